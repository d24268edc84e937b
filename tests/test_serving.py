"""The endpoint over HTTP: answers are the sampler's, and bad requests are told what is wrong."""

import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from relax import data  # noqa: E402
from relax.models import Transformer  # noqa: E402
from relax.models.config import TransformerConfig  # noqa: E402
from relax.sampling import Requests, SamplingConfig, generate, stop_decoder  # noqa: E402
from tests.serving import (  # noqa: E402
    TOOLS_TEMPLATE,
    Scripted,
    call,
    chat,
    connect,
    events,
    serving,
    together,
)

EOS = 1
USER = [{"role": "user", "content": "2+2="}]
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}


@pytest.fixture(scope="module")
def tokenizer():
    return data.arithmetic_tokenizer()


@pytest.fixture(scope="module")
def policy():
    """A model of one layer, and its parameters."""
    config = TransformerConfig(
        vocab_size=261,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    model = Transformer(config)
    return model, jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 8), jnp.int32))["params"]


@pytest.fixture(scope="module")
def url(policy, tokenizer):
    sampler = Requests(*policy, (EOS,), stop_decoder(tokenizer), slots=4, segment=4)
    with serving(sampler, tokenizer) as (url, _):
        yield url


def scripted(text, template=TOOLS_TEMPLATE, **options):
    tokenizer = data.arithmetic_tokenizer()
    tokenizer.chat_template = template
    return Scripted(tokenizer, text, **options), tokenizer


def greedy(policy, tokenizer, prompt, most):
    config = SamplingConfig(max_new_tokens=most, temperature=0.0, eos_token_ids=(EOS,))
    out = generate(*policy, [prompt], jax.random.key(0), config)
    return out.completions[0], out.finish_reasons[0]


def chat_ids(tokenizer):
    return data.prepare_prompts([{"prompt": USER}], tokenizer).prompt_ids[0]


def test_greedy_answers_are_those_of_generate(url, policy, tokenizer):
    prompt = chat_ids(tokenizer)
    ids, reason = greedy(policy, tokenizer, prompt, 20)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    finish = {"eos": "stop", "length": "length"}[reason]
    status, found = chat(url, temperature=0, max_tokens=20)
    assert status == 200 and found["object"] == "chat.completion" and found["model"] == "tiny"
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == finish and choice["logprobs"] is None
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
    usage |= {"prompt_tokens_details": {"cached_tokens": 0}}
    assert found["usage"] == usage | {"total_tokens": len(prompt) + len(ids)}
    for sent in (tokenizer.decode(prompt), prompt):
        body = {"prompt": sent, "temperature": 0, "max_tokens": 20}
        status, found = call(url, "/v1/completions", body)
        assert status == 200 and found["object"] == "text_completion"
        assert found["choices"][0]["text"] == text
        assert found["usage"]["completion_tokens"] == len(ids)


