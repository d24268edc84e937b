"""`relax gguf FILE DIR`: convert a GGUF file to a Hugging Face model directory."""

import argparse
import sys
from collections.abc import Sequence

from relax.errors import RelaxError


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts a file; returns 0, or 2 if it cannot be converted."""
    options = _parser().parse_args(arguments)
    from relax.tools.gguf.convert import convert_gguf

    try:
        tokenizer = convert_gguf(options.file, options.directory, options.dtype)
    except RelaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"the model is in '{options.directory}'")
    if not tokenizer:
        print("the file has no tokenizer: copy the files of one into the directory")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="relax gguf",
        description="Convert a GGUF file of a Llama, Qwen or Gemma model to a Hugging Face model "
        "directory: config, weights, tokenizer and generation config.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="the .gguf file; needs the gguf extra")
    parser.add_argument("directory", metavar="DIR", help="path of the new model directory")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="precision of the written weights; float32 (default) is exact",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
