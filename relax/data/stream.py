"""Batches of rows that come in a stream, which may have no end."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np

from relax.data.ahead import in_lists
from relax.data.batching import bucket, collate
from relax.data.conversion import with_known_columns
from relax.data.encode import CHUNK, Encoder
from relax.data.examples import Encoded, Examples
from relax.data.formats import FormatOptions, check_row, find_format
from relax.data.normalize import normal_row
from relax.data.reading import Rows
from relax.data.tokens import ending_ids
from relax.data.truncation import Truncator
from relax.errors import ConfigError, DataError

_WORDS = 1024  # random numbers that are drawn together


class StreamLoader:
    """Batches of `batch_size` tokenised rows of a stream, in the memory of a buffer of rows.

    A buffer is filled with rows; the next row is one of them at random, and the next of the stream
    takes its place, so that a row comes at most about so much earlier as the buffer is long. The
    order is a function of the stream and the seed, and a run resumes exactly if the stream gives
    the same rows again: they are read again up to the place. Rows without a trained token are left
    out and counted. A last batch that is not full is dropped if the stream ends.

    Args:
      make_rows: begins the stream anew: a function without arguments that returns an iterable of
        dicts, all in one format of `prepare`.
      tokenizer: a Hugging Face tokenizer.
      batch_size: rows per update.
      options: options for encoding; `max_length` must be set.
      buffer_size: rows in the buffer, >= 1; 1 keeps the order of the stream.
      seed: seed of the order, >= 0.
      vocab_size: rows of the model's embedding; None: not checked.

    Attributes:
      num_dropped: rows left out since the stream began last.

    >>> from relax.data import arithmetic_tokenizer
    >>> def sums():
    ...     for n in itertools.count():
    ...         yield {"prompt": f"{n}+1=", "completion": str(n + 1)}
    >>> loader = StreamLoader(sums, arithmetic_tokenizer(), 4, options=FormatOptions(max_length=32))
    >>> next(iter(loader))["input_ids"].shape
    (4, 12)
    """

    def __init__(
        self,
        make_rows: Callable[[], Iterable[dict]],
        tokenizer,
        batch_size: int,
        *,
        options: FormatOptions,
        buffer_size: int = 1000,
        seed: int = 0,
        vocab_size: int | None = None,
    ):
        if options.max_length is None:
            raise ConfigError("the rows of a stream need a max_length: not all of them are known.")
        if batch_size < 1 or buffer_size < 1 or seed < 0:
            raise ConfigError(
                "batch_size and buffer_size must be at least 1 and seed at least 0, got "
                f"{batch_size}, {buffer_size} and {seed}."
            )
        self.make_rows, self.tokenizer, self.batch_size = make_rows, tokenizer, batch_size
        self.options, self.buffer_size, self.seed = options, buffer_size, seed
        self.vocab_size, self.num_dropped = vocab_size, 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        self.num_dropped = 0
        for examples in in_lists(self._examples(), self.batch_size):
            if len(examples) == self.batch_size:
                longest = max(len(example.input_ids) for example in examples)
                yield collate([[example] for example in examples], bucket(longest))

    def _examples(self) -> Iterator[Encoded]:
        rows = self._numbered()
        first = next(rows, None)
        if first is None:
            raise DataError("the stream has no rows.")
        with_template = bool(self.tokenizer.chat_template)
        field = self.options.text_field
        convert = partial(with_known_columns, conversational=with_template, text_field=field)
        example = convert(Rows([first[1]], lambda i: _name(first[0]))).rows[0]
        found = find_format(example, _name(first[0]), self.options)
        encoder = Encoder(self.tokenizer, found, self.options)
        ends = ending_ids(self.tokenizer)
        shuffled = self._shuffled(itertools.chain([first], rows))
        for some in in_lists(shuffled, max(min(CHUNK, self.buffer_size), self.batch_size)):
            numbers = [number for number, _ in some]

            def origin(i: int, numbers=numbers) -> str:
                return _name(numbers[i])

            part = convert(Rows([row for _, row in some], origin))
            for i, row in enumerate(part.rows):
                check_row(row, found, origin(i))
            fate = Truncator(part, self.options, self.vocab_size, ends)
            yield from Examples.of_blocks(fate.keep(encoder.encode(part.rows, origin)))
            self.num_dropped += sum(fate.dropped.values())

    def _numbered(self) -> Iterator[tuple[int, dict]]:
        for number, row in enumerate(self.make_rows()):
            if not isinstance(row, dict):
                raise DataError(f"{_name(number)}: is a {type(row).__name__}, not a dict.")
            yield number, normal_row(row, _name(number), self.options.limits, set())

    def _shuffled(self, rows: Iterator[tuple[int, dict]]) -> Iterator[tuple[int, dict]]:
        buffer = list(itertools.islice(rows, self.buffer_size))
        places = _random_words(self.seed)
        for row in rows:
            place = next(places) % len(buffer)
            yield buffer[place]
            buffer[place] = row
        while buffer:  # the stream has ended
            yield buffer.pop(next(places) % len(buffer))


def _name(number: int) -> str:
    return f"row {number} of the stream"


def _random_words(seed: int) -> Iterator[int]:
    """64-bit numbers; numpy keeps the raw stream of a bit generator in every version."""
    generator = np.random.PCG64(np.random.SeedSequence([seed, 0]))
    while True:
        yield from generator.random_raw(_WORDS).tolist()
