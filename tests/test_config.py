"""Configurations: types, ranges, contradictions, files."""

import dataclasses
import json
import subprocess
import sys
from typing import ClassVar

import pytest

from relax.config import (
    ConfigLoader,
    Hyperparams,
    SFTConfig,
    TrainerConfig,
    create_default_config,
    diff,
    from_dict,
    option,
    options,
    resolve_steps,
    section,
)
from relax.config.settings import ALGORITHMS
from relax.errors import ConfigError

DATA = {"dataset_name": "rows.jsonl"}
EVAL = DATA | {"eval_strategy": "epoch"}


def problems(**fields) -> list[str]:
    """The lines of the ConfigError that these fields raise; empty for a good configuration."""
    try:
        from_dict(fields, SFTConfig)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def write(tmp_path, text, name="run.json"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_default_configuration_is_valid():
    SFTConfig().validate()
    assert SFTConfig().output.output_dir == "outputs/sft"


def test_every_field_has_one_line_of_help_and_a_unique_name():
    known = options(SFTConfig)
    parts = dataclasses.fields(SFTConfig)
    assert len(known) == sum(len(dataclasses.fields(p.default_factory())) for p in parts)
    assert all(o.help.endswith(".") and "\n" not in o.help for o in known.values())
    # A file tells sections from fields by name; of the profile it may hold the name alone.
    assert {p.name for p in parts} & set(known) == {"profile"}


def test_two_fields_with_one_name_are_refused():
    @dataclasses.dataclass
    class Twin:
        seed: int = option(1, "Again.")

    @dataclasses.dataclass
    class TwinConfig(TrainerConfig):
        twin: Twin = section(Twin)

    with pytest.raises(TypeError, match="two fields named 'seed'"):
        options(TwinConfig)


@pytest.fixture
def registry():
    """Forgets the algorithms that a test has added."""
    before = dict(ALGORITHMS)
    yield
    ALGORITHMS.clear()
    ALGORITHMS.update(before)


def test_an_algorithm_adds_a_section_and_its_own_defaults(registry):
    @dataclasses.dataclass(slots=True, kw_only=True)
    class Group:
        num_generations: int = option(8, "Completions per prompt.", at_least=2)

    @dataclasses.dataclass(slots=True, kw_only=True)
    class GroupConfig(TrainerConfig):
        algorithm: ClassVar[str] = "group"
        hyperparams: Hyperparams = section(Hyperparams, learning_rate=1e-6)
        group: Group = section(Group)

    assert options(GroupConfig)["learning_rate"].default == 1e-6
    assert options(GroupConfig)["num_generations"].section == "group"
    assert from_dict({"num_generations": 4}, GroupConfig).group.num_generations == 4
    with pytest.raises(ConfigError, match="num_generations must be at least 2, got 1"):
        from_dict({"num_generations": 1}, GroupConfig)
    with pytest.raises(ConfigError, match="configuration of 'sft', not of 'group'"):
        from_dict(SFTConfig().to_dict(), GroupConfig)


def test_sections_are_independent_between_configurations():
    first, second = SFTConfig(), SFTConfig()
    first.hyperparams.seed = 1
    first.output.allow_config_change.append("seed")
    assert second.hyperparams.seed == 42
    assert second.output.allow_config_change == []


def test_a_misspelt_attribute_cannot_be_set():
    with pytest.raises(AttributeError):
        SFTConfig().hyperparams.learning_rte = 1.0


WRONG = [
    ({"learning_rate": 0}, "learning_rate must be above 0, got 0.0"),
    ({"learning_rate": "1e-4"}, "learning_rate must be a finite number, got '1e-4' (a text)"),
    ({"learning_rate": True}, "learning_rate must be a finite number, got True (a boolean)"),
    ({"learning_rate": float("nan")}, "learning_rate must be a finite number, got nan (a number)"),
    ({"learning_rate": float("inf")}, "learning_rate must be a finite number, got inf (a number)"),
    ({"learning_rate": 10**400}, "learning_rate must be a finite number, got a huge number"),
    ({"learning_rate": None}, "learning_rate must be a finite number, got None"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
    ({"seed": "5"}, "seed must be a whole number, got '5' (a text)"),
    ({"seed": 5.0}, "seed must be a whole number, got 5.0 (a number)"),
    ({"seed": True}, "seed must be a whole number, got True (a boolean)"),
    ({"seed": 2**31}, "seed must be at most 2147483647, got 2147483648"),
    ({"max_steps": 0}, "max_steps must be -1 (no limit) or at least 1, got 0"),
    ({"max_steps": -2}, "max_steps must be at least -1, got -2"),
    ({"warmup_steps": 1.5}, "warmup_steps must be a whole number, or a ratio below 1, got 1.5"),
    ({"logging_steps": 0}, "logging_steps must be above 0, got 0.0"),
    ({"adam_beta2": 1}, "adam_beta2 must be below 1, got 1.0"),
    ({"packing": 1}, "packing must be true or false, got 1"),
    ({"packing": "false"}, "packing must be true or false, got 'false' (a text)"),
    ({"max_length": "no"}, "max_length must be a whole number or none, got 'no' (a text)"),
    (
        {"dtype": "float16"},
        "dtype must be one of float32, bfloat16 or none, got 'float16' (a text)",
    ),
    ({"dtype": []}, "dtype must be one of float32, bfloat16 or none, got [] (a list)"),
    ({"output_dir": ""}, "output_dir must not be empty: omit it to use the default"),
    ({"output_dir": None}, "output_dir must be a text, got None"),
    ({"allow_config_change": "seed"}, "allow_config_change must be a list of texts, got 'seed'"),
    ({"allow_config_change": [1]}, "allow_config_change must be a list of texts, got [1]"),
    ({"learnng_rate": 1}, "unknown field learnng_rate. Did you mean learning_rate?"),
    ({"max_seq_length": 9}, "max_seq_length is not a field here: use max_length."),
    ({"vocab": 9}, "unknown field vocab."),
    ({"data": {"seed": 1}}, "seed belongs to section hyperparams, not data"),
    ({"model": "gpt"}, "model is a section and must hold fields, got 'gpt'."),
    ({"seed": 1, "hyperparams": {"seed": 2}}, "seed is given twice"),
    ({"warmup_ratio": 0.1, "warmup_steps": 1}, "warmup_steps is given twice"),
    ({"warmup_ratio": 5}, "warmup_ratio must be at least 0 and below 1, got 5."),
    ({"algorithm": "dpo"}, "this is a configuration of 'dpo', not of 'sft'"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[m for _, m in WRONG])
def test_wrong_value_is_refused_in_one_sentence(fields, message):
    found = problems(**fields)
    assert len(found) == 1
    assert found[0].startswith(message)


UNUSED = [
    ({"max_steps": 5, "num_train_epochs": 1}, "num_train_epochs"),
    ({"lora_r": 8}, "lora_r"),
    ({"lora_alpha": 8}, "lora_alpha"),
    ({"lora_dropout": 0.0}, "lora_dropout"),
    ({"lora_target_modules": ["q_proj"], "freeze": "k_proj"}, "lora_target_modules"),
    ({"merge_lora": True}, "merge_lora"),
    ({"use_peft": True, "freeze": "k_proj"}, "freeze"),
    ({"dataset_config": "main"}, "dataset_config"),
    ({"dataset_train_split": "all"}, "dataset_train_split"),
    ({"dataset_test_split": "dev"}, "dataset_test_split"),
    ({"dataset_text_field": "body"}, "dataset_text_field"),
    ({"eval_dataset_name": "x", "eval_strategy": "epoch"}, "eval_dataset_name"),
    ({"test_size": 0.1}, "test_size"),
    ({"truncation_mode": "drop", "max_length": None}, "truncation_mode"),
    ({"packing_strategy": "wrapped"}, "packing_strategy"),
    ({"eval_packing": False}, "eval_packing"),
    (
        {"packing": True, "packing_strategy": "wrapped", "truncation_mode": "drop"},
        "truncation_mode",
    ),
    ({"packing": True, "pad_to_multiple_of": 8}, "pad_to_multiple_of"),
    ({"eval_steps": 5}, "eval_steps"),
    ({"eval_steps": 5, "eval_strategy": "epoch"}, "eval_steps"),
    (DATA | {"dataset_test_split": "dev"}, "dataset_test_split"),
    (DATA | {"per_device_eval_batch_size": 2}, "per_device_eval_batch_size"),
    (DATA | {"max_eval_batches": 2}, "max_eval_batches"),
    (DATA | {"packing": True, "eval_packing": True}, "eval_packing"),
    ({"save_steps": 5, "save_strategy": "epoch"}, "save_steps"),
    ({"save_total_limit": 5, "save_strategy": "no"}, "save_total_limit"),
    ({"save_async": True, "save_strategy": "no"}, "save_async"),
    ({"allow_config_change": ["seed"]}, "allow_config_change"),
]


@pytest.mark.parametrize(("fields", "name"), UNUSED)
def test_option_without_effect_is_refused(fields, name):
    found = problems(**fields)
    assert len(found) == 1
    assert found[0].startswith(f"{name} has no effect: ")


# A sweep over schedules, optimizers or shuffling holds these fixed.
WARNED = [
    ({"warmup_steps": 5, "lr_scheduler_type": "constant"}, "warmup_steps"),
    ({"min_lr_rate": 0.1}, "min_lr_rate"),
    ({"min_lr_rate": 0.1, "lr_scheduler_type": "constant"}, "min_lr_rate"),
    ({"num_decay_steps": 5}, "num_decay_steps"),
    (
        {"num_decay_steps": 5, "min_lr_rate": 0.1, "lr_scheduler_type": "cosine_with_min_lr"},
        "num_decay_steps",
    ),
    ({"adam_beta1": 0.8, "optim": "sgd"}, "adam_beta1"),
    ({"adam_beta2": 0.8, "optim": "adafactor"}, "adam_beta2"),
    ({"adam_epsilon": 1e-6, "optim": "lion"}, "adam_epsilon"),
    ({"data_seed": 1, "shuffle_dataset": False}, "data_seed"),
    (
        {"gradient_checkpointing": False, "gradient_checkpointing_policy": "nothing"},
        "gradient_checkpointing_policy",
    ),
]


@pytest.mark.parametrize(("fields", "name"), WARNED)
def test_option_that_a_sweep_may_hold_fixed_is_warned_of(fields, name):
    config = from_dict(fields, SFTConfig)
    assert [text.partition(":")[0] for text in config.warnings()] == [f"{name} has no effect"]
    with pytest.warns(UserWarning, match=f"^{name} has no effect: "):
        config.validate()


FREE = {"optim": "schedule_free_adamw"}
CONTRADICTORY = [
    (FREE, "optim schedule_free_adamw averages weights and needs no decay, got"),
    (
        FREE | {"lr_scheduler_type": "constant", "adam_beta1": 0},
        "adam_beta1 must be above 0 with optim schedule_free_adamw, got 0.0",
    ),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type cosine_with_min_lr needs"),
    ({"freeze": "("}, "freeze must be a regular expression, got '(': missing )"),
    ({"use_peft": True, "lora_target_modules": []}, "lora_target_modules must name"),
    (
        {"use_peft": True, "lora_target_modules": ["all-linear", "q_proj"]},
        "lora_target_modules must be all-linear or names, got all-linear,q_proj",
    ),
    ({"packing": True, "max_length": None}, "packing needs max_length"),
    (EVAL | {"test_size": 0.1, "eval_dataset_name": "x"}, "test_size and eval_dataset_name"),
    (EVAL | {"test_size": 0.1, "dataset_test_split": "x"}, "test_size and dataset_test_split"),
    ({"overwrite_output_dir": True, "resume": "auto"}, "overwrite_output_dir deletes the run"),
    ({"resume": "True"}, "resume must be auto, never or the path of a checkpoint, got 'True'"),
    (
        {"allow_config_change": ["sede"], "resume": "auto"},
        "allow_config_change names no field: 'sede'. Did you mean seed?",
    ),
]


@pytest.mark.parametrize(("fields", "message"), CONTRADICTORY)
def test_contradiction_is_refused(fields, message):
    found = problems(**fields)
    assert len(found) == 1
    assert found[0].startswith(message)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_steps": 5, "warmup_steps": 0.1, "lr_scheduler_type": "constant_with_warmup"},
        {"lr_scheduler_type": "wsd", "num_decay_steps": 0.2, "min_lr_rate": 0.1},
        {"optim": "lion", "adam_beta1": 0.95, "adam_beta2": 0.98, "weight_decay": 1.0},
        {"optim": "muon", "adam_beta1": 0.95, "adam_beta2": 0.98, "adam_epsilon": 1e-6},
        {"optim": "sgd", "adam_beta1": 0.9, "adam_epsilon": 1e-8, "weight_decay": 0.1},
        {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "adam_beta1": 0.95},
        {"use_peft": True, "lora_r": 8, "lora_alpha": 8, "lora_dropout": 0, "merge_lora": True},
        {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]},
        {"freeze": "embed_tokens|layers_[01]/"},
        {"packing": True, "packing_strategy": "bfd_split", "eval_packing": None},
        {"packing": True, "eval_packing": False, "pad_to_multiple_of": 8, "eval_on_start": True},
        EVAL | {"test_size": 0.1, "eval_packing": True, "packing": True},
        DATA | {"eval_dataset_name": "x", "eval_strategy": "steps", "eval_steps": 0.5},
        DATA | {"data_seed": 1, "shuffle_dataset": False, "test_size": 5, "eval_on_start": True},
        {"resume": "out/checkpoints/40", "allow_config_change": ("seed", "max_steps")},
        {"max_length": None, "max_grad_norm": 0, "seed": 2**31 - 1},
    ],
)
def test_options_with_effect_are_accepted(fields):
    assert problems(**fields) == []
    assert from_dict(fields, SFTConfig).warnings() == []


