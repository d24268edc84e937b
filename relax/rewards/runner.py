"""Runs reward functions on batches of completions."""

import contextlib
import functools
import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from relax.errors import ConfigError, RewardError
from relax.rewards.batch import RewardBatch, Tally, failures_of, gather
from relax.rewards.loading import parameters_by_reward
from relax.rewards.protocol import (
    TEXTS,
    Column,
    RewardInfo,
    check_columns,
    check_plain,
    check_values,
    collect_columns,
    describe,
    describe_columns,
    distinct,
)
from relax.rewards.workers.client import Host
from relax.rewards.workers.scores import Scores, scores_of
from relax.rewards.workers.threads import in_process, reference_of, score_here


class RewardRunner:
    """Reward functions and their processes.

    Functions given by name, or importable by name, run in worker processes: one that hangs is
    killed, and one that ends its process ends nothing else. Others (lambdas, closures, functions
    of a notebook) run in a thread of this process; `notes` lists them. An object with the attribute
    `in_process`, such as a reward model, is called directly.

    Args:
      functions: names (see `load_reward`) or functions, one or several.
      weights: one per function; None: all 1.
      parameters: {name: {parameter: value}} (`reward_kwargs`).
      timeout_s: time limit of one call of a function on a batch. A batch with completions that hang
        takes up to five times as long, since they are searched for.
      max_errors: RewardError is raised when a function has failed on more than this fraction of
        the completions so far (at least a hundred), 0 to 1.
      workers: number of processes; functions are assigned round robin and run concurrently.
      keep_env: environment variables that functions see although named like secrets.

    Raises:
      ConfigError: a function cannot be loaded, or an argument is out of range.

    >>> with RewardRunner(["exact_match"]) as runner:
    ...     runner.score(["1+1="] * 2, ["2", "3"], columns={"answer": ["2", "2"]}).total
    array([1., 0.])
    """

    def __init__(
        self,
        functions,
        weights: Sequence[float] | None = None,
        *,
        parameters: Mapping | None = None,
        timeout_s: float = 30.0,
        max_errors: float = 0.1,
        workers: int = 1,
        keep_env: Iterable[str] = (),
    ):
        functions = [functions] if callable(functions) or isinstance(functions, str) else functions
        self.functions = functions = list(functions)
        self.weights = _check_options(functions, weights, timeout_s, max_errors, workers)
        self.timeout_s = timeout_s
        references = _references(functions, parameters)
        self._local = {i: functions[i] for i, ref in enumerate(references) if ref is None}
        isolated = [i for i in range(len(functions)) if i not in self._local]
        dealt = [isolated[k::workers] for k in range(workers) if isolated[k::workers]]
        hosts: list[Host] = []
        self._close = weakref.finalize(self, _close_all, hosts)
        infos: dict[int, RewardInfo] = {i: describe(f) for i, f in self._local.items()}
        try:
            for indices in dealt:
                chosen = [ref for i in indices if (ref := references[i]) is not None]
                hosts.append(Host({"functions": chosen}, timeout_s, tuple(keep_env)))
            for indices, host in zip(dealt, hosts, strict=True):
                infos |= dict(zip(indices, host.infos(), strict=True))
        except BaseException:
            self.close()
            raise
        self._hosts = list(zip(dealt, hosts, strict=True))
        self.names = distinct(infos[i].name for i in range(len(functions)))
        self.infos = [
            RewardInfo(**vars(infos[i]) | {"name": name}) for i, name in enumerate(self.names)
        ]
        self.notes = [
            f"reward {self.names[i]!r} is no function of a module: it runs inside this process and "
            "cannot be killed when it hangs. Put it into a file to isolate it."
            for i, function in self._local.items()
            if not in_process(function)
        ]
        self.notes += [f.note for f in self._local.values() if getattr(f, "note", None)]
        self.tally = Tally(max_errors)
        self._pending: PendingRewards | None = None

    def __enter__(self) -> "RewardRunner":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def in_process(self) -> bool:
        """Whether a function runs in this process, as a reward model does."""
        return any(in_process(function) for function in self._local.values())

    @property
    def asks_for_texts(self) -> bool:
        """Whether a function has an argument `prompt_texts` or `completion_texts`."""
        return any(name in info.accepted for info in self.infos for name in TEXTS)

    def close(self) -> None:
        """Ends all workers, whatever they are doing; may be called again."""
        self._close()

    def check_rows(
        self, rows: Sequence[Mapping], columns: Mapping[str, Column] | None = None
    ) -> None:
        """Refuses rows on which the functions cannot run, before anything runs.

        Args:
          columns: what is known of their columns; None: it is found by reading all rows.

        Raises:
          ConfigError: a function needs a column that no row has, or that is None in all rows.
          DataError: a column for a worker holds a value that JSON does not preserve.
        """
        columns = describe_columns(rows) if columns is None else columns
        check_columns(self.infos, columns)
        check_values(self.infos, columns, len(rows))
        for name in self._sent(columns):
            if (i := columns[name].odd_row) is not None:
                check_plain(rows[i][name], f"row {i}: column {name!r}")

    def probe(self, rows: Sequence[Mapping], conversational: bool) -> None:
        """Scores empty completions of the first rows, so that a wrong function is refused at once.

        A wrong one does not return one reward for each completion. All other failures are left to
        the run, whose completions are not empty. Reward models of this process are not called.

        Args:
          rows: rows of the prompts; two are used.
          conversational: completions are lists of messages.

        Raises:
          ConfigError: a function does not return a list with one reward for each completion.
        """
        rows = rows[:2]
        empty = [{"role": "assistant", "content": ""}] if conversational else ""
        batch = self._batch(
            [row["prompt"] for row in rows],
            [empty] * len(rows),
            completion_ids=[[] for _ in rows],
            columns=collect_columns(rows),
            trainer_state={"global_step": 0, "max_steps": 0, "epoch": 0.0},
            texts={name: [""] * len(rows) for name in TEXTS} if self.asks_for_texts else {},
        )
        self._send(batch)
        isolated, _, _ = self._receive()
        here = {i: f for i, f in self._local.items() if not in_process(f)}
        every = isolated | self._score_here(batch, here)
        for i, scores in sorted(every.items()):
            kind, reason = scores.failures.get(0, (None, None))
            if kind == "shape":
                raise ConfigError(
                    f"reward {self.names[i]!r} must return a list with one number or None for each "
                    f"completion, and for {len(rows)} empty ones it {reason}. Correct the function."
                )

    def submit(
        self,
        prompts: list,
        completions: list,
        completion_ids: list | None = None,
        columns: Mapping[str, list] | None = None,
        trainer_state: Mapping | None = None,
        texts: Mapping[str, list[str]] | None = None,
    ) -> "PendingRewards":
        """Starts to score a batch and returns at once, while the workers continue.

        Args:
          prompts, completions: n texts or n lists of messages.
          completion_ids: n lists of token ids.
          columns: n values per column; see `collect_columns`.
          trainer_state: plain values, `global_step` and others; functions see them as attributes.
          texts: `prompt_texts` and `completion_texts`, with special tokens; see `asks_for_texts`.

        Raises:
          ConfigError: an argument of a function is missing, or the lengths differ.
          DataError: a column holds a value that JSON does not preserve.
        """
        batch = self._batch(prompts, completions, completion_ids, columns, trainer_state, texts)
        self._send(batch)
        finish = functools.partial(self._finish, batch)
        self._pending = PendingRewards(self._receive, finish)
        return self._pending

    def score(self, *args, **kwargs) -> RewardBatch:
        """Scores a batch: `submit`, then waits for the result."""
        return self.submit(*args, **kwargs).result()

    def _sent(self, columns: Iterable[str]) -> list[str]:
        infos = [self.infos[i] for indices, _ in self._hosts for i in indices]
        return [name for name in columns if any(info.takes(name) for info in infos)]

    def _batch(
        self, prompts, completions, completion_ids, columns, trainer_state, texts
    ) -> dict[str, Any]:
        """The arguments of all functions, checked."""
        batch: dict[str, Any] = {
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": _plain_ids(completion_ids),
            "columns": {name: list(values) for name, values in (columns or {}).items()},
            "trainer_state": dict(trainer_state or {}),
            "texts": {name: list(values) for name, values in (texts or {}).items()},
        }
        self._check_batch(batch)
        return batch

    def _send(self, batch: dict) -> None:
        """Sends a batch to the workers."""
        if not self._close.alive:
            raise RewardError("the reward runner is closed: no batch can be scored any more.")
        if self._pending is not None:
            self._pending.wait()  # read the pending result before the next request is written
        columns = {name: batch["columns"][name] for name in self._sent(batch["columns"])}
        sent = batch | {"columns": columns}
        if self._hosts:
            for name in ("prompts", "completions", "trainer_state"):
                check_plain(sent[name], name)
            for name, values in columns.items():
                check_plain(values, f"column {name!r}")
        with self._whole_messages():
            for _, host in self._hosts:
                host.send(sent)

    def _score_here(self, batch: dict, functions: Mapping[int, Callable]) -> dict[int, Scores]:
        return {
            i: score_here(function, self.infos[i], batch, self.timeout_s)
            for i, function in functions.items()
        }

    def _check_batch(self, batch: dict) -> None:
        n = len(batch["prompts"])
        lists = {k: batch[k] for k in ("completions", "completion_ids") if batch[k] is not None}
        for name, values in {**lists, **batch["columns"], **batch["texts"]}.items():
            if len(values) != n:
                raise ConfigError(f"{name} must have one item a prompt, {n}, got {len(values)}.")
        check_columns(self.infos, batch["columns"])
        for info in self.infos:
            given = {**batch["texts"], "completion_ids": batch["completion_ids"]}
            for name in ("completion_ids", *TEXTS):
                if name in info.required and given.get(name) is None:
                    raise ConfigError(f"reward {info.name!r} needs {name}, got none.")

    @contextlib.contextmanager
    def _whole_messages(self):
        """Defers interruptions, which would leave half a message or results of old requests."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _receive(self) -> tuple[dict[int, Scores], float, str]:
        """Scores, seconds and printed text of the isolated functions, by function."""
        scores: dict[int, Scores] = {}
        seconds, printed = 0.0, ""
        with self._whole_messages():
            answers = [(indices, host.receive()) for indices, host in self._hosts]
        for indices, answer in answers:
            scores |= dict(zip(indices, map(scores_of, answer["scores"]), strict=True))
            seconds = max(seconds, answer["seconds"])
            printed += answer["printed"]
        return scores, seconds, printed

    def _finish(self, batch: dict, received: tuple[dict[int, Scores], float, str]) -> RewardBatch:
        scores, seconds, printed = received
        start = time.monotonic()
        here = self._score_here(batch, self._local)
        seconds += time.monotonic() - start
        every = [(scores | here)[i] for i in range(len(self.names))]
        texts = batch["prompts"], batch["completions"]
        failures = [
            failure
            for name, of_function in zip(self.names, every, strict=True)
            for failure in failures_of(name, of_function, *texts)
        ]
        self.tally.add(self.names, len(batch["prompts"]), failures)
        count = len(batch["prompts"])
        return gather(self.names, count, every, self.weights, failures, seconds, printed)


class PendingRewards:
    """A batch that is being scored."""

    def __init__(self, receive: Callable, finish: Callable):
        self._receive, self._finish = receive, finish
        self._received: tuple[dict[int, Scores], float, str] | None = None
        self._result: RewardBatch | None = None

    def wait(self) -> None:
        """Waits until the isolated functions have finished."""
        if self._received is None:
            self._received = self._receive()

    def result(self) -> RewardBatch:
        """Waits, runs the functions that cannot be isolated, and returns the rewards.

        Raises:
          RewardError: a function fails too often, or the host process is gone.
        """
        if self._result is None:
            self.wait()
            self._result = self._finish(self._received)
        return self._result


def _check_options(functions, weights, timeout_s, max_errors, workers) -> np.ndarray:
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if len(weights) != len(functions):
        raise ConfigError(
            f"reward_weights must have one number for each reward function: got {len(weights)} for "
            f"{len(functions)}."
        )
    if not all(isinstance(w, int | float) and math.isfinite(w) for w in weights):
        raise ConfigError(f"reward_weights must be finite numbers, got {weights}.")
    if not timeout_s > 0:
        raise ConfigError(f"reward_timeout_s must be above 0, got {timeout_s}.")
    if not 0 <= max_errors <= 1:
        raise ConfigError(f"max_reward_errors must be from 0 to 1, got {max_errors}.")
    if workers < 1:
        raise ConfigError(f"reward_workers must be at least 1, got {workers}.")
    return np.array(weights, np.float64)


def _references(functions: list, parameters: Mapping | None) -> list[dict | None]:
    """The host's reference to each function; None if it has none."""
    handed = parameters_by_reward(functions, parameters)
    references: list[dict | None] = []
    for function, of_function in zip(functions, handed, strict=True):
        if isinstance(function, str):
            references.append({"spec": function, "parameters": of_function})
        elif callable(function):
            references.append(reference_of(function))
        else:
            raise ConfigError(
                f"a reward must be a name or a function, got a {type(function).__name__}."
            )
    return references


def _plain_ids(completion_ids) -> list[list[int]] | None:
    if completion_ids is None:
        return None
    return [np.asarray(ids, np.int64).tolist() for ids in completion_ids]


def _close_all(hosts: list[Host]) -> None:
    for host in hosts:
        host.close()