def test_the_next_turn_of_a_chat_is_continued_and_usage_says_so(policy, tokenizer):
    sampler = Requests(
        *policy, (EOS,), stop_decoder(tokenizer), slots=4, segment=4, prefix_caching=True
    )
    with serving(sampler, tokenizer) as (url, _):
        user = {"role": "user", "content": "2+2=3+3=4+4="}
        _, first = chat(url, temperature=0, max_tokens=8, messages=[user])
        said = first["choices"][0]["message"]["content"]
        messages = [user, {"role": "assistant", "content": said}, user]
        _, second = chat(url, temperature=0, max_tokens=8, messages=messages)
    asked = first["usage"]["prompt_tokens"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= asked
    assert sampler.prefilled_tokens < second["usage"]["prompt_tokens"]


def test_a_stream_is_the_same_answer_in_pieces(url):
    fields = {"max_tokens": 12, "seed": 7, "n": 2, "logprobs": True, "top_logprobs": 2}
    _, whole = chat(url, **fields)
    body = {"messages": USER, "stream_options": {"include_usage": True}} | fields
    chunks = events(url, "/v1/chat/completions", body)
    *choices, last = chunks
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    for i, expected in enumerate(whole["choices"]):
        mine = [c["choices"][0] for c in choices if c["choices"][0]["index"] == i]
        text = "".join(c["delta"].get("content", "") for c in mine)
        logprobs = [t for c in mine if c["logprobs"] for t in c["logprobs"]["content"]]
        assert text == expected["message"]["content"]
        assert logprobs == expected["logprobs"]["content"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [
            expected["finish_reason"]
        ]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}


def test_streamed_texts_are_the_same_answer_too(url):
    body = {"prompt": ["1+1=", "3"], "max_tokens": 9, "seed": 1, "logprobs": 1}
    _, whole = call(url, "/v1/completions", body)
    chunks = events(url, "/v1/completions", body)
    for i, expected in enumerate(whole["choices"]):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        assert "".join(c["text"] for c in mine) == expected["text"]
        for name, values in expected["logprobs"].items():
            assert [v for c in mine for v in c["logprobs"][name]] == values, name


def test_logprobs_are_the_models(url, policy, tokenizer):
    body = {"prompt": "12+34=", "temperature": 0, "max_tokens": 6, "logprobs": 3, "echo": True}
    _, found = call(url, "/v1/completions", body)
    (choice,) = found["choices"]
    prompt = tokenizer("12+34=")["input_ids"]
    ids, _ = greedy(policy, tokenizer, prompt, 6)
    shown = [*prompt, *(ids[:-1] if ids[-1] == EOS else ids)]
    model, params = policy
    logits = model.apply({"params": params}, jnp.array([shown]))[0]
    expected = np.asarray(jax.nn.log_softmax(logits))
    logprobs = choice["logprobs"]
    assert choice["text"].startswith("12+34=")
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert len(logprobs["tokens"]) == len(shown) == len(logprobs["text_offset"])
    for i, token in enumerate(shown[1:], 1):
        assert logprobs["token_logprobs"][i] == pytest.approx(expected[i - 1, token], abs=1e-4)
        top = sorted(logprobs["top_logprobs"][i].values(), reverse=True)
        assert top[0] == pytest.approx(expected[i - 1].max(), abs=1e-4)
    _, alone = call(url, "/v1/completions", body | {"max_tokens": 0})
    assert alone["choices"][0]["text"] == "12+34="
    first = logprobs["token_logprobs"][: len(prompt)]
    assert alone["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(first)
    # The tokens' bytes, one each in this tokenizer, make up the text.
    _, found = chat(url, temperature=0, max_tokens=6, logprobs=True)
    entries = found["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in entries)
    if all(entry["bytes"] for entry in entries):
        text = bytes(b for entry in entries for b in entry["bytes"]).decode()
        assert text == found["choices"][0]["message"]["content"]


def test_a_seed_gives_the_same_text_whatever_other_clients_do(url):
    def ask(i):
        fields = {"seed": i % 3, "max_tokens": 30 + 10 * (i >= 3), "temperature": 1.3}
        return chat(url, **fields)[1]["choices"][0]["message"]["content"]

    alone = [ask(i) for i in range(3)]
    beside = together(ask, 9)
    assert beside[:3] == alone
    for i, text in enumerate(beside):
        assert text.startswith(alone[i % 3])
    assert len(set(alone)) == 3
    several = chat(url, seed=1, n=2, max_tokens=30, temperature=1.3)[1]["choices"]
    assert several[0]["message"]["content"] == alone[1] != several[1]["message"]["content"]
    assert chat(url, seed=-(2**63), max_tokens=3)[0] == 200


def test_a_stop_string_is_no_part_of_the_answer_and_never_streamed():
    sampler, tokenizer = scripted("one END two", step=4)
    with serving(sampler, tokenizer) as (url, endpoint):
        # The script knows no stop strings; the sampler that does is tested elsewhere.
        chunks = events(url, "/v1/chat/completions", {"messages": USER, "stop": "END"})
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        assert text == "one "
        assert chat(url, stop=["x", "END"])[1]["choices"][0]["message"]["content"] == "one "


CALL = '<tool_call>{"name": "add", "arguments": {"a": "\N{EURO SIGN}"}}</tool_call>'


def test_a_tool_call_is_parsed_whole_and_streamed():
    sampler, tokenizer = scripted(f"Let me see. {CALL}{CALL}")
    with serving(sampler, tokenizer) as (url, _):
        (choice,) = chat(url, tools=[TOOL])[1]["choices"]
        assert choice["finish_reason"] == "tool_calls"
        message = choice["message"]
        assert message["content"] == "Let me see."
        function = {"name": "add", "arguments": '{"a": "\N{EURO SIGN}"}'}
        assert [(c["type"], c["function"]) for c in message["tool_calls"]] == [
            ("function", function)
        ] * 2
        assert len({c["id"] for c in message["tool_calls"]}) == 2
        body = {"messages": USER, "tools": [TOOL]}
        deltas = [c["choices"][0] for c in events(url, "/v1/chat/completions", body)]
        assert "".join(d["delta"].get("content", "") for d in deltas).strip() == "Let me see."
        (calls,) = [d["delta"]["tool_calls"] for d in deltas if "tool_calls" in d["delta"]]
        assert [(c["index"], c["function"]) for c in calls] == [(0, function), (1, function)]
        assert deltas[-1]["finish_reason"] == "tool_calls"
        # The whole conversation goes back, with the tool's answer.
        messages = [*USER, message, {"role": "tool", "tool_call_id": "x", "content": "4"}]
        assert call(url, "/v1/chat/completions", {"messages": messages, "tools": [TOOL]})[0] == 200
        # Without tools, or with tool_choice none, the text is text.
        for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}):
            (choice,) = chat(url, **fields)[1]["choices"]
            assert "tool_calls" not in choice["message"] and choice["finish_reason"] == "stop"
            assert choice["message"]["content"] == f"Let me see. {CALL}{CALL}"


def test_a_malformed_call_is_content():
    sampler, tokenizer = scripted('Hm. <tool_call>{"name": </tool_call>')
    with serving(sampler, tokenizer) as (url, _):
        (choice,) = chat(url, tools=[TOOL])[1]["choices"]
        assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]
        assert choice["message"]["content"] == 'Hm. <tool_call>{"name": </tool_call>'
        body = {"messages": USER, "tools": [TOOL]}
        deltas = [c["choices"][0]["delta"] for c in events(url, "/v1/chat/completions", body)]
        assert "".join(d.get("content", "") for d in deltas) == choice["message"]["content"]