def test_all_problems_are_listed_at_once():
    assert problems(learning_rate=-1, seed=-1, packing=True, max_length=None, eval_steps=3) == [
        "learning_rate must be above 0, got -1.0",
        "seed must be at least 0, got -1",
        "packing needs max_length: packed rows are that long; give max_length",
        "eval_steps has no effect: eval_strategy is no; make it steps",
    ]


def test_validate_checks_values_set_from_python():
    config = SFTConfig()
    config.data.max_length = 512.0
    with pytest.raises(ConfigError, match=r"max_length must be a whole number or none, got 512\.0"):
        config.validate()


def test_an_int_becomes_a_float_where_one_is_declared():
    assert repr(from_dict({"logging_steps": 5}).output.logging_steps) == "5.0"


def changed() -> SFTConfig:
    """A configuration with a value of each type that is not the default."""
    return create_default_config(
        "model dir",
        "rows.jsonl",
        "out",
        learning_rate=1.2345678901234567e-7,
        max_steps=7,
        packing=True,
        max_length=64,
        system_prompt='"quoted"\n# ünï',
        completion_only_loss=False,
        lr_scheduler_type="cosine",
        resume="auto",
        allow_config_change=["seed", "max_steps"],
    )


def test_saved_configuration_reproduces_itself(tmp_path):
    path = write(tmp_path, changed().to_json())
    assert ConfigLoader(path).load() == changed()
    assert ConfigLoader(path).load().to_json() == changed().to_json()


