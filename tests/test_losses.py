"""Chunked cross-entropy equals the dense one, in value and gradient, and never holds its logits."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.config import sft as config
from relax.losses import (
    IGNORED,
    SFT_LOSSES,
    TokenSums,
    linear_cross_entropy,
    next_token_targets,
    register_loss,
    target_hits,
)

M, D, V = 23, 6, 17
CHUNKS = (1, 4, 5, 22, 23, 64)


def problem(ignored=(0, 1, 5, 6, 7, 8, 20), seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(M, D)), dtype)
    matrix = jnp.asarray(rng.normal(size=(V, D)), dtype)
    targets = rng.integers(0, V, M).astype(np.int32)
    targets[::3] = np.asarray((hidden @ matrix.T).argmax(axis=1))[::3]  # some are right
    targets[list(ignored)] = IGNORED
    return hidden, matrix, jnp.asarray(targets)


def by_hand(hidden, matrix, targets, softcap=None):
    """The sums, token by token in float64."""
    nll, correct, entropy, weight = 0.0, 0, 0.0, 0
    for h, target in zip(np.asarray(hidden, np.float64), np.asarray(targets), strict=True):
        if target == IGNORED:
            continue
        logits = [float(h @ row) for row in np.asarray(matrix, np.float64)]
        if softcap is not None:
            logits = [softcap * math.tanh(z / softcap) for z in logits]
        log_total = math.log(sum(math.exp(z) for z in logits))
        logprobs = [z - log_total for z in logits]
        nll -= logprobs[target]
        correct += logits.index(max(logits)) == target
        entropy -= sum(math.exp(p) * p for p in logprobs)
        weight += 1
    return nll, correct, entropy, weight


def dense_nll(hidden, matrix, targets, softcap=None):
    logits = hidden @ matrix.T
    logprobs = jax.nn.log_softmax(
        logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    )
    picked = jnp.take_along_axis(logprobs, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
    return -jnp.where(targets == IGNORED, 0, picked).sum()


def nll(chunk_size=5, scale=1.0, softcap=None):
    def loss(hidden, matrix, targets):
        sums = linear_cross_entropy(hidden, matrix, targets, chunk_size=chunk_size, softcap=softcap)
        return scale * sums.loss

    return loss


def gradients(loss, hidden, matrix, targets):
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, matrix, targets)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_sums_equal_those_of_a_loop_in_float64(chunk_size):
    inputs = problem()
    expected = by_hand(*inputs)
    assert 3 < expected[1] < expected[3] == M - 7
    sums = linear_cross_entropy(*inputs, chunk_size=chunk_size)
    assert isinstance(sums, TokenSums)
    assert all(x.shape == () and x.dtype == jnp.float32 for x in sums)
    np.testing.assert_allclose(sums, (expected[0], *expected), rtol=1e-5)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_gradients_equal_those_of_dense_cross_entropy(chunk_size):
    inputs = problem()
    expected = gradients(dense_nll, *inputs)
    for ours, dense in zip(gradients(nll(chunk_size), *inputs), expected, strict=True):
        np.testing.assert_allclose(ours, dense, atol=1e-5)


def test_value_with_a_gradient_equals_the_value_without():
    inputs = problem()
    value, _ = jax.jit(jax.value_and_grad(nll()))(*inputs)
    np.testing.assert_allclose(value, nll()(*inputs), rtol=1e-6)
    np.testing.assert_allclose(value, by_hand(*inputs)[0], rtol=1e-5)


def test_every_sum_is_given_beside_the_gradient():
    inputs = problem()

    def loss(hidden):
        sums = linear_cross_entropy(hidden, *inputs[1:], chunk_size=5)
        return sums.loss, sums

    _, sums = jax.grad(loss, has_aux=True)(inputs[0])
    np.testing.assert_allclose(sums[1:], by_hand(*inputs), rtol=1e-5)


def dense(hidden, matrix, targets, *, dft=False, smoothing=0.0, z=0.0):
    """The variants from all logits, with jax's own gradient: no chunk, no rule of our own."""
    logits = hidden @ matrix.T
    logprobs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logprobs, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
    losses = -picked * (jax.lax.stop_gradient(jnp.exp(picked)) if dft else 1.0)
    losses = (1 - smoothing) * losses - smoothing * logprobs.mean(axis=1)
    losses += z * jnp.square(jax.nn.logsumexp(logits, axis=1))
    return jnp.where(targets == IGNORED, 0, losses).sum()