BAD = [
    ({"messages": None}, "messages", "messages must hold at least one message"),
    ({"messages": []}, "messages", "messages must hold at least one message"),
    ({"messages": "hi"}, "messages", "messages must be a list of messages, got \"hi\""),
    ({"messages": [{"content": "x"}]}, "messages", "'role'"),
    ({"messages": [{"role": "user"}]}, "messages", "'content'"),
    ({"messages": [{"role": "martian", "content": "x"}]}, "messages", "unknown role martian"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages",
        "image_url",
    ),
    ({"temperature": -1}, "temperature", "temperature must be a number from 0 to 2, got -1."),
    ({"temperature": "hot"}, "temperature", 'got "hot"'),
    ({"temperature": float("nan")}, "temperature", "temperature must be a number"),
    ({"top_p": 0}, "top_p", "top_p must be above 0, got 0"),
    ({"top_p": 1.5}, "top_p", "top_p must be a number from 0 to 1"),
    ({"n": 0}, "n", "n must be an integer from 1 to 128, got 0."),
    ({"n": True}, "n", "got true"),
    ({"n": 1.5}, "n", "got 1.5"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens must be an integer from 1"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "are the same"),
    ({"max_tokens": 10**6}, "max_tokens", "do not fit the 128 positions of the model"),
    ({"stop": [""]}, "stop", "texts that are not empty"),
    ({"stop": ["a"] * 5}, "stop", "at most 4 texts"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    ({"seed": 2**63}, "seed", "seed must be an integer"),
    ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty must be 0 here, got 0.5."),
    ({"response_format": {"type": "json_object"}}, "response_format", "json_object"),
    ({"tools": [{"type": "x"}]}, "tools", "tools[0] must be an object"),
    ({"tools": [TOOL]}, "tools", "the model's chat template does not render tools."),
    ({"tool_choice": "required"}, "tool_choice", "tool_choice must be auto or none here"),
    ({"stream_options": {}, "stream": False, "tempreature": 1}, "tempreature", "is not a field"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream true"),
    ({"messages": [{"role": "user", "content": "x" * 200}]}, "messages", "do not fit the 128"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "which rows cannot"),
    ({"chat_template_kwargs": {"x": "\ud800"}}, "chat_template_kwargs", "surrogate pair"),
    ({"tools": [TOOL | {"x": "\ud800"}]}, "tools", "surrogate pair"),
    ({"\ud800": 1}, "\N{REPLACEMENT CHARACTER}", "is not a field"),
    ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options", 'got "yes"'),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options", "true or false"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "message"), BAD)
def test_a_bad_chat_request_is_told_which_field_is_wrong(url, fields, param, message):
    status, found = chat(url, **fields)
    assert status == 400 and set(found) == {"error"}
    error = found["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        (b"{", 400, None, "the body must be JSON"),
        (b"[" * 4000, 400, None, "the body must be JSON"),
        (b"[1]", 400, None, "the body must be an object, got [1]."),
        ({}, 400, "prompt", "prompt must be a text"),
        ({"prompt": []}, 400, "prompt", "prompt must be a text"),
        ({"prompt": ""}, 400, "prompt", "got no token"),
        ({"prompt": [1, "a"]}, 400, "prompt", "prompt must be a text"),
        ({"prompt": [261]}, 400, "prompt", "token ids from 0 to 260, got 261"),
        ({"prompt": [-1]}, 400, "prompt", "got -1"),
        ({"prompt": "\ud800"}, 400, "prompt", "half of a surrogate pair"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "model", "there is no model 'gpt-4' here"),
        ({"prompt": "a", "echo": True, "stream": True}, 400, "echo", "not possible with stream"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix", "suffix must be empty here"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "from 1"),
        (b'{"prompt": "' + b"a" * 5000 + b'"}', 413, None, "may have 4000 bytes"),
    ],
)
def test_a_bad_text_request_too(policy, tokenizer, body, status, param, message):
    sampler, _ = scripted("a")
    with serving(sampler, tokenizer, max_body_bytes=4000) as (url, _):
        code, found = call(url, "/v1/completions", body)
        assert (code, found["error"]["param"]) == (status, param)
        assert message in found["error"]["message"]


def deep(levels):
    return {"x": deep(levels - 1)} if levels else 1


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"messages": [USER[0] | deep(70)]},
        {"tools": [TOOL | deep(70)]},
        {"messages": [{"role": "martian", "content": "x"}]},
    ],
)
def test_errors_of_chats_give_no_advice_on_data_sets(url, fields):
    status, found = chat(url, **fields)
    message = found["error"]["message"]
    assert status == 400 and message.endswith(".") and found["error"]["param"] == [*fields][0]
    assert not {"row", "rows", "trained"} & {*message.split()} and "--" not in message


