"""The report page and the live view: nothing foreign in them, whatever a run has written."""

import io
import json
import math
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from relax.config import DPOConfig, GRPOConfig, SFTConfig
from relax.errors import DataError
from relax.monitor import TrainingStatusWriter, read_status, write_comparison, write_report
from relax.monitor.__main__ import main
from relax.monitor.curves import Series, chart, downsample, limits
from relax.monitor.page import MOST_BYTES
from relax.monitor.tail import Tail
from relax.monitor.view import phase_of, view

ROOT = Path(__file__).parents[1]
EVIL = "</script><img src=x onerror=alert(1)>\"'&{[bold]}"


def write_run(directory, records, *, config=None, phase="finished", **status) -> Path:
    """A directory as a run leaves it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text((config or SFTConfig()).to_json())
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(lines)
    writer = TrainingStatusWriter(directory / "status.json")
    writer.update(phase=phase, algorithm=(config or SFTConfig()).algorithm, **status)
    return directory


def write_texts(directory, folder, step, records) -> None:
    (directory / folder).mkdir(exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / folder / f"step_{step:06d}.jsonl").write_text(lines)


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; tags must nest."""

    VOID = {"meta", "br", "img", "input", "link"}

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page_of(directory) -> tuple[str, Page]:
    text = write_report(directory).read_text(encoding="utf-8")
    return text, Page(text)


# The page.


def sft_records(count, every=1):
    return [
        {"step": i * every, "epoch": i / count, "loss": 2.0 / i, "learning_rate": 1e-3,
         "grad_norm": 1.0, "elapsed_s": float(i), "num_tokens": 100 * i}
        for i in range(1, count + 1)
    ]  # fmt: skip


