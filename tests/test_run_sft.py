"""`python run_sft.py` as its user meets it: what it prints, what it leaves, and that it repeats."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from metric_names import undocumented
from runs import (
    SCRIPT,
    TIMEOUT_S,
    additions,
    call,
    environment,
    finish,
    flags,
    metrics,
    model_bytes,
    start,
    write_rows,
)

from relax.models import load_pretrained

SHORT = ("--max_steps=30", "--logging_steps=10", "--eval_strategy=steps", "--eval_steps=15")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> tuple[str, Path]:
    """The run that needs no files, in short: what it printed and its directory."""
    output_dir = tmp_path_factory.mktemp("embedded") / "run"
    return finish(*SHORT, f"--output_dir={output_dir}"), output_dir


def test_the_embedded_run_prints_what_a_person_wants_to_know(embedded):
    """The data, the plan, the compilation, plain progress lines, the outcome and the paths."""
    printed, output_dir = embedded
    for words in (
        "rows          9,500 read, 9,500 trained on",
        "rows          500 read",
        "=<assistant>«",  # one example, its trained tokens marked
        "training 820,736 parameters for 30 updates of 128 rows (128 x 1) on cpu, float32",
        "held-out exact match before training: 0.0%",
        "compiling the train step for batches of 128 x 12 ...",
        "compiled for 128 x 12 and made one step in ",
        "step 30/30  epoch 0.40  evaluation loss ",
        "held-out exact match after training: ",
        "done in ",
        str(output_dir / "final"),
        str(output_dir / "metrics.jsonl"),
        str(output_dir / "checkpoints"),
    ):
        assert words in printed, (words, printed)
    progress = re.findall(
        r"^step (\d+)/30  epoch 0\.\d\d  loss \d\.\d{4}  accuracy \S+  lr \S+  grad norm \S+  "
        r"[\d,]+ tokens/s$",
        printed,
        re.MULTILINE,
    )
    assert progress == ["10", "20", "30"]
    assert "\x1b" not in printed  # no colours and no bar where there is no terminal


def test_the_embedded_run_logs_the_promised_metrics_and_its_loss_falls(embedded):
    records = [json.loads(li) for li in (embedded[1] / "metrics.jsonl").read_text().splitlines()]
    assert not undocumented(records)
    training = [r for r in records if "loss" in r]
    evaluations = [r["eval_loss"] for r in records if "eval_loss" in r]
    fields = "loss mean_token_accuracy entropy grad_norm learning_rate num_tokens".split()
    for record in training:
        assert set(fields) | {"step", "epoch", "tokens_per_second"} <= set(record)
    assert [r["step"] for r in training] == [10, 20, 30]
    assert training[0]["loss"] > training[-1]["loss"] + 1
    assert len(evaluations) == 2 and evaluations[1] < evaluations[0] - 0.1


def test_transformers_loads_what_the_run_leaves_and_computes_the_same_logits(embedded):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory = embedded[1] / "final"
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    chat = [{"role": "user", "content": "27+45="}, {"role": "assistant", "content": "72"}]
    ids = np.array([tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]])
    model, params = load_pretrained(directory)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(ids)).logits.numpy()
    ours = model.apply({"params": params}, ids.astype(np.int32))
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-4)


def test_the_saved_configuration_repeats_the_run_byte_for_byte(embedded, tmp_path, capsys):
    """Also in another process, and from a compiled program that was read from a cache."""
    config = embedded[1] / "config.json"
    assert call(f"--config={config}", f"--output_dir={tmp_path / 'again'}") == 0
    assert model_bytes(tmp_path / "again") == model_bytes(embedded[1])
    assert metrics(tmp_path / "again") == metrics(embedded[1])


def test_a_misspelt_flag_is_refused_with_a_suggestion(tmp_path):
    child = start("--learnin_rate=1e-4", f"--output_dir={tmp_path / 'run'}")
    assert child.end() == 2
    assert "Did you mean --learning_rate" in child.stderr and child.stdout == ""
    assert not (tmp_path / "run").exists()


def on_terminal(*args: str) -> str:
    """What `python run_sft.py ...` writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    env = environment() | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    env.pop("NO_COLOR", None)
    command = [sys.executable, str(SCRIPT), *args]
    written = b""
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        try:
            while block := os.read(ours, 1 << 16):
                written += block
        except OSError:
            pass  # Linux says so when the other end is closed
        assert process.wait(TIMEOUT_S) == 0, written.decode()
    os.close(ours)
    return written.decode()


def test_a_terminal_shows_a_line_per_window_and_a_bar_with_step_loss_speed_and_time_left(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", additions(24))
    job = {"dataset_name": rows, "num_train_epochs": 4, "per_device_train_batch_size": 2}
    job |= {"logging_steps": 2, "pad_to_multiple_of": 16, "output_dir": tmp_path / "run"}
    shown = on_terminal(*flags(**job))
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    bars = re.findall(r"step \d+/48 [━╸╺]+ loss \d\.\d{4}  [\d,]+ tokens/s +[\d.]+ s left", plain)
    assert bars and max(map(len, bars)) <= 80
    logged = re.findall(r"step \d+/48  epoch \d\.\d\d  loss \d\.\d{4}[^\r\n]*", plain)
    assert len(logged) == 24 and max(map(len, logged)) <= 80
    assert "\x1b[?25l" in shown and shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert "trained tokens in green" in plain


# A run with everything watched. One lookup is let pass: transformers imports torch where it is
# installed, as it is for these tests, and torch asks ldconfig where a library of CUDA lies.
WATCHED = """
import sys
seen = []
def watch(event, args):
    if event in ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "subprocess.Popen",
                 "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"):
        if "ldconfig" in str(args[0]):
            return
        seen.append((event, str(args)[:200]))
    if event == "open" and MODEL in str(args[0]) and str(args[0]).endswith(".py"):
        seen.append((event, str(args[0])))
MODEL = sys.argv[1]
sys.addaudithook(watch)
from relax.config import SFTConfig
from relax.config.cli import run
from run_sft import main
run(SFTConfig, main, sys.argv[2:])
print("seen:", seen)
"""


def test_a_local_run_unpickles_nothing_opens_no_socket_and_starts_no_process(embedded, tmp_path):
    """On a model directory that brings code of its own, which must not even be read."""
    model_dir = tmp_path / "model"
    shutil.copytree(embedded[1] / "final", model_dir)
    (model_dir / "trap.py").write_text("raise SystemExit('executed')\n")
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "trap.Trap"]}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    job = flags(
        model_name_or_path=model_dir,
        dataset_name=write_rows(tmp_path / "rows.jsonl", additions(4)),
        output_dir=tmp_path / "run",
        max_steps=2,
        save_steps=1,
    )
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(model_dir), *job],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "seen: []"