def test_the_type_of_a_body_may_have_capitals(url):
    head = {"content-type": "Application/JSON; charset=utf-8"}
    body = {"prompt": "a", "max_tokens": 1}
    assert call(url, "/v1/completions", body, head)[0] == 200


def test_half_of_a_surrogate_pair_that_the_model_writes_is_replaced():
    text = r'<tool_call>{"name": "f", "arguments": {"x": "\ud83d"}}</tool_call>'
    sampler, tokenizer = scripted(text)
    with serving(sampler, tokenizer) as (url, _):
        status, found = chat(url, tools=[TOOL])
        assert status == 200
        (made,) = found["choices"][0]["message"]["tool_calls"]
        chunks = events(url, "/v1/chat/completions", {"messages": USER, "tools": [TOOL]})
    assert json.loads(made["function"]["arguments"]) == {"x": "\N{REPLACEMENT CHARACTER}"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    (calls,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["function"] == made["function"]


@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_a_prompt_alone_is_echoed_without_sampling(url, logprobs):
    """A prompt of all positions too, which leaves no room for a token."""
    body = {"prompt": [40] * 128, "echo": True, "max_tokens": 0, "logprobs": logprobs, "n": 2}
    status, found = call(url, "/v1/completions", body)
    assert status == 200
    usage = {"prompt_tokens": 128, "completion_tokens": 0, "total_tokens": 128}
    assert found["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": 0}}
    first, second = found["choices"]
    assert first["finish_reason"] == "length" and first == second | {"index": 0}
    if logprobs is not None:
        assert len(first["logprobs"]["token_logprobs"]) == 128
    status, found = call(url, "/v1/completions", body | {"prompt": [40] * 129})
    assert (status, found["error"]["param"]) == (400, "prompt")


def test_unknown_paths_methods_and_forms_get_the_form_of_errors(url):
    for path, body, status in (
        ("/v1/embeddings", {}, 404),
        ("/", None, 404),
        ("/v1/chat/completions", None, 405),
        ("/v1/models/other", None, 404),
        ("/v1/../../etc/passwd", None, 404),
    ):
        code, found = call(url, path, body)
        assert code == status and found["error"]["message"].endswith(".")
    # A page in a browser can send text without asking, but not JSON.
    head = {"content-type": "text/plain"}
    assert call(url, "/v1/completions", {"prompt": "a"}, head)[0] == 415


def test_a_model_without_a_chat_template_says_so():
    sampler, tokenizer = scripted("a", template=None)
    with serving(sampler, tokenizer) as (url, _):
        status, found = chat(url)
        assert status == 400 and "the model has no chat template" in found["error"]["message"]
        assert call(url, "/v1/completions", {"prompt": "a"})[0] == 200


def test_models_are_listed(url):
    status, found = call(url, "/v1/models")
    assert status == 200 and [m["id"] for m in found["data"]] == ["tiny"]
    assert call(url, "/v1/models/tiny")[1] == found["data"][0]
    assert found["data"][0]["max_model_len"] == 128
    assert call(url, "/health") == (200, {"status": "ok"})


def test_with_a_key_requests_must_bring_it():
    sampler, tokenizer = scripted("a")
    with serving(sampler, tokenizer, api_key="se cret") as (url, _):
        for value in (None, "Bearer", "Bearer wrong", "se cret", "Bearer se cret2"):
            head = {} if value is None else {"authorization": value}
            status, found = call(url, "/v1/models", headers=head)
            assert (status, found["error"]["code"]) == (401, "invalid_api_key")
        assert call(url, "/v1/models", headers={"authorization": "Bearer se cret"})[0] == 200
        assert call(url, "/health")[0] == 200


def test_without_a_key_requests_must_be_for_this_machine():
    sampler, tokenizer = scripted("a")
    with serving(sampler, tokenizer, local_only=True) as (url, _):
        port = url.rpartition(":")[2]
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
            assert call(url, "/v1/models", headers={"host": host})[0] == 403
        for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}"):
            assert call(url, "/v1/models", headers={"host": host})[0] == 200


