"""A curriculum by pass rate: values by hand, its place in items, and exact resume."""

import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from grpo_runs import call, make_job, outcome

from relax.callbacks.curriculum import CurriculumProgress
from relax.data.curriculum import PassRateCurriculum
from relax.data.mixing import Mixture
from relax.data.prompt_loader import PromptLoader
from relax.data.prompts import Prompts
from relax.errors import ConfigError
from relax.trainers.rl.rollout import ScoredRollout


def test_due_times_are_those_of_the_equation():
    """4 r (1 - r): 1 at 1/2, 3/4 at 1/4, 7/16 at 1/8, and never below the floor of 1/10."""
    curriculum = PassRateCurriculum(6)
    curriculum.update([0, 1, 2, 3, 4], [1 / 2, 1 / 4, 1 / 8, 0.0, 1.0])
    np.testing.assert_allclose(curriculum.due, [1, 4 / 3, 16 / 7, 10, 10, 0])
    curriculum.update([0, 4], [1.0, 0.0])  # rates 3/4 and 1/2
    np.testing.assert_allclose(curriculum.due, [1 + 4 / 3, 4 / 3, 16 / 7, 10, 11, 0])
    np.testing.assert_allclose(curriculum.rates[[0, 4]], [3 / 4, 1 / 2])


def test_prompts_always_or_never_solved_come_a_tenth_as_often():
    curriculum = PassRateCurriculum(4)
    rates = [0.5, 0.5, 1.0, 0.0]
    drawn: Counter[int] = Counter()
    for epoch in range(220):
        (prompt,) = curriculum.order(0, epoch)[:1].tolist()
        drawn[prompt] += 1
        curriculum.update([prompt], [rates[prompt]])
    assert [drawn[i] for i in range(4)] == [100, 100, 10, 10]


def prompts(count, mixture=None):
    rows = [{"prompt": str(i)} for i in range(count)]
    return Prompts([[i + 1] for i in range(count)], rows, False, mixture=mixture)


def test_every_prompt_comes_once_before_any_comes_again():
    found, curriculum = prompts(10), PassRateCurriculum(10)
    loader = PromptLoader(found, 3, seed=1, curriculum=curriculum)
    assert len(loader) == 3
    drawn = []
    for item in loader:
        places = [ids[0] - 1 for ids in item["prompt_ids"]]
        curriculum.update(places, [0.5] * 3)
        drawn += places
    (left,) = {*range(10)} - {*drawn}
    assert next(loader.batches(1))["prompt_ids"][0] == [left + 1]


def test_an_item_is_a_function_of_the_state_and_the_position_alone():
    curriculum = PassRateCurriculum(20)
    curriculum.update(range(20), np.linspace(0, 1, 20).tolist())
    loader = PromptLoader(prompts(20), 4, seed=1, extra_prompts=4, curriculum=curriculum)
    other = PassRateCurriculum(20)
    other.restore(curriculum.state())
    again = PromptLoader(prompts(20), 4, seed=1, extra_prompts=4, curriculum=other)
    one, two = next(loader.batches(2, 3)), next(again.batches(2, 3))
    assert one == two and other.state() == curriculum.state()
    chosen = [ids[0] for ids in one["prompt_ids"] + one["extra_prompts"]["prompt_ids"]]
    assert len({*chosen}) == 8 and {9, 10, 11, 12} <= {*chosen}  # rates nearest to 1/2


def test_completions_are_noted_when_an_update_of_them_is_made():
    found, curriculum = prompts(3), PassRateCurriculum(3)
    progress = CurriculumProgress(curriculum, found.rows, pass_reward=1.0)
    rewards = np.array([[1.0, 2.0], [0.5, np.nan], [1.0, 0.0]])
    rows = [found.rows[2], found.rows[0], {"prompt": "0"}]  # the last is of another set
    scored = ScoredRollout(SimpleNamespace(rows=rows), rewards, rewards[:, :, None], {}, {})
    progress.on_scored(scored)
    assert np.isnan(curriculum.rates).all()
    progress.on_train_begin(None)  # an interrupted rollout is forgotten
    progress.on_batch_end(None)
    assert np.isnan(curriculum.rates).all()
    progress.on_scored(scored)
    progress.on_batch_end(None)
    progress.on_batch_end(None)  # the second update of the same rollout
    np.testing.assert_array_equal(curriculum.rates, [0.0, np.nan, 1.0])
    assert curriculum.due.tolist() == [10, 0, 10]


@pytest.mark.parametrize("floor", [0.0, 1.5])
def test_floors_out_of_range_are_refused(floor):
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        PassRateCurriculum(3, floor)


def test_weights_and_a_curriculum_exclude_each_other():
    mixture = Mixture(("a", "b"), (2, 2), None, "all_exhausted")
    with pytest.raises(ConfigError, match="leave out the weights"):
        PromptLoader(prompts(4, mixture), 2, curriculum=PassRateCurriculum(4))


def test_a_run_resumes_its_curriculum_to_the_byte(tmp_path):
    job = make_job(tmp_path) | {"curriculum": "pass_rate", "pass_reward": 0.3}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call(**job, output_dir=whole) == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "8")
    shutil.rmtree(cut / "final")
    assert call(**job, output_dir=cut, resume="auto") == 0
    assert outcome(cut) == outcome(whole)
