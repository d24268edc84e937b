"""Adam's moments in 8 bits: what is stored, what it takes, and how runs with it go."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import bits

from relax.checkpoint import Checkpointer
from relax.optimizers import adamw, adamw_8bit
from relax.optimizers.eight_bit import EightBit, _first, _second, scale_by_adam_8bit, stored

KEY = jax.random.key(0)
SHAPE = (64, 192)


def some(seed, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape) * jnp.exp(
        2 * jax.random.normal(jax.random.key(seed + 1), shape)
    )


def test_a_first_moment_is_stored_as_the_nearest_code():
    m = jnp.tile(jnp.asarray([[1.0, -0.5, 0.0, 1e-7] + [0.25] * 60]), (64, 1))
    found = stored(_first(m, 1))[0]
    codes = [1.0, -((101 / 127) ** 3), 0.0, 0.0, (80 / 127) ** 3]  # c³ nearest to 127³ / 2 and / 4
    np.testing.assert_allclose(found[:5], codes, rtol=1e-6)


def test_a_second_moment_is_stored_as_one_of_its_neighbours_and_right_on_average():
    v = jnp.square(some(0))

    @jax.jit
    def once(key):
        return stored(_second(v, 1, jax.random.bits(key, SHAPE)))

    found = np.stack([once(key) for key in jax.random.split(KEY, 400)])
    assert max(len(np.unique(found[:, i, j])) for i in range(8) for j in range(192)) == 2
    low, high = (
        stored(_second(v, 1, jnp.full(SHAPE, bits, jnp.uint32))) for bits in (2**32 - 1, 0)
    )
    gaps = np.abs(np.asarray(high - low))
    gaps = np.where(gaps > 0, gaps, np.inf)  # of numbers that have a code of their own
    seen = np.asarray(v / v.max(axis=1, keepdims=True)) > 1e-6
    error = (np.abs(found.mean(axis=0) - v) / gaps)[seen]
    assert error.mean() < 0.03 and error.max() < 0.15  # of the gap between the neighbours


def test_a_second_moment_above_zero_is_never_stored_as_zero():
    v = jnp.where(jnp.arange(192) % 3 > 0, jnp.square(some(1)) * 1e-12, 0.0).at[:, 1].set(1.0)
    found = stored(_second(v, 1, jnp.full(SHAPE, 2**32 - 1, jnp.uint32)))
    assert bits(found > 0) == bits(v > 0)
    np.testing.assert_allclose(found[:, 1], 1.0, rtol=1e-6)


def test_moments_take_less_than_three_tenths_of_their_bytes():
    params = {"embed_tokens": jnp.zeros((512, 96)), "kernel": jnp.zeros((64, 320)),
              "lora_a": jnp.zeros((960, 16)), "scale": jnp.zeros(64)}  # fmt: skip
    sizes = []
    for scale in (scale_by_adam_8bit(), optax.scale_by_adam()):
        state = scale.init(params)
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves((state.mu, state.nu))))
    assert sizes[0] <= 0.27 * sizes[1]
    mu = scale_by_adam_8bit().init(params).mu
    assert [isinstance(mu[name], EightBit) for name in params] == [True, True, True, False]


def test_steps_follow_those_of_adamw():
    """The first is the same; later ones differ by as much as the moments are rounded."""
    params = {"kernel": some(2)}
    spread = jnp.exp(0.7 * jax.random.normal(jax.random.key(3), SHAPE))
    kept, *changing = (jax.random.normal(jax.random.key(i), SHAPE) for i in range(4, 35))
    gradients = [{"kernel": spread * (kept + change)} for change in changing]
    paths = []
    for make in (adamw, adamw_8bit):
        optimizer = make(1e-3)
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        steps = []
        for gradient in gradients:
            step, state = update(gradient, state, params)
            steps.append(np.asarray(step["kernel"]))
        paths.append(steps)
    np.testing.assert_allclose(paths[1][0], paths[0][0], rtol=1e-5, atol=1e-9)
    differing = np.abs(paths[1][-1] - paths[0][-1]).mean() / np.abs(paths[0][-1]).mean()
    assert differing < 0.06
    moved = np.abs(np.sum(paths[1], axis=0) - np.sum(paths[0], axis=0)).mean()
    assert moved < 0.03 * np.abs(np.sum(paths[0], axis=0)).mean()


def test_a_bfloat16_first_moment_is_half_as_large_and_close():
    params, gradient = {"kernel": some(2)}, {"kernel": some(3)}
    both = adamw(1e-3), adamw(1e-3, mu_dtype=jnp.bfloat16)
    states = [optimizer.init(params) for optimizer in both]
    found = [
        optimizer.update(gradient, state, params)[0]["kernel"]
        for optimizer, state in zip(both, states, strict=True)
    ]
    np.testing.assert_allclose(*found, rtol=1e-2)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(state)) for state in states]
    assert sizes[0] - sizes[1] == 2 * params["kernel"].size


def test_what_is_restored_goes_on_to_the_same_bits(tmp_path):
    params, gradient, optimizer = {"kernel": some(2)}, {"kernel": some(3)}, adamw_8bit(1e-3)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    _, state = update(gradient, state, params)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state, {})
    back, _, _ = checkpointer.restore(jax.eval_shape(lambda: optimizer.init(params)))
    assert bits(update(gradient, back, params)) == bits(update(gradient, state, params))
