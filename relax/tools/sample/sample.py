"""Completions of prompts, printed or written to a file."""

import json
import secrets
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from relax import data
from relax.data.profiles import remaining_system_prompt
from relax.engine.model_source import ModelSource
from relax.engine.rows import limits_of
from relax.engine.tasks.prompts import as_conversations, profiled
from relax.errors import ConfigError, DataError
from relax.files import atomic_write
from relax.sampling import SamplingConfig, generate, stop_decoder
from relax.tools.sample.config import SampleConfig, SamplingSection


def sample(config: SampleConfig) -> None:
    """Generates and prints the completions of a configuration."""
    m, p = config.model, config.prompts
    name = m.model_name_or_path
    assert name is not None  # guaranteed by the rules of the configuration
    output = None if p.output_file is None else Path(p.output_file)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise ConfigError(f"output_file must be a file in a directory that exists, got '{output}'.")
    source = ModelSource.find(name)
    tokenizer = source.tokenizer(config.profile.chat_template_path)
    limits = limits_of(config)
    profile, rows = profiled(config.profile, _rows(p, tokenizer, limits))
    prompts = data.prepare_prompts(
        rows,
        tokenizer,
        system_prompt=remaining_system_prompt(profile, config.profile.system_prompt),
        vocab_size=source.model_config.vocab_size,
        limits=limits,
    )
    for note in prompts.notes:
        print(f"note: {note}", file=sys.stderr)
    model, params = source.load(jnp.dtype(m.dtype), param_dtype=jnp.dtype(m.param_dtype))
    end = source.end_tokens(tokenizer)
    segment = 8 if p.prompt is not None else 32  # a user is watching
    sampling = sampling_config(config.sampling, end, profile.get_stop_sequences(), segment)
    seed = config.sampling.seed
    if seed is None and sampling.temperature:
        seed = secrets.randbelow(2**31)
        print(f"seed {seed}", file=sys.stderr)
    stream = _Stream(tokenizer) if len(prompts) == sampling.n == 1 else None
    start_s = time.monotonic()
    out = generate(
        model,
        params,
        prompts.prompt_ids,
        jax.random.key(seed or 0),  # not used at temperature 0
        sampling,
        decode=stop_decoder(tokenizer),
        on_tokens=stream,
    )
    seconds = time.monotonic() - start_s
    records = _records(prompts, out, sampling.n, tokenizer)
    if stream is not None:
        stream.end()
    elif output is None:
        for record in records:
            print(f"--- {_shown(record['prompt'])}\n{record['completion']}")
    if output is not None:
        # Columns from parquet may hold dates.
        made = (json.dumps(record, ensure_ascii=False, default=str) for record in records)
        lines = "".join(f"{line}\n" for line in made)
        atomic_write(output, lines.encode())
    tokens = int(out.lengths.sum())
    print(f"{tokens} tokens in {seconds:.1f} s, including compilation", file=sys.stderr)


class _Stream:
    """Prints text as tokens arrive; incomplete characters wait for the rest."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.printed = tokenizer, [], ""

    def __call__(self, row: int, tokens: list[int]) -> None:
        self.ids += tokens
        text = self._text().rstrip("\N{REPLACEMENT CHARACTER}")
        print(text[len(self.printed) :], end="", flush=True)
        self.printed = text

    def end(self) -> None:
        print(self._text()[len(self.printed) :], flush=True)

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)


def _rows(p, tokenizer, limits: data.Limits) -> data.Rows:
    """The prompts, those that are texts as conversations of one message if asked to."""
    chat = bool(tokenizer.chat_template) if p.chat is None else p.chat
    source = [{"prompt": p.prompt}] if p.prompts_file is None else Path(p.prompts_file).expanduser()
    found = data.read_rows(source, limits=limits)
    rows = found.rows
    if p.prompts_file is not None and p.prompts_file.endswith(".txt"):
        rows = [{"prompt": row["text"]} for row in rows]
    if chat:
        rows = as_conversations(rows)
    elif p.chat is False:
        for i, row in enumerate(rows):
            if isinstance(row.get("prompt"), list):
                raise DataError(
                    f"{found.origin(i)}: the prompt is a list of messages, which needs a chat "
                    "template, and chat is false: leave chat out, or give prompts as texts."
                )
    return data.Rows(rows, found.origin, found.notes)


def sampling_config(
    s: SamplingSection, eos_token_ids: tuple[int, ...], stop: list[str], segment: int = 32
) -> SamplingConfig:
    """The sampler's options; `stop` are the profile's stop sequences."""
    return SamplingConfig(
        max_new_tokens=s.max_new_tokens,
        min_new_tokens=s.min_new_tokens,
        repetition_penalty=s.repetition_penalty,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        eos_token_ids=eos_token_ids,
        stop=tuple(stop if s.stop is None else s.stop),
        n=s.num_return_sequences,
        slots=s.slots,
        segment=segment,
    )


def _records(prompts, out, n: int, tokenizer) -> list[dict]:
    return [
        {
            **prompts.rows[i // n],
            "completion": tokenizer.decode(ids, skip_special_tokens=True),
            "finish_reason": out.finish_reasons[i],
            "num_tokens": len(ids),
            "logprob": float(out.logprobs[i, : len(ids)].sum()),
        }
        for i, ids in enumerate(out.completions)
    ]


def _shown(prompt) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))
