"""The parts of a run's page, each a piece of HTML made of a `Run`. All text is escaped."""

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from relax.config import options
from relax.config.schema import TrainerConfig
from relax.config.text import format_number, format_seconds, strip_control
from relax.monitor.curves import Series, bar, chart
from relax.monitor.run_files import TIME, Run, logged_columns
from relax.monitor.status import without_secrets

# What is drawn first, in this order: a title, and the metrics that belong in it.
CHARTS = (
    ("Scores of answers", r"(eval_(.+_)?)?(mean|min|max)_reward"),
    ("Reward", r"(eval_(.+_)?)?reward"),
    ("Reward functions", r"rewards/(?!chosen|rejected|margins|accuracies).+/mean"),
    ("Answers that pass", r"eval_(.+_)?pass@\d+"),
    ("Loss", r"(eval_(.+_)?)?loss"),
    ("Token accuracy", r"(eval_(.+_)?)?mean_token_accuracy"),
    ("Exact match", r"eval_(.+_)?exact_match"),
    ("Pairs judged right", r"(eval_(.+_)?)?(rewards/accuracies|accuracy)"),
    ("Rewards of chosen and rejected answers", r"rewards/(chosen|rejected|margins)"),
    ("Margin", r"(eval_(.+_)?)?margin"),
    ("KL to the reference", r"(eval_)?(objective/)?kl"),
    ("Value loss", r"(eval_)?(loss/value|value_loss|loss/value_avg|val/loss)"),
    ("Entropy", r"(eval_(.+_)?)?(policy/|objective/)?entropy"),
    ("Length of completions, tokens", r"(eval_(.+_)?)?completions/mean_(terminated_)?length"),
    ("Share of completions that are cut", r"completions/truncated_ratio"),
    ("Learning rate", r"learning_rate"),
    ("Gradient norm before clipping", r"grad_norm"),
    ("Tokens per second", r"tokens_per_second"),
    ("Seconds per update", rf"{TIME}.+"),
)
UNDRAWN = ("epoch", "elapsed_s", "num_tokens", "step_time")


def head(run: Run) -> str:
    """Name, state and the few numbers that one looks for first."""
    status = run.status
    phase = str(status.get("phase") or "unknown")
    kind = phase if phase in ("finished", "failed", "stopped") else "live"
    model = run.config.get("model", {}).get("model_name_or_path") or "the embedded model"
    data = run.config.get("data", {}).get("dataset_name") or "the embedded data"
    about = f"{model} on {data}" if run.config else ""
    return (
        f"<header><h1>{text(run.name)}</h1>"
        f'<span class="badge">{text(run.algorithm.upper() or "run")}</span>'
        f'<span class="badge {kind}">{text(phase)}</span><p>{text(about)}</p></header>'
        f'<dl class="facts">{"".join(_facts(run))}</dl>'
    )


def _facts(run: Run) -> Iterable[str]:
    step, total = run.status.get("step"), run.status.get("total_steps")
    if step is not None:
        yield _fact("Updates", f"{step:,}", f"of {total:,}" if total else "")
    elapsed = run.last("elapsed_s")
    if elapsed is not None:
        yield _fact("Time", format_seconds(elapsed))
    left = run.status.get("time_left_s")
    if left and run.status.get("phase") not in ("finished", "failed", "stopped"):
        yield _fact("Time left", format_seconds(left))
    for name, title in (
        ("loss", "Loss"),
        ("eval_loss", "Evaluation loss"),
        ("reward", "Reward"),
        ("eval_reward", "Evaluation reward"),
        ("eval_pass@1", "pass@1"),
        ("eval_rewards/accuracies", "Pairs judged right"),
        ("kl", "KL"),
    ):
        value = run.last(name)
        if value is not None and not (name == "loss" and run.last("reward") is not None):
            first = next(v for v in run.series[name][1] if math.isfinite(v))
            yield _fact(title, format_number(value), f"from {format_number(first)}")
    right = accuracy(run)
    if right is not None:
        yield _fact("Previews right", f"{right[1][-1]:.0%}", f"of {len(_last(run.previews))}")
    tokens = run.last("num_tokens")
    if tokens is not None:
        rate = run.last("tokens_per_second")
        yield _fact(
            "Tokens", format_number(tokens), f"{format_number(rate)} a second" if rate else ""
        )


def _fact(title: str, value: str, small: str = "") -> str:
    return f"<div><dt>{text(title)}</dt><dd>{text(value)} <small>{text(small)}</small></dd></div>"


