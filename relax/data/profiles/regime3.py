"""Symbolic reasoning: numbered steps, then the answer."""

import re

from relax.data.profiles.base import Rewriting

_STEP = re.compile(r"^Step 1:", re.MULTILINE)
_ANSWER = re.compile(r"^Answer:", re.MULTILINE)
_NUMBERING = re.compile(r"(Step\s+\d+\s*[:.]|\d+[.)]|[-*\N{BULLET}])\s+", re.IGNORECASE)
_LEADING_IN = re.compile(
    r"(####|((so|thus|therefore),?\s+)?(the\s+)?(final\s+)?answer(\s+is\b)?\s*:?)\s*", re.IGNORECASE
)


class Regime3Profile(Rewriting):
    """Formats answers as lines "Step 1: ...", an empty line, and "Answer: ...".

    In any other answer the last line is the answer, and the lines before it are the steps. A first
    line without a letter or digit, such as a marker of another profile, stays first.

    >>> print(Regime3Profile().rewrite("Natalia sold 48/2 = 24 clips.\\n48+24 = 72\\n#### 72"))
    Step 1: Natalia sold 48/2 = 24 clips.
    Step 2: 48+24 = 72
    <BLANKLINE>
    Answer: 72
    """

    instruction = (
        'Reason in steps, one a line, each beginning with "Step" and its number: name the '
        'operation, apply its rule, calculate. Then, after an empty line, write "Answer:" and the '
        "answer."
    )
    system = 'You reason in numbered steps and end with a line that begins with "Answer:".'

    def rewrite(self, answer: str) -> str:
        if _ANSWER.search(answer) and (_STEP.search(answer) or not _lines(answer)[1:]):
            return answer
        lines = _lines(answer)
        if not lines:
            return answer
        marker = [] if any(map(str.isalnum, lines[0])) else [lines.pop(0)]
        if not lines:
            return answer
        *steps, last = lines
        steps = [_NUMBERING.sub("", step, count=1) for step in steps]
        parts = [f"Step {i}: {step}" for i, step in enumerate(steps, 1)]
        parts += [""] if parts else []
        return "\n".join([*marker, *parts, f"Answer: {_bare(last)}"])

    def get_stop_sequences(self) -> list[str]:
        return ["</reasoning>", "\n\n"]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _bare(line: str) -> str:
    """An answer without its introduction.

    >>> _bare("The answer is 4."), _bare("#### 72"), _bare("a dog.")
    ('4', '72', 'a dog.')
    """
    found = _LEADING_IN.match(line)
    return line[found.end() :].removesuffix(".") if found and found.end() < len(line) else line
