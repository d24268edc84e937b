"""The transformer computes what transformers' LlamaForCausalLM does, packed and padded rows too."""

import dataclasses
import os

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.models import Transformer, TransformerConfig, load_pretrained
from relax.models.families import family_of

V, B, T = 61, 2, 14
SIZES = {
    "vocab_size": V,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "initializer_range": 0.15,
}
LLAMA3 = {  # of the five planes one is kept, one blended and three divided
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one-kv-head": {"num_key_value_heads": 1, "rope_parameters": {"rope_theta": 333.0}},
    "all-kv-heads": {"num_key_value_heads": 6, "head_dim": 8},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 700.0}},
    "llama3": {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """`(reference, ours)`: float32 logits of transformers and of ReLax for the same weights."""
    theirs, path = made_by_transformers(VARIANTS[request.param], tmp_path_factory.mktemp("model"))
    return reference_of(theirs), ours_of(path)


def made_by_transformers(fields, path):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**SIZES | fields)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # fresh biases are 0, norms are 1
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(path)
    return theirs, path


def reference_of(theirs):
    import torch

    def reference(input_ids, attention_mask=None, position_ids=None):
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
        tensors = {k: torch.tensor(np.array(v)) for k, v in inputs.items() if v is not None}
        with torch.no_grad():
            return theirs(torch.tensor(np.array(input_ids)), **tensors).logits.numpy()

    return reference


def ours_of(path):
    model, params = load_pretrained(path)
    return applied(model, params)


def applied(model, params):
    """`f(input_ids, positions, segment_ids)`, compiled; the parameters are no constants of it."""
    apply = jax.jit(model.apply)
    return lambda *inputs: np.asarray(apply({"params": params}, *map(jnp.asarray, inputs)))


def random_ids(*shape, seed=0, high=V):
    return np.random.default_rng(seed).integers(0, high, shape)


def row(lengths, padding=0):
    """positions and segment_ids of a row that packs documents and ends in padding."""
    positions = np.concatenate([np.arange(n) for n in [*lengths, padding]])
    segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])
    return positions[None].astype(np.int32), segments[None].astype(np.int32)


def assert_near(ours, reference, atol=2e-4):
    assert np.abs(reference).max() > 1, "too flat to tell anything"
    np.testing.assert_allclose(ours, reference, rtol=0, atol=atol)


def test_logits_equal_those_of_transformers(pair):
    reference, ours = pair
    ids = random_ids(B, T)
    positions = np.broadcast_to(np.arange(T), (B, T))
    assert_near(ours(ids, positions, np.ones((B, T), int)), reference(ids))


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_rows_equal_those_of_transformers(pair, side):
    reference, ours = pair
    ids = random_ids(B, T, seed=1)
    mask = (np.arange(T)[None] < np.array([[T], [9]])).astype(int)
    if side == "left":
        mask = mask[:, ::-1]
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)  # as transformers generates
    expected = reference(ids, mask, positions)
    assert_near(ours(ids, positions, mask)[mask == 1], expected[mask == 1])


def test_packed_documents_have_the_logits_that_transformers_gives_each_alone(pair):
    reference, ours = pair
    lengths = ([6, 8], [1, 10, 3])
    ids = random_ids(B, T, seed=2)
    positions, segments = (np.concatenate(x) for x in zip(*map(row, lengths), strict=True))
    logits = ours(ids, positions, segments)
    for i, row_lengths in enumerate(lengths):
        documents = np.split(ids[i], np.cumsum(row_lengths)[:-1])
        alone = [reference(document[None])[0] for document in documents]
        assert_near(logits[i], np.concatenate(alone))


def test_gradients_of_packed_rows_are_those_of_transformers_of_each_document_alone(tmp_path):
    """Of every parameter, through padding and with the keys of several queries shared."""
    theirs, path = made_by_transformers(VARIANTS["biases"], tmp_path)
    import torch

    lengths, padding = ([6, 5], [1, 9]), (3, 4)
    ids = random_ids(B, T, seed=3)
    positions, segments = (np.concatenate(x) for x in zip(*map(row, lengths, padding), strict=True))
    for i, row_lengths in enumerate(lengths):
        for document in np.split(ids[i], np.cumsum(row_lengths))[:-1]:
            document = torch.tensor(document)[None]
            logprobs = torch.log_softmax(theirs(document).logits, dim=-1)
            (-logprobs.gather(-1, document[..., None]).sum()).backward()
    model, params = load_pretrained(path)

    @jax.jit
    @jax.grad
    def gradients(params):
        logits = model.apply({"params": params}, ids, positions, segments)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1)
        return -jnp.where(segments[..., None] != 0, logprobs, 0).sum()

    ours = flax.traverse_util.flatten_dict(gradients(params))
    expected = {name: x.grad.numpy() for name, x in theirs.named_parameters()}
    assert len(ours) == len(expected)
    for path, gradient in ours.items():
        reference = expected[family_of("llama").tensor_name(path)]
        reference = reference.T if path[-1] == "kernel" else reference
        np.testing.assert_allclose(gradient, reference, atol=1e-4 * np.abs(reference).max())


