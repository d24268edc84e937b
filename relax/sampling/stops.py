"""The end of a completion: one rule for every algorithm and program.

A completion ends at the first of
1. an end token, one of `eos_token_ids`: it is the completion's last token;
2. a stop string in its text: the token that completes the string is its last token. The text is
   that of all tokens, special ones included, so that a stop string may be, or contain, a special
   token of the tokenizer, and one that is ends the completion at that token;
3. its limit of tokens.

Neither of the first two counts before `min_new_tokens`. Stop strings are looked for on the host,
after each segment; what a row has drawn past the end is dropped.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]


def stop_decoder(tokenizer) -> Decode:
    """The function from ids to the text that stop strings are looked for in.

    Special tokens are a part of it. A completion that is shown or scored is decoded elsewhere,
    mostly without them.
    """

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    return decode


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
      least: the fewest tokens of a completion.
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
