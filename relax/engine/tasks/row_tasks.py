"""Tasks from rows: completions scored by rewards, choices by likelihood, and perplexity."""

import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from relax import data
from relax.config.names import suggestion
from relax.config.text import join_some
from relax.data.profiles import remaining_system_prompt
from relax.data.tasks import PREFIX, is_task
from relax.engine.tasks.likelihood import Pair, windows
from relax.engine.tasks.options import Subject, TaskOptions
from relax.engine.tasks.prompts import as_conversations, profiled
from relax.engine.tasks.results import Estimate, TaskResult, exponential, mean, ratio
from relax.errors import ConfigError, DataError
from relax.models.config import TransformerConfig
from relax.rewards import RewardRunner, collect_columns
from relax.sampling import generate, stop_decoder
from relax.sampling.config import max_positions

RowTask = Callable[[Subject], TaskResult]


def rows_of(name: str, options: TaskOptions) -> data.Rows:
    """The rows of a task, at most `limit`.

    Raises:
      ConfigError: there is no such task; names the nearest.
      DataError: a row is broken.
    """
    path = Path(name).expanduser()
    if not is_task(name) and not path.exists():
        there = os.listdir(path.parent) if path.parent.is_dir() else []
        hint = suggestion(path.name, [*there, *(["reasoning_gym/..."] if "gym" in name else [])])
        raise ConfigError(
            f"there is no task {name!r}: a task is a file of rows, reasoning_gym/NAME or "
            f"lm_eval/NAME.{hint}"
        )
    split = "train" if path.is_file() else "test"  # a file is any split
    source = name if is_task(name) else path
    found = data.read_rows(source, split, limits=options.limits)
    return data.Rows(found.rows[: options.limit], found.origin, found.notes)


def row_task(name: str, options: TaskOptions, tokenizer, config: TransformerConfig) -> RowTask:
    """Reads and checks the rows of a task, before a model is loaded.

    Raises:
      ConfigError, DataError: see `rows_of`; or rows are of no kind that is evaluated, a prompt is
        too long, or a reward function cannot score the rows.
    """
    rows = rows_of(name, options)
    if not rows.rows:
        raise DataError(f"the task {name!r} has no rows.")
    first = rows.rows[0]
    if "prompt" not in first:
        return _perplexity(name, rows, tokenizer, config)
    if "choices" in first:
        return _choices(rows, options, tokenizer, config)
    functions = list(options.reward_funcs)
    if name.startswith(PREFIX):
        functions = ["reasoning_gym"]
    elif not functions:
        raise ConfigError(
            f"the completions of {name!r} need reward_funcs, such as --reward_funcs exact_match; "
            "rows with choices and rows with text alone need none."
        )
    return _rewards(rows, functions, options, tokenizer, config)


def _prompts(rows: data.Rows, options: TaskOptions, tokenizer, config):
    """The profile, and the prompts as tokens."""
    chat = options.chat
    if bool(tokenizer.chat_template) if chat is None else chat:
        rows = data.Rows(as_conversations(rows.rows), rows.origin, rows.notes)
    profile, rows = profiled(options.rendering, rows)
    prompts = data.prepare_prompts(
        rows,
        tokenizer,
        system_prompt=remaining_system_prompt(profile, options.rendering.system_prompt),
        vocab_size=config.vocab_size,
        limits=options.limits,
    )
    return profile, prompts


