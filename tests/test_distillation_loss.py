"""The distillation loss: TRL's values and gradients, top-k cells, several teachers, chunks."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.losses import TeacherStates, TopLogprobs, linear_divergence

GOLDEN = json.loads((Path(__file__).parent / "golden" / "trl_distillation.json").read_text())
HIDDEN, MATRIX, HIDDEN_T, MATRIX_T = (
    np.array(GOLDEN["given"][name], np.float32)
    for name in ("hidden", "matrix", "teacher_hidden", "teacher_matrix")
)
MASK = np.array(GOLDEN["mask"])
TEACHER = (TeacherStates(jnp.array(HIDDEN_T), jnp.array(MATRIX_T)),)


def mean_and_gradient(teacher=TEACHER, hidden=HIDDEN, matrix=MATRIX, **options):
    def mean(hidden, matrix):
        sums = linear_divergence(hidden, matrix, teacher, jnp.array(MASK), **options)
        return sums.divergence / sums.weight

    return jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(jnp.array(hidden), jnp.array(matrix))


def log_softmax(z):
    z = np.asarray(z, np.float64)
    return (
        z
        - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - z.max(-1, keepdims=True)
    )


def cells_of(log_p, ids):
    """Log-probabilities of some tokens and of the rest, by loops."""
    out = np.zeros((len(log_p), ids.shape[1] + 1))
    for row, chosen in enumerate(ids):
        out[row, :-1] = log_p[row, chosen]
        out[row, -1] = np.log(sum(np.exp(x) for v, x in enumerate(log_p[row]) if v not in chosen))
    return out


@pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda c: "-".join(str(c[n]) for n in list(c)[:3])
)
def test_value_and_gradients_are_those_of_trl(case):
    options = {name: case[name] for name in ("beta", "temperature", "top_k")}
    value, (d_hidden, d_matrix) = mean_and_gradient(chunk_size=4, **options)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
    np.testing.assert_allclose(d_hidden, case["d_hidden"], atol=1e-5)
    np.testing.assert_allclose(d_matrix, case["d_matrix"], atol=1e-5)


def test_neither_chunks_nor_what_is_masked_change_anything():
    whole = mean_and_gradient(beta=0.3, chunk_size=100)
    other = np.where(MASK[:, None], HIDDEN, np.nan)
    there = jnp.where(MASK[:, None], HIDDEN_T, jnp.nan)
    parts = mean_and_gradient((TEACHER[0]._replace(hidden=there),), other, beta=0.3, chunk_size=1)
    for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    none = linear_divergence(jnp.array(other), jnp.array(MATRIX), TEACHER, jnp.zeros(6, bool))
    assert [float(x) for x in none] == [0, 0, 0, 0]


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_top_k_is_the_divergence_of_k_plus_one_cells(beta):
    log_p, log_q = log_softmax(HIDDEN_T @ MATRIX_T.T), log_softmax(HIDDEN @ MATRIX.T)
    ids = np.argsort(-log_p, axis=-1)[:, :2]
    p, q = (np.exp(cells_of(x, ids)) for x in (log_p, log_q))
    m = beta * p + (1 - beta) * q
    kl = {
        0.0: p * np.log(p / q),
        1.0: q * np.log(q / p),
        0.4: beta * p * np.log(p / m) + (1 - beta) * q * np.log(q / m),
    }[beta]
    live, live_gradient = mean_and_gradient(beta=beta, top_k=2)
    np.testing.assert_allclose(live, kl.sum(-1)[MASK].mean(), rtol=1e-5)
    stored = TopLogprobs(jnp.array(ids), jnp.array(cells_of(log_p, ids), jnp.float32))
    value, gradient = mean_and_gradient(stored, beta=beta)
    np.testing.assert_allclose(value, live, rtol=1e-5)
    for one, two in zip(gradient, live_gradient, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)

    def cells(hidden):  # the gradient, from autodiff of the definition
        found = jax.nn.log_softmax(hidden @ MATRIX.T)
        top = jnp.take_along_axis(found, jnp.array(ids), axis=-1)
        found = jnp.concatenate([top, jnp.log1p(-jnp.exp(top).sum(-1, keepdims=True))], axis=-1)
        q, m = jnp.exp(found), beta * jnp.exp(stored.logprobs) + (1 - beta) * jnp.exp(found)
        kl_q = (q * (found - (jnp.log(m) if beta < 1 else stored.logprobs))).sum(-1)
        kl_p = (p * (np.log(p) - (jnp.log(m) if beta else found))).sum(-1)
        share = {0.0: (1, 0), 1.0: (0, 1), 0.4: (beta, 1 - beta)}[beta]
        return (share[0] * kl_p + share[1] * kl_q)[MASK].mean()

    np.testing.assert_allclose(jax.grad(cells)(jnp.array(HIDDEN)), gradient[0], atol=2e-5)


def test_several_teachers_are_the_weighted_mean_of_their_distributions():
    other = np.random.default_rng(3).normal(size=(9, 3)).astype(np.float32)
    cap = 1.5
    capped = cap * np.tanh(HIDDEN_T @ other.T / cap)
    p = 0.25 * np.exp(log_softmax(HIDDEN_T @ MATRIX_T.T / 0.7))
    p = p + 0.75 * np.exp(log_softmax(capped / 0.7))
    log_q = log_softmax(HIDDEN @ MATRIX.T / 0.7)
    teachers = (
        TEACHER[0]._replace(weight=1),
        TeacherStates(jnp.array(HIDDEN_T), jnp.array(other), weight=3, softcap=cap),
    )
    value, _ = mean_and_gradient(teachers, beta=0.0, temperature=0.7)
    np.testing.assert_allclose(value, (p * (np.log(p) - log_q)).sum(-1)[MASK].mean(), rtol=1e-5)


def test_a_vocabulary_with_padding_is_compared_up_to_its_common_rows():
    padded = np.concatenate([MATRIX_T, 1e3 * np.ones((3, 3), np.float32)])
    plain = mean_and_gradient(beta=0.5)
    longer = mean_and_gradient((TEACHER[0]._replace(matrix=jnp.array(padded)),), beta=0.5)
    np.testing.assert_array_equal(plain[0], longer[0])
    wide = np.concatenate([MATRIX, 1e3 * np.ones((2, 4), np.float32)])
    _, (_, d_matrix) = mean_and_gradient(matrix=wide, beta=0.5)
    np.testing.assert_allclose(d_matrix[:9], plain[1][1], atol=1e-7)
    assert not d_matrix[9:].any()


def test_student_and_teacher_of_extreme_logits_keep_gradients_finite():
    sharp = (TEACHER[0]._replace(hidden=jnp.array(300 * HIDDEN_T)),)
    for beta in (0.0, 0.5, 1.0):
        for top_k in (0, 2):
            found = mean_and_gradient(sharp, -200 * HIDDEN, beta=beta, top_k=top_k)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 1.5}, r"beta in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"top_k": 9}, "top_k must leave a token for the rest, got 9 of 9"),
        ({"teacher": ()}, "a row for each of 6 tokens, got none"),
        ({"teacher": (TEACHER[0]._replace(hidden=jnp.zeros((5, 3))),)}, r"got \(5, 3\)"),
        (
            {"teacher": TopLogprobs(jnp.zeros((6, 2), int), jnp.zeros((6, 2)))},
            "those of 2 ids and of the rest",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    given = {"teacher": TEACHER} | options
    teacher = given.pop("teacher")
    with pytest.raises(ValueError, match=message):
        linear_divergence(jnp.array(HIDDEN), jnp.array(MATRIX), teacher, jnp.array(MASK), **given)
