"""Reasoning between tags, then the answer."""

from relax.data.profiles.base import Rewriting


class ChainOfThoughtProfile(Rewriting):
    """Answers are reasoning between <think> and </think>, and then the answer.

    It is what the reward `think_format_reward` asks for. Of another answer of several paragraphs
    the last is the answer and the others are the reasoning; with a single one the last line is. An
    answer of one line has no reasoning and stays as it is.

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
