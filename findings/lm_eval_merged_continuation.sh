#!/usr/bin/env bash
# Finding: lm_eval scores a continuation without those of its characters that its tokenizer merges
#   with the context.
# Packages: lm_eval 0.4.13, tokenizers 0.23.3
# Guess: log p(continuation | context) is that of all characters of the continuation.
# Observed: Context and both together are encoded, and as many tokens as the context has are cut
#   from the front of the latter. Where "a" and "b" merge, the continuation "bc" of "xa" is scored
#   as "c" after "xa", like the continuation "c"; "b" has no token, and the class `hf` fails on it.
# Matters: Choices without a space before them (`target_delimiter: ""`, code, Chinese, parts of
#   words) lose characters in silence, and different choices get the same likelihood.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lm_eval==0.4.13 tokenizers==0.23.3
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PROGRAM'
import sys

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tokenizers import Tokenizer, models

symbols = [*"abcx", "ab"]
merges = [("a", "b")]
tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=merges))


class Recorder(TemplateLM):
    """Answers a request with the tokens that a model would get."""

    eot_token_id = 0

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return tokenizer.encode(string).ids

    def _loglikelihood_tokens(self, requests, **kwargs):
        return [tuple("|".join(symbols[i] for i in ids) for ids in pair) for _, *pair in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False): ...

    def generate_until(self, requests, disable_tqdm=False): ...


def scored(continuation):
    request = Instance("loglikelihood", {}, ("xa", continuation), 0)
    return Recorder().loglikelihood([request], disable_tqdm=True)[0]


observed = {text: scored(text) for text in ("bc", "c", "b")}
expected = {"bc": ("x|a", "c"), "c": ("x|a", "c"), "b": ("x|a", "")}

for name, value in observed.items():
    print(f"{name}: {value}")
sys.exit(0 if observed == expected else f"the behaviour has changed, expected {expected}")
PROGRAM
