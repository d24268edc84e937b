"""Chunked log-probabilities and entropies against torch's dense ones, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.losses import IGNORED
from relax.losses.logprobs import linear_logprobs, token_logits

M, D, V = 13, 5, 17


def data(seed=0):
    rng = np.random.default_rng(seed)
    hidden, matrix = rng.normal(size=(M, D)), rng.normal(size=(V, D))
    targets = rng.integers(0, V, M)
    targets[[0, 4, 5, 12]] = IGNORED
    hidden[4], hidden[12] = np.nan, 1e30
    return hidden.astype(np.float32), matrix.astype(np.float32), targets


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"temperature": 1.7, "softcap": 1.5}]
)
def test_values_and_gradients_equal_torchs_dense_ones(chunk_size, options):
    torch = pytest.importorskip("torch")
    hidden, matrix, targets = data()
    real = targets != IGNORED
    weights = np.random.default_rng(1).normal(size=(2, M)).astype(np.float32)

    h, w = (
        torch.tensor(x, requires_grad=True) for x in (np.where(real[:, None], hidden, 0), matrix)
    )
    z = h @ w.T
    if "softcap" in options:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    p = torch.distributions.Categorical(logits=z / options.get("temperature", 1.0))
    expected = torch.stack([p.log_prob(torch.tensor(np.where(real, targets, 0))), p.entropy()])
    expected = expected * torch.tensor(real)
    (expected * torch.tensor(weights)).sum().backward()

    def weighted(hidden, matrix):
        out = jnp.stack(linear_logprobs(hidden, matrix, targets, chunk_size=chunk_size, **options))
        return (out * weights).sum(), out

    grad = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))
    (d_hidden, d_matrix), out = grad(hidden, matrix)
    np.testing.assert_allclose(out, expected.detach(), atol=1e-5)
    np.testing.assert_allclose(d_hidden, h.grad, atol=1e-5)
    np.testing.assert_allclose(d_matrix, w.grad, atol=1e-5)


def test_without_a_real_token_all_is_zero():
    hidden, matrix, _ = data()
    targets = np.full(M, IGNORED)
    out, vjp = jax.vjp(lambda h, w: linear_logprobs(h, w, targets), hidden, matrix)
    for leaf in (*out, *vjp(jax.tree.map(jnp.ones_like, out))):
        np.testing.assert_array_equal(leaf, 0)


def test_logits_of_half_precision_states_are_summed_in_float32():
    hidden = jnp.ones((1, 4096), jnp.bfloat16)
    matrix = jnp.full((2, 4096), 1.0)
    assert token_logits(hidden, matrix).tolist() == [[4096.0, 4096.0]]
    assert token_logits(hidden, matrix, temperature=2.0, softcap=10.0).tolist() == [[5.0, 5.0]]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"chunk_size": 0}])
def test_what_cannot_be_is_refused(options):
    hidden, matrix, targets = data()
    with pytest.raises(ValueError, match="at least one token, a chunk_size of at least 1"):
        linear_logprobs(hidden, matrix, targets, **options)
