"""Tools and environments that run in other processes, and chat templates with tools."""

import os
import random
import subprocess
import time


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
      a: the first one
      b: the second one
    """
    return a + b


def roll(sides: int) -> int:
    """Rolls a die.

    Args:
      sides: how many it has
    """
    return random.randint(1, sides)


def fail(how: str) -> str:
    """Fails in one of several ways.

    Args:
      how: which
    """
    if how == "raise":
        raise ValueError("no such city")
    if how == "hang":
        time.sleep(60)
    if how == "die":
        os._exit(3)
    if how == "die late":
        time.sleep(0.2)
        os._exit(3)
    if how == "fork":
        os.fork()
    if how == "leave":  # a process that outlives its parent, as a daemon does
        subprocess.Popen(["sleep", "4321"], start_new_session=True)
        os._exit(0)
    if how == "print":
        while True:
            print("x" * 1000)
    return "x" * 2_000_000 if how == "long" else how


def untyped(a, b: int) -> int:
    """Adds.

    Args:
      a: one
      b: another
    """
    return a + b


def undescribed(a: int) -> int:
    return a


def positional(a: int, /) -> int:
    """Gives a number back.

    Args:
      a: the number
    """
    return a


def any_number(*numbers: int) -> int:
    """Adds numbers.

    Args:
      numbers: all of them
    """
    return sum(numbers)


class Guess:
    """Answers guesses of a digit until one is right, with a reward for few turns."""

    def reset(self, row):
        self.number, self.turns = row["number"], 0
        return [{"role": "user", "content": "Guess!"}]

    def step(self, message):
        self.turns += 1
        digits = [c for c in message["content"] if c.isdigit()]
        if digits and int(digits[-1]) == self.number:
            return None, 1.0 / self.turns, True
        return {"role": "user", "content": "No."}, None, self.turns == 3


class Mute(Guess):
    def step(self, message):
        return [], 0.0, False


class Several(Guess):
    def step(self, message):
        return "on", [0.0, 1.0], False


class NotMessages(Guess):
    def reset(self, row):
        return [{"role": "user"}]


class Counter:
    """An environment whose methods are tools, as in TRL."""

    def reset(self, start, **row):
        self.value = start

    def increment(self, by: int) -> int:
        """Adds to the counter.

        Args:
          by: how much
        """
        self.value += by
        return self.value

    def get_reward(self) -> float:
        return float(self.value)


class Napping:
    """Takes its time to answer, with random numbers that depend on the episode alone."""

    def reset(self, row):
        self.turns = 0
        return "Go on."

    def step(self, message):
        time.sleep(random.SystemRandom().random() / 10)
        self.turns += 1
        number = random.randint(0, 99)
        return f"{number}", number / 100, self.turns == 3


_CHAT = """\
{% if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'tool' %}[{{ m.content }}]{% else %}{{ m.content or '' }}{% endif %}\
{% for c in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_HERMES = """<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>"""
_LFM2 = (
    "<|tool_call_start|>[{{ c.function.name }}({% for k, v in c.function.arguments.items() %}"
    "{{ k }}={{ v | tojson }}{% if not loop.last %}, {% endif %}{% endfor %})]<|tool_call_end|>"
)
_GEMMA = (
    "<start_function_call>call:{{ c.function.name }}{{ '{' }}"
    "{% for k, v in c.function.arguments.items() %}{{ k }}:{% if v is string %}<escape>{{ v }}"
    "<escape>{% else %}{{ v }}{% endif %}{% if not loop.last %},{% endif %}{% endfor %}"
    "{{ '}' }}<end_function_call>"
)
_XML = (
    "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments.items() %}"
    "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
)
_MISTRAL = (
    '[TOOL_CALLS][{"name": "{{ c.function.name }}", '
    '"arguments": {{ c.function.arguments | tojson }}}]'
)
_CHANNELS = (
    "<|channel|>commentary to=functions.{{ c.function.name }} <|constrain|>json<|message|>"
    "{{ c.function.arguments | tojson }}<|call|>"
)
_LLAMA = '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
# Thoughts of earlier turns disappear, as in Qwen 3: no rendering begins with the one before.
_THOUGHTS = _CHAT.replace(
    "{{ m.content or '' }}",
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content or '' }}",
)
TEMPLATES = {
    "hermes": _CHAT.replace("CALL", _HERMES),
    "qwen3": _THOUGHTS.replace("CALL", _HERMES),
    "qwen3.5": _CHAT.replace("CALL", _XML),
    "lfm2": _CHAT.replace("CALL", _LFM2),
    "gemma": _CHAT.replace("CALL", _GEMMA),
    "mistral": _CHAT.replace("CALL", _MISTRAL),
    "llama3": _CHAT.replace("CALL", _LLAMA),
    "gpt_oss": _CHAT.replace("CALL", _CHANNELS),
}
PLAIN = _CHAT.replace("{% if tools %}", "{% if false %}").replace("CALL", "")
