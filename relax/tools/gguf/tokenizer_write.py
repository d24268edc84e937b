"""The tokenizer of a Hugging Face directory as the metadata of a GGUF file.

Byte-level tokenizers get the entries that llama.cpp's converter writes. For those in
SentencePiece's form, which merge by score, scores are made from the order of the merges.

Source: llama.cpp authors, conversion/base.py and gguf-py/gguf/vocab.py, 2023-2026.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from relax.errors import ModelLoadError
from relax.tools.gguf.tokenizer import WORDS, splitter

# Texts on which all known ways of splitting differ, and which no tokenizer leaves whole.
PROBES = (
    "1 12 123 1234 12345 3.14 x86_64",
    "don't DON'T we'll I'M 'RE HelloWORLD camelCase ÉCOLE école",
    "e\u0301 \u00e9 日本語のテキスト привет मुंबई ภาษาไทย 🦙🚀\u200d",
    "  two   spaces\ttab\n\n\nnewlines \r\n !!!\n\n a/b//c ...? ``x`` --- ==",
    "Once upon a time, there was a model that wrote GGUF files.",
)
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"
_LOOK_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_SPECIAL_ENDS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))


def add_tokenizer(writer, directory: Path, tokenizer, vocab_size: int) -> None:
    """Adds the entries about a tokenizer.

    Args:
      writer: a `gguf.GGUFWriter`.
      directory: the directory of the tokenizer's files.
      tokenizer: the tokenizer in it.
      vocab_size: rows of the embedding; rows without a token get an unused one.

    Raises:
      ModelLoadError: the tokenizer is of a kind, or splits text in a way, that has no name in GGUF.
    """
    import gguf

    model = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = model["model"]["type"]
    if kind != "BPE":
        raise ModelLoadError(
            f"'{directory}': a tokenizer in a GGUF file must be BPE, byte-level or in "
            f"SentencePiece's form, got {kind}."
        )
    bytes_fall_back = model["model"]["byte_fallback"]
    pre = "default" if bytes_fall_back else _split_rule(tokenizer.backend_tokenizer, directory)
    tokens, types = _tokens(tokenizer, vocab_size, bytes_fall_back)
    writer.add_tokenizer_model("llama" if bytes_fall_back else "gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if bytes_fall_back:
        writer.add_token_scores(_scores(tokens, types, model["model"]["merges"]))
    writer.add_token_types(types)
    special = gguf.SpecialVocab(
        directory, load_merges=not bytes_fall_back, n_vocab=len(tokens) if bytes_fall_back else None
    )
    special.add_to_gguf(writer, quiet=True)
    by_default = bytes_fall_back or WORDS[pre].bos
    adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    if by_default and not adds_bos and "bos" not in special.add_special_token:
        writer.add_add_bos_token(False)  # the converter leaves llama.cpp to add one
    prefix = (
        _adds_prefix(model) if bytes_fall_back else tokenizer.init_kwargs.get("add_prefix_space")
    )
    if prefix is not None:
        writer.add_add_space_prefix(prefix)


def check_tokenizer(tokenizer, read, file: Path) -> None:
    """Refuses a tokenizer that the file would turn into another one.

    Args:
      tokenizer: the tokenizer that was written.
      read: the tokenizer that the file's entries describe.
      file: named in the message.

    Raises:
      ModelLoadError: the two give different tokens for a text.
    """
    for text in PROBES:
        ours, theirs = tokenizer(text)["input_ids"], read(text)["input_ids"]
        if ours != theirs:
            raise ModelLoadError(
                f"{file}: a GGUF file cannot hold this tokenizer: {text[:40]!r} would become "
                f"{theirs[:8]} in place of {ours[:8]}."
            )


def _split_rule(backend, directory: Path) -> str:
    """The name of the way in which the tokenizer splits text into words."""
    for name, words in WORDS.items():
        normalizer, pre_tokenizer = splitter(words)
        same = backend.model.ignore_merges == words.whole
        if same and _split(normalizer, pre_tokenizer) == _split(
            backend.normalizer, backend.pre_tokenizer
        ):
            return name
    raise ModelLoadError(
        f"'{directory}': the tokenizer splits text into words in a way that has no name here for "
        f"tokenizer.ggml.pre. Known: {', '.join(sorted(WORDS))}."
    )


def _split(normalizer, pre_tokenizer) -> list[list[str]] | None:
    if pre_tokenizer is None:
        return None
    texts = [p if normalizer is None else normalizer.normalize_str(p) for p in PROBES]
    return [[word for word, _ in pre_tokenizer.pre_tokenize_str(text)] for text in texts]


def _tokens(tokenizer, vocab_size: int, bytes_fall_back: bool) -> tuple[list[str], list[int]]:
    """The tokens in the order of their ids, and their types."""
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    added: Mapping = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for i in range(vocab_size):
        token = by_id.get(i, f"[PAD{i}]")
        kind = _NORMAL if i in by_id else _UNUSED
        if i in added and bytes_fall_back and token == tokenizer.unk_token:
            kind = _UNKNOWN
        elif i in added and (added[i].special or _looks_special(token)):
            kind = _CONTROL
        elif i in added:
            token, kind = token.replace(_SPACE, " "), _USER_DEFINED
        elif bytes_fall_back and len(token) == 6 and token.startswith("<0x"):
            kind = _BYTE
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _looks_special(token: str) -> bool:
    """Whether llama.cpp's converter takes an added token for a control token by its looks."""
    ends = any(token.startswith(a) and token.endswith(b) for a, b in _SPECIAL_ENDS)
    return ends or token in _LOOK_SPECIAL


def _scores(tokens: list[str], types: list[int], merges: list) -> list[float]:
    """A score per token: minus the place of the first merge that makes it; others come last."""
    places: dict[str, int] = {}
    for i, merge in enumerate(merges):
        places.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), i)
    kinds = zip(tokens, types, strict=True)
    last = float(-len(merges))
    return [
        float(-places[token]) if token in places else last if kind == _NORMAL else 0.0
        for token, kind in kinds
    ]


def _adds_prefix(model: dict) -> bool:
    """Whether the tokenizer puts a space before a text."""
    normalizer = model["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    return any(step.get("type") == "Prepend" for step in steps)
