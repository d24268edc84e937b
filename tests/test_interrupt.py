"""Ctrl-C and SIGTERM: raised, asked for, forced; and everything put back afterwards."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from relax.errors import ConfigError
from relax.trainers import interrupt as module
from relax.trainers.interrupt import Interrupt, Interrupted

pytestmark = pytest.mark.programs

# The one file is loaded, since a package that imports jax would take seconds to start.
LOAD = f"""
import hashlib, importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("interrupt", {module.__file__!r})
interrupt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(interrupt)
Interrupt, Interrupted = interrupt.Interrupt, interrupt.Interrupted

def ready():
    print("ready", flush=True)

def compile_for_long():  # native code: no Python handler can run until it is over
    hashlib.pbkdf2_hmac("sha256", b"", b"", 400_000_000)
"""

UNARMED = """
try:
    with Interrupt():
        ready()
        time.sleep(30)
except Interrupted as stop:
    print("cleaned up", flush=True)
    sys.exit(stop.exit_code)
"""

STEPS = """
with Interrupt() as stop:
    stop.arm()
    ready()
    while stop.requested is None:
        time.sleep(0.01)
    print("saved", flush=True)
sys.exit(stop.exit_code)
"""

LONG_STEP = """
with Interrupt() as stop:
    stop.arm()
    ready()
    time.sleep(30)
"""

LONG_STEP_SOON_OVER = LONG_STEP.replace("Interrupt()", "Interrupt(grace_s=1.5)")

COMPILING = """
with Interrupt(grace_s=0.5) as stop:
    stop.arm()
    ready()
    compile_for_long()
"""

FORKED = """
with Interrupt(grace_s=0.3) as stop:
    stop.arm()
    child = os.fork()
    if child == 0:
        time.sleep(30)
    time.sleep(0.1)
    os.kill(child, 15)
    assert os.waitpid(child, 0)[1] == 15
    time.sleep(0.8)
    assert stop.requested is None
    ready()
"""


LOST = """
import gc
import signal

def collected(phase, info):
    gc.callbacks.remove(collected)
    signal.raise_signal(signal.SIGTERM)

try:
    with Interrupt() as stop:
        ready()
        gc.callbacks.append(collected)
        gc.collect()
        print("noted", flush=True)
        stop.arm()
except Interrupted as stop:
    sys.exit(stop.exit_code)
"""


def start(code):
    return subprocess.Popen(
        [sys.executable, "-c", LOAD + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])},
    )


def signalled(code, *signums):
    """Starts a child, signals it each time after it is ready, gives (exit code, out, err)."""
    child = start(code)
    try:
        assert child.stdout.readline() == "ready\n"
        for count, signum in enumerate(signums):
            if count:
                with pytest.raises(subprocess.TimeoutExpired):
                    child.wait(0.4)  # one signal does not end it
            child.send_signal(signum)
        out, err = child.communicate(timeout=20)
    finally:
        child.kill()
        child.communicate()
    return child.returncode, out, err


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_the_loop_a_signal_raises_at_once(signum, code):
    assert signalled(UNARMED, signum)[:2] == (code, "cleaned up\n")


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_in_the_loop_a_signal_lets_the_step_end_and_the_run_save(signum, code):
    returncode, out, err = signalled(STEPS, signum)
    assert (returncode, out) == (code, "saved\n")
    assert err == "finishing this step, then saving (press Ctrl-C again to stop at once)\n"


@pytest.mark.parametrize("signum, code", [(signal.SIGHUP, 129), (signal.SIGUSR1, 138)])
def test_a_closed_terminal_and_a_batch_system_ask_as_sigterm_does(signum, code):
    """However often: a closing terminal sends several, and SIGTERM follows SIGUSR1."""
    assert signalled(STEPS, signum)[:2] == (code, "saved\n")
    returncode, _, err = signalled(LONG_STEP_SOON_OVER, signum, signum, signal.SIGTERM)
    assert returncode == code and "1.5 s after SIG" in err and "stopped at once" not in err


def test_work_that_is_dropped_on_sigterm_goes_on_on_ctrl_c():
    def rollout():
        signal.raise_signal(signum)
        yield "drawn"
        yield "more"

    for signum, batches in ((signal.SIGTERM, []), (signal.SIGINT, ["drawn", "more"])):
        with Interrupt(say=lambda line: None) as stop:
            stop.arm()
            assert list(stop.until_asked(rollout())) == batches
            assert stop.requested == signum


def test_a_hangup_that_is_ignored_stays_ignored():
    """As under `nohup`; a handler of the user's stays, too."""
    before = signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGUSR1)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, print)
    try:
        with Interrupt():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGUSR1) is print
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGUSR1, before[1])


