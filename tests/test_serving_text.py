"""The stream of a turn in channels gives its content alone."""

from relax.serving.replies import Reply


class Pieces:
    """Tokens that are texts; special ones are within bars."""

    def text(self, ids, stop=(), *, special=False):
        shown = ids if special else [piece for piece in ids if not piece.startswith("<|")]
        return "".join(shown)

    def visible(self, text):
        return text


def streamed(pieces, tools=()):
    reply = Reply(Pieces(), format="gpt_oss", tools=tools)
    sent = [reply.stream.feed([piece]) for piece in pieces]
    reply.add({"tokens": pieces}, "eos")
    message, finish = reply.message("id")
    return "".join([*sent, reply.stream.end(message["content"] or "")]), message, finish


def test_a_final_message_is_streamed_and_its_thoughts_are_not():
    pieces = ["<|channel|>", "analysis", "<|message|>", "Two", " and one", "<|end|>", "<|start|>"]
    pieces += ["assistant", "<|channel|>", "final", "<|message|>", "It is", " 3", "."]
    sent, message, finish = streamed(pieces)
    expected = {"role": "assistant", "content": "It is 3.", "reasoning_content": "Two and one"}
    assert (sent, message, finish) == ("It is 3.", expected, "stop")


def test_a_call_in_the_commentary_is_no_text():
    pieces = ["<|channel|>", "analysis", "<|message|>", "Ask", "<|end|>", "<|start|>", "assistant"]
    pieces += ["<|channel|>", "commentary to=functions.f", "<|message|>", "{", "}"]
    sent, message, finish = streamed(pieces, [{"function": {"name": "f"}}])
    (call,) = message["tool_calls"]
    assert (sent, finish, call["function"]) == ("", "tool_calls", {"name": "f", "arguments": "{}"})
    assert message["reasoning_content"] == "Ask" and message["content"] is None