RUNS = {
    "sft": (SFTConfig(), sft_records(3) + [{"step": 3, "eval_loss": 0.9}], ["Loss", "0.9"]),
    "dpo": (
        DPOConfig(),
        [{"step": s, "loss": 0.69, "rewards/chosen": 0.5, "rewards/rejected": -0.25,
          "rewards/accuracies": 0.75} for s in (1, 2)],
        ["Rewards of chosen and rejected completions", "Pairs ranked correctly"],
    ),
    "grpo": (
        GRPOConfig(),
        [{"step": s, "loss": 0.0, "reward": 0.25 * s, "kl": 0.1, "completions/mean_length": 4.0,
          "rewards/f/mean": 1.0, "time/rollout": 0.5, "time/update": 0.25} for s in (1, 2)],
        ["Reward", "KL to the reference", "Length of completions", "Seconds per update", "rollout"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("algorithm", RUNS)
def test_the_page_draws_what_each_algorithm_logs(tmp_path, algorithm):
    config, records, expected = RUNS[algorithm]
    _, page = page_of(write_run(tmp_path / "run", records, config=config))
    for words in (*expected, algorithm.upper(), "finished", "Configuration", "learning_rate"):
        assert words in page.words


def test_the_page_needs_nothing_from_elsewhere_and_lets_no_other_script_run(tmp_path):
    text, page = page_of(write_run(tmp_path / "run", sft_records(5)))
    assert not set(page.tags) & {"link", "img", "iframe", "object", "embed", "base", "form"}
    assert page.tags.count("script") == 1
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "srcset"} and not any(n.startswith("on") for n in names)
    policy = next(value for name, value in page.attributes if name == "content")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert "@import" not in text and "url(" not in text
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}


def test_what_a_run_has_written_is_text_wherever_it_stands(tmp_path):
    run = write_run(
        tmp_path / "run<b>",
        [{"step": 1, "loss": 1.0, f"eval_{EVIL}": 2.0, EVIL: 1.0}],
        config=SFTConfig().replace(system_prompt=EVIL, dataset_name=EVIL),
        phase=EVIL,
        error=EVIL,
        environment={EVIL: EVIL},
        seconds={EVIL: 3.0},
    )
    record = {"prompt": EVIL, "expected": EVIL, "completion": EVIL, "right": False}
    write_texts(run, "samples", 1, [record])
    record = {"prompt": EVIL, "completion": EVIL, "finish": EVIL, EVIL: {EVIL: [EVIL]}}
    write_texts(run, "completions", 1, [record | {"rewards": {EVIL: 1.0, f"2{EVIL}": EVIL}}])
    (run / "data.json").write_text(json.dumps({"reports": {EVIL: {EVIL: [EVIL]}}}))
    text, page = page_of(run)
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert text.count("</script>") == 1
    assert page.words.count("onerror=alert(1)") >= 12


def test_curves_survive_one_point_and_numbers_that_are_none(tmp_path):
    for name, values in {
        "one": [1.5],
        "none": [None, None],
        "some": [None, 1.0, None, 3.0],
        "same": [2.0, 2.0, 2.0],
        "huge": [1e300, -1e300],
        "tiny": [1e-300, 2e-300],
    }.items():
        records = [{"step": i, "loss": v} for i, v in enumerate(values, 1)]
        text, _ = page_of(write_run(tmp_path / name, records))
        numbers = "".join(re.findall(r'(?:d|data-v|[xy]|c[xy])="([^"]*)"', text))
        assert set(numbers) <= set("0123456789.,+-e MHL"), name
        assert ('aria-label="Loss"' in text) == (name not in ("none", "one"))


def test_what_was_measured_once_is_a_number_without_a_curve_and_comes_from_nothing(tmp_path):
    records = [{"step": 0, "eval_loss": 2.5}, *sft_records(4), {"step": 4, "grad_std": 0.25}]
    text, page = page_of(write_run(tmp_path / "run", records))
    assert text.count("<svg") == 3  # loss, learning rate, gradient norm
    assert "0.25 at step 4" in page.words
    assert "Evaluation loss 2.5" in page.words and "from 2.5" not in page.words
    assert "Loss 0.5 from 2" in page.words


def test_values_before_and_after_training_are_both_shown(tmp_path):
    results = {"exact_match_before": 0.125, "exact_match": 0.875, "eval_loss": 0.5}
    _, page = page_of(write_run(tmp_path / "run", sft_records(4), results=results))
    assert "Exact match 0.875 from 0.125 before training" in page.words
    records = [{"step": 0, "eval_loss": 2.5}, *sft_records(4), {"step": 4, "eval_loss": 0.5}]
    _, page = page_of(write_run(tmp_path / "other", records))
    assert "Evaluation loss 0.5 from 2.5" in page.words


def test_a_hundred_thousand_points_and_many_texts_make_a_page_below_two_megabytes(tmp_path):
    def record(step):
        values = {f"metric_{m}": math.sin(step / 50 + m) for m in range(12)}
        return {"step": step, "loss": 1 / step, **values}

    run = write_run(tmp_path / "run", [record(step) for step in range(1, 100_001, 4)])
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(f'{{"step": {s}, "grad_norm": 1.0}}\n' for s in range(100_000))
    for step in range(30):
        record = {"prompt": "p" * 5000, "expected": "e", "completion": "é<" * 20_000}
        write_texts(run, "samples", step, [dict(record, prompt=f"{i}") for i in range(40)])
    assert write_report(run).stat().st_size < MOST_BYTES


def test_thinning_keeps_the_extremes_and_the_gaps():
    xs, ys = list(range(1000)), [0.0] * 1000
    ys[333], ys[777] = 5.0, -7.0
    ys[500:600] = [math.nan] * 100
    few_x, few_y = downsample(xs, ys, 40)
    assert len(few_x) <= 60 and few_x == sorted(few_x)
    assert (333, 5.0) in zip(few_x, few_y, strict=True)
    assert (777, -7.0) in zip(few_x, few_y, strict=True)
    assert any(math.isnan(y) and 500 <= x < 600 for x, y in zip(few_x, few_y, strict=True))


def test_a_spike_does_not_flatten_the_curve_and_is_told():
    ys = [1.0 + i % 5 / 10 for i in range(100)]
    ys[3] = 1000.0
    low, high = limits([Series("loss", range(100), ys)])
    assert low == 0.0 or low > 0.8
    assert high < 2
    assert "1 beyond the axis" in chart("Loss", [Series("loss", range(100), ys)])


def test_the_points_of_a_curve_lie_where_their_values_are():
    """The largest value is above the smallest, and steps go from left to right, to scale."""
    text = chart("t", [Series("s", [0, 10, 40], [1.0, 3.0, 1.0])])
    path = re.search(r'class="line" d="([^"]+)"', text)[1]
    points = [tuple(map(float, p.split())) for p in re.split("[ML]", path)[1:]]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert (x1 - x0) * 3 == pytest.approx(x2 - x1, abs=0.3)
    assert y0 == y2 and y1 < y0


def test_failure_warnings_previews_and_completions_are_on_the_page(tmp_path):
    run = write_run(
        tmp_path / "run",
        sft_records(2),
        phase="failed",
        error="the disk is full",
        warnings=[{"step": 4, "text": "the gradient norm jumped"}],
    )
    for step, said in ((1, "7"), (2, "54")):
        right = said == "54"
        record = {"prompt": "53+1=", "expected": "54", "completion": said, "right": right}
        write_texts(run, "samples", step, [record])
    _, page = page_of(run)
    for words in ("failed", "the disk is full", "step 4 the gradient norm jumped", "53+1=",
                  "expected 54", "step 1 7 ✗", "step 2 54 ✓", "Previews right 100%"):  # fmt: skip
        assert words in page.words


def test_completions_are_shown_with_all_rewards_and_what_functions_logged(tmp_path):
    run = write_run(tmp_path / "run", sft_records(1), config=GRPOConfig())
    record = {
        "prompt": "2+2=",
        "completion": "4",
        "finish": "eos",
        "tokens": 2,
        "reward": 1.5,
        "rewards": {"right": 1.0, "short": 0.5},
        "advantage": -0.25,
        "read_as": "four",
    }
    write_texts(run, "completions", 1, [record, record | {"rewards": {"right": None}}])
    words = page_of(run)[1].words
    assert "prompt completion right short reward advantage ended by read_as" in words
    assert "2+2= 4 1 0.5 1.5 -0.25 eos four 2+2= 4 – – 1.5 -0.25 eos four" in words


def test_no_secret_is_on_the_page_or_in_the_status(tmp_path):
    config = SFTConfig().replace(dataset_name="https://me:canary-1@host/rows.jsonl")
    environment = {"command": "run_sft.py --x hf_canary2canary2canary2"}
    run = write_run(tmp_path / "run", [], config=config, environment=environment)
    text, _ = page_of(run)
    assert "canary" not in text + (run / "status.json").read_text()


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="must be the output_dir of a run"):
        write_report(tmp_path)


