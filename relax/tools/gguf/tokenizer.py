"""The tokenizer of a GGUF file, rebuilt as a Hugging Face tokenizer.

A file names the rule that splits text into words (`tokenizer.ggml.pre`); the rules here are those
of the models' own tokenizer.json. An unknown name is refused, since another rule would silently
give other tokens.

Source: llama.cpp authors, src/llama-vocab.cpp, 2023-2026; Kudo and Richardson, SentencePiece, 2018.
"""

import dataclasses
from collections.abc import Mapping

from relax.errors import ModelLoadError
from relax.tools.gguf.file import GGUFFile

_BEGIN = r"[^\r\n\p{L}\p{N}]?"
_END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LATIN = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_BEGIN}\p{{L}}+|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"{_BEGIN}{_UPPER}*{_LOWER}+|{_BEGIN}{_UPPER}+{_LOWER}*|"


@dataclasses.dataclass(frozen=True)
class Words:
    """A rule for splitting text into words, within which byte pairs are merged.

    Attributes:
      pattern: regular expression of a word; None: GPT-2's.
      digits: split off every digit as a word.
      compose: normalise to NFC first.
      whole: keep a word that is a token, without merges.
      bos: begin a text with BOS if the file does not specify it.
    """

    pattern: str | None = None
    digits: bool = False
    compose: bool = False
    whole: bool = False
    bos: bool = False


