"""Sections of a run's page as HTML. All text is escaped."""

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from relax.config import options
from relax.config.schema import TrainerConfig
from relax.config.text import format_number, format_seconds, shorten
from relax.monitor.curves import Series, bar, chart
from relax.monitor.run_files import TIME, Run, logged_columns
from relax.monitor.status import without_secrets

# Charts shown first, in this order: title and pattern of the metrics.
CHARTS = (
    ("Scores", r"(eval_(.+_)?)?(mean|min|max)_reward"),
    ("Reward", r"(eval_(.+_)?)?reward"),
    ("Reward functions", r"rewards/(?!chosen|rejected|margins|accuracies).+/mean"),
    ("Completions that pass", r"eval_(.+_)?pass@\d+"),
    ("Loss", r"(eval_(.+_)?)?loss"),
    ("Token accuracy", r"(eval_(.+_)?)?mean_token_accuracy"),
    ("Tasks", r"eval_tasks/.+/(acc|acc_norm|exact_match.*|f1|reasoning_gym)"),
    ("Exact match", r"eval_(.+_)?exact_match"),
    ("Pairs ranked correctly", r"(eval_(.+_)?)?(rewards/accuracies|accuracy)"),
    ("Rewards of chosen and rejected completions", r"rewards/(chosen|rejected|margins)"),
    ("Margin", r"(eval_(.+_)?)?margin"),
    ("KL to the reference", r"(eval_)?(objective/)?kl"),
    ("Value loss", r"(eval_)?(loss/value|value_loss|loss/value_avg|val/loss)"),
    ("Entropy", r"(eval_(.+_)?)?entropy"),
    ("Length of completions, tokens", r"(eval_(.+_)?)?completions/mean_(terminated_)?length"),
    ("Share of completions that are truncated", r"completions/clipped_ratio"),
    ("Learning rate", r"learning_rate"),
    ("Gradient norm before clipping", r"grad_norm"),
    ("Tokens per second", r"tokens_per_second"),
    ("Seconds per update", rf"{TIME}.+"),
)
UNDRAWN = ("epoch", "elapsed_s", "num_tokens", "step_time")


def head(run: Run) -> str:
    """The header: name, phase and most important numbers."""
    status = run.status
    phase = str(status.get("phase") or "unknown")
    kind = phase if phase in ("finished", "failed", "stopped") else "live"
    model = run.config.get("model", {}).get("model_name_or_path") or "the demo model"
    data = run.config.get("data", {}).get("dataset_name") or "the demo data"
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
        ("eval_rewards/accuracies", "Pairs ranked correctly"),
        ("kl", "KL"),
    ):
        value = run.last(name)
        if value is not None and not (name == "loss" and run.last("reward") is not None):
            yield _fact(title, format_number(value), _from(run.series[name][1]))
    for name, (before, after) in before_and_after(run).items():
        small = "" if before is None else f"from {format_number(before)} before training"
        yield _fact(name.replace("_", " ").capitalize(), format_number(after), small)
    right = accuracy(run)
    if right is not None:
        share, count = right[1][-1], len(_last(run.previews))
        yield _fact("Previews right", f"{share:.0%}", f"of {count}")
    tokens = run.last("num_tokens")
    if tokens is not None:
        rate = run.last("tokens_per_second")
        yield _fact(
            "Tokens", format_number(tokens), f"{format_number(rate)} a second" if rate else ""
        )


