"""An agent that knows nothing of ReLax, trained by GRPO: `python examples/agent.py`.

It plays a game over OpenAI's API: guess a number from 0 to 9 in three turns, each answered by
"higher" or "lower". It needs `pip install 'relax-trainers[serve]' openai`. With `run_grpo.py`:
`--agent examples/agent.py:guess`.
"""

import openai


async def guess(client, row):
    """Plays the game of a row; returns 1 if the number is found, else 0."""
    messages = list(row["prompt"])
    async with openai.AsyncOpenAI(base_url=client.base_url, api_key=client.api_key) as api:
        for _ in range(3):
            answer = await api.chat.completions.create(
                model=client.model, messages=messages, max_tokens=4
            )
            text = answer.choices[0].message.content
            if text == str(row["number"]):
                return 1.0
            hint = "higher" if text.isdecimal() and int(text) < row["number"] else "lower"
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": hint}]
    return 0.0


def main():
    import jax
    import optax

    from relax.data import DataLoader, arithmetic_tokenizer, prepare, prepare_prompts
    from relax.models import Transformer, TransformerConfig
    from relax.sampling import SamplingConfig
    from relax.serving.agents import Agents
    from relax.trainers import GRPOTrainer, SFTTrainer

    tokenizer = arithmetic_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    model = Transformer(TransformerConfig(vocab_size=len(tokenizer), **sizes, **heads))
    key = jax.random.key(0)
    question = [{"role": "user", "content": "guess"}]
    # First the model learns to guess at all, each digit as often as any other.
    guesses = [
        {"prompt": question, "completion": [{"role": "assistant", "content": digit}]}
        for digit in "0123456789"
    ]
    examples, _ = prepare(guesses, tokenizer)
    taught = SFTTrainer(model, optax.adam(1e-2)).train(DataLoader(examples, 10), 40, key)

    prompts = prepare_prompts([{"prompt": question, "number": 7}] * 2, tokenizer)
    rollout = {"prompt_ids": prompts.prompt_ids, "rows": prompts.rows}
    trainer = GRPOTrainer(
        model,
        optax.adam(1e-2),
        reward_funcs=[],
        agents=(agents := Agents(f"{__file__}:guess", tokenizer, max_length=64)),
        tokenizer=tokenizer,
        params=taught.params,
        sampling=SamplingConfig(max_new_tokens=4, slots=16),
        num_generations=16,
    )
    before = trainer.validate(trainer.create_train_state(key), [rollout])
    state = trainer.train([rollout] * 10, num_epochs=1, key=key)
    after = trainer.validate(state, [rollout])
    agents.close()
    print(f"mean reward: {before['reward']:.2f} -> {after['reward']:.2f}")


if __name__ == "__main__":
    main()
