"""Style sheet of a report, and the script that shows values under the pointer."""

import base64
import hashlib

STYLE = """
:root{color-scheme:light dark;--bg:#f6f6f4;--card:#fff;--ink:#1d2126;--dim:#687078;--line:#e4e4e0;
--soft:#f0f0ec;--good:#1a7f4b;--bad:#c2362f;--warn:#96650a;--warnbg:#fdf4df;--accent:#2f6fde;
--c0:#2f6fde;--c1:#e0782a;--c2:#1d9a6c;--c3:#b0479b;--c4:#c9a40f;--c5:#d1495b;--c6:#4aa5b8;
--c7:#7a68d8}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1c2024;--ink:#e8eaec;--dim:#98a1aa;
--line:#30363c;--soft:#252a2f;--good:#52c98b;--bad:#f0766e;--warn:#e7b95a;--warnbg:#2d2717;
--accent:#7aa8ff;--c0:#7aa8ff;--c1:#f59f5e;--c2:#4fc795;--c3:#d884c6;--c4:#e2c34f;--c5:#ee8090;
--c6:#76c7d8;--c7:#a99bf2}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1240px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;line-height:1.25;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:18px;margin:36px 0 12px}
h3{font-size:15px;margin:16px 0 6px}
header{display:flex;flex-wrap:wrap;gap:6px 14px;align-items:center}
header p{flex-basis:100%;margin:0;color:var(--dim)}
.badge{font-size:13px;font-weight:600;padding:2px 11px;border-radius:99px;background:var(--soft)}
.badge.finished{color:var(--good)}.badge.failed{color:#fff;background:var(--bad)}
.badge.stopped{color:var(--warn)}.badge.live{color:var(--accent)}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(148px,1fr));gap:10px;
margin:20px 0 4px;padding:0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:10px 14px;min-width:0}
.facts dt{color:var(--dim);font-size:12.5px}
.facts dd{margin:1px 0 0;font-size:19px;font-weight:600;overflow-wrap:anywhere}
.facts dd small{display:block;font-size:12.5px;font-weight:400;color:var(--dim)}
.alert{border-left:4px solid var(--warn);background:var(--warnbg);border-radius:6px;
padding:9px 14px;margin:10px 0;overflow-wrap:anywhere;white-space:pre-wrap}
.alert.error{border-color:var(--bad);background:var(--card)}
.alert b{margin-right:6px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,390px),1fr));gap:14px}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;margin:0;
padding:14px 16px 12px;min-width:0}
figcaption{font-weight:600;font-size:14px;margin-bottom:4px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg.bar{height:22px;margin:2px 0 8px}.bar rect{fill:var(--c)}
.grid{stroke:var(--line);fill:none}.axis{stroke:var(--dim);fill:none;opacity:.6}
.tick{font-size:16px;fill:var(--dim);text-anchor:end}.tick.x{text-anchor:middle}
.s path{fill:none;stroke:var(--c);stroke-linejoin:round;stroke-linecap:round}
.s .line{stroke-width:2.2}.s .raw{stroke-width:1;opacity:.32}.s circle{fill:var(--c)}
.cursor path{stroke:var(--dim);stroke-dasharray:3 3;fill:none}
.cursor text{font-size:13px;fill:var(--ink);paint-order:stroke;stroke:var(--card);
stroke-width:5px;stroke-linejoin:round;font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:1px 16px;font-size:13px;color:var(--dim)}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;background:var(--c);
margin-right:6px;vertical-align:-1px}
.legend b{color:var(--ink)}.legend small{opacity:.85}
.legend span{overflow-wrap:anywhere;min-width:0}
.note{margin:4px 0 0;font-size:12.5px;color:var(--dim)}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:12px}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{text-align:left;vertical-align:top;padding:6px 12px;border-top:1px solid var(--line)}
tr:first-child>th,tr:first-child>td{border-top:0}
th{color:var(--dim);font-weight:500;white-space:nowrap}
td{overflow-wrap:anywhere;white-space:pre-wrap}
td.n,th.n{text-align:right;white-space:nowrap}
.texts td{font-family:ui-monospace,"SF Mono",Menlo,"DejaVu Sans Mono",monospace;font-size:12.5px}
.answers th:first-child{width:1%}
.texts td:first-child:not(.n){min-width:9em}
.changed td{font-weight:600}
.right{color:var(--good)}.wrong{color:var(--bad)}
details{margin:10px 0}summary{cursor:pointer;color:var(--dim);padding:3px 0}
details[open]>summary{margin-bottom:8px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:14px;
align-items:start}
.sections{columns:2 400px;column-gap:14px}.sections>section{break-inside:avoid;padding-bottom:6px}
.sections h3{margin-top:6px}
.two>section{min-width:0}.two h2{margin-top:24px}
footer{margin-top:44px;color:var(--dim);font-size:12.5px}
@media(max-width:520px){main{padding:18px 12px 40px}h1{font-size:21px}.facts{
grid-template-columns:repeat(2,minmax(0,1fr))}.facts dd{font-size:17px}.tick{font-size:17px}}
@media print{body{background:#fff}.card,.facts div{break-inside:avoid}}
"""

# Shows the values under the pointer, from the numbers of the curves.
SCRIPT = """
"use strict";
const NS = "http://www.w3.org/2000/svg", L = 66, R = 544, T = 12, B = 218;
const read = g => g.dataset.v.split(" ").filter(Boolean).map(p => p.split(",").map(Number));
const make = (name, attributes, text) => {
  const node = document.createElementNS(NS, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  return node;
};
for (const svg of document.querySelectorAll("svg[data-x]")) {
  const [x0, x1] = svg.dataset.x.split(" ").map(Number);
  const cursor = svg.querySelector(".cursor");
  let series = null;
  svg.addEventListener("pointermove", event => {
    series = series || [...svg.querySelectorAll(".s")].map(g => [g.dataset.n, read(g)]);
    const box = svg.getBoundingClientRect();
    const place = (event.clientX - box.left) / box.width * 560;
    const wanted = x0 + (place - L) / (R - L) * (x1 - x0);
    const near = points => points.reduce((a, b) =>
      Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a);
    const found = series.filter(s => s[1].length).map(s => [s[0], ...near(s[1])]);
    if (!found.length) return;
    const at = found.reduce((a, b) => Math.abs(b[1] - wanted) < Math.abs(a[1] - wanted) ? b : a)[1];
    const x = L + (at - x0) / (x1 - x0) * (R - L), left = x > 300;
    const side = {x: left ? x - 9 : x + 9, "text-anchor": left ? "end" : "start"};
    cursor.replaceChildren(make("path", {d: `M${x} ${T}V${B}`}));
    const lines = ["step " + at, ...found.slice(0, 9).map(f => f[0] + "  " + f[2])];
    lines.forEach((text, i) => cursor.append(make("text", {...side, y: T + 12 + 17 * i}, text)));
  });
  svg.addEventListener("pointerleave", () => cursor.replaceChildren());
}
"""


def policy() -> str:
    """The content security policy of a page: only its own style and script, no network."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
