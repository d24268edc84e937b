"""The model class `relax` of EleutherAI's lm_eval, whose tasks then run on ReLax.

lm_eval calls a model by `loglikelihood`, `loglikelihood_rolling` and `generate_until`, with texts.
The rules from text to tokens are those of its own class `hf`, so that scores are comparable. This
module does without lm_eval; `harness_tasks.model_class` makes the class that lm_eval accepts.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from relax.config.names import unknown
from relax.data.templates import Job, render_template, require_template
from relax.engine.model_source import ModelSource
from relax.engine.tasks.likelihood import LikelihoodScorer, windows
from relax.engine.tasks.options import Subject
from relax.errors import ConfigError, DataError
from relax.sampling import SamplingConfig, generate, stop_decoder
from relax.sampling.config import max_positions

# Options of `generate_until` with another name in SamplingConfig, the first given one counting.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLED = ("top_p", "top_k", "min_p")
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}


class HarnessModel:
    """The methods that lm_eval calls; requests have `args`, a tuple of texts.

    Args:
      pretrained: a model directory, an adapter's, a hub name, or a loaded `Subject`.
      dtype, param_dtype: precision of the computation and of the parameters.
      batch_size: texts whose likelihood is computed at a time; `auto`: 16.
      max_length: most tokens of a context with its continuation; None: all that the model takes.
      max_gen_toks: most tokens of a completion, where a task does not say.
      add_bos_token: whether texts begin with special tokens; None: as the tokenizer has it.
      prefix_token_id: the token before texts without a context; None: BOS, else EOS.
      chat_template_path: another chat template, as for `load_tokenizer`.
      chat_template_args: arguments of the chat template, such as `{"enable_thinking": False}`.
      seed: of completions that are sampled.
      device: lm_eval's flag, which has no effect: the device is JAX's.
      tell: gets sentences about what is truncated or left out; None prints them.

    Raises:
      ConfigError: an argument is unknown or has no such value.
      DataError, ModelLoadError: see `ModelSource`.
    """

    tokenizer: Any = None
    _without_system = False

    def __init__(
        self,
        pretrained: str | Subject,
        *,
        dtype: str = "float32",
        param_dtype: str = "float32",
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_path: str | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        seed: int = 0,
        device: str | None = None,
        tell: Callable[[str], None] | None = None,
        **others,
    ):
        super().__init__()
        for name in others:
            raise ConfigError(f"model_args: {unknown(name, ARGUMENTS)}")
        self.tell = tell or (lambda text: print(f"note: {text}", file=sys.stderr))
        if device is not None and device.partition(":")[0] not in ("cuda", jax.default_backend()):
            self.tell(f"device {device} has no effect: JAX runs on {jax.default_backend()}")
        number = "16" if str(batch_size).partition(":")[0] == "auto" else str(batch_size)
        if not number.isdecimal() or int(number) < 1:
            raise ConfigError(f"batch_size must be a number from 1 or auto, got {batch_size!r}.")
        self.batch_size = int(number)
        if isinstance(pretrained, Subject):
            self.subject = pretrained
        else:
            self.subject = _load(
                pretrained, dtype, param_dtype, self.batch_size, chat_template_path
            )
        self.tokenizer = self.subject.tokenizer
        most = self.subject.model.config.max_position_embeddings
        if max_length is not None and not 1 <= max_length <= most:
            raise ConfigError(f"max_length must be from 1 to the model's {most}, got {max_length}.")
        self.max_length = max_length or most
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self._add_bos, self._template_args = add_bos_token, dict(chat_template_args or {})
        first = self.tokenizer.bos_token_id
        first = self.tokenizer.eos_token_id if first is None else first
        self.prefix_token_id = first if prefix_token_id is None else prefix_token_id
        self.eot_token_id = self.tokenizer.eos_token_id

    @functools.cached_property
    def _prefix(self) -> str | None:
        """The text of the token before texts: one that begins with it gets no second one."""
        return None if self.prefix_token_id is None else self.tokenizer.decode(self.prefix_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """The tokens of a text."""
        special = add_special_tokens
        if special is None:
            begun = bool(self._prefix) and string.startswith(self._prefix or "")
            special = False if begun else self._add_bos
        options = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer(string, **options)["input_ids"])

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context, and those that follow it where the continuation does.

        Spaces at the end of a context belong to the word after them. Where the tokens of both
        texts together begin otherwise than those of the context, as many are left out.

        Raises:
          DataError: no token is left, or none can stand before the first.
        """
        if not context:
            ids = self.tok_encode(continuation, add_special_tokens=False)
            before = self._first(continuation)
            if ids[:1] == [before]:
                ids = ids[1:]
        else:
            kept = context.rstrip()
            whole = self.tok_encode(context + continuation)
            found = self.tok_encode(kept)
            ids = whole[len(found) :]
        if not ids or (context and not found):
            raise DataError(
                f"the continuation {continuation!r:.60} has no token of its own after the context "
                f"{context[-40:]!r}, so it has no likelihood."
            )
        return (found if context else [before]), ids

    def _first(self, text: str) -> int:
        if self.prefix_token_id is None:
            raise DataError(
                f"the text {text!r:.60} has no context, and the tokenizer has neither BOS nor EOS "
                "to stand before it: give prefix_token_id."
            )
        return self.prefix_token_id

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log p(continuation | context), and whether greedy decoding gives the continuation.

        Args:
          requests: with `args` (context, continuation).

        Raises:
          DataError: see `pair`; or a continuation is longer than the model takes.
        """
        pairs = [self.pair(*request.args) for request in requests]
        kept = [self._truncated(*pair) for pair in pairs]
        count = sum(len(a) > len(b) for (a, _), (b, _) in zip(pairs, kept, strict=True))
        self._tell_truncated(count)
        return [(found.logprob, found.is_greedy) for found in self.subject.scorer(kept)]

    def _truncated(self, context: list[int], ids: list[int]) -> tuple[list[int], list[int]]:
        if len(ids) > self.max_length:
            raise DataError(
                f"a continuation has {len(ids)} tokens, and the model takes {self.max_length}: "
                f"{self.tokenizer.decode(ids)!r:.60}."
            )
        return context[-(self.max_length + 1 - len(ids)) :], ids

    def _tell_truncated(self, count: int) -> None:
        if count:
            self.tell(
                f"{count} contexts are truncated: their first tokens do not fit the "
                f"{self.max_length} of the model"
            )

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """log p(text) of all of a text's tokens, in windows of `max_length`; see `windows`.

        Args:
          requests: with `args` (text,).
        """
        texts = [request.args[0] for request in requests]
        parts = [
            windows(self.tok_encode(text), self._first(text), self.max_length) for text in texts
        ]
        found = iter(self.subject.scorer([pair for text in parts for pair in text]))
        return [sum(next(found).logprob for _ in text) for text in parts]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Completions, up to the first of the texts of `until`.

        Args:
          requests: with `args` (context, options of the generation).

        Raises:
          ConfigError: an option is unknown.
        """
        by_options: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            key = sampling_options(request.args[1], self.max_gen_toks)
            by_options.setdefault(key, []).append(i)
        found = [""] * len(requests)
        for (most, until, options), places in by_options.items():
            contexts = [requests[i].args[0] for i in places]
            prompts = [self.tok_encode(text) or [self._first(text)] for text in contexts]
            texts = self._completions(prompts, np.array(places), most, until, options)
            for i, text in zip(places, texts, strict=True):
                found[i] = text
        return found

    def _completions(self, prompts: Sequence[list[int]], places, most, until, options) -> list[str]:
        room = min(self.max_length, max_positions(self.subject.model.config)[0]) - most
        if room < 1:
            raise ConfigError(
                f"max_gen_toks {most} must be less than the {room + most} tokens of the model."
            )
        self._tell_truncated(sum(len(prompt) > room for prompt in prompts))
        tokenizer, end = self.tokenizer, self.subject.end
        config = SamplingConfig(
            max_new_tokens=most,
            eos_token_ids=end,
            stop=until,
            slots=self.batch_size,
            **dict(options),
        )
        out = generate(
            self.subject.model,
            self.subject.params,
            [prompt[-room:] for prompt in prompts],
            jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(self.seed)))(places),
            config,
            decode=stop_decoder(tokenizer),
        )
        # The end token's text ends a completion too, where another token spells it.
        last = [] if self.eot_token_id is None else [tokenizer.decode(self.eot_token_id)]
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in out.completions]
        for stop in (*until, *filter(None, last)):
            texts = [text.partition(stop)[0] for text in texts]
        return texts

    @property
    def tokenizer_name(self) -> str:
        """The name by which lm_eval keeps the requests that a tokenizer made."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the chat template, None if there shall be none.

        Args:
          chat_template: whether there shall be one, or its name, where a tokenizer has several.

        Raises:
          DataError: the tokenizer has none.
        """
        if chat_template is False or chat_template is None:
            return None
        require_template(self.tokenizer, "prompts as conversations")
        name = chat_template if isinstance(chat_template, str) else None
        return self.tokenizer.get_chat_template(name)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; without the generation prompt its last message stays open.

        A template that refuses system messages gets the others alone, with a warning.

        Raises:
          DataError: the tokenizer has no template, or it refuses the conversation.
        """
        require_template(self.tokenizer, "prompts as conversations")
        try:
            return self._rendered(chat_history, add_generation_prompt)
        except DataError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            text = self._rendered(others, add_generation_prompt)
            if not self._without_system:
                self.tell("the chat template refuses system messages, which are left out")
            self._without_system = True
            return text

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        row = {"chat_template_kwargs": self._template_args}
        job = Job(messages, row, "a conversation of lm_eval", add_generation_prompt)
        text = render_template(self.tokenizer, *job[:3], add_generation_prompt=job[3])
        if add_generation_prompt:
            return text
        content = messages[-1]["content"]
        for last in (content, content.strip()):
            if last in text:
                return text[: text.rindex(last) + len(last)]
        raise DataError(
            f"the chat template does not write the last message {content!r:.60}, so it cannot "
            "be continued."
        )

    def get_model_info(self) -> dict[str, Any]:
        """Facts about the model for lm_eval's files of results."""
        leaves = jax.tree.leaves(self.subject.params)
        return {
            "model_num_parameters": sum(leaf.size for leaf in leaves),
            "model_dtype": jnp.dtype(self.subject.model.dtype).name,
        }