def alerts(run: Run) -> str:
    """What went wrong, and what was warned of."""
    out = ""
    error = run.status.get("error")
    if error:
        out += f'<p class="alert error" role="alert"><b>Error</b>{text(error, 4000)}</p>'
    warnings = run.status.get("warnings") or []
    for warning in warnings if isinstance(warnings, list) else []:
        warning = warning if isinstance(warning, dict) else {"text": warning}
        at = f"step {warning['step']}" if warning.get("step") is not None else "warning"
        out += f'<p class="alert"><b>{text(at)}</b>{text(warning.get("text"), 1000)}</p>'
    return out


def curves(run: Run, points: int) -> str:
    """All metrics: those that tell most first, the others folded away."""
    series = {name: s for name, s in run.series.items() if name not in UNDRAWN}
    drawn, left = [], dict(series)
    for title, pattern in CHARTS:
        names = [name for name in left if re.fullmatch(pattern, name)]
        drawn.append(chart(title, [_series(n, left.pop(n), len(names) > 1) for n in names], points))
        if title == "Loss" and (right := accuracy(run)):
            drawn.append(chart("Previews that are right", [Series("right", *right, True)], points))
    others = []
    for name in sorted(left, key=lambda n: (n.removeprefix("eval_"), n)):
        if name.startswith("eval_") and name.removeprefix("eval_") in left:
            continue  # is drawn with the other
        pair = [n for n in (name, f"eval_{name}") if n in left]
        others.append(chart(name, [_series(n, left[n], True) for n in pair], min(points, 150)))
    main, more = "".join(drawn), "".join(others)
    out = f'<h2>Curves</h2><div class="charts">{main}</div>' if main else ""
    if more:
        count = sum(1 for one in others if one)
        word = "metric" if count == 1 else "metrics"
        out += f'<details><summary>{count} more {word}</summary><div class="charts">{more}</div>'
        out += "</details>"
    return out


def _series(name: str, values, named: bool) -> Series:
    plain = name.removeprefix("rewards/").removeprefix(TIME).removesuffix("/mean")
    return Series(plain if named else name, *values, points=name.startswith("eval_"))


def accuracy(run: Run) -> tuple[list[int], list[float]] | None:
    """The share of previews that are right, by step."""
    steps, shares = [], []
    for step, records in sorted(run.previews.items()):
        marks = [r["right"] for r in records if isinstance(r.get("right"), bool)]
        if marks:
            steps.append(step)
            shares.append(sum(marks) / len(marks))
    return (steps, shares) if steps else None


def times(run: Run) -> str:
    """Where the time of the run went."""
    seconds = run.status.get("seconds")
    if not isinstance(seconds, dict):
        return ""
    known = {str(n): float(s) for n, s in seconds.items() if isinstance(s, int | float) and s > 0}
    drawn = bar(dict(sorted(known.items(), key=lambda item: -item[1])))
    return f'<h2>Where the time went</h2><div class="card">{drawn}</div>' if drawn else ""


def previews(run: Run, steps: int, characters: int) -> str:
    """Held-out prompts: what is expected, and what the model said as it learned."""
    chosen = _spread(sorted(run.previews), steps)
    by_prompt: dict[tuple[str, str], list[tuple[int, dict]]] = {}
    for step in chosen:
        for record in run.previews[step]:
            key = (str(record.get("prompt")), str(record.get("expected")))
            by_prompt.setdefault(key, []).append((step, record))
    out = ""
    for i, records in enumerate(list(by_prompt.values())[:12]):
        _, last = records[-1]
        rows = "".join(
            f"<tr><th>step {step}</th><td>{text(r.get('completion'), characters)}</td>"
            f'<td class="n">{_mark(r.get("right"))}</td></tr>'
            for step, r in records
        )
        expected = last.get("expected")
        if expected is not None:
            rows = f"<tr><th>expected</th><td>{text(expected, characters)}</td><td></td></tr>{rows}"
        question = text(last.get("prompt"), min(characters, 300))
        is_open = " open" if i < 3 else ""
        out += (
            f"<details{is_open}><summary>{_mark(last.get('right'))} {question}</summary>"
            f'<div class="scroll texts answers"><table>{rows}</table></div></details>'
        )
    return f"<h2>Held-out prompts, answered as it learned</h2>{out}" if out else ""


def completions(run: Run, steps: int, characters: int) -> str:
    """Completions of rollouts with their rewards, from some steps."""
    out, chosen = "", _spread(sorted(run.completions), steps)
    for step in reversed(chosen):
        is_open = " open" if step == chosen[-1] else ""
        out += (
            f"<details{is_open}><summary>step {step}</summary><div class="
            f'"scroll texts">{_completions(run.completions[step][:4], characters)}</div></details>'
        )
    return f"<h2>Completions</h2>{out}" if out else ""