def test_saved_json_is_sectioned_and_names_the_algorithm():
    saved = json.loads(changed().to_json())
    assert list(saved) == [
        "algorithm", "hyperparams", "model", "peft", "data", "profile", "limits", "inference",
        "output", "system", "debug", "sft",
    ]  # fmt: skip
    assert saved["algorithm"] == "sft"
    assert saved["hyperparams"]["max_steps"] == 7


def test_flat_and_sectioned_dicts_give_the_same_configuration():
    assert from_dict(changed().flat()) == from_dict(changed().to_dict()) == changed()


def test_diff_names_old_and_new():
    assert diff(SFTConfig(), SFTConfig()) == []
    new = SFTConfig().replace(seed=1, packing=True)
    assert diff(SFTConfig(), new) == [("seed", 42, 1), ("packing", False, True)]


def test_replace_leaves_the_original_alone_and_knows_its_fields():
    old = SFTConfig()
    assert old.replace(seed=1).hyperparams.seed == 1
    assert old == SFTConfig()
    with pytest.raises(ConfigError, match="unknown field sede. Did you mean seed?"):
        old.replace(sede=1)


def test_create_default_config_maps_paths_and_refuses_other_names():
    config = create_default_config(model_path="m", dataset_path="d", output_dir="o", seed=7)
    assert config.model.model_name_or_path == "m"
    assert config.data.dataset_name == "d"
    assert (config.output.output_dir, config.hyperparams.seed) == ("o", 7)
    with pytest.raises(ConfigError, match="base_model is not a field here: use model_name_or_path"):
        create_default_config(base_model="Qwen")
    with pytest.raises(ConfigError, match="dataset_name is given twice"):
        create_default_config(dataset_path="d", dataset_name="e")


