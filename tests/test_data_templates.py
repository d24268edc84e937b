"""Chat templates: limits, what they leave out, and tokens at the edges of texts."""

import threading

import pytest
from test_data_prepare import CHATML, bot, byte_tokenizer, marked, user
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from relax.data import FormatOptions, Limits, prepare, prepare_preferences
from relax.data.prompts import prepare_prompts
from relax.data.templates import ChatRenderer, Job
from relax.errors import ConfigError, DataError

CHAT = [user("Hi"), bot("Yo")]
SMALL = Limits(template_timeout_s=0.5, template_memory_mib=64)
SLOW = "{% for a in range(30000) %}{% for b in range(30000) %}{% endfor %}{% endfor %}"
LONG = "{% for a in range(2000) %}0123456789{% endfor %}"
LARGE = "{{ ('x' * 100000000) | length }}"


@pytest.mark.parametrize(
    "template, reason",
    [
        (SLOW, "takes longer than template_timeout_s=0.5 seconds.*--template_timeout_s"),
        (LONG, "renders 20,000 characters of .*template_output_ratio=64 times"),
        (LARGE, "needs more than template_memory_mib=64.*--template_memory_mib"),
    ],
)
def test_rendering_ends_at_its_limits_for_every_algorithm(template, reason):
    tokenizer = byte_tokenizer(template)
    with pytest.raises(DataError, match="row 0: the chat template " + reason):
        prepare([{"messages": CHAT}], tokenizer, FormatOptions(limits=SMALL))
    with pytest.raises(DataError, match="row 0: the chat template " + reason):
        prepare_prompts([{"prompt": CHAT[:1]}], tokenizer, limits=SMALL)
    pair = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [bot("No")]}
    with pytest.raises(DataError, match="row 0: the chat template " + reason):
        prepare_preferences([pair], tokenizer, limits=SMALL)


def test_an_end_token_of_preferences_is_checked_as_in_sft():
    tokenizer = byte_tokenizer()
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    chat = {name: [user("Hi"), bot(name)] for name in ("chosen", "rejected")}
    for rows, eos, error, reason in (
        ([pair], "<stop>", DataError, "eos_token '<stop>' is not a token of the tokenizer"),
        ([chat], "<|im_start|>", ConfigError, "eos_token ends plain texts; conversations end as"),
    ):
        with pytest.raises(error, match=reason):
            prepare_preferences(rows, tokenizer, eos_token=eos)


def test_limits_hold_in_other_threads_and_the_next_conversation_is_rendered():
    caught = []

    def render(template):
        try:
            caught.append(ChatRenderer(byte_tokenizer(template), SMALL).texts([Job(CHAT, {}, "x")]))
        except DataError as error:
            caught.append(str(error))

    for template in (SLOW, "{{ messages[0].content }}"):
        thread = threading.Thread(target=render, args=(template,))
        thread.start()
        thread.join()
    assert "takes longer" in caught[0] and caught[1] == ["Hi"]


def test_what_is_rendered_equals_transformers():
    tokenizer = byte_tokenizer(CHATML)
    jobs = [Job(CHAT[: 1 + i % 2], {}, f"row {i}", bool(i % 3)) for i in range(200)]
    for job, text in zip(jobs, ChatRenderer(tokenizer).texts(jobs), strict=True):
        assert text == tokenizer.apply_chat_template(
            job.messages, tokenize=False, add_generation_prompt=job.add_generation_prompt
        )


