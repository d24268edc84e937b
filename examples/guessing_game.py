"""A game of several turns: `python examples/guessing_game.py [SEED]`.

The model guesses a number from 0 to 9 and reads "higher" or "lower" until it is right, with a
reward of 1 / turns. The number is 2, 5 or 8, which only the rewards tell. With `run_grpo.py`:
`--environment_factory examples/guessing_game.py:Guessing`, and rows such as
`{"prompt": [{"role": "user", "content": "0-9?"}], "number": 7}`.
"""

import random
import sys

PROMPT = [{"role": "user", "content": "0-9?"}]


class Guessing:
    """Answers guesses. One object serves one episode."""

    def __init__(self, turns: int = 5):
        self.most = turns

    def reset(self, row):
        """Begins the episode of a row; may return messages to show after its prompt."""
        self.number, self.turns = row["number"], 0

    def step(self, message):
        """Answers a turn of the model: messages, reward, and whether the episode is over."""
        self.turns += 1
        guess = message["content"].strip()
        if guess == str(self.number):
            return None, 1 / self.turns, True
        if self.turns == self.most or not guess.isdigit():
            return None, 0.0, True
        word = "higher" if int(guess) < self.number else "lower"
        return {"role": "user", "content": word}, None, False


def random_game(rng: random.Random) -> dict:
    """A conversation whose guesses know nothing."""
    messages, number = list(PROMPT), rng.randrange(10)
    for _ in range(4):
        guess = rng.randrange(10)
        messages.append({"role": "assistant", "content": str(guess)})
        messages.append({"role": "user", "content": "higher" if guess < number else "lower"})
    return {"messages": messages[:-1]}


def train(seed: int = 0, updates: int = 12):
    """The mean reward on all numbers, before and after, and of each update."""
    # Imported here, since processes that play episodes import this file.
    import jax
    import optax

    from relax.data import DataLoader, arithmetic_tokenizer, prepare, prepare_prompts
    from relax.data.formats import FormatOptions
    from relax.data.prompt_loader import PromptLoader
    from relax.models import Transformer, TransformerConfig
    from relax.sampling import SamplingConfig
    from relax.trainers import GRPOTrainer, SFTTrainer

    tokenizer, key = arithmetic_tokenizer(), jax.random.key(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    model = Transformer(TransformerConfig(vocab_size=len(tokenizer), **sizes, **heads))
    # First the model learns the form of the game: each digit as often as any other.
    rng = random.Random(seed)
    games = [random_game(rng) for _ in range(256)]
    examples, _ = prepare(games, tokenizer, FormatOptions(assistant_only_loss=True))
    taught = SFTTrainer(model, optax.adam(1e-2)).train(DataLoader(examples, 32), 6, key)

    prompts = prepare_prompts([{"prompt": PROMPT, "number": n} for n in (2, 5, 8)], tokenizer)
    trainer = GRPOTrainer(
        model,
        optax.adam(5e-3),
        reward_funcs=[],
        environment_factory=f"{__file__}:Guessing",
        tokenizer=tokenizer,
        params=taught.params,
        sampling=SamplingConfig(max_new_tokens=64),  # all turns and answers together
        num_generations=16,
    )
    rows = PromptLoader(prompts, 3, seed=seed)
    held_out = list(PromptLoader(prompts, 3, shuffle=False))
    state, curve = trainer.create_train_state(key), []
    before = trainer.validate(state, held_out)["reward"]
    for update in range(updates):
        (item,) = rows.batches(update)
        for batch in trainer.make_batches(state, item):
            state, _ = trainer.train_step(state, batch.batch)
            curve.append(batch.metrics["reward"])
    return before, trainer.validate(state, held_out)["reward"], curve


if __name__ == "__main__":
    before, after, curve = train(int((sys.argv[1:] or ["0"])[0]))
    print("mean reward of every fourth update:", *(f"{reward:.2f}" for reward in curve[::4]))
    print(f"mean reward: {before:.2f} -> {after:.2f}")