def test_flags_go_over_the_file_over_the_defaults(tmp_path):
    path = write(tmp_path, '{"seed": 1, "hyperparams": {"max_steps": 5, "learning_rate": 1}}')
    config = ConfigLoader(path).merge_with_cli_args({"max_steps": 9})
    values = config.hyperparams
    assert (values.seed, values.max_steps, values.learning_rate) == (1, 9, 1.0)
    assert values.num_train_epochs == 3


def test_aliases_work_in_files(tmp_path):
    path = write(tmp_path, '{"warmup_ratio": 0.1, "resume_from_checkpoint": "auto"}')
    config = ConfigLoader(path).load()
    assert (config.hyperparams.warmup_steps, config.output.resume) == (0.1, "auto")


YAML = """
hyperparams:
  learning_rate: 1e-4   # PyYAML alone reads this as a text
  seed: 3
eval_strategy: no       # ... and this as False
packing: true
eval_packing: null
output:
  resume: "auto"
  allow_config_change: [seed, max_steps]
system_prompt: |
  two
  lines
"""


def test_yaml_is_read_with_the_scalars_of_json(tmp_path):
    config = ConfigLoader(write(tmp_path, YAML, "run.yaml")).load()
    assert diff(SFTConfig().replace(**SFTConfig.demo), config) == [
        ("learning_rate", 2e-3, 1e-4),
        ("seed", 42, 3),
        ("packing", False, True),
        ("system_prompt", None, "two\nlines\n"),
        ("resume", "never", "auto"),
        ("allow_config_change", [], ["seed", "max_steps"]),
    ]