def held(**options):
    """A server whose sampler waits for permissions."""
    sampler, tokenizer = scripted("x" * 60, slots=1, **options)
    sampler.permits = threading.Semaphore(0)
    return sampler, tokenizer


def until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it did not come to be within 60 s"
        time.sleep(0.01)


def test_beyond_slots_and_queue_requests_get_429():
    sampler, tokenizer = held()
    with serving(sampler, tokenizer, max_queue_size=1) as (url, endpoint):
        threads = []
        for load in (1, 2):
            threads.append(threading.Thread(target=chat, args=(url,)))
            threads[-1].start()
            until(lambda load=load: endpoint.worker.load == load)
        status, found = chat(url)
        assert (status, found["error"]["type"]) == (429, "rate_limit_error")
        assert found["error"]["code"] == "rate_limit_exceeded"
        sampler.permits.release(100)
        for thread in threads:
            thread.join()
        assert chat(url)[0] == 200 and endpoint.worker.load == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(stream):
    sampler, tokenizer = held()
    with serving(sampler, tokenizer) as (url, endpoint):
        gone = connect(url)
        body = json.dumps({"messages": USER, "stream": stream})
        gone.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        until(lambda: endpoint.worker.load == 1)
        gone.close()
        sampler.permits.release()
        until(lambda: endpoint.worker.load == 0)
        assert sampler.cancelled == 1
        sampler.permits.release(100)
        assert chat(url)[0] == 200


def test_an_error_of_the_model_is_told_and_the_server_goes_on():
    sampler, tokenizer = scripted("abc")
    advance, sampler.advance = sampler.advance, lambda: 1 / 0
    with serving(sampler, tokenizer) as (url, _):
        status, found = chat(url)
        assert (status, found["error"]["type"]) == (500, "server_error")
        assert "ZeroDivisionError" in found["error"]["message"]
        sampler.advance = advance
        assert chat(url)[0] == 200


def test_answers_under_way_end_when_the_server_does():
    sampler, tokenizer = held()
    found = []
    with serving(sampler, tokenizer) as (url, endpoint):
        thread = threading.Thread(target=lambda: found.append(chat(url)))
        thread.start()
        until(lambda: endpoint.worker.load == 1)
        sampler.permits.release(1)
    thread.join()
    ((status, body),) = found
    assert status == 503 and body["error"]["message"] == "the server is shutting down."


def test_the_openai_package_is_a_client(url, policy, tokenizer):
    openai = pytest.importorskip("openai")
    ids, _ = greedy(policy, tokenizer, chat_ids(tokenizer), 10)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        common = {"model": "tiny", "messages": USER, "temperature": 0, "max_completion_tokens": 10}
        found = client.chat.completions.create(**common, logprobs=True, top_logprobs=2)
        assert found.choices[0].message.content == text
        assert len(found.choices[0].logprobs.content[0].top_logprobs) == 2
        with client.chat.completions.create(**common, stream=True) as stream:
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
        found = client.completions.create(model="tiny", prompt=chat_ids(tokenizer), temperature=0)
        assert found.choices[0].text.startswith(text)
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**common, frequency_penalty=1)
        assert refused.value.param == "frequency_penalty"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt-4", messages=USER)


def test_the_openai_package_reads_tool_calls():
    openai = pytest.importorskip("openai")
    sampler, tokenizer = scripted(CALL)
    with (
        serving(sampler, tokenizer) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        common = {"model": "tiny", "messages": USER, "tools": [TOOL]}
        (called,) = client.chat.completions.create(**common).choices[0].message.tool_calls
        assert called.function.name == "add"
        with client.chat.completions.stream(**common) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.tool_calls[0].function.arguments == '{"a": "\N{EURO SIGN}"}'