_LLAMA3 = Words(
    _LATIN + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _END, whole=True, bos=True
)  # fmt: skip
_QWEN2 = Words(_LATIN + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _END, compose=True)
_TEKKEN = Words(_CASED + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _END, whole=True, bos=True)
WORDS = {
    "gpt-2": Words(),
    "smollm": Words(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of tokens
_SPACE = "\u2581"  # SentencePiece's space

PREFIX = "tokenizer.ggml."
# Keys after the prefix: their types, and values without effect.
LISTS = {"tokens": str, "merges": str, "token_type": int, "scores": float}
FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix")
NEUTRAL = {"add_sep_token": False, "remove_extra_whitespaces": False, "precompiled_charsmap": []}
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def gguf_tokenizer(file: GGUFFile):
    """The tokenizer of a GGUF file, with its chat template; None if the file has none.

    Raises:
      ModelLoadError: the file describes a tokenizer that cannot be rebuilt exactly.
    """
    from transformers import PreTrainedTokenizerFast

    if not {PREFIX + "model", PREFIX + "tokens"} & file.metadata.keys():
        return None
    try:
        fields = _fields(file.metadata)
        ids = {role: fields.get(f"{name}_token_id") for role, name in ROLES.items()}
        special = {role: fields["tokens"][i] for role, i in ids.items() if i is not None}
        if fields["model"] == "gpt2":
            tokenizer, bos = _byte_level(fields)
        else:
            tokenizer, bos = _sentencepiece(fields, special.get("unk_token")), True
        _add_tokens(tokenizer, fields)
        tokenizer.post_processor = _ends(fields, ids, bos)
    except ValueError as error:
        raise ModelLoadError(f"{file.path}: {error}") from None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_chat_template(file.metadata),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _fields(metadata: Mapping) -> dict:
    """The checked entries about the tokenizer, without their prefix."""
    fields = {key.removeprefix(PREFIX): v for key, v in metadata.items() if key.startswith(PREFIX)}
    if fields.get("model") not in ("gpt2", "llama"):
        raise ValueError(
            f"tokenizer.ggml.model must be gpt2 or llama, got {fields.get('model')!r}; no other "
            "tokenizer is implemented."
        )
    known = {*LISTS, *FLAGS, "model", "pre"}
    for key, value in fields.items():
        if key in LISTS:
            wanted, fits = f"a list of {LISTS[key].__name__}", isinstance(value, list)
            fits = fits and all(isinstance(item, LISTS[key]) for item in value)
        elif key in FLAGS:
            wanted, fits = "true or false", isinstance(value, bool)
        elif key.endswith("_token_id"):
            wanted = f"below the number of tokens, {len(fields.get('tokens', []))}"
            fits = isinstance(value, int) and 0 <= value < len(fields.get("tokens", []))
        elif key not in known:
            wanted = "absent, since ReLax does not know it"
            fits = key in NEUTRAL and value == NEUTRAL[key]
        if key not in ("model", "pre") and not fits:
            name = repr(PREFIX + key)[1:-1]  # a damaged file may contain any name
            raise ValueError(f"{name[:200]} must be {wanted}, got {repr(value)[:80]}.")
    tokens = fields.get("tokens", [])
    fields.setdefault("token_type", [_NORMAL] * len(tokens))
    lists = ("scores", "token_type") if fields["model"] == "llama" else ("token_type",)
    for key in lists:
        if len(fields.get(key, [])) != len(tokens) or not tokens:
            raise ValueError(
                f"{PREFIX}{key} must have one entry per token, got {len(fields.get(key, []))} for "
                f"{len(tokens)} tokens."
            )
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{PREFIX}tokens must differ, got {len(tokens) - len(set(tokens))} twice.")
    return fields


def splitter(words: Words):
    """The normaliser, which may be None, and the pre-tokeniser of a rule."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    steps: list[pre_tokenizers.PreTokenizer] = []
    if words.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if words.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(words.pattern), behavior="isolated"))
    use_regex = words.pattern is None
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex))
    return normalizers.NFC() if words.compose else None, pre_tokenizers.Sequence(steps)


def _byte_level(fields: dict):
    """A byte-level BPE tokenizer, and whether a text begins with BOS by default."""
    from tokenizers import Tokenizer, decoders, models

    name = fields.get("pre")
    if name not in WORDS:
        raise ValueError(
            f"tokenizer.ggml.pre is {name!r}: its way of splitting text is unknown. Known: "
            f"{', '.join(sorted(WORDS))}."
        )
    words = WORDS[name]
    vocabulary = {token: i for i, token in enumerate(fields["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields.get("merges", [])]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise ValueError(f"tokenizer.ggml.merges must join two tokens to one, got {merge}.")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=words.whole))
    normalizer, tokenizer.pre_tokenizer = splitter(words)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, words.bos


def _sentencepiece(fields: dict, unknown: str | None):
    """A SentencePiece BPE tokenizer: merges by score, with byte fallback."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate(fields["tokens"])}
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges(fields),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = fields.get("add_space_prefix", True)
    spaces = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges(fields: dict) -> list[tuple[str, str]]:
    """All merges of two pieces into a third, the highest score first."""
    kinds = zip(fields["tokens"], fields["scores"], fields["token_type"], strict=True)
    scores = {token: score for token, score, kind in kinds if kind == _NORMAL}
    ways = [
        (score, i, len(token) - i, token)
        for token, score in scores.items()
        for i in range(1, len(token))
        if token[:i] in scores and token[i:] in scores
    ]
    ways.sort(key=lambda way: way[:3], reverse=True)  # ties in transformers' order
    return [(token[:i], token[i:]) for _, i, _, token in ways]


def _add_tokens(tokenizer, fields: dict) -> None:
    """Adds the control and user-defined tokens, which are split off before all else."""
    from tokenizers import AddedToken

    kinds = list(zip(fields["tokens"], fields["token_type"], strict=True))
    special = [token for token, kind in kinds if kind in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    own = [token for token, kind in kinds if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in own])


def _ends(fields: dict, ids: Mapping, bos: bool):
    """The post-processor that adds BOS and EOS if the file requests them."""
    from tokenizers import processors

    wanted = {
        "bos_token": fields.get("add_bos_token", bos),
        "eos_token": fields.get("add_eos_token", False),
    }
    for role, adds in wanted.items():
        if adds and ids[role] is None:
            raise ValueError(f"a text gets a {role}, and there is no tokenizer.ggml.{role}_id.")
    names = {role: fields["tokens"][ids[role]] for role, adds in wanted.items() if adds}
    first, last = ([names[role]] if role in names else [] for role in wanted)
    single = [*first, "$A", *last]
    second = [f"{piece}:1" for piece in (*first, "$B", *last)]
    special = [(name, ids[role]) for role, name in names.items()]
    return processors.TemplateProcessing(
        single=single, pair=single + second, special_tokens=special
    )


def _chat_template(metadata: Mapping):
    """The chat template, or several by name; None if there is none."""
    prefix = "tokenizer.chat_template"
    named = {
        key[len(prefix) + 1 :]: v for key, v in metadata.items() if key.startswith(f"{prefix}.")
    }
    if not named:
        return metadata.get(prefix)
    return ({"default": metadata[prefix]} if prefix in metadata else {}) | named