def test_a_comparison_lays_curves_over_each_other_and_tells_options_apart(tmp_path):
    one = write_run(tmp_path / "a" / "run", sft_records(3))
    config = SFTConfig().replace(learning_rate=0.5)
    two = write_run(tmp_path / "b" / "run", sft_records(5), config=config)
    page = Page(write_comparison([one, two], tmp_path / "c.html").read_text())
    assert "run (1) 0.6667 0.6667 … 2" in page.words  # the last loss, the least and the largest
    assert "run (2) 0.4 0.4 … 2" in page.words
    assert "learning_rate 2e-05 0.5" in page.words.split("Options that differ")[1]
    assert "weight_decay" not in page.words


# The status file and the live view.


def test_a_reader_never_sees_half_a_status(tmp_path):
    writer = TrainingStatusWriter(tmp_path / "status" / "training_status.json", every_s=0)
    for step in range(50):
        writer.update(step=step, loss=float("nan"), text="é" * step * 100)
        assert read_status(writer.path)["step"] == step
    found = read_status(writer.path)
    assert found["loss"] is None and found["pid"] == os.getpid()
    assert [p.name for p in writer.path.parent.iterdir()] == ["training_status.json"]


def test_a_status_is_written_at_most_once_a_while_but_at_once_for_a_new_phase(tmp_path):
    writer = TrainingStatusWriter(tmp_path / "s.json", every_s=1000)
    writer.update(phase="training", step=1)
    writer.update(step=2)
    assert read_status(writer.path)["step"] == 1
    writer.update(phase="evaluating")
    assert read_status(writer.path)["step"] == 2


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    writer = TrainingStatusWriter(tmp_path / "file" / "status.json")
    writer.update(force=True, step=1)
    assert writer.problem


