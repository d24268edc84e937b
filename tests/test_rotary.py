"""Rotary positions: each stretching against a loop over planes, and how packed rows use them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.models.rope import Rope, RopeScaling
from relax.models.rotary import frequencies, rotary_angles, rotate, scale_queries

THETA, R = 100.0, 8
PLAIN = [1.0, 0.31622776601683794, 0.1, 0.03162277660168379]  # 100^(-2i/8)


def test_frequencies_fall_from_one_by_the_base():
    np.testing.assert_allclose(frequencies(Rope(THETA), R), PLAIN, rtol=1e-6)


def test_linear_divides_all_frequencies():
    stretched = frequencies(Rope(THETA, RopeScaling("linear", 4.0)), R)
    np.testing.assert_allclose(stretched, [f / 4 for f in PLAIN], rtol=1e-6)


def llama3(plain, factor, low, high, original):
    expected = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            expected.append(frequency)
        elif wavelength > original / low:
            expected.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    return expected


def test_llama3_keeps_the_fast_planes_divides_the_slow_and_blends_between():
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 50)
    expected = llama3(PLAIN, 8.0, 1.0, 4.0, 50)
    assert expected[0] == PLAIN[0] and expected[2:] == [f / 8 for f in PLAIN[2:]]
    assert PLAIN[1] / 8 < expected[1] < PLAIN[1]
    np.testing.assert_allclose(frequencies(Rope(THETA, scaling), R), expected, rtol=1e-6)


def yarn(plain, scaling):
    def plane(turns):
        turned = scaling.original_max_position_embeddings / (2 * math.pi * turns)
        return R * math.log(turned) / (2 * math.log(THETA))

    first, last = plane(scaling.beta_fast), plane(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, R - 1)
    expected = []
    for i, frequency in enumerate(plain):
        slow = min(max((i - first) / (last - first), 0.0), 1.0)
        expected.append(slow * frequency / scaling.factor + (1 - slow) * frequency)
    return expected


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_blends_between_the_planes_that_turn_often_and_rarely(truncate):
    scaling = RopeScaling(
        "yarn",
        4.0,
        original_max_position_embeddings=50,
        beta_fast=3.0,
        beta_slow=0.5,
        truncate=truncate,
        attention_factor=1.25,
    )
    expected = yarn(PLAIN, scaling)
    assert 1 < len(set(np.round(np.divide(expected, PLAIN), 6))) <= 4
    np.testing.assert_allclose(frequencies(Rope(THETA, scaling), R), expected, rtol=1e-6)
    cos, sin, _ = rotary_angles(jnp.array([[0, 3]]), Rope(THETA, scaling), R)
    np.testing.assert_allclose(cos[0, 0, 0], [1.25] * 4, rtol=1e-6)
    np.testing.assert_allclose(sin[1, 0, 0], [1.25 * math.sin(3 * f) for f in expected], rtol=1e-5)


def dynamic(length, factor, original):
    base = THETA * (factor * max(length, original) / original - (factor - 1)) ** (R / (R - 2))
    return [base ** (-2 * i / R) for i in range(R // 2)]


def angles_of(positions, scaling, segments=None):
    """Angles `[B, T, R/2]` of a row."""
    positions = jnp.asarray(positions)
    cos, sin, _ = rotary_angles(positions, Rope(THETA, scaling), R, segments)
    return np.arctan2(sin, cos).reshape(*positions.shape, -1)


def turned(position, frequencies):
    """The angle from -π to π."""
    return np.angle(np.exp(1j * position * np.asarray(frequencies)))


DYNAMIC = RopeScaling("dynamic", 3.0, original_max_position_embeddings=4)
LONG = RopeScaling(
    "longrope",
    original_max_position_embeddings=4,
    short_factor=(1.0, 1.5, 2.0, 3.0),
    long_factor=(2.0, 4.0, 6.0, 8.0),
)


def test_dynamic_raises_the_base_with_the_length_of_a_document():
    found = angles_of(np.arange(7)[None], DYNAMIC)
    np.testing.assert_allclose(found[0, 6], turned(6, dynamic(7, 3.0, 4)), atol=1e-5)
    np.testing.assert_allclose(found[0, 1], turned(1, dynamic(7, 3.0, 4)), atol=1e-5)
    np.testing.assert_allclose(
        angles_of([[0, 1, 2, 3]], DYNAMIC)[0, 3], turned(3, PLAIN), atol=1e-5
    )


def test_longrope_takes_the_long_factors_in_long_documents():
    short, long = (np.divide(PLAIN, f) for f in (LONG.short_factor, LONG.long_factor))
    np.testing.assert_allclose(angles_of([[0, 1, 2, 3]], LONG)[0, 3], turned(3, short), atol=1e-5)
    found = angles_of(np.arange(5)[None], LONG)
    np.testing.assert_allclose(found[0, 3], turned(3, long), atol=1e-5)


@pytest.mark.parametrize("scaling", [DYNAMIC, LONG], ids=["dynamic", "longrope"])
def test_a_document_turns_by_its_own_length_whatever_stands_beside_it(scaling):
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 0]])
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0]])
    packed = angles_of(positions, scaling, jnp.asarray(segments))
    np.testing.assert_allclose(packed[0, :3], angles_of([[0, 1, 2]], scaling)[0], atol=1e-6)
    np.testing.assert_allclose(packed[0, 3:9], angles_of([range(6)], scaling)[0], atol=1e-6)


def test_rotation_turns_pairs_half_a_head_apart_and_leaves_the_rest():
    x = np.random.default_rng(0).normal(size=(3, 2, 1, 12)).astype(np.float32)
    positions = [0, 2, 5]
    out = np.asarray(rotate(jnp.asarray(x), rotary_angles(jnp.array([positions]), Rope(THETA), R)))
    for m, position in enumerate(positions):
        for i, frequency in enumerate(PLAIN):
            a = position * frequency
            first, second = x[m, :, 0, i], x[m, :, 0, i + 4]
            np.testing.assert_allclose(
                out[m, :, 0, i], first * math.cos(a) - second * math.sin(a), atol=1e-5
            )
            np.testing.assert_allclose(
                out[m, :, 0, i + 4], second * math.cos(a) + first * math.sin(a), atol=1e-5
            )
    np.testing.assert_array_equal(out[..., 8:], x[..., 8:])
    np.testing.assert_array_equal(rotate(jnp.asarray(x), None), x)


def test_interleaved_rotation_turns_pairs_of_neighbours():
    """As the other rotation of the entries in another order."""
    x = np.random.default_rng(0).normal(size=(3, 2, 1, 12)).astype(np.float32)
    angles = rotary_angles(jnp.array([[0, 2, 5]]), Rope(THETA), R)
    order = [0, 4, 1, 5, 2, 6, 3, 7, 8, 9, 10, 11]
    out = rotate(jnp.asarray(x[..., order]), angles, interleaved=True)
    np.testing.assert_allclose(out, rotate(jnp.asarray(x), angles)[..., order], atol=1e-6)


def test_backward_rotation_undoes_the_other_one():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1, 8)), jnp.float32)
    there, back = (
        rotary_angles(jnp.array([[2, 5]]), Rope(THETA, backwards=b), R) for b in (False, True)
    )
    assert np.abs(rotate(x, back) - x).max() > 0.1
    np.testing.assert_allclose(rotate(rotate(x, there), back), x, atol=1e-5)


def test_ntk_raises_the_base_whatever_the_length():
    """Base 4 · 9^(8 / 6) with R = 8."""
    found = frequencies(Rope(4.0, RopeScaling("ntk", 9.0)), 8)
    base = 4.0 * 9.0 ** (8 / 6)
    np.testing.assert_allclose(found, [base ** (-i / 4) for i in range(4)], rtol=1e-6)


def test_queries_grow_with_the_logarithm_of_how_often_the_length_fits_into_their_position():
    """1 + 0.5 log(1 + floor(p / 4)): 1 below 4, then one step every 4 positions."""
    rope = Rope(THETA, query_beta=0.5, query_length=4)
    angles = rotary_angles(jnp.array([[0, 3, 4, 7, 13]]), rope, R)
    q = jnp.ones((5, 2, 3, 8))
    expected = [1.0, 1.0, 1 + 0.5 * math.log(2), 1 + 0.5 * math.log(2), 1 + 0.5 * math.log(4)]
    np.testing.assert_allclose(scale_queries(q, angles)[:, 1, 2, 7], expected, rtol=1e-6)
    assert scale_queries(q, rotary_angles(jnp.array([[9]]), Rope(THETA), R)) is q
    assert scale_queries(q, None) is q


def test_rotation_computes_in_float32_and_gives_the_dtype_it_was_given():
    x = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    far = rotary_angles(jnp.array([[4001]]), Rope(THETA), R)
    out = rotate(x, far)
    assert out.dtype == jnp.bfloat16
    expected = [math.cos(4001 * f) - math.sin(4001 * f) for f in PLAIN]
    np.testing.assert_allclose(out[0, 0, 0, :4].astype(np.float32), expected, atol=1e-2)


def test_an_unknown_scaling_is_an_error():
    with pytest.raises(
        ValueError, match="unknown rope scaling 'spiral'. Known: linear, proportional, ntk, llama3"
    ):
        frequencies(Rope(THETA, RopeScaling("spiral")), R)


@pytest.mark.parametrize("scaling", [DYNAMIC, LONG], ids=["dynamic", "longrope"])
def test_lengths_are_read_in_compiled_code(scaling):
    positions = jnp.arange(7)[None]
    compiled = jax.jit(lambda p: rotary_angles(p, Rope(THETA, scaling), R))(positions)
    expected = rotary_angles(positions, Rope(THETA, scaling), R)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), compiled, expected)
