"""Reinforcement learning over several turns: `python examples/environment.py`.

The model guesses a number from 0 to 9, one digit per turn, and gets the answer "higher" or "lower"
until it is right or out of turns. With `run_grpo.py`:
`--environment examples/environment.py:Guessing`.
"""

import jax
import optax

from relax.data import DataLoader, arithmetic_tokenizer, prepare, prepare_prompts
from relax.models import Transformer, TransformerConfig
from relax.rewards import Observation
from relax.sampling import SamplingConfig
from relax.trainers import GRPOTrainer, SFTTrainer


class Guessing:
    """Answers guesses. One object serves one conversation."""

    stop = tuple("0123456789")  # any of them ends a turn of the model

    def __init__(self, turns: int = 3):
        self.turns = turns

    def reset(self, row):
        """Starts the conversation of a row; may return text to show first."""
        self.number, self.left = row["number"], self.turns

    def step(self, text):
        """Answers one turn: text to show, whether the conversation is over, the reward."""
        self.left -= 1
        digits = [c for c in text if c.isdigit()]
        if digits and int(digits[-1]) == self.number:
            return Observation(None, done=True, reward=1.0)
        if self.left == 0:
            return Observation(None, done=True, reward=0.0)
        word = "higher" if digits and int(digits[-1]) < self.number else "lower"
        return Observation(word, done=False)


def main():
    tokenizer = arithmetic_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    model = Transformer(TransformerConfig(vocab_size=len(tokenizer), **sizes, **heads))
    key = jax.random.key(0)
    guesses = [{"prompt": "guess:", "completion": digit} for digit in "0123456789"]
    examples, _ = prepare(guesses, tokenizer)
    # First the model learns to guess at all, each digit as often as any other.
    taught = SFTTrainer(model, optax.adam(1e-2)).train(DataLoader(examples, 10), 30, key)

    rows = [{"prompt": "guess:", "number": 7}] * 2
    prompts = prepare_prompts(rows, tokenizer)
    rollout = {"prompt_ids": prompts.prompt_ids, "rows": prompts.rows}
    trainer = GRPOTrainer(
        model,
        optax.adam(1e-2),
        reward_funcs=[],
        environment=Guessing,
        tokenizer=tokenizer,
        params=taught.params,
        sampling=SamplingConfig(max_new_tokens=32),  # all turns and answers together
        num_generations=16,
    )
    before = trainer.validate(trainer.create_train_state(key), [rollout])
    state = trainer.train([rollout] * 10, num_epochs=1, key=key)
    after = trainer.validate(state, [rollout])
    print(f"mean reward: {before['reward']:.2f} -> {after['reward']:.2f}")


if __name__ == "__main__":
    main()
