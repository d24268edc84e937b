"""What is recorded from TRL and replayed by ReLax: model, rows and flags, the same for both.

The flags have the same names and meanings in both, so a case is one dict. Imports neither jax nor
torch: the recorder and the test run in different environments.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from relax.data import arithmetic_tokenizer

HERE = Path(__file__).parent
GSM_ROWS = HERE / "gsm_symbolic.jsonl"

COMMON = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "max_length": 512,
    "shuffle_dataset": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}

# Two rows, twice: micro-batches of unequal numbers of trained tokens.
TWO_BY_TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}

# All batches padded to one length: nothing changes but that the step is compiled once.
ONE_LENGTH = {"max_length": 1024, "pad_to_multiple_of": 1024}

# A byte is a token in the tiny model, so rows have some 500 tokens, and several are cut.
TINY = {
    "text": ("text", {}),
    "messages": ("messages", ONE_LENGTH | {"assistant_only_loss": True}),
    "prompt_completion": ("prompt_completion", {}),
    "prompt_completion_messages": ("prompt_completion_messages", ONE_LENGTH),
    "two_micro_batches": ("prompt_completion", TWO_BY_TWO),
    "prompts_trained_ends_kept": (
        "prompt_completion",
        {"completion_only_loss": False, "truncation_mode": "keep_end", "max_length": 128},
    ),
    "packed": (
        "text",
        {"packing": True, "max_length": 1024, "per_device_train_batch_size": 1, "max_steps": 16},
    ),
    "warmup_linear_decay": (
        "text",
        {
            "lr_scheduler_type": "linear",
            "warmup_steps": 3,
            "weight_decay": 0.1,
            "adam_beta1": 0.8,
            "adam_beta2": 0.95,
            "adam_epsilon": 1e-6,
            "learning_rate": 1e-2,
            "max_length": 128,
        },
    ),
}
SMOLLM2 = {
    "one_batch": ("prompt_completion_messages", {}),
    "two_micro_batches": ("prompt_completion_messages", TWO_BY_TWO),
}


def flags(name: str, extra: dict) -> dict:
    """All flags of a case; the tiny model takes a rate at which it moves."""
    return COMMON | ({"learning_rate": 1e-3} if name in TINY else {}) | extra


def gsm_rows() -> list[dict]:
    """The committed rows, as they are in the file."""
    return [json.loads(line) for line in GSM_ROWS.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, kind: str) -> Path:
    """Writes the committed rows in one of the formats: 40 rows, some of more turns than one."""
    messages = gsm_rows()
    pairs = [(r["prompt"][0]["content"], r["completion"][0]["content"]) for r in messages]
    make = {
        "text": lambda i: {"text": f"{pairs[i][0]}\n{pairs[i][1]} é"},
        "messages": lambda i: {"messages": _conversation(pairs, i)},
        "prompt_completion": lambda i: {"prompt": pairs[i][0] + "\n", "completion": pairs[i][1]},
        "prompt_completion_messages": lambda i: messages[i],
    }[kind]
    rows = [json.dumps(make(i), ensure_ascii=False) for i in range(40)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def _conversation(pairs, i: int) -> list[dict]:
    """One or two questions with their answers; every third begins with a system message."""
    messages = [{"role": "system", "content": "Be brief."}] if i % 3 == 0 else []
    for question, answer in pairs[i : i + 1 + i % 2]:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return messages


def write_tiny_llama(directory: Path) -> Path:
    """Writes a Hugging Face directory: two Llama layers of random weights, a token per byte."""
    width, inner, layers, heads, kv_heads = 64, 128, 2, 4, 2
    tokenizer = arithmetic_tokenizer()
    tokenizer.save_pretrained(directory)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shapes = {"model.embed_tokens": (len(tokenizer), width)}
    kv_width = width // heads * kv_heads
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj": (width, width),
            f"{layer}.self_attn.k_proj": (kv_width, width),
            f"{layer}.self_attn.v_proj": (kv_width, width),
            f"{layer}.self_attn.o_proj": (width, width),
            f"{layer}.mlp.gate_proj": (inner, width),
            f"{layer}.mlp.up_proj": (inner, width),
            f"{layer}.mlp.down_proj": (width, inner),
            f"{layer}.input_layernorm": (width,),
            f"{layer}.post_attention_layernorm": (width,),
        }
    shapes |= {"model.norm": (width,), "lm_head": (len(tokenizer), width)}
    random = np.random.RandomState(0)
    tensors = {}
    for name, shape in shapes.items():
        weights = random.standard_normal(shape) * 0.2
        tensors[f"{name}.weight"] = np.asarray(weights + (len(shape) == 1), np.float32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