def test_variants_of_the_loss_equal_their_equations_and_gradients():
    """Also a loss of one's own: half the negative log-likelihood and half its square."""
    register_loss("square", "sft")(lambda logprobs: -0.5 * logprobs + 0.5 * logprobs**2)
    inputs = problem()
    try:
        for options, equation in [
            ({"loss_type": "dft"}, {"dft": True}),
            ({"label_smoothing": 0.1, "z_loss": 0.01}, {"smoothing": 0.1, "z": 0.01}),
            ({"loss_type": "dft", "z_loss": 1e-3}, {"dft": True, "z": 1e-3}),
            ({"loss_type": "square"}, None),
        ]:

            def ours(*inputs, options=options):
                sums = linear_cross_entropy(*inputs, chunk_size=5, **options)
                return sums.loss, sums.nll

            def theirs(*inputs, equation=equation):
                if equation is not None:
                    return dense(*inputs, **equation)
                picked = jax.nn.log_softmax(inputs[0] @ inputs[1].T)
                picked = jnp.take_along_axis(picked, jnp.maximum(inputs[2], 0)[:, None], 1)[:, 0]
                losses = -0.5 * picked + 0.5 * picked**2
                return jnp.where(inputs[2] == IGNORED, 0, losses).sum()

            (value, plain), found = jax.value_and_grad(ours, (0, 1), has_aux=True)(*inputs)
            np.testing.assert_allclose(value, theirs(*inputs), rtol=1e-5)
            np.testing.assert_allclose(plain, by_hand(*inputs)[0], rtol=1e-5)
            for ours_, expected in zip(found, jax.grad(theirs, (0, 1))(*inputs), strict=True):
                np.testing.assert_allclose(ours_, expected, rtol=1e-4, atol=1e-6)
    finally:
        del SFT_LOSSES["square"]


def test_two_uniform_tokens_of_dynamic_fine_tuning_cost_half_their_cross_entropy():
    """TRL's own test of its dft: -½ log ½ in place of -log ½."""
    sums = linear_cross_entropy(jnp.ones((3, 2)), jnp.ones((2, 2)), jnp.array([0, 1, 1]))
    dft = linear_cross_entropy(
        jnp.ones((3, 2)), jnp.ones((2, 2)), jnp.array([0, 1, 1]), loss_type="dft"
    )
    np.testing.assert_allclose(dft.loss, sums.loss / 2, rtol=1e-6)
    assert tuple(SFT_LOSSES) == config.LOSSES


def test_jit_changes_nothing():
    inputs = problem()
    plain = linear_cross_entropy(*inputs, chunk_size=4)
    jitted = jax.jit(linear_cross_entropy, static_argnames="chunk_size")(*inputs, chunk_size=4)
    np.testing.assert_allclose(jitted, plain, rtol=1e-6)


@pytest.mark.parametrize("scale", [-2.5, 0.0, 1e-3])
def test_gradients_scale_with_the_loss(scale):
    inputs = problem()
    plain = gradients(nll(), *inputs)
    for ours, expected in zip(gradients(nll(scale=scale), *inputs), plain, strict=True):
        np.testing.assert_allclose(ours, scale * expected, rtol=1e-5, atol=1e-7)


