"""Reward functions run in workers that can be killed: every failure has a defined result."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from relax.errors import ConfigError, DataError, RewardError
from relax.rewards import RewardRunner
from relax.rewards.workers import client

FUNCTIONS = '''
import asyncio, ctypes, os, re, signal, subprocess, sys, time

def act(text):
    if text == "raise": raise ValueError("no such thing")
    if text == "leave": sys.exit(4)
    if text == "hang": time.sleep(100)
    if text == "regex": re.match("(a+)+$", "a" * 60 + "b")
    if text == "exit": os._exit(3)
    if text == "stop the parent":
        os.kill(os.getppid(), signal.SIGSTOP)
        time.sleep(100)
    if text == "stop": os.kill(os.getpid(), signal.SIGSTOP)
    if text == "segfault": ctypes.string_at(0)
    if text == "recurse": act(text)
    if text == "gigabyte": return bytes(2**30)
    if text == "tuple": return (1.0, 2.0)
    if text == "huge": return 10**400
    if text == "text": return "1.0"
    return float(text)  # nan and inf among them

def acts(completions, **kwargs):
    return [act(text) for text in completions]

def size(completions, **kwargs):
    """Depends on the whole batch, as a ranking does."""
    acts([text for text in completions if text == "raise"])
    return [len(completions)] * len(completions)

def alone(completions):
    if len(completions) > 1: raise ValueError("one at a time")
    return [1.0]

def returns(completions, what):
    import numpy
    results = {
        "short": [1.0], "scalar": 1.0, "none": None, "dict": {"r": 1}, "text": "1" * len(what),
        "numpy": numpy.array([0.5, True, 2]), "mixed": [None, True, 1],
    }
    return results[what[0]]

async def waits(completions):
    await asyncio.sleep(0.001)
    return [0.25] * len(completions)

def prints(completions, **kwargs):
    for _ in range(20): print("y" * 50_000)
    return [0.0] * len(completions)

def looks(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
    completions.clear()
    log_extra("names", [",".join(sorted(columns))] * len(prompts))
    log_extra("secret", ["A_SECRET" in os.environ, "KEPT_KEY" in os.environ])
    log_extra("jax", ["jax" in sys.modules] * len(prompts))
    log_metric("mean_length", sum(map(len, completion_ids)) / len(prompts))
    return [trainer_state.global_step + len(prompt) for prompt in prompts]

def logs_much(completions, log_extra):
    log_extra("text", [text * 70_000_000 for text in completions])
    return [1.0] * len(completions)

def looks_up(completions):
    return [os.getpid()] * len(completions)

def leaves_a_process(completions, then=("return",)):
    """In a session of its own, and with a parent that has ended."""
    code = "import os, sys, time; os.fork() and os._exit(0); os.setsid(); "
    code += "print(os.getpid(), os.getsid(0), file=open(sys.argv[1], 'w'), flush=True); "
    code += "time.sleep(100)"
    subprocess.run([sys.executable, "-c", code, completions[0]])
    while not os.path.exists(completions[0]) or not open(completions[0]).read().endswith("\\n"):
        time.sleep(0.01)
    if then[0] == "hang":
        time.sleep(100)
    return [1.0]

def pids(completions):
    with open(completions[0], "w") as file: print(os.getpid(), os.getppid(), file=file, flush=True)
    time.sleep(100)
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture(scope="module")
def make(file):
    """Makes runners of functions of the file; what two tests ask for alike is started once."""
    made = {}

    def make(*names, **options):
        key = (names, tuple(options.items()))
        if key not in made:
            functions = [f"{file}:{name}" for name in names]
            made[key] = RewardRunner(functions, **{"max_errors": 1.0} | options)
        return made[key]

    yield make
    for runner in made.values():
        runner.close()


@pytest.mark.parametrize(
    ("completion", "kind", "reason"),
    [
        ("raise", "raised", "raised ValueError: no such thing (*mine.py, line 5)"),
        ("leave", "raised", "raised SystemExit: 4"),
        ("recurse", "raised", "raised RecursionError"),
        ("hang", "hung", "did not return within 0.5 s and was killed"),
        ("stop", "hung", "did not return within 0.5 s and was killed"),
        ("stop the parent", "hung", "did not return within 0.5 s and was killed"),
        ("regex", "hung", "did not return within 0.5 s and was killed"),
        ("exit", "died", "ended its process with exit code 3"),
        ("segfault", "died", "ended its process by signal SIGSEGV"),
        ("nan", "result", "returned nan"),
        ("-inf", "result", "returned -inf"),
        ("huge", "result", "returned a huge number"),
        ("text", "result", "returned '1.0'"),
        ("tuple", "result", "returned (1.0, 2.0)"),
        ("gigabyte", "result", "(1073741824 bytes)"),
    ],
)
def test_a_bad_completion_fails_alone_with_a_message(make, completion, kind, reason):
    # Only what hangs meets a short limit: a busy machine makes others wait too.
    runner = make("acts", timeout_s=0.5) if kind == "hung" else make("acts")
    before = runner.tally.kinds[kind], runner.tally.failed["acts"]
    batch = runner.score(["first", "second", "third"], ["1.5", completion, "2.5"])
    np.testing.assert_array_equal(batch.total, [1.5, np.nan, 2.5])
    [failure] = batch.failures
    assert (failure.function, failure.index, failure.kind) == ("acts", 1, kind)
    for part in reason.split("*"):
        assert part.strip("(") in failure.reason
    assert "'second'" in str(failure) and repr(completion) in str(failure)
    assert len(failure.reason) < 1000
    assert (runner.tally.kinds[kind], runner.tally.failed["acts"]) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("short", "returned 1 rewards for 3 completions"),
        ("scalar", "returned 1.0 (a float), not a list of 3 rewards"),
        ("none", "returned None (a NoneType), not a list of 3 rewards"),
        ("dict", "returned {'r': 1} (a dict), not a list of 3 rewards"),
        ("text", "returned '111' (a str), not a list of 3 rewards"),
    ],
)
def test_what_is_no_list_of_rewards_is_never_broadcast(make, what, reason):
    batch = make("returns").score(["p"] * 3, ["c"] * 3, columns={"what": [what] * 3})
    assert np.isnan(batch.rewards).all() and np.isnan(batch.total).all()
    assert [f.reason for f in batch.failures] == [reason] * 3


def test_numbers_booleans_and_none_are_rewards(make):
    runner = make("returns")
    numbers = runner.score(["p"] * 3, ["c"] * 3, columns={"what": ["numpy"] * 3})
    np.testing.assert_array_equal(numbers.total, [0.5, 1, 2])
    mixed = runner.score(["p"] * 3, ["c"] * 3, columns={"what": ["mixed"] * 3})
    np.testing.assert_array_equal(mixed.total, [np.nan, 1, 1])
    assert not numbers.failures + mixed.failures


def test_a_function_of_the_whole_batch_is_asked_again_without_the_bad_completion(make):
    batch = make("size").score(["p"] * 4, ["1", "raise", "1", "1"])
    np.testing.assert_array_equal(batch.total, [3, np.nan, 3, 3])


def test_a_worker_that_dies_between_two_batches_costs_nothing(make):
    runner = make("looks_up")
    [[pid]] = runner.score(["p"], ["1"]).rewards.tolist()
    os.kill(int(pid), signal.SIGKILL)
    again = runner.score(["p", "p"], ["1", "2"])
    assert not again.failures and set(again.total) != {pid}


def test_what_only_works_alone_fails_for_the_batch(make):
    batch = make("alone").score(["p"] * 2, ["1", "2"])
    assert np.isnan(batch.total).all()
    assert "with 2 completions together, but with none alone" in batch.failures[0].reason


def test_many_hanging_completions_cost_a_bounded_number_of_time_limits(make):
    batch = make("acts", timeout_s=0.5).score(["p"] * 6, ["1", "hang", "hang", "hang", "hang", "2"])
    np.testing.assert_array_equal(batch.total, [1] + [np.nan] * 5)
    assert ["not tried alone" in f.reason for f in batch.failures] == [False] * 3 + [True] * 2


def test_weights_multiply_what_applies_and_nothing_else(make):
    runner = make("acts", "returns", weights=(0.7, 0.3))
    batch = runner.score(["p"] * 3, ["1", "nan", "2"], columns={"what": ["mixed"] * 3})
    np.testing.assert_allclose(batch.rewards, [[1, np.nan], [np.nan, 1], [2, 1]])
    np.testing.assert_allclose(batch.total, [0.7, 0.3, 1.7])


def test_async_functions_are_awaited_and_workers_run_side_by_side(make):
    runner = make("waits", "acts", "size", workers=2)
    np.testing.assert_array_equal(runner.score(["p"], ["7"]).rewards, [[0.25, 7, 1]])


def test_functions_get_copies_and_what_their_signature_asks_for(file, monkeypatch):
    monkeypatch.setenv("A_SECRET", "x")
    monkeypatch.setenv("KEPT_KEY", "x")
    specs = [f"{file}:looks", f"{file}:acts"]
    with RewardRunner(specs, keep_env=["KEPT_KEY"]) as runner:
        columns = {"answer": ["2", "3"], "level": [1, {"a": [None, 0.5]}]}
        ids = [np.arange(3), [5]]
        batch = runner.score(["pp", "p"], ["1", "2"], ids, columns, {"global_step": 10})
    np.testing.assert_array_equal(batch.rewards, [[12, 1], [11, 2]])
    assert batch.extras == {
        "names": ["answer,level"] * 2,
        "secret": [False, True],
        "jax": [False, False],
    }
    assert batch.metrics == {"mean_length": 2.0}


def test_conversations_arrive_as_lists_of_messages(file):
    with RewardRunner(["exact_match"]) as runner:
        prompts = [[{"role": "user", "content": "1+1="}]] * 2
        completions = [[{"role": "assistant", "content": text}] for text in ("2", "3")]
        batch = runner.score(prompts, completions, columns={"answer": ["2", "2"]})
    assert batch.total.tolist() == [1.0, 0.0]


def test_what_is_printed_is_kept_up_to_a_limit_and_counted(make):
    printed = make("prints").score(["p"], ["1"]).printed
    assert printed.startswith("yyy") and len(printed) < 20_000
    assert f"[... {20 * 50_001 - 16384} more bytes]" in printed


def test_an_answer_without_bounds_is_not_read(make):
    runner = make("logs_much")
    [failure] = runner.score(["p"], ["x"]).failures
    assert (failure.kind, failure.reason) == ("result", "answers with more than 67108864 bytes")
    assert runner.score(["p"], [""]).total.tolist() == [1.0]


def test_a_batch_is_scored_while_the_caller_goes_on(make):
    runner = make("acts")
    first = runner.submit(["p"], ["1"])
    second = runner.submit(["p"], ["2"])
    assert second.result().total.tolist() == [2.0]
    assert first.result().total.tolist() == [1.0] and first.result() is first.result()


def test_a_run_stops_past_the_allowed_share_of_errors(file):
    with RewardRunner([f"{file}:acts", f"{file}:size"], max_errors=0.1) as runner:
        runner.score(["p"] * 90, ["nan"] * 10 + ["1"] * 80)  # 10 of at least 100
        saved = runner.tally.state()
        with pytest.raises(RewardError) as error:
            runner.score(["the prompt"], ["nan"])
        for part in ("'acts' has failed on 11 of 91", "returned nan", "'the prompt'", "'nan'"):
            assert part in str(error.value)
        runner.tally.restore(saved)
        assert runner.score(["p"], ["1"]).total.tolist() == [2.0]
        assert runner.tally.scored == {"acts": 91, "size": 91}


def test_rows_are_refused_before_anything_runs(make):
    runner = make("returns")
    with pytest.raises(ConfigError, match="needs the column 'what'.*have 'answer'"):
        runner.check_rows([{"prompt": "p", "answer": 1}])
    with pytest.raises(DataError, match="row 1: column 'what' holds a datetime"):
        import datetime

        runner.check_rows([{"what": "x"}, {"what": datetime.datetime.now()}])
    runner.check_rows([{"what": "x", "unused": object()}])
    with pytest.raises(ConfigError, match="completions must have one item a prompt, 2, got 1"):
        runner.score(["p", "p"], ["c"], columns={"what": ["short"] * 2})


def test_functions_that_cannot_be_loaded_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown reward 'exact_mach'"):
        RewardRunner(["exact_mach"])
    (tmp_path / "bad.py").write_text("import os; os._exit(3)")
    with pytest.raises(ConfigError, match="cannot be loaded: .*exit code 3"):
        RewardRunner([f"{tmp_path}/bad.py:f"])


def test_an_interrupted_runner_does_not_give_the_answer_to_another_question(file, monkeypatch):
    def interrupted(fd, wait):
        raise KeyboardInterrupt

    with RewardRunner([f"{file}:acts"]) as runner:
        pending = runner.submit(["p"], ["1"])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("relax.rewards.workers.messages.read", interrupted)
            pending.result()
        with pytest.raises(RewardError, match="is closed"):
            runner.score(["p"], ["2"])


def test_a_closed_runner_says_so(file):
    runner = RewardRunner("exact_match")
    runner.close()
    runner.close()
    with pytest.raises(RewardError, match="is closed"):
        runner.score(["p"], ["1"], columns={"answer": ["1"]})


def gone(pid):
    """Whether a process has ended; a zombie has."""
    for _ in range(200):
        if is_gone(pid):
            return True
        time.sleep(0.05)
    return False


def is_gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def read_pids(path):
    for _ in range(200):
        if path.exists() and len(numbers := path.read_text().split()) == 2:
            return [int(number) for number in numbers]
        time.sleep(0.05)
    raise AssertionError("the function did not start")


def test_closing_kills_a_function_that_runs(file, tmp_path):
    with RewardRunner(f"{file}:pids") as runner:
        runner.submit(["p"], [str(tmp_path / "pids")])
        pids = read_pids(tmp_path / "pids")
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("how", ["hung", "closed", "trainer killed"])
def test_a_process_in_a_session_of_its_own_ends_with_the_worker_or_the_run(file, tmp_path, how):
    reward, pids = f"{file}:leaves_a_process", tmp_path / "pids"
    if how == "trainer killed":
        code = f"""
            import time
            from relax.rewards import RewardRunner
            runner = RewardRunner({reward!r})
            runner.score(["p"], [{str(pids)!r}])
            print("scored", flush=True)
            time.sleep(100)
        """
        trainer = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
        )
        assert trainer.stdout.readline() == "scored\n"
        pid, session = read_pids(pids)
        assert not is_gone(pid)
        trainer.kill()
        trainer.communicate()
    else:
        with RewardRunner(reward, timeout_s=5.0, max_errors=1.0) as runner:
            if how == "hung":
                runner.score(["p"], [str(pids)], columns={"then": ["hang"]})
                pid, session = read_pids(pids)
                assert gone(pid)
            else:
                assert runner.score(["p"], [str(pids)]).total.tolist() == [1.0]
                pid, session = read_pids(pids)
                assert not is_gone(pid)
    assert pid == session and gone(pid)


def test_a_host_that_stays_silent_ends_the_run_with_a_sentence(file, monkeypatch):
    monkeypatch.setattr(client, "GIVE_UP_AFTER_S", 0.5)
    with RewardRunner(f"{file}:acts", timeout_s=0.5) as runner:
        [(_, host)] = runner._hosts
        kill = host._signal
        monkeypatch.setattr(host, "_signal", lambda s: s == signal.SIGKILL and kill(s))
        os.kill(host._process.pid, signal.SIGSTOP)
        with pytest.raises(RewardError, match="has been silent for 1 s, though a call may take 0"):
            runner.score(["p"], ["1"])


@pytest.mark.parametrize("victim", ["trainer", "host"])
def test_no_process_outlives_the_one_that_started_it(file, tmp_path, victim):
    code = f"""
        from relax.rewards import RewardRunner
        runner = RewardRunner({str(file) + ":pids"!r})
        runner.submit(["p"], [{str(tmp_path / "pids")!r}]).result()
    """
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.PIPE, text=True
    )
    worker, host = read_pids(tmp_path / "pids")
    os.kill(trainer.pid if victim == "trainer" else host, signal.SIGKILL)
    _, errors = trainer.communicate(timeout=60)
    assert gone(worker) and gone(host)
    if victim == "host":
        assert "the process of the reward functions ended by signal SIGKILL" in errors


# --- functions that cannot travel --------------------------------------------------------------


def test_a_lambda_runs_here_with_the_same_results_and_a_note():
    def moody(completions, **kwargs):
        if "raise" in completions:
            raise ValueError("no such thing")
        return [float(text) for text in completions]

    with RewardRunner([moody, "exact_match"], max_errors=1.0) as runner:
        assert "'moody' is no function of a module: it runs inside this process" in runner.notes[0]
        columns = {"answer": ["1", "2", "3"]}
        batch = runner.score(["p"] * 3, ["1", "raise", "nan"], columns=columns)
    np.testing.assert_array_equal(batch.rewards, [[1, 1], [np.nan, 0], [np.nan, 0]])
    assert [f.kind for f in batch.failures] == ["raised", "result"]


def test_a_lambda_that_hangs_is_asked_to_stop():
    stopped = []

    def hangs(completions):
        try:
            while True:
                pass
        finally:
            stopped.append(True)

    with RewardRunner(hangs, timeout_s=0.2, max_errors=1.0) as runner:
        [failure] = runner.score(["p"], ["c"]).failures
    assert failure.kind == "hung" and "was asked to stop" in failure.reason
    for _ in range(100):
        if stopped:
            break
        time.sleep(0.05)
    assert stopped


# --- before a run --------------------------------------------------------------------------------


def test_a_function_that_returns_a_wrong_number_of_rewards_is_refused_before_the_run(tmp_path):
    file = tmp_path / "lengths.py"
    file.write_text(
        "def one_for_all(completions):\n    return [1.0]\n\n\n"
        "def number(completions):\n    return 1.0\n\n\n"
        "def divides(completions):\n    return [1 / len(text) for text in completions]\n"
    )
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    cases = {
        f"{file}:one_for_all": "'one_for_all' must return .* for 2 empty ones it returned 1 ",
        f"{file}:number": "'number' must return .* it returned 1.0 .a float., not a list of 2",
        lambda completions: completions[:1]: "it returned 1 rewards for 2 completions",
    }
    for function, message in cases.items():
        with RewardRunner(function) as runner, pytest.raises(ConfigError, match=message):
            runner.probe(rows, conversational=False)
    with RewardRunner([f"{file}:divides", "exact_match"]) as runner:
        runner.probe([row | {"answer": "1"} for row in rows], conversational=False)
        assert runner.tally.failed == {} and runner.tally.scored == {}
        assert runner.score(["p"], ["12"], columns={"answer": ["12"]}).total == [1.5]
