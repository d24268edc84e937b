"""Where a completion ends, found on the host from its tokens."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]


def find_stop(
    tokens: Sequence[int], known: int, stop: tuple[str, ...], least: int, decode: Decode
) -> int | None:
    """How many tokens there are up to the one that completes a stop string; None: there is none.

    A stop string may begin and end within tokens. Text is decoded from the completion's start, as
    tokenizers treat the first token of a text in their own way.

    Args:
      tokens: the completion so far.
      known: no stop string ends within so many first tokens.
      stop: the strings.
      least: of the tokens that a completion must have.
      decode: ids to text.
    """
    first = max(known + 1, least, 1)
    if len(tokens) < first or not _holds(tokens, stop, decode):
        return None
    lengths = range(first, len(tokens) + 1)
    return next((n for n in lengths if _holds(tokens[:n], stop, decode)), None)


def _holds(tokens: Sequence[int], stop: tuple[str, ...], decode: Decode) -> bool:
    text = decode(list(tokens))
    return any(string in text for string in stop)