ARGUMENTS = tuple(HarnessModel.__init__.__kwdefaults__ or ())


def sampling_options(given: Mapping[str, Any], most: int) -> tuple:
    """lm_eval's options of a generation: most tokens, stop strings, options of SamplingConfig.

    As in lm_eval, `do_sample: false` and a temperature of 0 are greedy, and then other options of
    sampling have no effect.

    Args:
      most: most tokens, if the options do not say.

    Raises:
      ConfigError: an option is unknown.

    >>> sampling_options({"until": ["."], "do_sample": False, "temperature": 0.7}, 256)
    (256, ('.',), (('temperature', 0.0),))
    """
    rest = dict(given)
    lengths = [value for name in LENGTHS if (value := rest.pop(name, None)) is not None]
    until = rest.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    sampled = rest.pop("do_sample", None)
    temperature = float(rest.pop("temperature", 1.0 if sampled else 0.0) or 0.0)
    options = {"temperature": 0.0 if sampled is False else temperature}
    for name in SAMPLED:
        value = rest.pop(name, None)
        if value is not None and options["temperature"]:
            options[name] = value
    if "repetition_penalty" in rest:
        options["repetition_penalty"] = float(rest.pop("repetition_penalty"))
    for name, value in rest.items():
        if name not in NEUTRAL or value != NEUTRAL[name]:
            raise ConfigError(
                f"generation_kwargs: {name} {value!r} is not supported. Known are until, "
                f"{', '.join(LENGTHS)}, do_sample, temperature, {', '.join(SAMPLED)} and "
                "repetition_penalty."
            )
    stop = tuple(text for text in until if text)
    return int(lengths[0] if lengths else most), stop, tuple(sorted(options.items()))


def _load(name: str, dtype: str, param_dtype: str, batch_size: int, template) -> Subject:
    for value in (dtype, param_dtype):
        if value not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype must be float32 or bfloat16, got {value!r}.")
    source = ModelSource.find(name)
    tokenizer = source.tokenizer(template)
    source.check_tokens(tokenizer)
    model, params = source.load(jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))
    scorer = LikelihoodScorer(model, params, batch_size)
    return Subject(model, params, tokenizer, source.end_tokens(tokenizer), scorer)
