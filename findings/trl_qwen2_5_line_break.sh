#!/usr/bin/env bash
# Finding: TRL's training template for Qwen 2.5 marks the line break of the assistant's header,
#   which the generation prompt supplies, as trained; the one for Qwen 3 does not.
# Packages: trl 1.16.0, transformers 5.24.0, jinja2 3.1.6
# Guess: `assistant_only_loss` trains on what the model generates, with every template alike.
# Observed: Both models ask for an answer with "<|im_start|>assistant\n". The mask of the Qwen 2.5
#   template begins with "\n", that of the Qwen 3 template behind it.
# Matters: One token more per turn counts in the loss, the token accuracy and the number of trained
#   tokens, though the model never generates it: values of the two models are not comparable.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps trl==1.16.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 jinja2==3.1.6
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import importlib.util
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

templates = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


def trained(name):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.chat_template = (templates / f"{name}_training.jinja").read_text()
    asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(out["input_ids"], out["assistant_masks"])
    return asked[-22:], tokenizer.decode([token for token, mask in pairs if mask])


observed = {name: trained(name) for name in ("qwen2_5", "qwen3")}
prompt = "<|im_start|>assistant\n"
expected = {
    "qwen2_5": (prompt, "\nYo<|im_end|>\n"),
    "qwen3": (prompt, "<think>\n\n</think>\n\nYo<|im_end|>\n"),
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
