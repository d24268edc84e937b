"""`run_rl.py` as a user runs it: what it leaves, what it refuses before anything is compiled."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from metric_names import undocumented
from ppo_runs import call, make_job

from relax.config import PPOConfig
from relax.data import arithmetic_tokenizer
from relax.engine import TrainerEngine
from relax.models import Transformer, TransformerConfig, load_pretrained, save_pretrained
from relax.models.heads import init_head, trunk, with_head
from relax.models.huggingface.classifiers import save_classifier


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> dict:
    return make_job(tmp_path_factory.mktemp("job"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_metrics_completions_and_the_policy_alone(job, tmp_path):
    assert call(**job, output_dir=tmp_path) == 0
    records = lines(tmp_path / "metrics.jsonl")
    trained = [r for r in records if "reward" in r]
    assert [r["step"] for r in trained] == [3, 6, 9]  # rollouts before updates 1, 5 and 9
    names = """
        episode eps critic_learning_rate learning_rate loss/policy_avg loss/value_avg objective/kl
        objective/kl_coef objective/scores objective/rlhf_reward
        objective/non_score_reward policy/approxkl_avg policy/clipfrac_avg entropy
        val/clipfrac_avg val/ratio val/ratio_var val/num_eos_tokens val/explained_variance
        skipped_minibatches sampling/logp_difference/max
    """.split()
    assert set(names) <= set(trained[-1]) and not undocumented(records)
    assert trained[-1]["episode"] == 24  # three rollouts of 8
    phases = [v for name, v in trained[-1].items() if name.startswith("time/")]
    assert len(phases) == 5 and sum(phases) == pytest.approx(trained[-1]["step_time"])
    assert len(lines(tmp_path / "completions" / "step_000001.jsonl")) == 8
    model, _ = load_pretrained(tmp_path / "final")
    assert model.config.hidden_size == 16
    assert (tmp_path / "config.json").read_text().count('"algorithm": "ppo"') == 1


@pytest.mark.parametrize("kind", ["reward model", "language model", "lora"])
def test_a_critic_from_a_directory_and_adapters_train(kind, job, tmp_path):
    """A reward model brings its head; the policy's own directory does as a critic."""
    unevaluated = {"eval_strategy": "no", "eval_steps": None, "num_generations_eval": None}
    fields = job | unevaluated | {"max_steps": 4, "test_size": 0}
    if kind == "lora":
        fields |= {"use_peft": True, "value_model": None}
    elif kind == "language model":
        fields |= {"value_model": job["model_name_or_path"]}
    else:
        policy, params = load_pretrained(job["model_name_or_path"])
        head = init_head(jax.random.key(0), policy.config, std=1.0)
        path = tmp_path / "rm"
        save_classifier(path, trunk(policy), with_head(params, head), arithmetic_tokenizer())
        fields |= {"value_model": path}
    fields = {name: value for name, value in fields.items() if value is not None}
    assert call(**fields, output_dir=tmp_path / "run") == 0
    first = lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["objective/kl"] is not None


REFUSED = [
    ({"value_model": "nowhere/rm"}, "nowhere/rm"),
    ({"value_model": "OTHER"}, "value_model must have the policy's tokens"),
    ({"max_completion_length": 60}, "there is room for 4"),
    ({"per_device_train_batch_size": 32}, "a rollout needs 16 prompts and the data set has 10"),
    ({"critic_warmup_steps": 12}, "critic_warmup_steps must leave steps for the policy"),
    ({"cliprange_value": 0}, "cliprange_value must be above 0"),
    ({"reward_funcs": "exact_mach", "reward_weights": None}, "Did you mean exact_match"),
]


@pytest.mark.parametrize("case", REFUSED, ids=[" ".join(map(str, c[0].values())) for c in REFUSED])
def test_bad_input_is_refused_in_one_sentence_before_anything_compiles(case, job, tmp_path, capsys):
    fields, said = case
    if fields.get("value_model") == "OTHER":
        fields = {"value_model": other_tokens(tmp_path)}
    given = {k: v for k, v in (job | fields).items() if v is not None}
    assert call(**given, output_dir=tmp_path / "run") == 2
    out = capsys.readouterr()
    assert "compiling" not in out.out
    assert said in out.err and len(out.err.splitlines()) <= 2, out.err


def other_tokens(directory: Path) -> Path:
    """A model with the tokens of another one."""
    shape = TransformerConfig(
        vocab_size=262, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Transformer(shape)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    tokenizer = arithmetic_tokenizer()
    tokenizer.add_tokens(["<other>"])
    return save_pretrained(directory / "other", model, params, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [42, 43, 44])
def test_the_run_with_no_flags_lifts_held_out_accuracy_over_95_percent(seed, tmp_path):
    result = TrainerEngine().run_job(
        PPOConfig().replace(**PPOConfig.demo, seed=seed, output_dir=str(tmp_path / "run"))
    )
    before = next(r for r in lines(tmp_path / "run" / "metrics.jsonl") if "eval_pass@1" in r)
    assert before["eval_pass@1"] < 0.7 and result.metrics["eval_pass@1"] > 0.95