class Swallower:
    """An object at whose end a signal comes; what is raised in `__del__` goes no further."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_exception_is_swallowed_is_found_when_the_loop_begins():
    with pytest.raises(Interrupted), Interrupt() as stop:
        Swallower()
        assert stop.requested == signal.SIGINT
        stop.arm()


@pytest.mark.parametrize("code", [LONG_STEP, COMPILING], ids=["python", "native"])
def test_a_second_signal_ends_the_process_at_once(code):
    returncode, _, err = signalled(code, signal.SIGINT, signal.SIGINT)
    assert returncode == 130 and "stopped at once" in err
    assert signalled(LONG_STEP, signal.SIGTERM, signal.SIGTERM)[0] == 143


def test_a_process_stuck_in_native_code_ends_when_the_grace_of_sigterm_is_over():
    returncode, _, err = signalled(COMPILING, signal.SIGTERM)
    assert returncode == 143 and "0.5 s after SIGTERM" in err


def test_ending_a_forked_worker_does_not_count_as_a_signal_to_the_parent():
    returncode, _, err = signalled(FORKED)
    assert returncode == 0 and "SIGTERM" not in err


def handlers():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


def state_of_process():
    wakeup_fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup_fd)
    return wakeup_fd, handlers(), len(os.listdir("/proc/self/fd")), threading.active_count()


def test_handlers_descriptors_and_threads_are_put_back_and_the_old_descriptor_is_served():
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    before_fd = signal.set_wakeup_fd(write_fd)
    try:
        before = state_of_process()
        with pytest.raises(Interrupted) as caught, Interrupt():
            assert state_of_process()[:2] != before[:2]
            signal.raise_signal(signal.SIGINT)
        assert state_of_process() == before
        assert caught.value.exit_code == 130
        assert os.read(read_fd, 10) == bytes([signal.SIGINT])
    finally:
        signal.set_wakeup_fd(before_fd)
        os.close(read_fd)
        os.close(write_fd)


def test_a_stop_asked_for_inside_a_nested_context_reaches_the_outer_one():
    said = []
    with Interrupt(say=said.append) as outer:
        with Interrupt() as inner:
            inner.arm()
            signal.raise_signal(signal.SIGINT)
            assert inner.requested == outer.requested == signal.SIGINT
        assert outer.exit_code == inner.exit_code == 130
    assert len(said) == 1


def test_leaving_a_nested_context_leaves_the_outer_one_as_it_was():
    with pytest.raises(Interrupted), Interrupt():
        with Interrupt() as inner:
            inner.arm()
        signal.raise_signal(signal.SIGINT)


def test_after_disarming_a_signal_raises_again():
    with pytest.raises(Interrupted), Interrupt() as stop:
        stop.arm()
        stop.disarm()
        signal.raise_signal(signal.SIGINT)


def test_in_a_notebook_sigterm_is_left_alone(monkeypatch):
    monkeypatch.setattr("builtins.__IPYTHON__", True, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as stop:
        assert signal.getsignal(signal.SIGTERM) is before
        assert signal.getsignal(signal.SIGINT) == stop._handle


def test_outside_the_main_thread_nothing_is_installed():
    before, seen = handlers(), []

    def work():
        with Interrupt() as stop:
            stop.arm()
            seen.append((handlers(), stop.requested, stop.exit_code))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None, 0)]


def test_a_grace_time_that_is_not_positive_is_refused():
    with pytest.raises(ConfigError, match="grace_s must be above 0 seconds, got 0"):
        Interrupt(grace_s=0)


def test_a_signal_while_processes_agree_counts_at_their_next_agreement(monkeypatch):
    """The others did not hear of it: if this process stopped, they would wait for it for ever."""

    def slow(value):
        signal.raise_signal(signal.SIGTERM)
        return [None, value]

    with Interrupt() as interrupt:
        interrupt.arm()
        monkeypatch.setattr(module.processes, "gather", slow)
        assert interrupt.agree() is None and interrupt.requested == signal.SIGTERM
        monkeypatch.setattr(module.processes, "gather", lambda value: [None, value])
        assert interrupt.agree() == signal.SIGTERM


def test_a_stop_that_is_lost_in_a_callback_of_the_collector_prints_no_traceback():
    code, out, err = signalled(LOST)
    assert (code, out) == (143, "noted\n") and "Traceback" not in err, err
