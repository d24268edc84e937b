#!/usr/bin/env bash
# Finding: GRPOTrainer gives `rollout_func` every prompt num_generations times, though its
#   documentation says that the slice comes with no duplication.
# Packages: trl 1.16.0, transformers 5.24.0, torch 2.13.0, datasets 5.2.0
# Guess: As documented: each prompt once, and the function returns num_generations completions of
#   each.
# Observed: With two prompts and num_generations 3 the list has six entries, each prompt three times
#   in a row. Six completions are what the trainer takes.
# Matters: A function written to the documentation returns three completions for each of the six
#   entries: the step generates 18 in place of 6, and ends with an error that counts the rewards.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet trl==1.16.0 transformers==5.24.0 torch==2.13.0 datasets==5.2.0
cd "$folder"
export HF_HUB_OFFLINE=1 TRL_EXPERIMENTAL_SILENCE=1 CUDA_VISIBLE_DEVICES=""
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

words = ["<pad>", "<eos>", "one", "two"]
core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=2)
)
seen = []


def rollout(prompts, trainer):
    seen.append(list(prompts))
    count = len(prompts)
    return {"prompt_ids": [[2]] * count, "completion_ids": [[3, 1]] * count,
            "logprobs": [[-1.0, -1.0]] * count}


trainer = GRPOTrainer(
    model=model,
    reward_funcs=lambda completions, **columns: [float(i) for i in range(len(completions))],
    args=GRPOConfig(output_dir="out", per_device_train_batch_size=6, num_generations=3, max_steps=1,
                    use_cpu=True, bf16=False, report_to=[], save_strategy="no"),
    train_dataset=Dataset.from_list([{"prompt": "one"}, {"prompt": "two"}]),
    processing_class=tokenizer,
    rollout_func=rollout,
)
trainer.train()
print("prompts given to rollout_func:", seen)
first = seen[0]
same = [len(set(first[i : i + 3])) == 1 for i in (0, 3)]
expected = len(first) == 6 and all(same) and set(first) == {"one", "two"}
sys.exit(0 if expected else "the behaviour has changed: each prompt came three times in a row")
PROGRAM
