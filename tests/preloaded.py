"""What a run imports, for the process that runs are forked from. It may not make an array: with the
first one jax starts threads, and a fork has none of them."""

import fire  # noqa: F401

# Reading a tokenizer imports this, and with it PyTorch, where that is installed.
import transformers.models.llama.configuration_llama  # noqa: F401
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

import relax.engine  # noqa: F401
