"""A tool for sums too large to do by head: `python examples/calculator_tool.py [SEED]`.

The model may answer at once, or call `add` and read the result. It is rewarded for right answers
alone, and learns to call. With `run_grpo.py`: `--tools examples/calculator_tool.py:add
--reward_funcs exact_match`, a model whose chat template renders tools, and rows such as
`{"prompt": [{"role": "user", "content": "4718+2956="}], "answer": "7674"}`.
"""

import random
import sys

# Tools by their names, and calls as LFM2 writes them: a few tokens, where each byte is one.
TEMPLATE = """\
{%- if tools -%}<system>{% for t in tools %}{{ t.function.name }} {% endfor %}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}<assistant>{% generation %}{{ m.content }}
{%- for c in m.tool_calls or [] -%}
<|tool_call_start|>[{{ c.function.name }}({% for k, v in c.function.arguments.items() %}\
{{ k }}={{ v | tojson }}{% if not loop.last %}, {% endif %}{% endfor %})]<|tool_call_end|>
{%- endfor -%}<eos>{% endgeneration %}
{%- else -%}<{{ m.role }}>{{ m.content }}{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}<assistant>{%- endif -%}"""
SPECIAL = ["<tool>", "<|tool_call_start|>", "<|tool_call_end|>"]


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
      a: the first number
      b: the second number
    """
    return a + b


def make_tokenizer():
    from relax.data import arithmetic_tokenizer

    tokenizer = arithmetic_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def question(rng: random.Random) -> tuple[int, int, list[dict]]:
    a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
    return a, b, [{"role": "user", "content": f"{a}+{b}="}]


def example(rng: random.Random, tools: list[dict], share: float) -> dict:
    """A conversation that calls the tool with probability `share`, and else guesses."""
    a, b, messages = question(rng)
    if rng.random() < share:
        function = {"name": "add", "arguments": {"a": a, "b": b}}
        call = {"type": "function", "function": function}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "name": "add", "content": str(a + b)})
        messages.append({"role": "assistant", "content": str(a + b)})
    else:
        messages.append({"role": "assistant", "content": str(rng.randrange(200, 2000))})
    return {"messages": messages, "tools": tools}


def teach(seed: int, tools: list[dict]):
    """A model that guesses, or calls in half of its answers; its tokenizer; and random numbers."""
    # Imported here, since processes that play episodes import this file.
    import jax
    import optax

    from relax.data import DataLoader, prepare
    from relax.data.formats import FormatOptions
    from relax.models import Transformer, TransformerConfig
    from relax.trainers import SFTTrainer

    tokenizer, rng = make_tokenizer(), random.Random(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = Transformer(TransformerConfig(vocab_size=len(tokenizer), **sizes, **heads))
    rows = [example(rng, tools, 0.5) for _ in range(4096)]
    examples, _ = prepare(rows, tokenizer, FormatOptions(assistant_only_loss=True))
    trainer = SFTTrainer(model, optax.adam(3e-3))
    taught = trainer.train(DataLoader(examples, 64), 12, jax.random.key(seed))
    return model, taught.params, tokenizer, rng


def train(seed: int = 0, updates: int = 30):
    """The share of right answers on held-out sums, before and after, and curves of the updates."""
    import jax
    import optax

    from relax.data import prepare_prompts
    from relax.data.prompt_loader import PromptLoader
    from relax.rewards import EpisodeRunner
    from relax.sampling import SamplingConfig
    from relax.trainers import GRPOTrainer

    runner, key = EpisodeRunner([f"{__file__}:add"]), jax.random.key(seed)
    tools = list(runner.info.tools)
    model, params, tokenizer, rng = teach(seed, tools)
    asked = [question(rng) for _ in range(8 * updates + 64)]
    rows = [{"prompt": messages, "answer": str(a + b)} for a, b, messages in asked]
    prompts = prepare_prompts(rows[64:], tokenizer, tools=tools)
    held_out = prepare_prompts(rows[:64], tokenizer, tools=tools)
    trainer = GRPOTrainer(
        model,
        optax.adam(1e-3),
        reward_funcs="exact_match",
        tools=runner,
        tokenizer=tokenizer,
        params=params,
        sampling=SamplingConfig(max_new_tokens=48),  # all turns and results together
        num_generations=8,
    )
    loader = PromptLoader(held_out, 64, shuffle=False)
    state, curve = trainer.create_train_state(key), []
    before = trainer.validate(state, loader)["reward"]
    for item in PromptLoader(prompts, 8, seed=seed).batches(0):
        for batch in trainer.make_batches(state, item):
            state, _ = trainer.train_step(state, batch.batch)
            curve.append((batch.metrics["reward"], batch.metrics["tools/call_frequency"]))
    return before, trainer.validate(state, loader)["reward"], curve


if __name__ == "__main__":
    before, after, curve = train(int((sys.argv[1:] or ["0"])[0]))
    for i in range(0, len(curve), 5):
        reward, calls = curve[i]
        print(f"update {i:3}: right answers {reward:.2f}, calls per episode {calls:.2f}")
    print(f"right answers on held-out sums: {before:.2f} -> {after:.2f}")
