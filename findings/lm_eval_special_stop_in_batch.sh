#!/usr/bin/env bash
# Finding: With lm_eval's class `hf`, a completion that ends in a stop string which is a special
#   token depends on the batch that it is computed in.
# Packages: lm_eval 0.4.13, transformers 5.24.0, torch 2.13.0, accelerate 1.15.0, peft 0.21.2
# Guess: A completion ends at the first text of `until`, whatever stands beside it.
# Observed: Generation goes on until every row of the batch has met a stop string, and what follows
#   one is cut from the decoded text. Special tokens are not in that text, so nothing is cut. Alone
#   the completion is "b"; in a batch of two it is "b c d e a".
# Matters: `<|im_end|>` is a stop string of dozens of its tasks, gsm8k among them. A base model
#   whose EOS is another token gets other scores with another batch size.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lm_eval==0.4.13 transformers==5.24.0 torch==2.13.0 accelerate==1.15.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import sys

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

symbols = ["<eos>", "<|im_end|>", *"abcdefghij"]
backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend,
    eos_token="<eos>",
    pad_token="<eos>",
    additional_special_tokens=["<|im_end|>"],
    clean_up_tokenization_spaces=False,
)
# The next token follows from the last one alone: a b <|im_end|> c d e a, and f g h i j f.
following = {"a": "b", "b": "<|im_end|>", "<|im_end|>": "c", "c": "d", "d": "e", "e": "a"}
following |= {"f": "g", "g": "h", "h": "i", "i": "j", "j": "f", "<eos>": "a"}
config = LlamaConfig(
    vocab_size=12,
    hidden_size=12,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=False,
    eos_token_id=0,
    bos_token_id=0,
    max_position_embeddings=64,
)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    model.model.layers[0].mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(12))
    model.lm_head.weight.zero_()
    for token, after in following.items():
        model.lm_head.weight[symbols.index(after), symbols.index(token)] = 1.0


def completions(batch_size):
    lm = HFLM(model, tokenizer=tokenizer, batch_size=batch_size)
    requests = []
    for i, prompt in enumerate("af"):
        options = {"until": ["<|im_end|>"], "max_gen_toks": 6, "do_sample": False}
        requests.append(Instance("generate_until", {}, (prompt, options), i))
    return lm.generate_until(requests, disable_tqdm=True)


observed = {"one at a time": completions(1), "in a batch of two": completions(2)}
expected = {
    "one at a time": ["b", "g h i j f g"],
    "in a batch of two": ["b c d e a", "g h i j f g"],
}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
