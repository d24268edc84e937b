"""Chat templates, against `apply_chat_template` of transformers, on all templates that TRL has."""

from pathlib import Path

import numpy as np
import trl
from jinja2 import TemplateError

from relax.data import arithmetic_tokenizer
from relax.data.encode import Encoder
from relax.data.formats import FormatOptions, find_format
from relax.data.templates import ChatRenderer, Job
from relax.errors import DataError

SECTION = "Chat templates"
TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
USER = {"role": "user", "content": "How wide is it?"}
ANSWER = {"role": "assistant", "content": "Nine metres."}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "depth",
        "description": "Depth of a port.",
        "parameters": {
            "type": "object",
            "properties": {"port": {"type": "string", "description": "Its name."}},
            "required": ["port"],
        },
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "depth", "arguments": {"port": "Brest"}}}
    ],
}
RESULT = {"role": "tool", "name": "depth", "content": "9"}
CASES = {
    "one turn": ([USER, ANSWER], None),
    "system and two turns": ([SYSTEM, USER, ANSWER, USER, ANSWER], None),
    "thoughts": ([USER, ANSWER | {"reasoning_content": "It says 9."}], None),
    "tools": ([USER, CALL, RESULT, ANSWER], [TOOL]),
}


def tokenizer_with(template):
    tokenizer = arithmetic_tokenizer()
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokenizer.bos_token = "<system>"  # templates write it
    return tokenizer


def theirs(tokenizer, messages, tools, **options):
    """The text, or None where the template refuses the messages."""
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
    except (TemplateError, TypeError, ValueError, KeyError):
        return None


def ours(tokenizer, messages, tools, add_generation_prompt=False):
    job = Job(messages, {"tools": tools}, "row", add_generation_prompt)
    try:
        return ChatRenderer(tokenizer).texts([job])[0]
    except DataError:
        return None


def in_parts(messages):
    """Contents as image models' templates want them."""
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


# Templates of image models that leave out contents which are texts.
PARTS = ("idefics3", "smolvlm")


def is_of_parts(template):
    return template.name.startswith(PARTS)


def renderings(templates, form=lambda messages: messages):
    """Ours and theirs of all cases that transformers does not refuse, by case."""
    pairs = {name: ([], []) for name in CASES}
    for template in templates:
        tokenizer = tokenizer_with(template)
        for name, (messages, tools) in CASES.items():
            for prompt in (False, True):
                wanted = theirs(tokenizer, form(messages), tools, add_generation_prompt=prompt)
                if wanted is not None:
                    found = ours(tokenizer, messages, tools, prompt)
                    pairs[name][0].append(f"{template.name}: {found}")
                    pairs[name][1].append(f"{template.name}: {wanted}")
    return pairs


def check_texts(parity):
    chosen = [template for template in TEMPLATES if not is_of_parts(template)]
    for name, pair in renderings(chosen).items():
        what = f"{len(pair[1])} texts of {name}"
        parity.equal(f"{len(chosen)} templates of TRL", "transformers", what, *pair)


def check_templates_of_image_models(parity):
    chosen = [template for template in TEMPLATES if is_of_parts(template)]
    plain, explained = renderings(chosen), renderings(chosen, in_parts)
    parity.departs(
        f"{len(chosen)} templates of image models in TRL ({', '.join(PARTS)})",
        "transformers",
        "texts",
        *plain["one turn"],
        "These templates render contents that are lists of parts. ReLax gives them parts; "
        "transformers leaves out contents that are texts, without a word.",
        explained=explained["one turn"][1],
    )


def check_assistant_masks(parity):
    marked = [t for t in TEMPLATES if t.name.endswith("_training.jinja") and not is_of_parts(t)]
    mine, wanted = [], []
    for template in marked:
        tokenizer = tokenizer_with(template)
        for messages, tools in CASES.values():
            if theirs(tokenizer, messages, tools) is None:
                continue
            other = tokenizer.apply_chat_template(
                messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
            )
            row = {"messages": messages, "tools": tools}
            options = FormatOptions(assistant_only_loss=True)
            found = find_format(row, "row", options, tuple(row))
            (encoded,) = Encoder(tokenizer, found, options).encode([row], lambda i: "row")
            mine.append((encoded.input_ids, encoded.labels != -100))
            wanted.append((np.array(other["input_ids"]), np.array(other["assistant_masks"]) == 1))
    what = f"`assistant_only_loss`, {len(marked)} templates of TRL"
    for i, name in enumerate(("tokens", "assistant mask")):
        name = f"{name} of {len(mine)} renderings"
        parity.equal(what, "transformers", name, [m[i] for m in mine], [w[i] for w in wanted])
