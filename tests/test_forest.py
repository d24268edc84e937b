"""Trees are packed into rows of real tokens, and the states of rows are those of separate ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.data.forest import deal, pack_forest, pack_rows, places
from relax.models import Transformer, TransformerConfig
from relax.models.forward import predicting_states
from relax.models.rope import RopeScaling
from relax.trainers.groups import pack_groups

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
    "sinks, experts with biases and clamped gates": {
        "attention_sinks": True,
        "sliding_window": 4,
        "layer_types": ("sliding_attention", "full_attention"),
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "expert_bias": True,
        "swiglu_limit": 0.02,
    },
    "convolutions, windows and gates of heads": {
        "layer_types": ("conv", "sliding_attention"),
        "conv_width": 4,
        "sliding_window": 4,
        "attention_gate": "head",
        "post_norm": True,
        "hidden_act": "xielu",
        "gated_mlp": False,
    },
    # Reaches from completions of one token over the prompt of four to its beginning.
    "convolutions": {"layer_types": ("conv", "full_attention"), "conv_width": 6, "conv_bias": True},
    "shared keys and inputs of each layer": {
        "num_hidden_layers": 4,
        "sliding_window": 4,
        "layer_types": ("sliding_attention", "full_attention") * 2,
        "global_head_dim": 8,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 5,
        "vocab_size_per_layer_input": V,
        "value_norm": True,
        "layer_scalar": True,
    },
    "delta rules": {
        "layer_types": ("linear_attention", "full_attention"),
        "attention_gate": "entry",
        "conv_width": 3,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 5,
    },
}
PROMPT_LENGTHS = np.array([7, 4])
LENGTHS = np.array([[5, 1, 3], [2, 0, 4]])


def test_a_tree_is_laid_out_as_by_hand():
    rows, starts, ends = pack_forest([([5, 6], [[7, 8], [], [9]])], row_length=6)
    assert rows["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0]]
    assert rows["positions"].tolist() == [[0, 1, 2, 3, 2, 0]]
    assert rows["segment_ids"].tolist() == [[1, 1, 2, 2, 4, 0]]
    assert rows["parent_ids"].tolist() == [[0, 0, 1, 1, 1, 0]]
    assert rows["previous"].tolist() == [[-1, -1, 1, 2, 1, -1]]
    assert starts[[0, 2]].tolist() == [2, 4] and ends.tolist() == [3, 1, 4]


def test_a_root_is_repeated_where_its_tree_does_not_fit():
    rows, starts, ends = pack_forest([([5, 6], [[7, 8], [9]])], row_length=4)
    assert rows["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 9, 0]]
    assert rows["previous"].tolist() == [[-1, -1, 1, 2], [-1, -1, 1, -1]]
    assert starts.tolist() == [2, 6] and ends.tolist() == [3, 6]


def test_without_sharing_each_child_is_one_document_with_its_root():
    rows, starts, _ = pack_forest([([5, 6], [[7], [8, 9]])], row_length=7, shared=False)
    assert rows["input_ids"].tolist() == [[5, 6, 8, 9, 5, 6, 7]]
    assert rows["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 2]]
    assert rows["positions"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert not rows["parent_ids"].any() and starts.tolist() == [6, 2]


def test_the_first_token_behind_an_empty_root_is_predicted_by_none():
    rows, _, ends = pack_forest([([], [[7, 8], []])], row_length=2)
    assert rows["previous"].tolist() == [[-1, 0]] and not rows["parent_ids"].any()
    assert ends.tolist() == [1, -1]


def test_each_block_has_its_own_trees_in_its_own_rows():
    trees = [([1], [[2] * n]) for n in (7, 3, 2, 2)]
    rows, starts, _ = pack_forest(trees, blocks=2, row_length=8)
    assert (rows["segment_ids"] > 0).sum(axis=1).tolist() == [8, 4, 6, 0]
    assert starts.tolist() == [1, 9, 1, 4]  # counted from the first row of the block


def test_trees_are_dealt_so_that_tokens_balance():
    sizes = np.array([7, 6, 5, 4, 1, 1])
    order = deal(sizes.tolist(), 2)
    assert sorted(order) == list(range(6)) and sizes[order].reshape(2, 3).sum(axis=1).tolist() == [
        12,
        12,
    ]


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 6])
def test_devices_do_not_change_which_trees_are_in_a_micro_batch(micro_batches):
    sizes = np.random.default_rng(0).integers(1, 50, 96).tolist()
    alone = np.sort(deal(sizes, micro_batches).reshape(micro_batches, -1))
    on_eight = np.sort(deal(sizes, micro_batches * 8).reshape(micro_batches, -1))
    assert np.array_equal(alone, on_eight)


def test_a_child_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="5 tokens of the longest and 4 of a row"):
        pack_forest([([5, 6], [[1, 2, 3]])], row_length=4)


def test_a_tree_that_is_not_laid_out_takes_no_place():
    rows, _, ends = pack_forest([([1], [[2]]), ([3], [[4, 5]])], row_length=3, laid=[False, True])
    assert rows["input_ids"].tolist() == [[3, 4, 5]] and ends.tolist() == [-1, 2]


def geometric_trees(count: int, cap: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(1 / 40, (count, 8)), cap)
    return [(rng.integers(1, 99, 30), [rng.integers(1, 99, n) for n in row]) for row in lengths]


def test_few_places_are_padding_whatever_the_lengths():
    shapes, shares = set(), []
    for seed in range(50):
        trees = geometric_trees(4, 256, seed)
        rows = pack_forest(trees).rows["segment_ids"]
        shapes.add(rows.shape)
        shares.append((rows > 0).mean())
    assert np.mean(shares) > 0.8 and len(shapes) < 15


@pytest.mark.parametrize(
    "lengths, shape", [([283] * 4, (4, 320)), ([283] * 3 + [200], (4, 320)), ([500] * 4, (4, 512))]
)
def test_equal_rows_just_above_a_power_of_two_are_not_half_empty(lengths, shape):
    trees = [([], [[1] * n]) for n in lengths]
    assert pack_forest(trees).rows["input_ids"].shape == shape


@pytest.mark.parametrize("blocks, row_length", [(1, 24), (2, 24), (3, None)])
def test_every_token_is_predicted_by_the_token_before_it(blocks, row_length):
    rng = np.random.default_rng(0)
    trees = [
        (rng.integers(1, 99, rng.integers(1, 9)), [rng.integers(1, 99, n) for n in sizes])
        for sizes in rng.integers(0, 12, (12, 4))
    ]
    rows, starts, ends = pack_forest(trees, blocks=blocks, row_length=row_length)
    ids, previous = (rows[name].reshape(blocks, -1) for name in ("input_ids", "previous"))
    T = rows["input_ids"].shape[1]
    number = 0
    for tree, (root, children) in enumerate(trees):
        block = tree * blocks // len(trees)
        for child in children:
            mine = places(starts[[number]], np.array([len(child)]), len(child))[0]
            assert ids[block][mine].tolist() == child.tolist()
            before = mine // T * T + previous[block][mine]
            assert ids[block][before].tolist() == [root[-1], *child[:-1]][: len(child)]
            assert ids[block][ends[number]] == [*root, *child][-1]
            number += 1


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


def packed(model, multiple=1) -> dict:
    prompts, completions = ids()
    batch = {
        "prompt_ids": prompts,
        "prompt_lengths": PROMPT_LENGTHS,
        "completion_ids": completions,
        "completion_lengths": LENGTHS,
    }
    return pack_groups(batch, [model], 1, multiple=multiple)


def as_forest(model, params):
    batch = packed(model)
    hidden, _ = predicting_states(model, params, batch)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return [flat[batch["places"][p, g, : LENGTHS[p, g]]] for p, g in np.ndindex(P, G)]


def over_two_rows(model, params):
    """In rows of 12 tokens the first group, a prompt of 7 and 9 tokens, has no room."""
    prompts, completions = ids()
    trees = [
        (prompts[p, : PROMPT_LENGTHS[p]], [completions[p, g, : LENGTHS[p, g]] for g in range(G)])
        for p in range(P)
    ]
    rows, starts, _ = pack_forest(trees, row_length=12)
    assert (rows["input_ids"][:, :7] == prompts[0]).all(axis=1).sum() == 2
    hidden, _ = predicting_states(model, params, rows)
    flat, lengths = hidden.reshape(-1, hidden.shape[-1]), LENGTHS.reshape(-1)
    return [flat[start : start + n] for start, n in zip(starts, lengths, strict=True)]


def test_states_equal_those_of_separate_rows(model_and_params):
    expected, *others = (
        jax.jit(f, static_argnums=0)(*model_and_params)
        for f in (each_alone, as_forest, over_two_rows)
    )
    for found in others:
        for a, b in zip(expected, found, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(b, a, atol=1e-5)


def test_where_positions_turn_by_the_length_of_a_text_each_completion_repeats_its_prompt():
    """Two of six texts are longer than 10 tokens, and turn otherwise, from the first token on."""
    scaling = RopeScaling("dynamic", 3.0, original_max_position_embeddings=10)
    model = Transformer(TransformerConfig(**SIZES, rope_scaling=scaling))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert "parent_ids" not in packed(model)
    for a, b in zip(each_alone(model, params), as_forest(model, params), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_equal_those_of_separate_rows(model_and_params, gradient_checkpointing):
    model, params = model_and_params
    model = model.clone(gradient_checkpointing=gradient_checkpointing)
    weights = np.random.default_rng(1).normal(size=(C, SIZES["hidden_size"])).astype(np.float32)

    def loss(params, states):
        return sum((h * weights[: len(h)]).sum() for h in states(model, params))

    expected = jax.jit(jax.grad(lambda p: loss(p, each_alone)))(params)
    found = jax.jit(jax.grad(lambda p: loss(p, as_forest)))(params)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * scale)


def test_a_kernel_without_parents_gets_each_prompt_repeated():
    model = Transformer(TransformerConfig(**SIZES), attn_implementation="splash")
    batch = packed(model, multiple=32)
    assert "parent_ids" not in batch and batch["input_ids"].shape[1] % 32 == 0
    tokens = (PROMPT_LENGTHS[:, None] + LENGTHS).sum()
    assert (batch["segment_ids"] > 0).sum() == tokens


def test_rows_that_cannot_be_divided_are_refused():
    model = Transformer(TransformerConfig(**SIZES))
    batch = {
        "prompt_ids": ids()[0],
        "prompt_lengths": PROMPT_LENGTHS,
        "completion_ids": ids()[1],
        "completion_lengths": LENGTHS,
    }
    with pytest.raises(ValueError, match="got 4 and 2 rows. Use a batch size that is a multiple"):
        pack_groups(batch, [model], 4)


def test_parents_without_positions_are_refused():
    model = Transformer(TransformerConfig(**SIZES))
    ids = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="parent_ids need positions"):
        model.init(jax.random.key(0), ids, None, ids, ids)


def rows_of_lengths(lengths, T=16):
    ids = np.zeros((len(lengths), T), np.int32)
    for row, n in zip(ids, lengths, strict=True):
        row[:n] = np.random.default_rng(n).integers(1, V, n)
    segments = (ids > 0).astype(np.int32)
    labels = np.where(segments > 0, ids, -100)
    labels[:, 0] = -100
    positions = np.where(segments > 0, np.arange(T), 0).astype(np.int32)
    return {"input_ids": ids, "labels": labels, "positions": positions, "segment_ids": segments}


@pytest.mark.parametrize("blocks", [1, 2])
def test_padded_rows_become_fewer_with_the_same_documents(blocks):
    batch = rows_of_lengths([9, 2, 3, 4, 5, 1, 2, 0])
    batch["segment_ids"][0, 4:9] = 2  # two documents in a row
    batch["positions"][0, 4:9] = np.arange(5)
    found = pack_rows(batch, blocks)
    assert found["input_ids"].shape == (blocks * (2 if blocks == 1 else 1), 16)

    def documents(batch):
        return sorted(
            tuple(batch[name][row][batch["segment_ids"][row] == n].tolist() for name in batch)[:3]
            for row in range(len(batch["input_ids"]))
            for n in range(1, batch["segment_ids"].max() + 1)
            if (batch["segment_ids"][row] == n).any()
        )

    assert documents(found) == documents(batch) and len(documents(found)) == 8
    assert (found["labels"][found["segment_ids"] == 0] == -100).all()


def test_full_rows_and_rows_of_other_arrays_stay_as_they_are():
    full = rows_of_lengths([16, 15, 16, 0, 0])
    assert all(pack_rows(full)[name] is full[name] for name in full)
    other = rows_of_lengths([2, 2]) | {"weight": np.ones(2)}
    assert pack_rows(other)["input_ids"] is other["input_ids"]
    front = rows_of_lengths([2, 2])
    front = {name: value[:, ::-1].copy() for name, value in front.items()}
    assert pack_rows(front)["input_ids"] is front["input_ids"]
