"""An algorithm of your own: `python examples/own_trainer.py`.

Dynamic fine-tuning (Wu et al., 2025, https://arxiv.org/abs/2508.05629) weights every token of the
cross-entropy by the probability that the model gives it, without a gradient through the weight:

    L = − mean_t sg(p_t) log p_t
"""

import jax
import jax.numpy as jnp
import optax

from relax.data import DataLoader, arithmetic_rows, arithmetic_tokenizer, prepare
from relax.models import Transformer, TransformerConfig
from relax.trainers import LossOutput, Trainer, TrainState


class DFTTrainer(Trainer):
    """Dynamic fine-tuning on batches with `input_ids` and `labels`, -100 where not trained."""

    def create_train_state(self, key):
        params = self.model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]
        return TrainState.create(params=params, optimizer=self.optimizer, rng=key)

    def compute_loss(self, params, batch):
        rows = {name: batch[name] for name in ("positions", "segment_ids")}
        logits = self.model.apply({"params": params}, batch["input_ids"], **rows)[:, :-1]
        labels = batch["labels"][:, 1:]  # token t + 1 is the target of token t
        mask = labels >= 0
        targets = jnp.where(mask, labels, 0)
        logprobs = -optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        losses = -jax.lax.stop_gradient(jnp.exp(logprobs)) * logprobs
        count = jnp.maximum(mask.sum(), 1)
        hits = (logits.argmax(-1) == targets) & mask
        return LossOutput(
            loss=jnp.where(mask, losses, 0).sum() / count,
            weight=count,  # micro-batches and evaluation batches are weighted by it
            metrics={"accuracy": hits.sum() / count},
        )


def main():
    tokenizer = arithmetic_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = Transformer(TransformerConfig(vocab_size=len(tokenizer), **sizes, **heads))
    sums = [row for row in arithmetic_rows() if len(row["prompt"][0]["content"]) <= 4]
    examples, _ = prepare(sums, tokenizer)
    loader = DataLoader(examples, batch_size=8, seed=0)

    trainer = DFTTrainer(model, optax.adam(3e-3), max_grad_norm=1.0)
    key = jax.random.key(0)
    before = trainer.validate(trainer.create_train_state(key), loader)
    state = trainer.train(loader, num_epochs=10, key=key)
    after = trainer.validate(state, loader)
    print(f"accuracy: {before['accuracy']:.2f} -> {after['accuracy']:.2f}")


if __name__ == "__main__":
    main()
