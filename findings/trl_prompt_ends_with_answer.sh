#!/usr/bin/env bash
# Finding: Where a prompt ends with a message of the assistant, TRL's `apply_chat_template` leaves
#   that message open, and begins the completion with its end token and the header of a new turn.
# Packages: trl 1.16.0, transformers 5.24.0, datasets 5.2.0, jinja2 3.1.6
# Guess: The prompt is continued, as the function's `continue_final_message` says: "The answer",
#   then " is 4".
# Observed: The completion is what the rendering of all messages has behind the prompt, and there
#   the two messages are two turns. TRL's trainers close the message and begin a new turn in the
#   prompt, so the same row has another prompt there.
# Matters: A row with a prefilled answer teaches to end the answer and to write the header of a
#   turn; at inference the prefill is to be continued.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps trl==1.16.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 datasets==5.2.0 jinja2==3.1.6
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import sys

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import apply_chat_template

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
tokenizer.chat_template = TEMPLATE
prompt = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "The answer"}]
row = {"prompt": prompt, "completion": [{"role": "assistant", "content": " is 4"}]}
observed = apply_chat_template(row, tokenizer)
trainers = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
expected = {
    "prompt": "[user]2+2?[end][assistant]The answer",
    "completion": "[end][assistant] is 4[end]",
}

print(f"apply_chat_template: {observed}")
print(f"the prompt of the trainers: {trainers}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
