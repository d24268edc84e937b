"""GRPO with a reward function of your own: `python examples/own_reward.py`.

A tiny model without any training is rewarded for digits. With a real model, the same function works
from the command line: `python run_grpo.py --model_name_or_path DIR --dataset_name prompts.jsonl
--reward_funcs examples/own_reward.py:share_of_digits`.
"""

import jax
import optax

from relax.data import arithmetic_tokenizer, prepare_prompts
from relax.models import Transformer, TransformerConfig
from relax.sampling import SamplingConfig
from relax.trainers import GRPOTrainer


def share_of_digits(completions, **columns):
    """One number per completion. Columns of the rows arrive by name, such as `answer`."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def main():
    tokenizer = arithmetic_tokenizer()
    model = Transformer(
        TransformerConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    )
    prompts = prepare_prompts([{"prompt": f"{n}+{n}="} for n in range(1, 9)], tokenizer)
    rollout = {"prompt_ids": prompts.prompt_ids, "rows": prompts.rows}
    trainer = GRPOTrainer(
        model,
        optax.adam(1e-2),
        reward_funcs=[share_of_digits],
        tokenizer=tokenizer,
        sampling=SamplingConfig(max_new_tokens=8),
        num_generations=8,  # completions per prompt, which are compared with each other
    )
    key = jax.random.key(0)
    before = trainer.validate(trainer.create_train_state(key), [rollout])
    state = trainer.train([rollout] * 10, num_epochs=4, key=key)
    after = trainer.validate(state, [rollout])
    print(f"share of digits: {before['reward']:.2f} -> {after['reward']:.2f}")


if __name__ == "__main__":
    main()
