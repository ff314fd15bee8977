"""The stages of rollouts without a value head, as group methods use them."""

import fast_blas  # noqa: F401  isort: skip

import mlx.core as mx
import numpy as np
import pytest
from tiny import tiny_model
from tiny_ppo import EOS, make_trainer, random_batch, shaken

from errors import UserError
from models.actor_critic import reference_logprobs
from models.decoding import Sampling
from models.lora import LoraConfig, add_lora
from rl.kl import kl_penalty
from rl.ppo_statistics import rollout_statistics
from rl.rollouts import (
    join_rollouts,
    minibatch_order,
    response_limits,
    set_mask,
    stream,
    use_sampled,
)
from rl.shaping import rollout_stats
from training.rollout_stages import sample, score_reference, scored


def rollout_without_values(seed: int = 0, queries=None):
    """(model, tuning, rollout): a policy that has no value head at all."""
    model = tiny_model()
    tuning = add_lora(model, LoraConfig(rank=2, scale=2.0))
    key = mx.random.key(3)
    moved = {
        name: a + 0.3 * mx.random.normal(a.shape, key=key) for name, a in tuning.arrays().items()
    }
    tuning.load_arrays(moved, "test")
    model.eval()
    rollout = sample(
        model,
        tuning.prefix,
        queries or random_batch()[0],
        max_tokens=6,
        sampling=Sampling(),
        eos_ids=EOS,
        vocabulary=64,
        random=stream(seed, 0, 0),
    )
    return model, tuning, rollout


def test_a_rollout_without_values_has_logprobs_kl_and_statistics():
    model, tuning, rollout = rollout_without_values()
    assert rollout.sampled_values is None and rollout.values is None
    set_mask(rollout, mx.array)
    assert use_sampled(rollout, mx.array)
    (again,) = scored(rollout, lambda packed: (reference_logprobs(model, packed),), size=3)
    np.testing.assert_allclose(rollout.logprobs, again, atol=1e-4)  # 8 rows are no multiple of 3
    score_reference(rollout, model, tuning, None, size=4)
    rollout.kls = kl_penalty(rollout.logprobs, rollout.ref_logprobs, "k3")
    rollout.scores = mx.arange(8).astype(mx.float32)
    stats = rollout_statistics(rollout, rollout_stats)
    sums = np.array(rollout.kls).sum(axis=1)
    np.testing.assert_allclose(stats["objective/kl_dist"], sums, rtol=1e-5)
    assert stats["objective/kl"] == pytest.approx(sums.mean(), rel=1e-5) and sums.mean() > 0
    assert stats["ppo/mean_scores"] == 3.5 and "ppo/mean_non_score_reward" not in stats
    assert stats["tokens/responses_ended"] == np.mean(rollout.ended)


def test_statistics_need_no_reference():
    _, _, rollout = rollout_without_values()
    set_mask(rollout, mx.array)
    use_sampled(rollout, mx.array)
    rollout.scores = mx.zeros(8)
    stats = rollout_statistics(rollout, rollout_stats)
    surprise = [-row.sum() for row in rollout.sampled_logprobs]
    assert stats["objective/entropy"] == pytest.approx(np.mean(surprise), rel=1e-5)
    assert not any("kl" in name or "ref" in name for name in stats)


def test_rollouts_are_joined_and_taken_apart():
    queries = random_batch()[0]
    _, _, whole = rollout_without_values(queries=queries)
    parts = [whole.take([0, 1, 2]), whole.take([3, 4, 5, 6, 7])]
    again = join_rollouts(parts)
    assert again.queries == queries and again.responses == whole.responses
    assert again.ended == whole.ended and len(again) == 8
    for one, other in zip(again.sampled_logprobs, whole.sampled_logprobs, strict=True):
        np.testing.assert_array_equal(one, other)
    assert join_rollouts([whole, make_trainer().as_rollout([[5]], [[6]])]).sampled_logprobs is None
    assert whole.take([7, 0]).responses == [whole.responses[7], whole.responses[0]]


def test_streams_belong_to_seed_step_and_purpose():
    orders = {
        tuple(minibatch_order(8, *place)) for place in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    }
    assert len(orders) == 4 and all(sorted(order) == list(range(8)) for order in orders)
    trainer = make_trainer(seed=3)
    assert list(trainer.minibatch_order(2)) == list(minibatch_order(8, 3, 0, 2))
    assert response_limits(None, 9, 4, 0, 0) == 9
    limits = [response_limits(2, 9, 40, 0, step) for step in (0, 1)]
    assert limits[0] != limits[1] and set(limits[0]) == set(range(2, 10))


def test_a_query_with_an_unknown_id_is_refused():
    with pytest.raises(UserError, match="row 1: the query has the token id 64"):
        rollout_without_values(queries=[[5], [64]])


def test_responses_from_elsewhere_are_updated_as_those_sampled():
    """TRL's step recomputes what `update` has from sampling: the same up to rounding."""
    queries, _, scores = random_batch()
    moved = []
    for thin in (False, True):
        trainer = shaken(make_trainer(head_std=0.3), 0.05)
        rollout = trainer.generate(queries)
        if thin:
            stats = trainer.step(queries, rollout.responses, scores)
        else:
            stats = trainer.update(rollout, scores)
        moved.append({name: np.array(a) for name, a in trainer.model.tuning.arrays().items()})
        assert stats["ppo/not_finite"] == 0
    for name, array in moved[0].items():
        np.testing.assert_allclose(array, moved[1][name], atol=1e-4, err_msg=name)