# --- on a model of our own -----------------------------------------------------------------------

CONFIG = TransformerConfig(
    **SIZES | {"num_hidden_layers": 2}, attention_bias=True, output_bias=True
)


def fresh(model):
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


@pytest.fixture(scope="module")
def tiny():
    """`(model, params, apply)`."""
    model = Transformer(CONFIG)
    params = fresh(model)
    return model, params, applied(model, params)


def changed(ids, where, seed=5):
    """Other ids where told, each of them different."""
    step = np.random.default_rng(seed).integers(1, V, ids.shape)
    return np.where(where, (ids + step) % V, ids)


def test_positions_count_from_0_when_none_are_given(tiny):
    *_, apply = tiny
    ids = random_ids(B, T)
    positions = np.broadcast_to(np.arange(T), (B, T))
    np.testing.assert_array_equal(apply(ids), apply(ids, positions))
    shifted = apply(ids, positions + 3)  # rotary attention sees differences only
    np.testing.assert_allclose(apply(ids), shifted, atol=1e-4)
    assert np.abs(apply(ids) - apply(ids, positions * 2)).max() > 1e-2


def test_no_segment_ids_means_one_segment(tiny):
    *_, apply = tiny
    ids = random_ids(B, T)
    positions = np.broadcast_to(np.arange(T), (B, T))
    ones = np.ones((B, T), np.int32)
    np.testing.assert_allclose(apply(ids), apply(ids, positions, ones), atol=1e-6)


def test_a_token_does_not_see_later_tokens(tiny):
    *_, apply = tiny
    ids = random_ids(B, T)
    other = apply(changed(ids, np.arange(T)[None] >= 8))
    np.testing.assert_array_equal(other[:, :8], apply(ids)[:, :8])
    assert np.abs(other[:, 8:] - apply(ids)[:, 8:]).max(axis=-1).min() > 1e-3


def test_a_token_does_not_see_other_segments(tiny):
    *_, apply = tiny
    ids, (positions, segments) = random_ids(1, T), row([5, 6, 3])
    before = apply(ids, positions, segments)
    after = apply(changed(ids, segments == 2), positions, segments)
    np.testing.assert_array_equal(after[segments != 2], before[segments != 2])
    assert np.abs(after - before)[segments == 2].max(axis=-1).min() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_may_hold_any_ids(tiny, side):
    *_, apply = tiny
    ids, (positions, segments) = random_ids(1, T), row([5, 6], padding=3)
    if side == "left":
        positions, segments = positions[:, ::-1], segments[:, ::-1]
    before = apply(ids, positions, segments)
    for padding in (0, 7, V - 1, V + 100, -5):
        filled = np.where(segments == 0, padding, ids)
        after = apply(filled, positions, segments)
        np.testing.assert_array_equal(after[segments != 0], before[segments != 0])
        assert np.isfinite(after).all() or not 0 <= padding < V


def test_padding_gets_no_gradient_and_gives_none(tiny):
    model, params, _ = tiny
    ids, (positions, segments) = random_ids(1, T, high=V - 1), row([5, 6], padding=3)

    def loss(params, ids):
        logits = model.apply({"params": params}, ids, positions, segments)
        return jnp.where((segments != 0)[..., None], jax.nn.log_softmax(logits), 0).sum()

    gradients = [
        jax.jit(jax.grad(loss))(params, np.where(segments == 0, padding, ids))
        for padding in (V - 1, 0)
    ]
    assert not np.asarray(gradients[0]["embed_tokens"][V - 1]).any()  # only padding holds it
    jax.tree.map(np.testing.assert_array_equal, *gradients)


def value_and_grad(model, params):
    ids, (positions, segments) = random_ids(1, T), row([5, 6], padding=3)

    @jax.jit
    def run(params):
        def loss(params):
            logits = model.apply({"params": params}, ids, positions, segments)
            logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1)
            return -jnp.where(segments[..., None] != 0, logprobs, 0).mean()

        return jax.value_and_grad(loss)(params)

    return run(params)