def _rewards(rows, functions: list[str], options: TaskOptions, tokenizer, config) -> RowTask:
    profile, prompts = _prompts(rows, options, tokenizer, config)
    named = options.reward_kwargs if functions == list(options.reward_funcs) else {}
    # The ids that end a completion are not known here, and the room does not depend on them.
    most = options.sampling((0,), profile.get_stop_sequences()).max_new_tokens
    _check_room(rows, prompts, most, config)
    with RewardRunner(functions, parameters=named) as checker:
        checker.check_rows(prompts.rows, prompts.facts)
        checker.probe(prompts.rows, prompts.conversational)

    def evaluate(subject: Subject) -> TaskResult:
        stop = profile.get_stop_sequences()
        sampling = options.sampling(subject.end, stop)
        out = generate(
            subject.model,
            subject.params,
            prompts.prompt_ids,
            jax.random.key(options.seed),  # not used at temperature 0
            sampling,
            decode=stop_decoder(subject.tokenizer),
        )
        repeated = [row for row in prompts.rows for _ in range(sampling.n)]
        texts = [subject.tokenizer.decode(i, skip_special_tokens=True) for i in out.completions]
        completions = [
            [{"role": "assistant", "content": text}] if prompts.conversational else text
            for text in texts
        ]
        special = _special_texts(subject, prompts, out, sampling.n)
        with RewardRunner(functions, parameters=named) as runner:
            scores = runner.score(
                [row["prompt"] for row in repeated],
                completions,
                completion_ids=[list(ids) for ids in out.completions],
                columns=collect_columns(repeated),
                texts=special if runner.asks_for_texts else {},
            )
            names = runner.names
        return _rewarded(prompts, texts, out, names, scores, sampling.n)

    return evaluate


def _check_room(rows: data.Rows, prompts, most: int, config: TransformerConfig) -> None:
    """Refuses prompts that leave no room for `most` new tokens."""
    room, why = max_positions(config)
    for i, length in enumerate(prompts.lengths):
        if length + most > room:
            raise DataError(
                f"{rows.origin(i)}: the prompt of {length} tokens and {most} new ones do not fit "
                f"the {room} positions {why}. Shorten the prompt or lower the number of new tokens."
            )


def _special_texts(subject: Subject, prompts, out, n: int) -> dict[str, list[str]]:
    """Prompts and completions with special tokens, for functions that ask for them."""
    decode = subject.tokenizer.decode
    before = [decode(ids) for ids in prompts.prompt_ids for _ in range(n)]
    ids = [list(ids) for ids in out.completions]
    after = [decode(row[:-1] if row and row[-1] in subject.end else row) for row in ids]
    return {"prompt_texts": before, "completion_texts": after}


def _rewarded(prompts, texts, out, names, scores, n: int) -> TaskResult:
    """Means over prompts, each of which counts with the mean of its completions."""
    metrics = {}
    failed = {name: sum(f.function == name for f in scores.failures) for name in names}
    for name, rewards in zip(names, scores.rewards.T, strict=True):
        grouped = rewards.reshape(-1, n)
        applies = ~np.isnan(grouped).all(axis=1)
        if applies.any():
            metrics[name] = mean(np.nanmean(grouped[applies], axis=1).tolist())
    metrics["num_tokens"] = mean(out.lengths.reshape(-1, n).mean(axis=1).tolist())
    cut = np.array([reason == "length" for reason in out.finish_reasons], float)
    metrics["truncated"] = mean(cut.reshape(-1, n).mean(axis=1).tolist())
    samples = [
        {
            **prompts.rows[i // n],
            "completion": text,
            "finish_reason": out.finish_reasons[i],
            "rewards": dict(zip(names, scores.rewards[i].tolist(), strict=True)),
        }
        for i, text in enumerate(texts)
    ]
    notes = [f"reward {name!r} failed on {count} completions" for name, count in failed.items()]
    wrong = tuple(note for note, count in zip(notes, failed.values(), strict=True) if count)
    return TaskResult("rewards", len(prompts), metrics, samples, (*prompts.notes, *wrong))


def _choices(rows, options: TaskOptions, tokenizer, config) -> RowTask:
    answers = [_answer(row, rows.origin(i)) for i, row in enumerate(rows.rows)]
    _, prompts = _prompts(rows, options, tokenizer, config)
    pairs: list[Pair] = []
    for i, row in enumerate(prompts.rows):
        found = _pairs(tokenizer, prompts, i, row["choices"], rows.origin(i))
        longest = max(len(a) + len(b) for a, b in found) - 1
        if longest > config.max_position_embeddings:
            raise DataError(
                f"{rows.origin(i)}: the prompt with a choice has {longest} tokens, and the model "
                f"takes {config.max_position_embeddings}; leave the row out."
            )
        pairs += found

    def evaluate(subject: Subject) -> TaskResult:
        found = iter(subject.scorer(pairs))
        samples = []
        for row, answer in zip(prompts.rows, answers, strict=True):
            scores = [next(found).logprob for _ in row["choices"]]
            perletter = [s / len(c) for s, c in zip(scores, row["choices"], strict=True)]
            right = {
                "acc": float(np.argmax(scores) == answer),
                "acc_norm": float(np.argmax(perletter) == answer),
            }
            samples.append({**row, "logprobs": scores, **right})
        metrics = {name: mean([s[name] for s in samples]) for name in ("acc", "acc_norm")}
        return TaskResult("choices", len(prompts), metrics, samples, prompts.notes)

    return evaluate


def _answer(row: dict, where: str) -> int:
    """The index of the right choice, which a row gives as a number or as the text of a choice."""
    choices, answer = row.get("choices"), row.get("answer")
    if not (isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)):
        raise DataError(f"{where}: choices must be a list of texts, got {repr(choices)[:80]}.")
    index = choices.index(answer) if answer in choices else answer
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(choices):
        raise DataError(
            f"{where}: answer must be one of the {len(choices)} choices or its place from 0, got "
            f"{repr(answer)[:80]}."
        )
    return index