def shown(status, series=None) -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(view("run", status, series or {}))
    return console.file.getvalue()


def test_the_view_shows_where_a_run_is_without_taking_texts_for_markup(tmp_path):
    writer = TrainingStatusWriter(tmp_path / "s.json")
    said = "\x1b[2J3[/red]"  # would clear the screen
    preview = {"prompt": "[bold]1+1=", "expected": "2", "completion": said, "right": False}
    writer.update(
        phase="training", step=40, total_steps=100, epoch=1.5, time_left_s=75.0,
        last_checkpoint={"step": 30}, last_preview=preview,
    )  # fmt: skip
    writer.warn("[link]careful")
    text = shown(read_status(writer.path), {"loss": [2.0, 1.0], "grad_norm": [math.nan]})
    for words in ("training", "step 40 of 100", "epoch 1.50", "75 s left", "saved at step 30", "█▁",
                  "[bold]1+1=", "\ufffd[2J3[/red]  wrong", "! [link]careful",
                  "not finite"):  # fmt: skip
        assert words in text


def test_a_killed_run_is_told_from_one_that_goes_on(tmp_path):
    writer = TrainingStatusWriter(tmp_path / "s.json")
    writer.update(phase="training")
    status = read_status(writer.path)
    assert phase_of(status) == "training"
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert phase_of(status | {"pid": child.pid}) == "killed"
    assert phase_of(status | {"pid": child.pid, "host": "another"}) == "training"
    assert phase_of(status | {"pid": child.pid, "phase": "failed"}) == "failed"
    assert phase_of(None) == "not begun" and "waiting" in shown(None)


def test_the_tail_takes_whole_lines_once_and_begins_again_when_a_file_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == {}
    path.write_text('{"step": 1, "loss": 4.0}\n{"step": 2, "lo')
    assert tail.read()["loss"] == [4.0]
    with open(path, "a") as file:
        file.write('ss": 3.0}\nno record\n')
    assert tail.read()["loss"] == [4.0, 3.0]
    path.write_text('{"step": 1, "loss": 5.0}\n')
    assert tail.read()["loss"] == [5.0]


def test_the_monitor_runs_without_jax_and_ends_as_the_run_did(tmp_path, capsys):
    good, bad = write_run(tmp_path / "a", sft_records(2)), tmp_path / "b"
    write_run(bad, [], phase="failed", error="it broke")
    code = (
        "import sys\nfrom relax.monitor.__main__ import main\n"
        f"code = main([{str(bad)!r}])\n"
        "print(code, 'jax' in sys.modules, 'numpy' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "it broke" in ran.stdout and ran.stdout.endswith("1 False False\n")
    assert main([str(good), "--once"]) == 0
    assert main(["--compare", str(good), str(bad), "-o", str(tmp_path / "c.html")]) == 0
    assert main([str(good), "-o", str(tmp_path / "r.html")]) == 0
    assert main([str(tmp_path), "-o", str(tmp_path / "x.html")]) == 2
    assert (tmp_path / "c.html").exists() and (tmp_path / "r.html").exists()
    for wrong in ([], ["--compare", str(good)], [str(tmp_path / "no"), "--once"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
    late = threading.Timer(0.2, write_run, (tmp_path / "late", sft_records(1)))
    late.start()  # what has not begun is waited for
    assert main([str(tmp_path / "late"), "--interval", "0.05"]) == 0
    late.join()
    capsys.readouterr()
