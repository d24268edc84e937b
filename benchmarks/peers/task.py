"""The work that every program here does.

GRPO: sums, rewarded where the last number is right. Distillation: rows of about 250 tokens.

Standard library only, so that it imports in the environment of every package.
"""

import json
import random
import re
import statistics
import sys

PROMPTS, COMPLETIONS, NEW_TOKENS = 4, 8, 32  # of one step
DIALOGUES = 4  # of a step of distillation
LEARNING_RATE = 1e-6
WARM_UP = 3  # steps that are not counted: compiling, first touches of memory


def rows(count: int) -> list[dict]:
    """Rows with a conversational prompt and the answer as text, the same in every call."""
    numbers = random.Random(0)
    made = []
    for _ in range(count):
        a, b = numbers.randint(1, 99), numbers.randint(1, 99)
        question = f"State the final answer to the following arithmetic problem: {a} + {b} = "
        question += "Respond with only the number."
        made.append({"prompt": [{"role": "user", "content": question}], "answer": str(a + b)})
    return made


def dialogues(count: int) -> list[list[dict]]:
    """A question and an answer of 210 common words, which no package truncates."""
    words = "the river was long and cold so they built a small boat of wood and rope".split()
    draw = random.Random(0)
    made = []
    for _ in range(count):
        answer = " ".join(draw.choice(words) for _ in range(210))
        turns = ("user", "Tell me a story."), ("assistant", answer)
        made.append([{"role": role, "content": text} for role, text in turns])
    return made


def lengths(tokenizer, rows: list[list[dict]]) -> list[float]:
    """Tokens of every row by a tokenizer of transformers."""
    return [len(tokenizer.apply_chat_template(row, tokenize=True)["input_ids"]) for row in rows]


def reward(text: str, answer: str) -> float:
    """1 where the last number of a completion is the answer."""
    numbers = re.findall(r"-?\d+", text)
    return float(bool(numbers) and numbers[-1] == answer)


def report(program: str, seconds: list[float], lengths: list[float]) -> None:
    """Prints one line of JSON about the steps after the first `WARM_UP`."""
    counted = seconds[WARM_UP:]
    result = {
        "program": program,
        "steps": len(counted),
        "median_s": round(statistics.median(counted), 2),
        "fastest_s": round(min(counted), 2),
        "tokens": round(statistics.mean(lengths[WARM_UP:]), 1),
    }
    print(json.dumps(result), file=sys.stdout, flush=True)