def _pairs(tokenizer, prompts, i: int, choices: list[str], where: str) -> list[Pair]:
    """Tokens of a prompt, and those that follow it where each of the choices does.

    The first letters of a choice may form one token with the last ones of the prompt. All choices
    of the row then start before that token, so that their likelihoods can be compared.
    """
    prompt, context = prompts.rows[i]["prompt"], prompts.prompt_ids[i]
    if prompts.conversational or not prompt.strip():
        pairs = [(context, tokenizer(c, add_special_tokens=False)["input_ids"]) for c in choices]
    else:
        kept = tokenizer(prompt.rstrip())["input_ids"]  # a space belongs to the word after it
        wholes = [tokenizer(prompt + choice)["input_ids"] for choice in choices]
        shared = len(os.path.commonprefix([kept, *wholes]))
        pairs = [(whole[:shared], whole[shared:]) for whole in wholes]
    for choice, (before, after) in zip(choices, pairs, strict=True):
        if not before:
            raise DataError(
                f"{where}: the prompt {prompt!r:.80} has no token that stays apart from its "
                "choices. Make the prompt longer."
            )
        if not after:
            raise DataError(f"{where}: the choice {choice!r:.80} adds no token to the prompt.")
    return pairs


def _perplexity(name: str, rows, tokenizer, config) -> RowTask:
    for i, row in enumerate(rows.rows):
        if not isinstance(row.get("text"), str) or not row["text"]:
            raise DataError(
                f"{rows.origin(i)}: rows of a task have prompt, prompt and choices, or text, got "
                f"{join_some(sorted(row))}."
            )
    texts = [row["text"] for row in rows.rows]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    first = eos if bos is None else bos
    if first is None:
        raise DataError(
            f"{name!r}: the first token needs a BOS or EOS before it, and there is none."
        )
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    length = config.max_position_embeddings
    parts = [windows(tokens, first, length) for tokens in ids]

    def evaluate(subject: Subject) -> TaskResult:
        found = iter(subject.scorer([pair for text in parts for pair in text]))
        nats = [-sum(next(found).logprob for _ in text) for text in parts]
        counts = {
            "token": [len(tokens) for tokens in ids],
            "word": [len(text.split()) for text in texts],
            "byte": [len(text.encode()) for text in texts],
        }
        per = {unit: ratio(nats, numbers) for unit, numbers in counts.items() if any(numbers)}
        metrics = {f"{unit}_perplexity": exponential(estimate) for unit, estimate in per.items()}
        value, error = per["byte"]
        scale = np.log(2)
        bits = Estimate(float(value / scale), None if error is None else float(error / scale))
        samples = [
            {"text": text, "logprob": -nat, "num_tokens": n}
            for text, nat, n in zip(texts, nats, counts["token"], strict=True)
        ]
        metrics["bits_per_byte"] = bits
        none = [
            f"the texts have no {unit}s: no {unit}_perplexity" for unit in counts if unit not in per
        ]
        notes = (*rows.notes, *none)
        return TaskResult("perplexity", len(texts), metrics, samples, notes)

    return evaluate
