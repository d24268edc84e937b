"""A group's completions behind one prompt give what rows of their own give, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.models import Transformer, TransformerConfig
from relax.models.groups import group_hidden_states

P, G, L, C, V = 2, 3, 7, 5, 61
SIZES = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": {"tie_word_embeddings": True},
    "windows and caps": {
        "sliding_window": 4,
        "layer_types": ("sliding_attention", "full_attention"),
        "local_rope_theta": 50.0,
        "attn_logit_softcapping": 2.0,
        "qk_norm": "head",
        "post_norm": True,
    },
    "experts, no positions": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "no_rope_layers": (1,),
    },
}
PROMPT_LENGTHS = np.array([7, 4])
LENGTHS = np.array([[5, 1, 3], [2, 5, 4]])


@pytest.fixture(scope="module", params=CONFIGS)
def model_and_params(request):
    model = Transformer(TransformerConfig(**SIZES | CONFIGS[request.param]))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return model, params


def ids():
    rng = np.random.default_rng(0)
    return rng.integers(0, V, (P, L)), rng.integers(0, V, (P, G, C))


def each_alone(model, params):
    """The states before each token of each completion, from a row of prompt and completion."""
    prompts, completions = ids()
    rows, positions = np.zeros((P * G, L + C), int), np.arange(L + C)[None].repeat(P * G, 0)
    where = []
    for row, (p, g) in enumerate(np.ndindex(P, G)):
        n, c = PROMPT_LENGTHS[p], LENGTHS[p, g]
        rows[row, : n + c] = [*prompts[p, :n], *completions[p, g, :c]]
        where.append((row, n, c))
    segments = np.array([[1] * (n + c) + [0] * (L + C - n - c) for _, n, c in where])
    hidden = model.apply({"params": params}, rows, positions, segments, method="hidden_states")
    return [hidden[row, n - 1 : n + c - 1] for row, n, c in where]


def as_groups(model, params):
    arguments = (*ids()[:1], PROMPT_LENGTHS, ids()[1], LENGTHS)
    arguments = [jnp.asarray(a) for a in arguments]
    hidden, _ = model.apply({"params": params}, *arguments, method=group_hidden_states)
    assert hidden.shape == (P, G, C, SIZES["hidden_size"])
    return [hidden[p, g, : LENGTHS[p, g]] for p, g in np.ndindex(P, G)]


def test_states_equal_those_of_separate_rows(model_and_params):
    expected, found = (
        jax.jit(f, static_argnums=0)(*model_and_params) for f in (each_alone, as_groups)
    )
    for a, b in zip(expected, found, strict=True):
        assert np.abs(a).max() > 0.5
        np.testing.assert_allclose(b, a, atol=1e-5)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_equal_those_of_separate_rows(model_and_params, gradient_checkpointing):
    model, params = model_and_params
    model = model.clone(gradient_checkpointing=gradient_checkpointing)
    weights = np.random.default_rng(1).normal(size=(C, SIZES["hidden_size"])).astype(np.float32)

    def loss(params, states):
        return sum((h * weights[: len(h)]).sum() for h in states(model, params))

    expected = jax.jit(jax.grad(lambda p: loss(p, each_alone)))(params)
    found = jax.jit(jax.grad(lambda p: loss(p, as_groups)))(params)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * scale)