def test_nothing_to_train_gives_exactly_zero():
    hidden, matrix, targets = problem()
    targets = jnp.full_like(targets, IGNORED)
    assert linear_cross_entropy(hidden, matrix, targets) == (0, 0, 0, 0, 0)
    for gradient in gradients(nll(), hidden, matrix, targets):
        assert not np.asarray(gradient).any()


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf, 1e4, 3e38])
def test_hidden_rows_of_ignored_tokens_may_hold_anything(rubbish):
    hidden, matrix, targets = problem()
    ignored = np.asarray(targets) == IGNORED
    dirty = jnp.where(ignored[:, None], rubbish, hidden)
    # 16 tokens are trained: chunks of 5 hold both kinds, or only trained, or only ignored ones
    clean_sums = linear_cross_entropy(hidden, matrix, targets, chunk_size=5)
    assert linear_cross_entropy(dirty, matrix, targets, chunk_size=5) == clean_sums
    clean, ours = (gradients(nll(5), h, matrix, targets) for h in (hidden, dirty))
    for a, b in zip(clean, ours, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.asarray(ours[0])[ignored].any()
    assert np.asarray(ours[0])[~ignored].any(axis=1).all()


def test_large_logits_neither_overflow_nor_vanish():
    hidden = jnp.array([[1e4], [1e4]])
    matrix = jnp.array([[1.0], [0.0], [-1.0]])
    sums = linear_cross_entropy(hidden, matrix, jnp.array([0, 2]))
    np.testing.assert_allclose(sums[1:], (2e4, 1, 0, 2))


def test_entropy_of_equal_logits_is_the_logarithm_of_their_number():
    hidden, matrix, targets = problem()
    sums = linear_cross_entropy(jnp.zeros_like(hidden), matrix, targets)
    np.testing.assert_allclose(sums.entropy / sums.weight, math.log(V), rtol=1e-6)
    np.testing.assert_allclose(sums.nll / sums.weight, math.log(V), rtol=1e-6)


def test_bfloat16_sums_are_those_of_the_rounded_inputs():
    """The logits of bfloat16 inputs are float32, so only the inputs are rounded."""
    inputs = problem(dtype=jnp.bfloat16)
    sums = linear_cross_entropy(*inputs, chunk_size=5)
    assert {x.dtype for x in sums} == {jnp.dtype("float32")}
    np.testing.assert_allclose(sums[1:], by_hand(*inputs), rtol=1e-4)


def test_bfloat16_gradients_are_near_and_of_the_dtype_of_the_inputs():
    hidden, matrix, targets = problem(dtype=jnp.bfloat16)
    wide = gradients(dense_nll, hidden.astype(jnp.float32), matrix.astype(jnp.float32), targets)
    for ours, exact in zip(gradients(nll(), hidden, matrix, targets), wide, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            ours.astype(jnp.float32), exact, atol=0.02 * jnp.abs(exact).max()
        )


SHAPE = re.compile(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]")


def largest_array(f, *args):
    """Elements of the largest array in what XLA compiles."""
    text = jax.jit(f).lower(*args).compile().as_text()
    return max(math.prod(map(int, shape.split(","))) for shape in SHAPE.findall(text))


def test_no_array_has_the_size_of_all_logits():
    m, d, v, chunk_size = 96, 8, 101, 12
    rng = np.random.default_rng(0)
    args = (
        jnp.asarray(rng.normal(size=(m, d)), jnp.float32),
        jnp.asarray(rng.normal(size=(v, d)), jnp.float32),
        jnp.asarray(rng.integers(0, v, m), jnp.int32),
    )
    assert largest_array(dense_nll, *args) >= m * v  # the probe sees them where they are
    most = chunk_size * v
    assert max(m * d, v * d) < most
    loss = nll(chunk_size)
    assert largest_array(loss, *args) <= most
    assert largest_array(jax.value_and_grad(loss, argnums=(0, 1)), *args) <= most
    assert largest_array(lambda *a: target_hits(*a, chunk_size=chunk_size), *args) <= most


# --- soft-capping, precision, what is frozen, what is refused ------------------------------------

CAP = 1.5  # logits reach about 6 here


@pytest.mark.parametrize("chunk_size", [5, 64])
def test_soft_capped_sums_and_gradients_are_the_dense_ones(chunk_size):
    inputs = problem()
    sums = linear_cross_entropy(*inputs, chunk_size=chunk_size, softcap=CAP)
    expected = by_hand(*inputs, CAP)
    np.testing.assert_allclose(sums[1:], expected, rtol=1e-5)
    assert abs(expected[0] - by_hand(*inputs)[0]) > 1
    dense = gradients(lambda *args: dense_nll(*args, CAP), *inputs)
    for ours, exact in zip(gradients(nll(chunk_size, softcap=CAP), *inputs), dense, strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-5)


def test_a_soft_cap_reaches_target_hits():
    """One so low that all logits of a row become equal: the first token is then the likeliest."""
    hidden, matrix, targets = problem(ignored=())
    hits = target_hits(hidden, matrix, targets, softcap=1e-3)
    signs = np.sign(np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64).T)
    np.testing.assert_array_equal(hits, signs.argmax(axis=1) == np.asarray(targets))