def test_what_a_template_leaves_out_is_counted_for_every_algorithm():
    tokenizer = byte_tokenizer(
        "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    function = {"name": "at", "arguments": {}}
    asked = [{"role": "system", "content": "Be kind"}, user("?")]
    row = {
        "messages": [
            *asked,
            {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
            bot("so") | {"reasoning_content": "because", "function_call": function},
        ],
        "tools": [{"type": "function", "function": {"name": "at", "parameters": {}}}],
    }
    notes = prepare([row, {"messages": CHAT}], tokenizer)[1].notes
    for name in ("tool_calls", "function_call", "tools", "reasoning_content", "system messages"):
        said = f"the chat template does not render the {name} of 1 rows: first row 0"
        assert any(note.startswith(said) for note in notes), name
    assert any("system messages of 1" in n for n in prepare_prompts(
        [{"prompt": asked}], tokenizer).notes)  # fmt: skip
    pair = {"prompt": asked, "chosen": [bot("a")], "rejected": [bot("b")]}
    assert any("system messages of 1" in n for n in prepare_preferences(
        [pair], tokenizer)[1].notes)  # fmt: skip
    assert prepare([{"messages": CHAT}], tokenizer)[1].notes == ()


# Tokens at the edges


def edged(template=None, header=None):
    """One token per byte, with <s> before every text and </s> behind it, as some models have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>", *([header] if header else [])])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **names)


def test_a_text_has_one_beginning_and_one_end_token_and_a_prompt_no_end():
    tokenizer = edged()
    for prompt in ("1+1=", "<s>1+1="):
        row = {"prompt": prompt, "completion": "2"}
        (example,) = prepare([row], tokenizer)[0]
        assert marked(example, tokenizer) == "<s>1+1=«2</s>»"
        (ids,) = prepare_prompts([{"prompt": prompt}], tokenizer).prompt_ids
        assert tokenizer.decode(ids) == "<s>1+1="
        pair = {"prompt": prompt, "chosen": "2", "rejected": "3</s>"}
        (item,) = prepare_preferences([pair], tokenizer)[0].items
        assert [tokenizer.decode(part) for part in item[:3]] == ["<s>1+1=", "2</s>", "3</s>"]
    (example,) = prepare([{"text": "<s>ab"}], tokenizer)[0]
    assert marked(example, tokenizer) == "<s>«ab</s>»"


def test_a_header_token_that_takes_the_space_behind_it_is_not_trained():
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<bot>{% generation %} "
        "{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = edged(template, AddedToken("<bot>", rstrip=True))
    examples, _ = prepare([{"messages": CHAT}], tokenizer, FormatOptions(assistant_only_loss=True))
    assert marked(examples[0], tokenizer) == "Hi<bot>«Yo</s>»"


def test_a_pair_whose_prompt_merges_into_its_answer_is_trained_on_as_in_sft():
    tokenizer = byte_tokenizer(merges=[("p", "s")])
    rows = [
        {"prompt": "p", "chosen": "same", "rejected": "other"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ]
    found, report = prepare_preferences(rows, tokenizer)
    first = found.items[0]
    assert (len(found), report.merged, first.prompt.tolist()) == (2, 1, [])
    (example,) = prepare([{"prompt": "p", "completion": "same"}], tokenizer)[0]
    assert first.chosen.tolist() == example.input_ids.tolist()


REWRITING = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>{% else %}{{ m.content }};{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant:<think>{% endif %}"
)


def test_all_algorithms_take_what_prompt_and_whole_begin_with_as_the_prompt():
    """The generation prompt of DeepSeek's and Qwen's templates opens a thought (TRL 1.16)."""
    tokenizer = byte_tokenizer(REWRITING)
    asked, answer = [user("Hi")], [bot("why</think>Yo")]
    (example,), report = prepare([{"prompt": asked, "completion": answer}], tokenizer)
    assert marked(example, tokenizer) == "user:Hi;assistant:«Yo<|im_end|>»" and report.merged == 1
    pair = {"prompt": asked, "chosen": answer, "rejected": [bot("No")]}
    (item,) = prepare_preferences([pair], tokenizer)[0].items
    unpaired = [
        {"prompt": asked, "completion": answer, "label": True},
        {"prompt": [user("Ho")], "completion": answer, "label": True},
    ]
    kto = prepare_preferences(unpaired, tokenizer, unpaired=True)[0].items[0]
    for found in (item, kto):
        assert tokenizer.decode(found.prompt) == "user:Hi;assistant:"
        assert tokenizer.decode(found.chosen) == "Yo<|im_end|>"


def test_kto_never_compares_with_an_answer_to_the_same_prompt():
    tokenizer = byte_tokenizer()
    pairs = [
        {"prompt": prompt, "chosen": prompt + good, "rejected": prompt + "bad"}
        for prompt, good in (("a", "1"), ("b", "2"), ("b", "3"), ("a", "4"))
    ]
    items = prepare_preferences(pairs, tokenizer, unpaired=True)[0].items
    assert len(items) == 8
    for item in items:
        own, other = (tokenizer.decode(ids) for ids in (item.chosen, item.rejected))
        assert own[0] != other[0]
        assert ("bad" in own) == ("bad" in other)  # the partner is of the same label
