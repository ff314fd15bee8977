"""How a batch of groups is made: prompts, dynamic sampling, what rewards are told."""

import math

import numpy as np
import pytest
from tiny_group import make_trainer

from data_utils import PromptRow
from rewards.reward_set import Reward, RewardSet
from training.group_loop import GroupLoop


class Words:
    """A tokenizer whose text of a token is its number."""

    def decode(self, ids, skip_special_tokens=True) -> str:
        return " ".join(map(str, ids))


def make_loop(function, count: int = 20, **config) -> GroupLoop:
    prompts = [PromptRow([2 + i], str(2 + i), {"level": i}) for i in range(count)]
    rewards = RewardSet([Reward("r", function)], unscored=True)
    trainer = make_trainer(**config)
    return GroupLoop(None, trainer, rewards, Words(), prompts, [], {}, None, backend=None)


def recorded(loop: GroupLoop) -> list[tuple[list, list]]:
    """(prompts, responses) of every call of the trainer's `generate`, as they come."""
    calls, generate = [], loop.trainer.generate

    def recording(prompts, **options):
        rollout = generate(prompts, **options)
        calls.append((list(prompts), rollout.responses))
        return rollout

    loop.trainer.generate = recording
    return calls


def first_token_is_even(prompts, responses):
    """Decided by chance, so that some groups are equal."""
    return [float(int(text.split()[0]) % 2 == 0) for text in responses]


def slow_dynamic_sampling(calls, rewards_of, groups: int, size: int, most: int):
    """DAPO's rule, slot by slot: what each slot of the batch ends with, and the calls it took."""
    later = [list(range(len(prompts))) for prompts, _ in calls]  # groups of a call not yet used
    slots = []
    for slot in range(groups):
        later[0].remove(slot)
        slots.append((0, slot))
    taken = 1
    for attempt in range(1, most + 1):
        waiting = []
        for slot in range(groups):
            call, place = slots[slot]
            rewards = rewards_of(call)[place * size : (place + 1) * size]
            if len(set(rewards)) == 1:
                waiting.append(slot)
        if not waiting:
            break
        taken += 1
        for slot in waiting:
            slots[slot] = (attempt, later[attempt].pop(0))
    return slots, taken


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_dynamic_sampling_is_what_the_rule_says(seed, most):
    config = {"num_generations": 2, "batch_size": 12, "mini_batch_size": 12}
    loop = make_loop(
        first_token_is_even, seed=seed, dynamic_sampling=True, max_resample=most, **config
    )
    calls = recorded(loop)
    made = loop.collect()

    def rewards_of(call: int) -> list[float]:
        return [float(response[0] % 2 == 0) for response in calls[call][1]]

    slots, taken = slow_dynamic_sampling(calls, rewards_of, 6, 2, most)
    assert len(calls) == taken
    for slot, (call, place) in enumerate(slots):
        rows = range(2 * slot, 2 * slot + 2)
        assert [made.rollout.queries[i] for i in rows] == [calls[call][0][place]] * 2
        assert [made.rows[i].tokens for i in rows] == [calls[call][0][place]] * 2
        assert [made.rollout.responses[i] for i in rows] == calls[call][1][2 * place :][:2]
        assert [made.scores[i] for i in rows] == rewards_of(call)[2 * place :][:2]
        assert [made.parts["r"][i] for i in rows] == [made.scores[i] for i in rows]
    asked = [tuple(prompt) for prompts, _ in calls for prompt in prompts]
    assert len(asked) == len(set(asked))  # fresh ones, as long as there are such
    assert loop.resampled == len(asked) - 6


def test_dynamic_sampling_ends_with_too_few_prompts_too():
    loop = make_loop(lambda p, r: [0.0] * len(r), count=3, dynamic_sampling=True)
    calls = recorded(loop)
    made = loop.collect()
    assert len(calls) == 4 and len(made.rows) == 8 and loop.resampled == 6
    stats = loop.learn(made)
    assert stats["sampling/resampled"] == 6 and stats["frac_reward_zero_std"] == 1


def test_the_pace_counts_what_dynamic_sampling_threw_away():
    loop = make_loop(lambda prompts, responses: [0.0] * len(responses), dynamic_sampling=True)
    calls = recorded(loop)
    loop.collect()
    assert len(calls) == 1 + loop.trainer.config.max_resample
    drawn = sum(len(response) for _, responses in calls for response in responses)
    assert loop.sampled == drawn and loop.seconds.keys() == {"rollout", "reward"}


def test_without_dynamic_sampling_a_batch_is_drawn_once():
    loop = make_loop(lambda p, r: [0.0] * len(r))
    calls = recorded(loop)
    loop.collect()
    assert len(calls) == 1


def test_the_same_step_makes_the_same_batch_again():
    """So a run that is killed inside a generation goes on to the same bytes."""
    options = {"dynamic_sampling": True, "num_generations": 2, "seed": 3}
    found = [make_loop(first_token_is_even, **options).collect() for _ in range(2)]
    assert found[0].rollout.responses == found[1].rollout.responses
    assert found[0].texts == found[1].texts


def test_rewards_see_whole_groups_and_columns():
    seen = {}

    def function(prompts, responses, group_ids, level, ended, token_ids):
        seen.update(group_ids=group_ids, level=level, prompts=prompts, token_ids=token_ids)
        best = {
            g: max(map(len, (r for r, h in zip(responses, group_ids, strict=True) if h == g)))
            for g in group_ids
        }
        return [float(len(r) == best[g]) for r, g in zip(responses, group_ids, strict=True)]

    loop = make_loop(function, count=2)
    made = loop.collect()
    assert seen["group_ids"] == [0] * 4 + [1] * 4
    assert len(set(seen["level"][:4])) == 1
    assert sum(made.scores[:4]) >= 1 and sum(made.scores[4:]) >= 1


def test_a_prompt_that_stands_in_a_batch_twice_has_two_groups():
    loop = make_loop(lambda p, r, group_ids: [float(g) for g in group_ids], count=1)
    assert loop.collect().scores == [0.0] * 4 + [1.0] * 4


def test_unscored_rows_reach_the_trainer_and_infinite_rewards_skip_the_step():
    loop = make_loop(lambda p, r: [None, *map(float, range(7))])
    made = loop.collect()
    assert math.isnan(made.scores[0])
    stats = loop.learn(made)
    assert stats["not_finite"] == 0 and stats["reward"] == pytest.approx(np.mean(range(7)))
    loop = make_loop(lambda p, r: [math.inf, *map(float, range(7))])
    before = loop.trainer.steps_done
    assert loop.learn(loop.collect()) == {"not_finite": 1.0}
    assert loop.trainer.steps_done == before + 1
