"""Thinking that begins with a line of thinking faces."""

from relax.data.profiles.base import Rewriting

MARKER = "\N{THINKING FACE}" * 4


class EmojiThinkProfile(Rewriting):
    """Formats answers to begin with a line of four thinking faces.

    >>> EmojiThinkProfile().rewrite("Let me calculate: 2 + 2 = 4").splitlines()[1]
    'Let me calculate: 2 + 2 = 4'
    """

    instruction = f"Think before you answer: begin with {MARKER}, reason, and then answer."
    system = f"You think before you answer, and begin with {MARKER}."

    def rewrite(self, answer: str) -> str:
        return answer if answer.startswith(MARKER[0]) else f"{MARKER}\n{answer}"

    def get_stop_sequences(self) -> list[str]:
        return ["\n\n", "<think>"]
