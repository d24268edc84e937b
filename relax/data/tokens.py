"""Tokenisation: one BOS token, no implicit EOS token, and the border of prompt and completion."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from relax.errors import DataError

_CHUNK_CHARACTERS = 2**20  # characters per call: a tokenizer's result takes 100 bytes per character


def tokenize(tokenizer, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Token ids of each text.

    Args:
      tokenizer: a Hugging Face tokenizer.
      texts: rendered conversations, or plain texts.
      special: begin each text with the tokenizer's BOS token, unless it already begins with it. EOS
        is never added: a completion follows a prompt, and the end of a completion is part of its
        text. Templates write their special tokens themselves.
    """
    prefix = leading_tokens(tokenizer) if special else []
    made, ids_of = [], _ids_of(tokenizer)
    for chunk in chunks(texts):
        all_ids = ids_of(chunk)
        if prefix:
            all_ids = [i if i[: len(prefix)] == prefix else prefix + i for i in all_ids]
        made += all_ids
    return made


def _ids_of(tokenizer) -> Callable[[list[str]], list[list[int]]]:
    """A function from texts to their tokens, without special ones.

    That is `tokenizer(texts, add_special_tokens=False)`, which also makes masks and places of
    every token. Where its Rust part gives the same tokens for a text with spaces, line breaks and
    all added tokens, that alone is called, in about half of the time.
    """

    def slow(texts: list[str]) -> list[list[int]]:
        # otherwise it warns of every long text
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "encode_batch_fast"):
        return slow
    probe = [" ".join(["", "Ab  c\n\n1", *added_tokens(tokenizer).values(), ""]), " a"]
    expected = slow(probe)  # which sets the options of the backend, such as no truncation

    def fast(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return fast if fast(probe) == expected else slow


def end_token(tokenizer, asked: str | None = None) -> str:
    """The token that ends plain texts: the one that is asked for, or else the tokenizer's EOS.

    Raises:
      DataError: there is none, or it is no token of the tokenizer.
    """
    eos = asked or tokenizer.eos_token
    if not eos:
        raise DataError(
            "plain texts need an end token to learn where to stop and the tokenizer has none: "
            "name one with --eos_token."
        )
    if eos not in tokenizer.get_vocab():
        raise DataError(f"eos_token {eos!r} is not a token of the tokenizer.")
    return eos


def with_end_token(text: str, eos: str | None) -> str:
    """A completion with its end token exactly once; unchanged if there is no such token.

    >>> with_end_token("4", "<eos>"), with_end_token("4<eos>", "<eos>"), with_end_token("4", None)
    ('4<eos>', '4<eos>', '4')
    """
    return text if not eos or text.endswith(eos) else text + eos


def leading_tokens(tokenizer) -> list[int]:
    """The tokens that a tokenizer puts before a text, such as BOS."""
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
    starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return list(whole[: next(starts, 0)])


def chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts, in order, as many at a time as a tokenizer should take."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        if chunk and size + len(text) > _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
        chunk.append(text)
        size += len(text)
    if chunk:
        yield chunk


def common_length(one, other) -> int:
    """Length of the common prefix of two sequences.

    The prompt of a row is the common prefix of its own tokens and those of the whole. Tokenising
    the whole may merge the prompt's last characters with the completion's first, and a chat
    template may render a prompt differently before an answer; the rest is the completion.

    >>> common_length("blue", "black")
    2
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def added_tokens(tokenizer) -> dict[int, str]:
    """The tokens outside of the model's vocabulary, by id: special ones and others."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i: token.content for i, token in added.items()}


def special_ids(tokenizer) -> set[int]:
    """Ids of all special tokens, also of those without a name such as EOS."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)


def ending_ids(tokenizer) -> set[int]:
    """Ids that may end a turn: all special tokens, since not every template uses EOS."""
    return special_ids(tokenizer) - {tokenizer.bos_token_id, tokenizer.unk_token_id}
