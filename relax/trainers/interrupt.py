"""Signal handling: the first signal finishes the step, saves and exits; a second exits at once.

SIGINT is Ctrl-C, schedulers send SIGTERM, a closed terminal sends SIGHUP, and batch systems can be
configured to send SIGUSR1 some time before the time limit.

A Python signal handler runs in the main thread, and only between bytecodes: never while that thread
is inside XLA's compiler. So the handler only asks the loop to stop, and a watcher thread, which the
interpreter's wakeup descriptor wakes even then, ends the process on a second signal or when the
grace period is over. Ending it by force is safe because files are committed by a rename.
"""

import builtins
import contextlib
import itertools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from relax.errors import ConfigError
from relax.parallel import processes

# One Ctrl-C can arrive twice: from the terminal and from a wrapper that forwards it.
_SAME_PRESS_S = 0.1
# A second one of these signals ends the process at once. Others may arrive any number of times: a
# closing terminal sends several, and a batch system sends SIGTERM after SIGUSR1.
_URGENT = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Raised when a signal stops the run. Not an `Exception`, so that no library catches it.

    Args:
      signum: the signal.
      in_all: all processes of the run raise it, as after `Interrupt.agree`.
    """

    def __init__(self, signum: int, *, in_all: bool = False):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum, self.in_all = signum, in_all

    @property
    def exit_code(self) -> int:
        """128 plus the signal number, as in shells: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


