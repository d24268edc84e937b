"""Layers with the keys and values of others, and inputs of tokens for each layer (Gemma 4)."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from families import IDS, POSITIONS, SEGMENTS, V, tiny_family

from relax.errors import ModelLoadError
from relax.models import load_pretrained, save_pretrained
from relax.models.cache import is_columns
from relax.models.mixers import empty_cache
from relax.models.rotary import frequencies
from relax.trainers import SFTTrainer

NAME = "gemma4_text"  # five layers, of which two attend to the keys and values of 2 and 1
BATCH = {"input_ids": IDS, "labels": IDS, "positions": POSITIONS, "segment_ids": SEGMENTS}


def test_a_layer_attends_to_the_last_one_of_its_type_that_has_keys_and_values():
    model, params = tiny_family(NAME)
    layers = model.config.layers
    assert [layer.source for layer in layers] == [None, None, None, 2, 1]
    assert [layer.head_dim for layer in layers] == [10, 16, 10, 10, 16]
    assert [layer.intermediate_size for layer in layers] == [20, 20, 20, 40, 40]
    assert not {"k_proj", "v_proj", "k_norm"} & (params["layers_3"] | params["layers_4"]).keys()


def test_the_cache_holds_no_columns_of_layers_that_share():
    cache = empty_cache(tiny_family(NAME)[0].config, 2, 8, jnp.float32)
    assert [is_columns(state) for state in cache] == [True, True, True, False, False]
    assert cache[3] == cache[4] == ()
    assert cache[1][0].entries.shape == (2, 2, 16, 8)  # wider heads in the full layer


def test_proportional_frequencies_are_those_of_the_whole_head_for_a_part_of_it():
    """3 planes of a head of 16, base 300: 300^(-2i/16), and 0 for the other five."""
    rope = tiny_family(NAME)[0].config.layers[1].rope
    np.testing.assert_allclose(
        frequencies(rope, 16), [1.0, 0.4901848, 0.2402811, 0, 0, 0, 0, 0], rtol=1e-5
    )


@pytest.mark.parametrize("policy", ["matmuls", "nothing"])
def test_gradients_through_shared_keys_are_the_same_with_checkpointing(policy):
    model, params = tiny_family(NAME)
    checkpointed = model.clone(gradient_checkpointing=True, gradient_checkpointing_policy=policy)

    def gradients(model):
        trainer = SFTTrainer(model, optax.sgd(1.0))
        return jax.jit(jax.grad(lambda p: trainer.compute_loss(p, BATCH).loss))(params)

    plain, ours = map(gradients, (model, checkpointed))
    for a, b in zip(*map(jax.tree.leaves, (plain, ours)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(float(jnp.abs(a).max()), 1e-6))
    assert float(jnp.abs(plain["layers_1"]["k_proj"]["kernel"]).max()) > 0


def test_the_factors_of_layers_are_not_trained():
    model, params = tiny_family(NAME)
    trainer = SFTTrainer(model, optax.adam(0.1))
    state = trainer.create_train_state(jax.random.key(0)).replace(params=params)
    state, _ = trainer.train_step(jax.tree.map(jnp.array, state), BATCH)
    for i in range(5):
        after, before = (p[f"layers_{i}"]["layer_scalar"] for p in (state.params, params))
        assert after == before != 1


def with_unused_keys(path):
    """As the files of Gemma 4 E2B: layers that share have keys and values that nothing reads."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    like = "model.layers.2.self_attn.{}"
    extra = {
        f"model.layers.3.self_attn.{name}": tensors[like.format(name)] + 1
        for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "k_norm.weight")
    }
    save_file(tensors | extra, path / "model.safetensors", metadata={"format": "pt"})
    return extra


def test_keys_of_layers_that_share_may_stand_in_a_file_and_are_not_read(tmp_path):
    model, params = tiny_family(NAME)
    path = save_pretrained(tmp_path / "model", model, params)
    with_unused_keys(path)
    back, again = load_pretrained(path)
    assert back.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_keys_of_layers_that_do_not_exist_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    path = save_pretrained(tmp_path / "model", *tiny_family(NAME))
    tensors = load_file(path / "model.safetensors")
    save_file(
        tensors | {"model.layers.5.self_attn.k_proj.weight": IDS.astype(np.float32)},
        path / "model.safetensors",
    )
    with pytest.raises(ModelLoadError, match=r"1 not in the architecture: model\.layers\.5"):
        load_pretrained(path)


def test_every_leaf_has_a_shape_that_initialisation_gives_it():
    model, params = tiny_family(NAME)
    made = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    ours, theirs = map(flax.traverse_util.flatten_dict, (params, made))
    assert {k: x.shape for k, x in ours.items()} == {k: x.shape for k, x in theirs.items()}
    assert ours["embed_tokens_per_layer",].shape == (V + 3, 5 * 8)
