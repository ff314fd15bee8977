"""Easy rows first: no row before its time, every row later, and the ordinary order in the end."""

import numpy as np
import pytest

from data_loading.curriculum import Curriculum, chosen_prompts, hard_by_score
from data_utils import (
    BatchIterator,
    BatchPlan,
    PreferenceRow,
    PromptRow,
    TextRow,
    easy_first,
    prompt_batch,
)
from errors import UserError

LENGTHS = np.random.default_rng(0).integers(2, 60, 100).tolist()


def rows():
    return [TextRow([1] * n, [0] + [1] * (n - 1), f"row {i}") for i, n in enumerate(LENGTHS)]


def test_competence_is_platanios_root():
    curriculum = Curriculum(LENGTHS, 0.2, 50)
    found = [curriculum.competence(t) for t in (0, 10, 25, 50, 90)]
    expected = [np.sqrt(t * 0.96 / 50 + 0.04) for t in (0, 10, 25)]
    np.testing.assert_allclose(found, [*expected, 1, 1])
    assert len(curriculum.open_rows(0)) == 20 and len(curriculum.open_rows(50)) == 100


@pytest.mark.parametrize("accumulation", [1, 3])
def test_no_row_before_its_time_and_all_of_them_later(accumulation):
    curriculum = Curriculum(LENGTHS, 0.1, 30)
    plan = easy_first(BatchPlan(LENGTHS, 8, seed=3), curriculum, accumulation)
    iterator, rank = BatchIterator(rows(), plan), np.argsort(curriculum.order)
    ranks, seen = [], set()
    for update in range(90):
        taken = []
        for _ in range(accumulation):
            next(iterator)
            taken.extend(iterator.taken.tolist())
        assert rank[taken].max() < np.ceil(100 * curriculum.competence(update))
        ranks.append(curriculum.difficulty[taken].mean())
        seen |= set(taken) if update >= 30 else set()
    assert seen == set(range(100))  # one that sorts for ever would never come to the longest
    # It rises, and is not a shuffle from the start.
    assert np.mean(ranks[:5]) + 5 < np.mean(ranks[15:25]) < np.mean(ranks[30:])


def test_from_full_competence_on_it_is_the_ordinary_plan():
    plain = BatchPlan(LENGTHS, 8, seed=3)
    plan = easy_first(plain, Curriculum(LENGTHS, 0.1, 30), 1)
    for epoch in range(4):
        whole = zip(plain.epoch(epoch), plan.epoch(epoch), strict=True)
        same = [np.array_equal(a, b) for a, b in whole]
        assert same == [epoch * len(plain) + i >= 30 for i in range(len(plain))]
    assert plan.notes(7, [0, 1]) == {
        "curriculum/competence": Curriculum(LENGTHS, 0.1, 30).competence(7),
        "curriculum/difficulty": (LENGTHS[0] + LENGTHS[1]) / 2,
    }


@pytest.mark.parametrize("steps", [1, 40])
def test_a_start_of_1_is_the_ordinary_order(steps):
    plain, all_open = BatchPlan(LENGTHS, 8, seed=3), Curriculum(LENGTHS, 1.0, steps)
    for one, other in zip(plain.epoch(0), easy_first(plain, all_open, 1).epoch(0), strict=True):
        np.testing.assert_array_equal(one, other)
    assert chosen_prompts(all_open, 100, 16, 3, 0) == prompt_batch(100, 16, 3, 0)


def test_prompts_of_a_step_are_a_function_of_seed_and_step():
    curriculum = Curriculum(LENGTHS, 0.1, 30)
    drawn = [chosen_prompts(curriculum, 100, 16, step, 5) for step in range(40)]
    assert drawn == [chosen_prompts(curriculum, 100, 16, step, 5) for step in range(40)]
    assert drawn[3] != chosen_prompts(curriculum, 100, 16, 3, 6)
    for step, numbers in enumerate(drawn):
        open_rows = set(curriculum.open_rows(step).tolist())
        assert set(numbers) <= open_rows and len(numbers) == 16
        if len(open_rows) >= 16:
            assert len(set(numbers)) == 16 or step >= 30
    assert drawn[30] == prompt_batch(100, 16, 30, 5)


def test_scores_are_easy_where_they_are_high():
    scored = [PromptRow([1], "a", {}, reward=r) for r in (1.0, 5.0, 3.0)]
    assert Curriculum(hard_by_score(scored), 0.5, 3).order.tolist() == [1, 2, 0]
    pairs = [PreferenceRow([[1, 2], [1, 3]], [0, 1], margin=m) for m in (0.1, 0.9)]
    assert Curriculum(hard_by_score(pairs), 0.5, 3).order.tolist() == [1, 0]
    with pytest.raises(UserError, match="row 0: --curriculum-by score"):
        hard_by_score(rows())
