"""The options of DPO: what has no effect, or contradicts another one, is refused."""

import pytest

from relax.config import DPOConfig, create_default_config
from relax.config import dpo as declared
from relax.errors import ConfigError
from relax.losses import PREFERENCE_LOSSES


def config(**fields) -> DPOConfig:
    named = {"model_path": "DIR", "dataset_path": "FILE"}  # else it is the embedded run's
    return create_default_config(config_class=DPOConfig, **named, **fields)


def test_the_configuration_names_the_losses_that_there_are():
    assert declared.LOSSES == tuple(PREFERENCE_LOSSES)
    assert declared.WITHOUT_REFERENCE == tuple(
        name for name, loss in PREFERENCE_LOSSES.items() if not loss.needs_reference
    )
    for field, names in (
        ("any_divergence", declared.ANY_DIVERGENCE),
        ("compares_pairs", declared.COMPARING),
    ):
        assert set(names) == {n for n, ls in PREFERENCE_LOSSES.items() if getattr(ls, field)}
    for option in ("label_smoothing", "simpo_gamma", "discopop_tau"):
        assert declared.READERS[option] == tuple(
            n for n, ls in PREFERENCE_LOSSES.items() if option in ls.reads
        )


def test_defaults_are_those_of_trl():
    plain = DPOConfig()
    assert plain.hyperparams.learning_rate == 1e-6
    assert (plain.dpo.beta, plain.dpo.loss_type, plain.data.max_length) == (0.1, ["sigmoid"], 1024)
    assert plain.peft.lora_dropout == 0.0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
        {"loss_type": ["kto"], "desirable_weight": 2.0},
        {"loss_type": ["exo_pair"], "label_smoothing": 0.001},
        {"precompute_ref_log_probs": True, "ref_log_probs_dir": "there"},
        {"sync_ref_model": True, "ref_model_sync_steps": 5},
        {"use_peft": True, "precompute_ref_log_probs": True},
        {"loss_type": ["hinge", "sft"], "f_divergence_type": "forward_kl", "ld_alpha": 0.5},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.9},
        {"loss_type": ["losses.py:mine", "discopop"], "discopop_tau": 0.1, "use_weighting": True},
    ],
)
def test_what_has_an_effect_is_taken(fields):
    again = DPOConfig().replace(**config(**fields).flat())
    again.validate()


@pytest.mark.parametrize(
    "fields, reason",
    [
        (
            {"loss_type": ["sigmiod"]},
            "loss_type must be one of sigmoid, .*, kto, .* got 'sigmiod'. Did you mean sigmoid",
        ),
        ({"loss_type": ["apo_zero"], "f_divergence_type": "forward_kl"}, "got loss_type apo_zero"),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}, "reverse_kl"),
        ({"loss_type": ["aot"], "use_weighting": True}, "use_weighting weights pairs"),
        ({"loss_type": ["kto"], "ld_alpha": 0.5}, "ld_alpha has no effect: kto has no pairs"),
        ({"ld_alpha": 0.5, "precompute_ref_log_probs": True}, "ld_alpha excludes precompute"),
        ({"loss_type": []}, "must name each loss once, got none"),
        ({"loss_type": ["kto", "sft"]}, "kto cannot be combined with another loss"),
        ({"loss_weights": [1.0, 2.0]}, "one per loss, got 2 for 1"),
        ({"loss_type": ["kto"], "loss_weights": [1.0]}, "kto has desirable_weight"),
        ({"loss_type": ["exo_pair"]}, "exo_pair needs label_smoothing above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be below 0.5"),
        ({"ref_log_probs_dir": "there"}, "precompute_ref_log_probs is false"),
        ({"ref_model_sync_steps": 5}, "sync_ref_model is false"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "the reference moves"),
        ({"sync_ref_model": True, "use_peft": True}, "the reference is the frozen base"),
        ({"max_length": None, "truncation_mode": "drop"}, "truncation_mode has no effect"),
        ({"pack_pairs": True, "max_length": None}, "pack_pairs needs max_length"),
    ],
)
def test_what_has_no_effect_or_contradicts_is_refused(fields, reason):
    with pytest.raises(ConfigError, match=reason):
        config(**fields)


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"loss_type": ["hinge"], "label_smoothing": 0.1}, "label_smoothing has no effect"),
        ({"simpo_gamma": 1.0}, "simpo_gamma has no effect: only simpo use"),
        ({"desirable_weight": 2.0}, "desirable_weight has no effect"),
        ({"loss_type": ["sft"], "beta": 0.2}, "beta has no effect"),
        ({"loss_type": ["orpo"], "precompute_ref_log_probs": True}, "orpo uses no reference"),
        ({"loss_type": ["sft"], "sync_ref_model": True}, "loss_type sft uses no reference"),
    ],
)
def test_what_a_sweep_over_losses_may_hold_fixed_is_warned_of(fields, reason):
    [said] = config(**fields).warnings()
    assert reason in said