def _completions(records: Sequence[dict], characters: int) -> str:
    """A table: prompt, completion, rewards, advantage, what ended it, what functions logged."""
    given = [r["rewards"] if isinstance(r.get("rewards"), dict) else {} for r in records]
    functions = list(dict.fromkeys(name for rewards in given for name in rewards))[:12]
    functions = functions if len(functions) > 1 else []  # of one alone it is the reward
    logged = logged_columns(records)[:12]
    rows = "".join(
        f"<tr><td>{text(_prompt(r.get('prompt')), characters // 2)}</td>"
        f"<td>{text(r.get('completion'), characters)}</td>"
        + "".join(f'<td class="n">{_number(rewards.get(name))}</td>' for name in functions)
        + f'<td class="n">{_number(r.get("reward"))}</td>'
        f'<td class="n">{_number(r.get("advantage"))}</td><td>{text(r.get("finish"))}</td>'
        + "".join(f"<td>{text(plain(r.get(name)), characters // 2)}</td>" for name in logged)
        + "</tr>"
        for r, rewards in zip(records, given, strict=True)
    )
    numbers = "".join(f"<th class=n>{text(n)}</th>" for n in (*functions, "reward", "advantage"))
    others = "".join(f"<th>{text(name)}</th>" for name in ("ended by", *logged))
    return f"<table><tr><th>prompt</th><th>completion</th>{numbers}{others}</tr>{rows}</table>"


def data(run: Run, characters: int) -> str:
    """What became of the rows."""
    reports = run.data.get("reports")
    out = ""
    for name, report in (reports if isinstance(reports, dict) else {}).items():
        if isinstance(report, dict):
            out += f"<h3>{text(name)}</h3>{pairs(report, characters)}"
    return f"<section><h2>Data</h2>{out}</section>" if out else ""


def environment(run: Run) -> str:
    """On what the run ran."""
    found = run.status.get("environment")
    shown = dict(found) if isinstance(found, dict) else {}
    for name in ("started_at", "updated_at", "output_dir"):
        if run.status.get(name):
            shown[name] = run.status[name]
    return f"<section><h2>Environment</h2>{pairs(shown, 500)}</section>" if shown else ""


def configuration(run: Run, characters: int) -> str:
    """The options that differ from their defaults, and all of them by section, folded away."""
    defaults = default_values(run.algorithm)
    out, given = "", {}
    for section, fields in run.config.items():
        if isinstance(fields, dict):
            changed = {n: v for n, v in fields.items() if n in defaults and v != defaults[n]}
            given |= changed
            table = pairs(fields, characters, set(changed))
            out += f"<section><h3>{text(section)}</h3>{table}</section>"
    if not out:
        return ""
    first = pairs(given, characters) if given else ""
    return (
        f"<h2>Configuration</h2>{first}<details><summary>all options, those that are not the "
        f'default in bold</summary><div class="sections">{out}</div></details>'
    )


def default_values(algorithm: str) -> dict[str, Any]:
    """The defaults of an algorithm's options; {} of one that is not known."""
    classes = TrainerConfig.__subclasses__()
    for config_class in classes:
        classes += config_class.__subclasses__()
        if config_class.algorithm == algorithm:
            return {name: option.default for name, option in options(config_class).items()}
    return {}


def pairs(fields: dict[str, Any], characters: int, changed: Sequence[str] | set = ()) -> str:
    """A table of names and values."""
    rows = "".join(
        f"<tr{' class=changed' if name in changed else ''}><th>{text(name)}</th>"
        f"<td>{text(plain(value), characters)}</td></tr>"
        for name, value in fields.items()
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


def plain(value: Any) -> str:
    """A value of JSON in words."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {plain(inner)}" for name, inner in value.items()) or "–"
    if isinstance(value, list):
        return ", ".join(map(plain, value)) or "–"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def text(value: Any, most: int = 200) -> str:
    """Any value as text for HTML: shortened in the middle, escaped, without what is secret."""
    shown = "" if value is None else str(value)
    if len(shown) > most:
        shown = f"{shown[: most // 2]} … {shown[-most // 2 :]}"
    return escape(without_secrets(strip_control(shown)))


def _mark(right: Any) -> str:
    if not isinstance(right, bool):
        return ""
    return '<b class="right">✓</b>' if right else '<b class="wrong">✗</b>'


def _number(value: Any) -> str:
    return (
        format_number(value)
        if isinstance(value, int | float) and not isinstance(value, bool)
        else "–"
    )


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        return str(prompt[-1].get("content", ""))
    return str(prompt)


def _spread(steps: list[int], most: int) -> list[int]:
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _last(by_step: dict[int, list[dict]]) -> list[dict]:
    return by_step[max(by_step)] if by_step else []
