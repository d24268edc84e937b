"""Distillation: one layout for all sources of completions, teachers, modes, evaluation, resume."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rl import EOS, Letters

from relax.data import Encoded
from relax.models.config import LoRA
from relax.sampling import SamplingConfig
from relax.trainers import DistillationTrainer, Teacher

KEY = jax.random.key(3)
RNG = np.random.default_rng(7)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
COMPLETIONS = [[12, 13, EOS], [14, 15, 16, 17, EOS], [18, EOS], [3, 2, 1, EOS]]
ROWS = [{"prompt": "".join(chr(97 + i) for i in prompt)} for prompt in PROMPTS]
EXAMPLES = [
    Encoded(np.array(p + c), np.array([-100] * len(p) + c))
    for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
]
ITEM = {"prompt_ids": PROMPTS, "rows": ROWS, "examples": EXAMPLES}
PRIVILEGED = [[20, 21, *prompt] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def teacher(tiny_model):
    """A model with other weights."""
    params = jax.jit(tiny_model.init)(jax.random.key(9), jnp.zeros((1, 8), jnp.int32))["params"]
    return Teacher(tiny_model, params)


@pytest.fixture
def make(tiny_model, tiny_params, teacher):
    def trainer(teachers=(teacher,), model=tiny_model, **options):
        options = {"sampling": SamplingConfig(max_new_tokens=4), "lmbda": 0.0} | options
        return DistillationTrainer(
            model,
            optax.sgd(0.1),
            teachers=teachers,
            params=tiny_params,
            tokenizer=Letters(),
            **options,
        )

    return trainer


@pytest.fixture(scope="module")
def logprobs(tiny_model):
    """log p of every token of padded sequences `[4, 14]`, without packing; compiled once."""

    @jax.jit
    def function(params, ids):
        return jax.nn.log_softmax(tiny_model.apply({"params": params}, ids))

    return function


def beginnings(prompts, completions):
    """Padded sequences, and for each the slice of positions that predict its completion."""
    ids = np.zeros((4, 14), np.int32)
    for row, prompt, completion in zip(ids, prompts, completions, strict=False):
        row[: len(prompt) + len(completion)] = [*prompt, *completion]
    return ids, [
        slice(len(p) - 1, len(p) - 1 + len(c)) for p, c in zip(prompts, completions, strict=True)
    ]


def expected_kl(logprobs, theirs, ours, prompts=PROMPTS):
    """The forward KL of rows that each have padding of their own."""
    ids, at = beginnings(PROMPTS, COMPLETIONS)
    ids_theirs, at_theirs = beginnings(prompts, COMPLETIONS)
    p, q = np.asarray(logprobs(theirs, ids_theirs)), np.asarray(logprobs(ours, ids))
    total = 0.0
    for row in range(4):
        one, other = p[row, at_theirs[row]], q[row, at[row]]
        total += (np.exp(one) * (one - other)).sum()
    return total / sum(map(len, COMPLETIONS))


def test_the_loss_of_packed_rows_is_that_of_separate_ones(make, teacher, logprobs, tiny_params):
    expected = expected_kl(logprobs, teacher.params, tiny_params)
    trainer = make(beta=0.0)
    state = trainer.create_train_state(KEY)
    found = trainer.validate(state, [ITEM])
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["num_tokens"] == sum(map(len, PROMPTS + COMPLETIONS))
    # Two micro-batches give the same gradient.
    whole, half = make(beta=0.0), make(beta=0.0, gradient_accumulation_steps=2)
    after = []
    for one in (whole, half):
        (batch,) = one.make_batches(state, ITEM)
        new, metrics = one.train_step(one.create_train_state(KEY), batch.batch)
        assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
        after.append(new.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *after)


def test_the_teacher_reads_its_own_prompt(make, teacher, logprobs, tiny_params):
    item = ITEM | {"teacher_prompt_ids": PRIVILEGED}
    trainer = make(beta=0.0)
    found = trainer.validate(trainer.create_train_state(KEY), [item])
    expected = expected_kl(logprobs, teacher.params, tiny_params, PRIVILEGED)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    # Without teachers it is the student before training: nothing to learn without the prompt.
    alone = make(teachers=(), beta=0.0)
    state = alone.create_train_state(KEY)
    assert alone.validate(state, [ITEM])["loss"] == pytest.approx(0, abs=1e-6)
    expected = expected_kl(logprobs, tiny_params, tiny_params, PRIVILEGED)
    assert alone.validate(state, [item])["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_base_of_adapters_is_a_teacher_without_a_copy(make, logprobs, tiny_model, tiny_params):
    lora = tiny_model.clone(lora=LoRA(r=2, alpha=4, dropout=0.0, target_modules=("q_proj",)))
    trainer = make(teachers=(), model=lora, beta=0.0)
    state = trainer.create_train_state(KEY)
    assert set(state.frozen) == {"base"}
    item = ITEM | {"teacher_prompt_ids": PRIVILEGED}
    expected = expected_kl(logprobs, tiny_params, tiny_params, PRIVILEGED)
    assert trainer.validate(state, [item])["loss"] == pytest.approx(expected, rel=1e-5)


def test_stored_log_probabilities_stand_for_the_teacher(make, teacher, logprobs):
    k, ids, stored_logprobs = 3, [], []
    whole, at = beginnings(PROMPTS, COMPLETIONS)
    found = np.asarray(logprobs(teacher.params, whole), np.float64)
    for p in (found[row, at[row]] for row in range(4)):
        top = np.argsort(-p, axis=-1)[:, :k]
        kept = np.take_along_axis(p, top, axis=-1)
        rest = np.log1p(-np.exp(kept).sum(-1, keepdims=True))
        ids.append(top.astype(np.int32))
        stored_logprobs.append(np.concatenate([kept, rest], axis=-1).astype(np.float32))
    live, stored = make(loss_top_k=k), make(teachers=(), precomputed=True)
    assert stored.create_train_state(KEY).frozen == {}
    written = live.teacher_logprobs(live.create_train_state(KEY), ITEM, k)
    for row in range(4):
        np.testing.assert_array_equal(written["teacher_ids"][row], ids[row])
        np.testing.assert_allclose(
            written["teacher_logprobs"][row], stored_logprobs[row], atol=1e-5
        )
    item = ITEM | {"teacher_ids": ids, "teacher_logprobs": stored_logprobs}
    found = stored.validate(stored.create_train_state(KEY), [item])
    expected = live.validate(live.create_train_state(KEY), [ITEM])
    for name in ("loss", "teacher_agreement", "entropy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def test_lmbda_is_the_share_of_completions_that_the_student_writes(make):
    trainer = make(lmbda=0.5, reward_funcs=[lambda completions: [1.0] * len(completions)])
    state = trainer.create_train_state(KEY)
    written, given = trainer.divide(state, ITEM)
    assert [len(written["rows"]), len(given["rows"])] == [2, 2]
    assert sorted(written["prompt_ids"] + given["prompt_ids"]) == sorted(PROMPTS)
    later, _ = trainer.divide(state.replace(step=jnp.int32(3)), ITEM)
    assert later["prompt_ids"] != written["prompt_ids"]
    (batch,) = trainer.make_batches(state, ITEM)
    assert len(batch.records) == 2 and batch.metrics["reward"] == 1.0
    assert batch.batch["prompt_lengths"].sum() == sum(map(len, PROMPTS))
    given_ids = {tuple(ids) for ids in COMPLETIONS}
    ids, lengths = batch.batch["completion_ids"], batch.batch["completion_lengths"]
    rows = [tuple(row[:n].tolist()) for row, n in zip(ids[:, 0], lengths[:, 0], strict=True)]
    assert sum(row in given_ids for row in rows) == 2
    _, metrics = trainer.train_step(state, batch.batch)
    assert np.isfinite(metrics["loss"]) and metrics["skipped_steps"] == 0


def test_on_policy_training_lowers_the_reverse_kl_in_both_modes(make):
    prompts = {"prompt_ids": PROMPTS, "rows": ROWS}
    for options in ({"beta": 1.0}, {"distill_mode": "policy_gradient", "gamma": 0.5}):
        trainer = make(lmbda=1.0, num_generations=16, **options)
        state = trainer.create_train_state(KEY)
        before = trainer.validate(state, [prompts])["loss"]
        state = trainer.train([prompts] * 20, state=state)
        assert trainer.validate(state, [prompts])["loss"] < 0.7 * before, options


def test_the_policy_gradient_is_that_of_discounted_log_ratios(make, teacher, logprobs):
    trainer = make(lmbda=1.0, distill_mode="policy_gradient", gamma=0.5)
    state = trainer.create_train_state(KEY)
    (batch,) = trainer.make_batches(state, {"prompt_ids": PROMPTS[:2], "rows": ROWS[:2]})
    arrays = batch.batch
    # The prompts of 3 and of 1 tokens may have changed places.
    prompts = [PROMPTS[0] if n == 3 else PROMPTS[1] for n in arrays["prompt_lengths"]]
    lengths = arrays["completion_lengths"][:, 0]
    completions = [
        ids[0, :n].tolist() for ids, n in zip(arrays["completion_ids"], lengths, strict=True)
    ]
    ids, at = beginnings(prompts, completions)
    targets = np.roll(ids, -1, axis=1)[:, :, None]

    def of_tokens(params):
        return jnp.take_along_axis(logprobs(params, ids), targets, axis=2)[:, :, 0]

    rewards, returns = (
        np.asarray(of_tokens(teacher.params) - of_tokens(state.params)),
        np.zeros((4, 14)),
    )
    for row, where in enumerate(at):
        later = 0.0
        for t in reversed(range(where.start, where.stop)):
            later = returns[row, t] = rewards[row, t] + 0.5 * later
    expected = jax.grad(lambda p: -(of_tokens(p) * returns).sum() / lengths.sum())(state.params)
    batch = jax.tree.map(jnp.asarray, dict(arrays))

    @jax.jit
    def loss_and_gradient(params):
        return jax.value_and_grad(
            lambda p: trainer.compute_loss(p, batch, frozen=state.frozen).loss
        )(params)

    loss, found = loss_and_gradient(state.params)
    kl = -sum(rewards[row, where].sum() for row, where in enumerate(at)) / lengths.sum()
    assert loss == pytest.approx(kl, rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": -0.1}, r"must be in \[0, 1\].*got -0.1"),
        ({"distill_mode": "sft"}, "one of divergence, policy_gradient"),
        ({"distill_mode": "policy_gradient"}, "need lmbda 1, got num_generations 1"),
        ({"num_generations": 2, "lmbda": 0.5}, "need lmbda 1, got num_generations 2"),
        ({"precomputed": True}, "replace the teachers, got lmbda 0.0 and 1 teachers"),
    ],
)
def test_what_cannot_be_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
