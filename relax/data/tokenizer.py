"""Tokenizers: from a directory or a hub name, or the small one of the demo run."""

from pathlib import Path

from relax.errors import CONVERT_FIRST, DataError, ModelLoadError
from relax.files import TEMPLATE_BYTES, check_directory, check_size

# One token per role, so an arithmetic example has about ten tokens.
_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ '<system>' + message['content'] }}
{%- elif message['role'] == 'user' -%}{{ '<user>' + message['content'] }}
{%- elif message['role'] == 'assistant' -%}{{ '<assistant>' }}
{%- generation -%}{{ message['content'] + '<eos>' }}{%- endgeneration -%}
{%- else -%}{{ raise_exception('unknown role ' + message['role']) }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}"""


def load_tokenizer(path, chat_template_path=None, eos_token: str | None = None):
    """Loads a Hugging Face tokenizer; none of the model's own code is executed.

    Args:
      path: a directory or a hub name.
      chat_template_path: a tokenizer directory or a `.jinja` file with another chat template.
      eos_token: the token that ends a text or a turn, if not the tokenizer's own.

    Raises:
      ModelLoadError: if there is no tokenizer.
      DataError: if the template or the end token does not exist.
    """
    if str(path).lower().endswith(".gguf") and not Path(path).is_dir():
        raise ModelLoadError(CONVERT_FIRST.format(path=path))
    if Path(path).is_dir():
        check_directory(path)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        tokenizer.decode(tokenizer("a")["input_ids"])  # some damage shows only here
    except BaseException as error:  # a damaged directory may raise anything
        # A panic of the Rust library is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelLoadError(
            f"no tokenizer in {str(path)!r}: {_first_line(error)} A model directory needs "
            "tokenizer.json and tokenizer_config.json, a hub name needs a network."
        ) from error
    return adapt_tokenizer(tokenizer, chat_template_path, eos_token)


def adapt_tokenizer(tokenizer, chat_template_path=None, eos_token: str | None = None):
    """Replaces a tokenizer's chat template and end token if given; see `load_tokenizer`."""
    if chat_template_path is not None:
        tokenizer.chat_template = _read_template(Path(chat_template_path))
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise DataError(f"eos_token {eos_token!r} is not a token of the tokenizer.")
        tokenizer.eos_token = eos_token
    return tokenizer


def arithmetic_tokenizer():
    """The tokenizer of the demo run: one token per byte, so there is no unknown text.

    It has 261 tokens: `<pad>`, `<eos>`, one per role (`<system>`, `<user>`, `<assistant>`), then
    the 256 bytes. Its chat template marks the assistant's turns, for `assistant_only_loss`.

    >>> tokenizer = arithmetic_tokenizer()
    >>> len(tokenizer("27+45=é")["input_ids"])
    8
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<system>", "<user>", "<assistant>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=special[2:],
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _read_template(path: Path) -> str:
    if path.is_dir():
        check_directory(path)
        template = path / "chat_template.jinja"
        if not template.is_file():
            found = load_tokenizer(path).chat_template
            if not isinstance(found, str):
                raise DataError(f"the tokenizer in {str(path)!r} has no chat template.")
            return found
        path = template
    try:
        check_size(path, TEMPLATE_BYTES)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read a chat template from {str(path)!r}: {error}. "
            "chat_template_path is a .jinja file or a tokenizer directory."
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
