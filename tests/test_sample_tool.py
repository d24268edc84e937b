"""`relax sample`: rows, limits and notes as in training, before a model is loaded."""

import json
from types import SimpleNamespace

import pytest
from test_data_prepare import CHATML, byte_tokenizer
from test_data_templates import LARGE, SLOW

from relax.engine.model_source import ModelSource
from relax.errors import ConfigError, DataError, ModelLoadError
from relax.tools.sample.config import SampleConfig
from relax.tools.sample.sample import sample


@pytest.fixture
def source(monkeypatch):
    """A model directory without weights."""

    class Source:
        template = CHATML

        def tokenizer(self, chat_template_path=None, eos_token=None):
            return byte_tokenizer(self.template)

        def load(self, dtype, param_dtype=None):
            raise ModelLoadError("the prompts are prepared")

    found = Source()
    found.model_config = SimpleNamespace(vocab_size=512)
    monkeypatch.setattr(ModelSource, "find", lambda name: found)
    return found


def run(tmp_path, rows, **options):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample(SampleConfig().replace(model_name_or_path="m", prompts_file=str(file), **options))


@pytest.mark.parametrize(
    ("template", "options", "reason"),
    [
        (CHATML, {"max_row_bytes": 20}, "prompts.jsonl:2: the row has .* max_row_bytes=20"),
        (CHATML, {"max_json_depth": 1}, "prompts.jsonl:2: .*max_json_depth=1"),
        (CHATML, {"max_file_gib": 1e-9}, "max_file_gib=1e-09"),
        (
            SLOW,
            {"template_timeout_s": 0.5},
            "prompts.jsonl:1: the chat template takes longer than template_timeout_s=0.5",
        ),
        ("{{ 'x' * 9999 }}", {"template_output_ratio": 1}, "prompts.jsonl:1: .*output_ratio=1"),
        (
            LARGE,
            {"template_memory_mib": 64},
            "prompts.jsonl:1: .*template_memory_mib=64",
        ),
    ],
)
def test_sampling_obeys_the_limits_of_training(template, options, reason, source, tmp_path):
    source.template = template
    rows = [{"prompt": "1+1="}, {"prompt": "2+2=", "kept": [["a longer row"]]}]
    with pytest.raises(DataError, match=reason):
        run(tmp_path, rows, **options)


def test_without_a_chat_template_messages_and_its_limits_are_refused(source, tmp_path):
    config = SampleConfig().replace(model_name_or_path="m", prompt="2+2=", chat=False)
    assert not config.problems()
    for limit in ("template_timeout_s", "template_output_ratio", "template_memory_mib"):
        (problem,) = config.replace(**{limit: 9}).problems()
        assert problem == f"{limit} has no effect: chat is false"
    rows = [{"prompt": "2+2="}, {"prompt": [{"role": "user", "content": "2+2="}]}]
    with pytest.raises(DataError, match="jsonl:2: the prompt is a list of .* chat is false"):
        run(tmp_path, rows, chat=False)


@pytest.mark.parametrize("place", [".", "missing/out.jsonl"])
def test_an_output_file_that_cannot_be_written_is_refused_first(source, tmp_path, place):
    with pytest.raises(ConfigError, match="output_file must be a file in a directory that exists"):
        run(tmp_path, [{"prompt": "2+2="}], output_file=str(tmp_path / place))


def test_what_sampling_normalises_or_leaves_out_is_noted(source, tmp_path, capsys):
    source.template = "{{ messages[-1].content }}"
    prompt = [{"role": "system", "content": "Zounds"}, {"role": "user", "content": "Hi"}]
    with pytest.raises(ModelLoadError):
        run(tmp_path, [{"prompt": prompt}])
    assert "does not render the system messages of 1 rows" in capsys.readouterr().err