def products(jaxpr):
    """Of every matrix product in a program: the dtypes of its operands, and what it gives."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            operands = {operand.aval.dtype.name for operand in equation.invars}
            found.append((operands, equation.outvars[0].aval.str_short()))
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            found += products(inner) if hasattr(inner, "eqns") else []
    return found


def products_of(f, *args):
    return products(jax.make_jaxpr(f)(*args).jaxpr)


def test_bfloat16_states_make_bfloat16_products_whatever_the_matrix_is_and_float32_sums():
    hidden, matrix, targets = problem()
    narrow = hidden.astype(jnp.bfloat16)
    sums = linear_cross_entropy(narrow, matrix, targets, chunk_size=5)
    rounded = (narrow, matrix.astype(jnp.bfloat16), targets)
    np.testing.assert_allclose(sums[1:], by_hand(*rounded), rtol=1e-4)
    d_hidden, d_matrix = gradients(nll(), narrow, matrix, targets)
    assert (d_hidden.dtype, d_matrix.dtype) == (jnp.bfloat16, jnp.float32)
    found = products_of(jax.grad(nll(), argnums=(0, 1)), narrow, matrix, targets)
    found += products_of(lambda *args: target_hits(*args, chunk_size=5), narrow, matrix, targets)
    assert len(found) >= 4
    for operands, output in found:
        assert operands == {"bfloat16"} and output.startswith("float32"), found


def test_the_gradient_of_a_frozen_matrix_is_not_made():
    hidden, matrix, targets = problem()
    expected = gradients(dense_nll, hidden, matrix, targets)[0]
    np.testing.assert_allclose(jax.grad(nll())(hidden, matrix, targets), expected, atol=1e-5)
    for arguments, made in (((0, 1), True), (0, False)):
        found = products_of(jax.grad(nll(), argnums=arguments), hidden, matrix, targets)
        assert (f"float32[{V},{D}]" in [output for _, output in found]) == made


def test_a_sum_without_a_gradient_has_none():
    hidden, matrix, targets = problem()

    def entropy(hidden):
        return linear_cross_entropy(hidden, matrix, targets).entropy

    assert not np.asarray(jax.grad(entropy)(hidden)).any()


@pytest.mark.parametrize(("rows", "chunk_size"), [(M, 0), (M, -1), (0, 256)])
def test_no_tokens_and_no_chunk_are_refused(rows, chunk_size):
    hidden, matrix, targets = problem()
    for f in (linear_cross_entropy, target_hits):
        with pytest.raises(ValueError, match="at least one, got"):
            f(hidden[:rows], matrix, targets[:rows], chunk_size=chunk_size)


# --- target_hits and next_token_targets ----------------------------------------------------------


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_target_hits_are_where_the_likeliest_token_is_the_target(chunk_size):
    hidden, matrix, targets = problem()
    likeliest = (np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64).T).argmax(axis=1)
    targets = jnp.where(jnp.arange(M) % 3 == 0, jnp.asarray(likeliest), targets)
    hits = target_hits(hidden, matrix, targets, chunk_size=chunk_size)
    np.testing.assert_array_equal(hits, likeliest == np.asarray(targets))
    assert hits.dtype == bool and 0 < hits.sum() < M


def test_an_ignored_token_is_no_hit():
    hidden, matrix, targets = problem()
    assert not target_hits(hidden, matrix, jnp.full_like(targets, IGNORED)).any()


@pytest.mark.parametrize(
    ("labels", "targets"),
    [
        ([[-100, 5, 6]], [[5, 6, -100]]),
        ([[-100]], [[-100]]),
        ([[-100, -100, 7, -100]], [[-100, 7, -100, -100]]),
        # two documents in one row: the first token of the second is no one's target
        ([[-100, 3, 4, -100, 8]], [[3, 4, -100, 8, -100]]),
        ([[-100, 1], [-100, 2]], [[1, -100], [2, -100]]),  # rows stay apart
        ([[9, 0]], [[0, -100]]),  # nothing predicts the first token; token 0 is a target
    ],
)
def test_next_token_targets(labels, targets):
    assert next_token_targets(jnp.array(labels)).tolist() == targets
