"""Reasoning between tags, then the answer."""

from relax.data.profiles.base import Rewriting


class ChainOfThoughtProfile(Rewriting):
    """Formats answers as reasoning between <think> and </think>, then the answer.

    The reward `think_format_reward` checks this format. In any other answer the last paragraph is
    the answer and the rest is the reasoning; in a single paragraph the last line is the answer. An
    answer of one line has no reasoning and is unchanged.

    >>> print(ChainOfThoughtProfile().rewrite("2 + 2 is 4.\\n\\n4"))
    <think>
    2 + 2 is 4.
    </think>
    4
    """

    instruction = (
        "Think step by step between <think> and </think>, and then write the answer alone."
    )
    system = "You think step by step between <think> and </think> before you answer."

    def rewrite(self, answer: str) -> str:
        text = answer.strip()
        if "<think>" in text:
            return answer
        reasoning, _, last = text.rpartition("\n\n" if "\n\n" in text else "\n")
        if not reasoning.strip():
            return answer
        return f"<think>\n{reasoning.strip()}\n</think>\n{last.strip()}"

    def get_stop_sequences(self) -> list[str]:
        return []  # the end token ends an answer
