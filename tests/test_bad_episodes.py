"""Tools, environments and templates that cannot be used end a run before anything is compiled."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grpo_runs import JOB, call
from runs import write_rows
from test_data_prepare import byte_tokenizer

from relax.models import Transformer, TransformerConfig, save_pretrained
from tests import tool_files

FILE = tool_files.__file__
HERMES = tool_files.TEMPLATES["hermes"]


class BadReward(tool_files.Counter):
    """TRL's form, whose reward is a list."""

    def get_reward(self):
        return [0.5, 0.5]


def directory_with(tmp_path, template):
    tokenizer = byte_tokenizer(template)
    shape = TransformerConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = Transformer(shape)
    made = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), made)
    return save_pretrained(tmp_path / "tiny", model, params, tokenizer)


@pytest.mark.parametrize(
    ("template", "fields", "sentence"),
    [
        (HERMES, {"tools": f"{FILE}:untyped"}, "must have a type hint for every argument"),
        (HERMES, {"tools": f"{FILE}:undescribed"}, "must have a docstring"),
        (tool_files.PLAIN, {"tools": f"{FILE}:add"}, "the chat template does not render tools"),
        (HERMES, {"environment_factory": f"{FILE}:NotMessages"}, "reset returned .* not a message"),
        (HERMES, {"environment_factory": f"{FILE}:Mute"}, "step returned no message, though"),
        (HERMES, {"environment_factory": f"{FILE}:Several"}, "step gave 2 rewards, and an episode"),
        (
            HERMES,
            {"environment_factory": f"{__file__}:BadReward"},
            "get_reward gave 2 rewards, and",
        ),
    ],
)
def test_what_cannot_play_is_refused_in_one_sentence(tmp_path, capsys, template, fields, sentence):
    prompt = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": prompt, "number": 3, "start": 1} for _ in range(8)]
    unscored = {"reward_weights": None} | (
        {"reward_funcs": "exact_match"} if "tools" in fields else {}
    )
    job = JOB | {
        "model_name_or_path": directory_with(tmp_path, template),
        "dataset_name": write_rows(tmp_path / "rows.jsonl", [r | {"answer": "3"} for r in rows]),
        "output_dir": tmp_path / "run",
    }
    job = {name: value for name, value in (job | unscored | fields).items() if value is not None}
    code = call(**job)
    said = capsys.readouterr()
    assert code == 2 and "compiling" not in said.out, said
    assert len(said.err.splitlines()) == 1 and said.err.startswith("error: "), said.err
    assert re.search(sentence, said.err), said.err
