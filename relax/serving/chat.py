"""Token ids of chats and texts, by the model's own chat template."""

import re
from collections.abc import Sequence

from relax.data import Limits, prepare_prompts
from relax.data.tokens import tokenize
from relax.data.tool_calls import tool_format
from relax.errors import DataError
from relax.serving.errors import ApiError

_WHERE = re.compile(r"^[^:]{1,40}: ")  # the place of the row, which is no place of the client's
# What the errors of data sets advise, with flags and rows that the client does not have.
_ADVICE = re.compile(r": (?:leave|flatten|split) the row.*|: use another one \(--.*", re.DOTALL)
_WORDS = {"the chat template refuses the row": "the chat template refuses the request"}
_WORDS |= {"models are trained on text parts only": "text parts only are read"}
_DROPPED = re.compile(r"the chat template does not render the (.+) of 1 rows")


class PromptEncoder:
    """Encodes prompts of requests. One thread at a time may use it.

    Args:
      tokenizer: a Hugging Face tokenizer.
      vocab_size: rows of the model's embedding.
      limits: on messages and rendering.
    """

    def __init__(self, tokenizer, vocab_size: int, limits: Limits):
        self.tokenizer, self.vocab_size, self.limits = tokenizer, vocab_size, limits

    def chat(self, messages: list[dict], tools: list[dict], kwargs: dict) -> list[int]:
        """The ids of a chat, up to the header of the assistant's turn.

        Raises:
          ApiError: the messages cannot be rendered, or the template leaves something out.
        """
        if not self.tokenizer.chat_template:
            raise ApiError(
                400,
                "the model has no chat template: send texts to /v1/completions, or start the "
                "server with --chat_template_path.",
                "messages",
            )
        row: dict = {"prompt": messages}
        if tools:
            row["tools"] = tools
        if kwargs:
            row["chat_template_kwargs"] = kwargs
        try:
            prompts = self._prepared(row)
        except (DataError, RecursionError) as error:
            raise ApiError(400, _for_clients(str(error)), self._wrong_field(row)) from None
        for note in prompts.notes:
            found = _DROPPED.match(note)
            if found and found.group(1) != "reasoning_content":
                what = found.group(1)
                param = "tools" if what == "tools" else "messages"
                message = f"the model's chat template does not render {what}."
                raise ApiError(400, message, param)
        return prompts.prompt_ids[0]

    def _prepared(self, row: dict):
        return prepare_prompts(
            [row], self.tokenizer, vocab_size=self.vocab_size, limits=self.limits
        )

    def _wrong_field(self, row: dict) -> str:
        """The field without which a refused row is rendered; if there is none, the messages."""
        for name in ("tools", "chat_template_kwargs"):
            if name not in row:
                continue
            try:
                self._prepared({k: v for k, v in row.items() if k != name})
            except (DataError, RecursionError):
                continue
            return name
        return "messages"

    def tool_format(self, tools: Sequence[dict]) -> str | None:
        """The format of tool calls; None without tools, unless it has channels.

        Raises:
          ApiError: the template's format is not known.
        """
        template = self.tokenizer.chat_template
        if isinstance(template, dict):  # by name
            template = template.get("tool_use") or template.get("default")
        format = tool_format(template)
        if not tools:
            return format if format == "gpt_oss" else None
        if format is None:
            message = "the model's chat template writes no tool calls in a format that is known."
            raise ApiError(400, message, "tools")
        return format

    def text(self, prompt: str | list[int]) -> list[int]:
        """The ids of a text with the tokenizer's special tokens, or the checked ids.

        Raises:
          ApiError: there is no token, or one that the model lacks.
        """
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError:
                message = "prompt must be text of whole characters, got half of a surrogate pair."
                raise ApiError(400, message, "prompt") from None
            (ids,) = tokenize(self.tokenizer, [prompt], special=True)
        else:
            ids = prompt
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong or not ids:
            got = f"got {wrong[0]}" if wrong else "got no token"
            message = f"prompt must hold token ids from 0 to {self.vocab_size - 1}, {got}."
            raise ApiError(400, message, "prompt")
        return list(map(int, ids))


def _for_clients(message: str) -> str:
    """An error of a data set's row in the words of a request."""
    message = _ADVICE.sub(".", _WHERE.sub("", message))
    for words, others in _WORDS.items():
        message = message.replace(words, others)
    message = re.sub(r"\bprompt\[(?=\d)", "messages[", message)
    return message if message.endswith((".", "!", "?")) else f"{message}."
