"""The end of a completion: one rule for every algorithm and program.

A completion ends at the first of
1. an EOS token, one of `eos_token_ids`, which is the completion's last token;
2. a stop string in its text: the token that completes the string is its last token. The text
   includes special tokens, so a stop string may be or contain a special token;
3. its limit of tokens.

The first two do not apply before `min_new_tokens`. The host searches for stop strings after each
segment; tokens sampled after the end are dropped.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]


def stop_decoder(tokenizer) -> Decode:
    """Makes the function from ids to the text that is searched for stop strings.

    The text includes special tokens. Completions for display or scoring are decoded elsewhere,
    mostly without them.
    """

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    return decode


def find_stop(
    tokens: Sequence[int], known: int, stop: tuple[str, ...], least: int, decode: Decode
) -> int | None:
    """Number of tokens up to the one that completes a stop string; None: no stop string.

    A stop string may start and end within tokens. Text is decoded from the completion's start,
    since tokenizers treat the first token of a text specially.

    Args:
      tokens: the completion so far.
      known: number of first tokens known to contain no stop string.
      stop: the stop strings.
      least: minimum tokens of a completion.
      decode: turns ids into text.
    """
    first = max(known + 1, least, 1)
    if len(tokens) < first or not _holds(tokens, stop, decode):
        return None
    lengths = range(first, len(tokens) + 1)
    return next((n for n in lengths if _holds(tokens[:n], stop, decode)), None)


def _holds(tokens: Sequence[int], stop: tuple[str, ...], decode: Decode) -> bool:
    text = decode(list(tokens))
    return any(string in text for string in stop)
