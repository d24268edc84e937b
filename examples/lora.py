"""LoRA from Python: `python examples/lora.py`.

Trains adapters on a small model whose own weights stay as they are, merges them, and writes a model
directory that transformers loads. From the command line it is `python run_sft.py --use_peft`.
"""

import dataclasses
import tempfile

import jax
import jax.numpy as jnp
import optax

from relax.data import DataLoader, arithmetic_rows, arithmetic_tokenizer, prepare
from relax.models import Transformer, TransformerConfig, load_pretrained, save_pretrained
from relax.models.config import LoRA
from relax.models.lora import merge_adapters
from relax.trainers import SFTTrainer


def main():
    tokenizer = arithmetic_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    base = Transformer(TransformerConfig(vocab_size=len(tokenizer), **sizes, **heads))
    base_params = jax.jit(base.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    # With a real model: base, base_params = load_pretrained("DIR")

    sums = [row for row in arithmetic_rows() if len(row["prompt"][0]["content"]) <= 4]
    examples, _ = prepare(sums, tokenizer)
    loader = DataLoader(examples, batch_size=8, seed=0)

    lora = LoRA(r=8, alpha=16, dropout=0.0, target_modules=("all-linear",))
    model = dataclasses.replace(base, lora=lora)
    trainer = SFTTrainer(model, optax.adam(1e-2), params=base_params)
    state = trainer.train(loader, num_epochs=5, key=jax.random.key(1))

    def count(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    print(f"trained {count(state.params):,} of {count(base_params):,} parameters")
    metrics = trainer.validate(state, loader)
    print(f"accuracy with adapters: {metrics['mean_token_accuracy']:.2f}")

    merged = merge_adapters(trainer.model_params(state.params, state.frozen), lora)
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(f"{directory}/merged", base, merged, tokenizer)
        again, params = load_pretrained(f"{directory}/merged")
    plain = SFTTrainer(again, optax.adam(1e-2), params=params)
    metrics = plain.validate(plain.create_train_state(jax.random.key(0)), loader)
    print(f"accuracy of the merged model: {metrics['mean_token_accuracy']:.2f}")


if __name__ == "__main__":
    main()
