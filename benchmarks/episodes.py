"""Episodes with a slow tool: `python benchmarks/episodes.py [DIR | HIDDEN LAYERS]`.

Rolls out 16 episodes of 4 turns, between which a tool takes 50 ms, in two ways:

- side by side: as the trainers do, in slots that keep their caches while tools work;
- in lockstep: all turns of a round together, then all tools one after another, then every episode
  prefilled again from its first token.

Prints the tokens that were computed and the time of each, compiled before. DIR is a model; without
one it is a random model, by default of hidden size 64 and 2 layers.
"""

import sys
import time

import jax
import numpy as np

from relax.models import Transformer, TransformerConfig, load_pretrained
from relax.sampling import SamplingConfig, Session, generate

EPISODES, TURNS, TOOL_S, GROUP = 16, 4, 0.05, 8
PROMPT, TURN, RESULT = 64, 32, 24  # tokens


KEYS = jax.random.split(jax.random.key(0), EPISODES)


@jax.jit
def turn_key(keys, i, turn):
    return jax.random.fold_in(keys[i], turn)


def model_of(arguments):
    if len(arguments) == 1:
        return load_pretrained(arguments[0])
    hidden, layers = map(int, arguments or (64, 2))
    config = TransformerConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=1024,
    )
    model = Transformer(config)
    return model, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]


def prompts_of(model):
    rng = np.random.default_rng(0)
    groups = rng.integers(3, model.config.vocab_size, (EPISODES // GROUP, PROMPT))
    results = rng.integers(3, model.config.vocab_size, (EPISODES, TURNS, RESULT))
    return [groups[i // GROUP].tolist() for i in range(EPISODES)], results.tolist()


def side_by_side(model, params, config, prompts, results, call):
    """The turns of each episode, and the tokens computed besides the sampled ones."""
    session = Session(model, params, config, slots=EPISODES)
    rows = [session.open(ids, KEYS[i]) for i, ids in enumerate(prompts)]
    turns, waiting = [[] for _ in rows], []
    while session.under_way() or waiting:
        due, waiting = waiting, []
        for row, answer in due:
            i = rows.index(row)
            session.extend(row, answer.result(), turn_key(KEYS, i, len(turns[i])))
        for row, _ in session.advance():
            if row.reason is None:
                continue
            i = rows.index(row)
            turns[i].append(row.tokens)
            if len(turns[i]) == TURNS:
                session.close(row)
            else:
                waiting.append((row, call(results[i][len(turns[i]) - 1])))
    return turns, session.counts["prefilled"] + session.counts["appended"]


def in_lockstep(model, params, config, prompts, results, call):
    turns, ids, computed = [[] for _ in prompts], [list(p) for p in prompts], 0
    for turn in range(TURNS):
        keys = KEYS if not turn else jax.vmap(jax.random.fold_in, (0, None))(KEYS, turn)
        out = generate(model, params, ids, keys, config)
        computed += sum(len(x) - 1 for x in ids)
        for i, tokens in enumerate(out.completions):
            turns[i].append(tokens)
            ids[i] += tokens
            if turn < TURNS - 1:
                ids[i] += call(results[i][turn]).result()
    return turns, computed


def main():
    from concurrent.futures import ThreadPoolExecutor

    model, params = model_of(sys.argv[1:])
    config = SamplingConfig(max_new_tokens=TURN, slots=EPISODES)
    prompts, results = prompts_of(model)
    pool = ThreadPoolExecutor(EPISODES)

    def call(result):
        return pool.submit(lambda: time.sleep(TOOL_S) or result)

    new = EPISODES // GROUP * PROMPT + EPISODES * (TURNS - 1) * RESULT
    sampled, times = EPISODES * TURNS * TURN, {}
    for play in (side_by_side, in_lockstep):
        play(model, params, config, prompts, results, call)  # compiles
        best = []
        for _ in range(3):
            start_s = time.monotonic()
            turns, computed = play(model, params, config, prompts, results, call)
            best.append(time.monotonic() - start_s)
        assert sum(len(t) for turn in turns for t in turn) == sampled
        times[play] = min(best)
        print(
            f"{play.__name__:13} {min(best):6.2f} s  {sampled / min(best):7.0f} sampled tokens/s  "
            f"{computed:6} other tokens computed, {computed / new:.2f} x the {new} new ones"
        )
    print(f"side by side is {times[in_lockstep] / times[side_by_side]:.1f} times as fast")


if __name__ == "__main__":
    main()
