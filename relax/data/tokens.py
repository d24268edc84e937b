"""Tokenisation: one BOS token, no implicit EOS token, and the border of prompt and completion."""

from collections.abc import Iterator, Sequence

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
    made = []
    for chunk in _chunks(texts):
        # otherwise it warns of every long text
        all_ids = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        made += [ids if ids[: len(prefix)] == prefix else prefix + ids for ids in all_ids]
    return made


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


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
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


def token_mask(encoding_offsets, ids: Sequence[int], spans, special_ids: set[int]) -> list[bool]:
    """Marks the tokens within spans of characters.

    A token across the beginning of a span is inside, as in a completion, unless it is a special
    token: those of some tokenizers include the space after them.

    >>> token_mask([(0, 3), (3, 5), (5, 6)], [9, 7, 7], [(2, 5)], {9})
    [False, True, False]
    """
    mask, rest = [], list(spans)
    for token, (start, end) in zip(ids, encoding_offsets, strict=True):
        while rest and start >= rest[0][1]:
            rest.pop(0)
        inside = bool(rest) and end > rest[0][0]
        mask.append(inside and not (token in special_ids and start < rest[0][0]))
    return mask