class Interrupt:
    """Context manager that turns SIGINT, SIGTERM, SIGHUP and SIGUSR1 into an orderly exit.

    Before `arm()` a signal raises `Interrupted` in the main thread. After it, the first signal only
    sets `requested`, which the loop checks between steps. A second Ctrl-C or SIGTERM ends the
    process at once. In a notebook only Ctrl-C is handled; SIGHUP and SIGUSR1 keep an existing
    handler and stay ignored under `nohup`; outside the main thread no handler is installed; an
    `Interrupt` inside another one shares its state.

    Args:
      grace_s: seconds (> 0) after a signal other than Ctrl-C until the process is ended by force.
      say: prints one line; None: to stderr.

    Example:
      >>> with Interrupt() as interrupt:
      ...     interrupt.arm()
      ...     interrupt.requested is None
      True
    """

    _active: "Interrupt | None" = None  # the one whose handlers are installed

    def __init__(self, grace_s: float = 25.0, say: Callable[[str], None] | None = None):
        if not grace_s > 0:
            raise ConfigError(f"grace_s must be above 0 seconds, got {grace_s}. The default is 25.")
        self.grace_s = grace_s
        self._say = say or _say
        self._signum: int | None = None
        self._armed = False
        self._drops = False
        self._outer: Interrupt | None = None
        self._previous: dict[int, Any] = {}  # handlers, by signal

    @property
    def requested(self) -> int | None:
        """The signal that asked the run to stop, or None."""
        return self._outer.requested if self._outer else self._signum

    @property
    def exit_code(self) -> int:
        """The exit code for the process: 0, or 128 plus the signal number."""
        return 0 if self.requested is None else 128 + self.requested

    def agree(self) -> int | None:
        """The signal that asked one of the processes to stop, or None. All of them must call it.

        The result is the same in all of them, and `requested` may not be: a signal that arrives
        while this process waits for the others counts at the next call.
        """
        asked = next((s for s in processes.gather(self.requested) if s is not None), None)
        if asked is not None and self.requested is None:
            owner = self._outer or self
            owner._signum = asked
        return asked

    def arm(self) -> None:
        """Makes the first signal set `requested` instead of raising; the caller must poll it.

        Raises:
          Interrupted: an earlier signal's exception was lost, as in a callback of the garbage
            collector.
        """
        self._set_armed(True)
        if self.requested is not None:
            raise Interrupted(self.requested)

    def disarm(self) -> None:
        """Makes a signal raise `Interrupted` again."""
        self._set_armed(False)

    @contextlib.contextmanager
    def dropping(self) -> Iterator[None]:
        """Context in which a signal other than Ctrl-C raises at once, armed or not.

        For work that has no side effects and can be repeated, such as a rollout or an evaluation,
        which may take longer than the grace period. With several processes it has no effect: none
        may abandon work that the others continue.

        Raises:
          Interrupted: such a signal arrives, or arrived before.
        """
        owner = self._outer or self
        if processes.count() > 1:
            yield
            return
        owner._drops = True
        try:
            if self.requested not in (None, signal.SIGINT):
                raise Interrupted(self.requested)
            yield
        finally:
            owner._drops = False

    def until_asked(self, batches: Iterable) -> Iterator:
        """Yields the batches; none if a signal interrupts the making of the first one."""
        iterator = iter(batches)
        try:
            with self.dropping():
                first = list(itertools.islice(iterator, 1))
        except Interrupted:
            return
        yield from first
        yield from iterator

    def _set_armed(self, armed: bool) -> None:
        if self._outer:
            self._outer._set_armed(armed)
        self._armed = armed

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is not threading.main_thread():
            return self
        if Interrupt._active is not None:
            self._outer = Interrupt._active
            self._armed_before = self._outer._armed
            return self
        Interrupt._active = self
        self._start_watcher()
        for signum in _handled():
            self._previous[signum] = signal.signal(signum, self._handle)
        self._old_hook, sys.unraisablehook = sys.unraisablehook, self._report_lost
        return self

    def __exit__(self, *exc_info) -> None:
        if self._outer:
            self._outer._set_armed(self._armed_before)
            self._signum, self._outer = self._outer.requested, None
        elif Interrupt._active is self:
            for signum, handler in self._previous.items():
                # None means a handler that was not installed from Python.
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)
            self._previous.clear()
            sys.unraisablehook = self._old_hook
            self._stop_watcher()
            Interrupt._active = None

    def _handle(self, signum: int, frame) -> None:
        first = self._signum is None
        if first:
            # Set before raising: the exception may be lost where it is raised.
            self._signum = signum
        if self._drops and signum != signal.SIGINT:
            self._say("saving now: the work in progress is abandoned and repeated on resume")
            raise Interrupted(signum)
        if not self._armed:
            raise Interrupted(signum)
        if first:
            self._say("finishing this step, then saving (press Ctrl-C again to stop at once)")

    def _report_lost(self, lost) -> None:
        """Prints no traceback of a signal in a callback of the garbage collector: it is noted."""
        if not isinstance(lost.exc_value, Interrupted):
            self._old_hook(lost)

    def _start_watcher(self) -> None:
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        self._old_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="relax-interrupt", daemon=True)
        self._watcher.start()

    def _stop_watcher(self) -> None:
        signal.set_wakeup_fd(self._old_fd)
        os.write(self._write_fd, b"\0")  # no signal has the number 0
        self._watcher.join()
        os.close(self._read_fd)
        os.close(self._write_fd)

    def _watch(self) -> None:
        """Counts signals, which arrive as one byte each, and enforces the deadline."""
        first_s: float | None = None
        deadline_s: float | None = None
        last = signal.SIGTERM  # the signal that started the deadline
        while True:
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            if not select.select([self._read_fd], [], [], left_s)[0]:
                _end(
                    last,
                    f"the run did not end within {self.grace_s:g} s after {last.name}: ending it "
                    "by force",
                )
            for signum in os.read(self._read_fd, 64):
                if signum == 0:
                    return
                if self._old_fd != -1:
                    _forward(self._old_fd, signum)
                if signum not in self._previous:
                    continue
                now_s = time.monotonic()
                if signum in _URGENT:
                    if first_s is not None and now_s - first_s > _SAME_PRESS_S:
                        _end(signum, "stopped at once; earlier checkpoints are intact")
                    first_s = first_s or now_s
                if signum != signal.SIGINT and deadline_s is None:
                    deadline_s, last = now_s + self.grace_s, signal.Signals(signum)


def _handled() -> list[int]:
    """The signals to handle here."""
    if hasattr(builtins, "__IPYTHON__"):
        return [signal.SIGINT]
    others = (signal.SIGHUP, signal.SIGUSR1)
    return [*_URGENT, *(s for s in others if signal.getsignal(s) == signal.SIG_DFL)]


def _forget_in_child() -> None:
    """A forked worker must not write its own signals into its parent's pipe."""
    active, Interrupt._active = Interrupt._active, None
    if active is not None:
        signal.set_wakeup_fd(-1)
        for signum, handler in active._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


os.register_at_fork(after_in_child=_forget_in_child)


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except RuntimeError:  # the signal interrupted a print to the same stream
        os.write(2, line.encode() + b"\n")
    except OSError:  # the terminal is closed
        pass


def _forward(fd: int, signum: int) -> None:
    try:
        os.write(fd, bytes([signum]))
    except OSError:
        pass  # its owner has closed it or does not read it


def _end(signum: int, why: str) -> None:
    """Ends the process without unwinding; shows the cursor that a progress bar may have hidden."""
    try:
        os.write(2, (b"\x1b[?25h" if os.isatty(2) else b"") + b"\n" + why.encode() + b"\n")
    finally:
        os._exit(128 + signum)