def test_embedded_defaults_hold_where_nothing_is_named_and_yield_to_what_is_given():
    config = create_default_config(learning_rate=1e-3)
    assert config.hyperparams.learning_rate == 1e-3
    assert config.hyperparams.max_steps == SFTConfig.demo["max_steps"]
    assert create_default_config(num_train_epochs=2).hyperparams.max_steps == -1
    assert create_default_config(model_path="x").hyperparams == SFTConfig().hyperparams
    assert create_default_config(dataset_path="x").hyperparams == SFTConfig().hyperparams
    assert create_default_config(packing=True, lr_scheduler_type="constant").data.packing


BAD_FILES = [
    ("a.json", '{"seed": 1, "seed": 2}', "key 'seed' occurs twice"),
    ("a.json", '{"data": {"packing": true, "packing": true}}', "key 'packing' occurs twice"),
    ("a.json", '{"learning_rate": NaN}', "numbers must be finite, got NaN"),
    ("a.json", '{"learning_rate": 1e999}', "learning_rate must be a finite number, got inf"),
    ("a.json", '{"seed": %s}' % ("1" * 5000), "a number has 5000 digits"),
    ("a.json", '{"seed": 1', "line 1 column 11"),
    ("a.json", "[" * 100_000, "nested too deeply"),
    ("a.json", "[]", "must hold an object of fields, got a list"),
    ("a.json", "", "Expecting value"),
    ("a.json", b'{"output_dir": "\xff"}', "not UTF-8 at byte 16"),
    ("a.json", '{"seed": "5"}', "seed must be a whole number, got '5' (a text)"),
    ("a.json", '{"seed": 1.0}', "seed must be a whole number, got 1.0 (a number)"),
    ("a.json", '{"packng": true}', "unknown field packng. Did you mean packing?"),
    ("a.yaml", "seed: 1\nseed: 2", "key 'seed' occurs twice"),
    ("a.yaml", "seed: '5'", "seed must be a whole number, got '5' (a text)"),
    ("a.yaml", "seed: 0x10", "seed must be a whole number, got '0x10' (a text)"),
    ("a.yaml", "packing: yes", "packing must be true or false, got 'yes' (a text)"),
    ("a.yaml", "seed: [", "line 1, column 8"),
    ("a.yaml", "", "must hold an object of fields, got a NoneType"),
    ("a.yaml", "? [seed]\n: 1", "line 1: keys must be plain names"),
    ("a.yaml", "data: &a [*a]", "line 1: anchors and aliases are not supported"),
    ("a.yaml", "seed: !!python/object/apply:os.getpid []", "line 1: the tag"),
    ("a.yaml", "<<: {seed: 1}", "unknown field '<<'"),
    ("a.yml", "---\nseed: 1\n---\nseed: 2", "expected a single document"),
    ("a.toml", "seed = 1", "a config file ends in .json, .yaml or .yml"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_file_gets_one_sentence_that_names_it(tmp_path, name, text, message):
    path = write(tmp_path, text, name)
    with pytest.raises(ConfigError) as caught:
        ConfigLoader(path).load()
    lines = str(caught.value).splitlines()
    assert len(lines) == 1
    assert str(path) in lines[0]
    assert message in lines[0]


def test_missing_file_and_directory_are_named(tmp_path):
    with pytest.raises(ConfigError, match="none.json: cannot be read: No such file"):
        ConfigLoader(tmp_path / "none.json").load()
    (tmp_path / "dir.json").mkdir()
    with pytest.raises(ConfigError, match="dir.json: cannot be read: Is a directory"):
        ConfigLoader(tmp_path / "dir.json").load()


@pytest.mark.parametrize(
    ("value", "total", "steps"),
    [(500, 2000, 500), (1.0, 30, 1), (0.1, 30, 3), (0.07, 100, 7), (0.001, 30, 1), (0.0, 30, 0),
     (0.34, 10, 4)],
)  # fmt: skip
def test_steps_or_ratio_resolve_to_steps(value, total, steps):
    assert resolve_steps(value, total) == steps


def test_configuration_imports_neither_jax_nor_numpy_nor_transformers():
    code = (
        "import sys, relax.config, relax.config.cli, relax.config.helptext;"
        "print([m for m in ('jax', 'numpy', 'flax', 'transformers', 'yaml') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