def before_and_after(run: Run) -> dict[str, tuple[float | None, float]]:
    """Results measured once, by name: values before (None if not measured) and after training."""
    results = run.status.get("results")
    numbers = {
        str(name): value
        for name, value in (results if isinstance(results, dict) else {}).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return {
        name: (numbers.get(f"{name}_before"), value)
        for name, value in numbers.items()
        if not name.endswith("_before") and not name.startswith("eval_")
    }


def _from(values: Sequence[float]) -> str:
    """The first value, if there is a later one."""
    real = [v for v in values if math.isfinite(v)]
    return f"from {format_number(real[0])}" if len(real) > 1 else ""


def _fact(title: str, value: str, small: str = "") -> str:
    return f"<div><dt>{text(title)}</dt><dd>{text(value)} <small>{text(small)}</small></dd></div>"


def alerts(run: Run) -> str:
    """The error and the warnings of a run."""
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


def charts_of(run: Run) -> list[tuple[str, list[Series]]]:
    """The titles and curves of the most important charts that the run has."""
    left = {name: s for name, s in run.series.items() if name not in UNDRAWN}
    found = []
    for title, pattern in CHARTS:
        names = sorted(
            (name for name in left if re.fullmatch(pattern, name)),
            key=lambda name: name.startswith("eval_"),  # training gets the first colour
        )
        series = [_series(name, left.pop(name), len(names) > 1) for name in names]
        if any(s.num_finite() > 1 for s in series):
            found.append((title, series))
    return found


def curves(run: Run, points: int) -> str:
    """Charts of all metrics: the most important first, the others collapsed."""
    series = {name: s for name, s in run.series.items() if name not in UNDRAWN}
    drawn, left = [], dict(series)
    for title, pattern in CHARTS:
        names = [name for name in left if re.fullmatch(pattern, name)]
        names.sort(key=lambda name: name.startswith("eval_"))  # training gets the first colour
        drawn.append(chart(title, [_series(n, left.pop(n), len(names) > 1) for n in names], points))
        if title == "Loss" and (right := accuracy(run)):
            drawn.append(chart("Previews that are right", [Series("right", *right, True)], points))
    others = []
    for name in sorted(left, key=lambda n: (n.removeprefix("eval_"), n)):
        if name.startswith("eval_") and name.removeprefix("eval_") in left:
            continue  # already drawn
        pair = [n for n in (name, f"eval_{name}") if n in left]
        others.append(chart(name, [_series(n, left[n], True) for n in pair], min(points, 150)))
    main, more = "".join(drawn), "".join(others)
    out = f'<h2>Curves</h2><div class="charts">{main}</div>' if main else ""
    if once := _measured_once(series):
        out += f"<details><summary>{len(once)} metrics measured once</summary>"
        out += f"{pairs(once, 100)}</details>"
    if more:
        count = sum(1 for one in others if one)
        word = "metric" if count == 1 else "metrics"
        out += f'<details><summary>{count} more {word}</summary><div class="charts">{more}</div>'
        out += "</details>"
    return out


def _measured_once(series: dict[str, tuple[list[float], list[float]]]) -> dict[str, str]:
    """The value and step of each metric with a single value, which has no curve."""
    out = {}
    for name, (steps, values) in series.items():
        found = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
        if len(found) == 1:
            out[name] = f"{format_number(found[0][1])} at step {found[0][0]:g}"
    return out


def _series(name: str, values, named: bool) -> Series:
    plain = name.removesuffix("/mean").replace("completions/", "")
    plain = plain.removeprefix("rewards/").removeprefix(TIME)
    xs, ys = values
    return Series(plain if named else name, xs, ys, points=name.startswith("eval_"))


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
    """The seconds of each phase as one bar."""
    seconds = run.status.get("seconds")
    if not isinstance(seconds, dict):
        return ""
    known = {str(n): float(s) for n, s in seconds.items() if isinstance(s, int | float) and s > 0}
    drawn = bar(dict(sorted(known.items(), key=lambda item: -item[1])))
    return f'<h2>Where the time went</h2><div class="card">{drawn}</div>' if drawn else ""


def previews(run: Run, steps: int, characters: int) -> str:
    """Held-out prompts with expected completions and those of each evaluation."""
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
    return f"<h2>Completions of held-out prompts</h2>{out}" if out else ""


def completions(run: Run, steps: int, characters: int) -> str:
    """Completions of rollouts with their rewards, for some steps."""
    out, chosen = "", _spread(sorted(run.completions), steps)
    for step in reversed(chosen):
        is_open = " open" if step == chosen[-1] else ""
        out += (
            f"<details{is_open}><summary>step {step}</summary><div class="
            f'"scroll texts">{_completions(run.completions[step][:4], characters)}</div></details>'
        )
    return f"<h2>Completions of rollouts</h2>{out}" if out else ""


def _completions(records: Sequence[dict], characters: int) -> str:
    """A table: prompt, completion, rewards, advantage, finish reason, logged columns."""
    given: list[dict] = [
        r["rewards"] if isinstance(r.get("rewards"), dict) else {} for r in records
    ]
    functions = list(dict.fromkeys(name for rewards in given for name in rewards))[:12]
    functions = functions if len(functions) > 1 else []  # a single function equals the reward
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
    """The data report."""
    reports = run.data.get("reports")
    out = ""
    for name, report in (reports if isinstance(reports, dict) else {}).items():
        if isinstance(report, dict):
            out += f"<h3>{text(name)}</h3>{pairs(report, characters)}"
    return f"<section><h2>Data</h2>{out}</section>" if out else ""


def environment(run: Run) -> str:
    """Command, versions and devices of the run."""
    found = run.status.get("environment")
    shown = dict(found) if isinstance(found, dict) else {}
    for name in ("started_at", "updated_at", "output_dir"):
        if run.status.get(name):
            shown[name] = run.status[name]
    return f"<section><h2>Environment</h2>{pairs(shown, 500)}</section>" if shown else ""


def configuration(run: Run, characters: int) -> str:
    """Options that differ from their defaults, and all options by section, collapsed."""
    defaults = default_values(run.algorithm)
    out = ""
    given: dict[str, Any] = {}
    for section, fields in run.config.items():
        if isinstance(fields, dict):
            changed = {n: v for n, v in fields.items() if n in defaults and v != defaults[n]}
            given |= changed
            table = pairs(fields, characters, set(changed))
            out += f"<section><h3>{text(section)}</h3>{table}</section>"
    if not out:
        return ""
    first = pairs(given, characters) if given else "<p>All options have their default values.</p>"
    return (
        f"<h2>Configuration</h2>{first}<details><summary>all options, non-default ones in "
        f'bold</summary><div class="sections">{out}</div></details>'
    )


def default_values(algorithm: str) -> dict[str, Any]:
    """Default values of an algorithm's options; {} for an unknown algorithm."""
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
    """A JSON value as plain text."""
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
    """Any value as HTML text: shortened in the middle, escaped, without secrets."""
    return escape(shorten(without_secrets("" if value is None else str(value)), most))


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