def test_gradient_checkpointing_changes_neither_loss_nor_gradients(tiny):
    model, params, _ = tiny
    loss, gradients = value_and_grad(model, params)
    again, others = value_and_grad(Transformer(CONFIG, gradient_checkpointing=True), params)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    assert jax.tree.structure(others) == jax.tree.structure(gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), others, gradients)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))


def test_gradient_checkpointing_initialises_the_same_parameters(tiny):
    _, params, _ = tiny
    model = Transformer(CONFIG, gradient_checkpointing=True)
    again = fresh(model)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_bfloat16_computation_keeps_float32_parameters_and_stays_near(tiny):
    model, params, apply = tiny
    half = Transformer(CONFIG, jnp.bfloat16)
    shapes = jax.eval_shape(half.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    ids = random_ids(B, T)
    hidden = jax.eval_shape(lambda p: half.apply(p, ids, method="hidden_states"), shapes)
    assert hidden.dtype == jnp.bfloat16
    logits = jax.jit(half.apply)({"params": params}, ids)
    assert logits.dtype == jnp.float32
    exact = apply(ids)
    assert 1e-4 < np.abs(logits - exact).max() < 0.06 * np.abs(exact).max()
    _, gradients = jax.eval_shape(lambda p: value_and_grad(half, p), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_parameters_are_of_param_dtype():
    model = Transformer(CONFIG, jnp.bfloat16, jnp.bfloat16)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_hidden_states_times_the_output_matrix(tied):
    shape = dataclasses.replace(CONFIG, num_hidden_layers=1, tie_word_embeddings=tied)
    model = Transformer(shape)
    params, ids = fresh(model), random_ids(B, T)
    assert ("lm_head" in params) is not tied

    @jax.jit
    def both(variables):
        hidden = model.apply(variables, ids, method="hidden_states")
        return hidden, model.apply(variables, ids)

    hidden, logits = both({"params": params})
    matrix = model.output_matrix(params)
    assert matrix.shape == (V, 48)
    expected = np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64).T
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_fresh_matrices_have_the_standard_deviation_of_the_config(tiny):
    _, params, _ = tiny
    kernel = np.asarray(params["layers_1"]["up_proj"]["kernel"])
    assert abs(kernel.std() / CONFIG.initializer_range - 1) < 0.1
    assert abs(np.asarray(params["embed_tokens"]).std() / CONFIG.initializer_range - 1) < 0.1
    assert not np.asarray(params["layers_1"]["q_proj"]["bias"]).any()
    assert (np.asarray(params["norm"]["scale"]) == 1).all()


# --- on a real model -----------------------------------------------------------------------------

TEXTS = (
    "The Eiffel Tower was built between 1887 and 1889 as the entrance to the World's Fair, and it "
    "has since become the best known symbol of Paris. It is 330 metres tall.",
    "def factorial(n):\n    return 1 if n == 0 else n * factorial(n - 1)\n",
    "Water boils at a lower temperature on a mountain, because the air above it weighs less.",
)


@pytest.mark.slow
@pytest.mark.skipif("RELAX_SMOLLM2" not in os.environ, reason="RELAX_SMOLLM2 names no model")
def test_logits_of_smollm2_on_real_text_equal_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = os.environ["RELAX_SMOLLM2"]
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    reference, ours = reference_of(theirs), ours_of(path)
    tokens = [np.array(AutoTokenizer.from_pretrained(path)(text)["input_ids"]) for text in TEXTS]
    alone = [reference(ids[None])[0] for ids in tokens]
    width = max(map(len, tokens)) + 5
    for left in (True, False):
        mask = np.zeros((len(tokens), width), int)
        ids = np.full_like(mask, 2)
        for i, row_ids in enumerate(tokens):
            at = slice(width - len(row_ids), None) if left else slice(len(row_ids))
            ids[i, at], mask[i, at] = row_ids, 1
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        logits = ours(ids, positions, mask)
        assert_near(logits[mask == 1], reference(ids, mask, positions)[mask == 1], atol=1e-3)
        assert_near(logits[mask == 1], np.concatenate(alone), atol=1e-3)
    positions, segments = row([len(ids) for ids in tokens], padding=4)
    packed = np.concatenate([*tokens, [0, 1, 2, 3]])[None]
    logits = ours(packed, positions, segments)
    assert_near(logits[segments != 0], np.concatenate(alone), atol=1e-3)
