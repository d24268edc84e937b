"""The gated delta rule in chunks is the recurrence of its paper, in packed rows and trees too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.models.delta import delta_rule, delta_step, solve_unit_lower

B, T, H, K, V = 2, 23, 3, 5, 4
# Documents; the second row has two trees, whose children are as short as one token.
SEGMENTS = np.array(
    [[1] * 5 + [2] * 15 + [0] * 3, [1] * 6 + [2] + [3] * 4 + [4] * 3 + [5] + [6] * 8]
)
PARENTS = np.array([[0] * 23, [0] * 6 + [1] * 5 + [0] * 3 + [4] * 9])


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, T, H, size)) for size in (K, K, V))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    g, beta = -0.5 * np.abs(rng.normal(size=(B, T, H))), rng.uniform(size=(B, T, H))
    return q, k, v, g, beta


def by_token(tokens, segments, parents):
    """Each token in turn, as in eq. 10 of the paper, float64: outputs and states."""
    out, states = np.zeros((B, T, H, V)), np.zeros((B, T, H, K, V))
    q, k, v, g, beta = tokens
    for b in range(B):
        behind = {0: np.zeros((H, K, V))}
        for t in range(T):
            state = behind.get(segments[b, t], behind[parents[b, t]])
            for h in range(H):
                decayed = np.exp(g[b, t, h]) * state[h]
                u = beta[b, t, h] * (v[b, t, h] - decayed.T @ k[b, t, h])
                states[b, t, h] = decayed + np.outer(k[b, t, h], u)
                out[b, t, h] = states[b, t, h].T @ q[b, t, h]
            if segments[b, t]:
                behind[segments[b, t]] = states[b, t]
    return out, states


ONE_DOCUMENT = (np.ones_like(SEGMENTS), np.zeros_like(PARENTS))


@pytest.mark.parametrize("chunk", [4, 7, 64])
@pytest.mark.parametrize("rows", ["one document", "documents", "trees"])
def test_chunks_equal_the_recurrence(tokens, rows, chunk):
    if rows == "one document":
        (segments, parents), given = ONE_DOCUMENT, ()
    else:
        segments, parents = SEGMENTS, PARENTS if rows == "trees" else ONE_DOCUMENT[1]
        given = (segments, PARENTS) if rows == "trees" else (segments,)
    expected, states = by_token(tokens, segments, parents)
    inputs = [jnp.asarray(x, jnp.float32) for x in tokens]
    out, state = delta_rule(*inputs, *map(jnp.asarray, given), chunk=chunk)
    real = segments > 0
    np.testing.assert_allclose(out[real], expected[real], atol=5e-6)
    np.testing.assert_allclose(state[1], states[1, -1], atol=5e-6)


@pytest.mark.parametrize("size", [5, 21, 64])
def test_triangular_systems_are_solved_and_differentiated(size):
    """Of one matrix whose inverse has entries up to 1, and of one of random numbers."""
    rng = np.random.default_rng(0)
    lower = np.stack([np.ones((size, size)), rng.normal(size=(size, size)) / size**0.5])
    right, weights = rng.normal(size=(2, 2, size, 3))
    system = np.eye(size) + np.tril(lower, -1)
    expected = np.linalg.solve(system, right)
    d_right = np.linalg.solve(system.swapaxes(1, 2), weights)
    d_lower = -np.tril(d_right @ expected.swapaxes(1, 2), -1)
    inputs = [jnp.asarray(x, jnp.float32) for x in (lower, right)]
    solved, vjp = jax.vjp(jax.jit(solve_unit_lower), *inputs)
    found = (solved, *vjp(jnp.asarray(weights, jnp.float32)))
    for ours, reference in zip(found, (expected, d_lower, d_right), strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-5 * np.abs(reference).max())


def test_tokens_without_decay_and_correction_leave_the_state_alone(tokens):
    """So a prompt that is padded on the right ends with its own state."""
    q, k, v, g, beta = (jnp.asarray(x, jnp.float32) for x in tokens)
    real = (jnp.arange(T) < 9)[None, :, None]
    _, padded = delta_rule(q, k, v, jnp.where(real, g, 0), jnp.where(real, beta, 0), chunk=4)
    _, alone = delta_rule(*(x[:, :9] for x in (q, k, v, g, beta)), chunk=4)
    np.testing.assert_allclose(padded, alone, atol=1e-6)


def test_the_next_token_continues_from_the_state_behind_a_row(tokens):
    inputs = [jnp.asarray(x, jnp.float32) for x in tokens]
    _, state = delta_rule(*(x[:, : T - 1] for x in inputs), chunk=8)
    out, state = delta_step(*(x[:, T - 1] for x in inputs), state)
    expected, states = by_token(tokens, *ONE_DOCUMENT)
    np.testing.assert_allclose(out, expected[:, -1], atol=5e-6)
    np.testing.assert_allclose(state, states[:, -1], atol=5e-6)


def test_gradients_of_trees_equal_those_of_the_recurrence(tokens):
    """Of the second row; a parent's tokens have gradients through all of its children."""
    inputs = [jnp.asarray(x[1:], jnp.float32) for x in tokens]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(1, T, H, V)), jnp.float32)

    def in_chunks(inputs):
        segments, parents = jnp.asarray(SEGMENTS[1:]), jnp.asarray(PARENTS[1:])
        return (weights * delta_rule(*inputs, segments, parents, chunk=4)[0]).sum()

    def in_turn(inputs):
        behind, total = {0: jnp.zeros((1, H, K, V))}, 0.0
        for t in range(T):
            state = behind.get(SEGMENTS[1, t], behind[PARENTS[1, t]])
            out, behind[SEGMENTS[1, t]] = delta_step(*(x[:, t] for x in inputs), state)
            total += (weights[:, t] * out).sum()
        return total

    compare = functools.partial(np.testing.assert_allclose, atol=2e-5)
    jax.tree.map(compare, jax.jit(jax.grad(in_chunks))(inputs), jax.grad(in_turn)(inputs))
