"""Data: reading rows, turning them into tokens and labels, packing and batching them."""

from relax.data.arithmetic import arithmetic_rows
from relax.data.batching import bucket_lengths, collate
from relax.data.examples import IGNORE, Encoded, Examples
from relax.data.formats import FormatOptions
from relax.data.limits import Limits
from relax.data.loader import DataLoader
from relax.data.mixing import Mixture
from relax.data.packing import pack
from relax.data.preference import Preferences, prepare_preferences
from relax.data.preference_loader import PreferenceLoader
from relax.data.prepare import prepare
from relax.data.prompt_loader import PromptLoader
from relax.data.prompts import Prompts, prepare_prompts
from relax.data.reading import Rows, read_rows
from relax.data.report import DataReport, render
from relax.data.stream import StreamLoader
from relax.data.tokenizer import adapt_tokenizer, arithmetic_tokenizer, load_tokenizer

__all__ = [
    "IGNORE",
    "DataLoader",
    "DataReport",
    "Encoded",
    "Examples",
    "FormatOptions",
    "Limits",
    "Mixture",
    "PreferenceLoader",
    "Preferences",
    "PromptLoader",
    "Prompts",
    "Rows",
    "StreamLoader",
    "adapt_tokenizer",
    "arithmetic_rows",
    "arithmetic_tokenizer",
    "bucket_lengths",
    "collate",
    "load_tokenizer",
    "pack",
    "prepare",
    "prepare_preferences",
    "prepare_prompts",
    "read_rows",
    "render",
]
