"""What other implementations of group methods get wrong, and ours must not."""

import itertools
from typing import get_args

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from tiny_group import make_trainer, random_groups
from tiny_ppo import assert_close, movement, shaken

from errors import UserError
from rl.group_config import LossType

PROMPTS = [[5, 6, 7], [8]]
END = 1  # of tiny_ppo.EOS


def logprobs_by_hand(model, query: list[int], response: list[int], temperature: float) -> list:
    """log p of each response token, from the logits of the whole row, a token at a time."""
    ids = query + response
    logits = model(mx.array([ids[:-1]]))[0] / temperature
    table = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    return [table[t - 1, ids[t]] for t in range(len(query), len(ids))]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.filterwarnings("ignore:--temperature")
def test_a_rollout_is_scored_at_the_temperature_it_was_drawn_at(temperature, kept):
    """mlx-lm-lora draws at 0.8 and scores at 1."""
    trainer = shaken(make_trainer(temperature=temperature, rollout_logprobs=kept, beta=0.1), 0.05)
    rollout = trainer.generate(PROMPTS)
    rewards = np.arange(8.0)[:, None]
    trainer.prepare(rollout, rewards, np.ones(1))
    trainer.score_policy(rollout)
    trainer.score_reference(rollout)
    model, tuning = trainer.model.model, trainer.model.tuning
    for row, (query, response) in enumerate(zip(rollout.queries, rollout.responses, strict=True)):
        policy = logprobs_by_hand(model, query, response, temperature)
        found = np.array(rollout.logprobs[row, : len(response)])
        np.testing.assert_allclose(found, policy, atol=1e-4)
        with tuning.disabled():
            reference = logprobs_by_hand(model, query, response, temperature)
        found = np.array(rollout.ref_logprobs[row, : len(response)])
        np.testing.assert_allclose(found, reference, atol=1e-4)


@pytest.mark.filterwarnings("ignore:--temperature")
def test_the_first_ratio_is_1_at_any_temperature():
    trainer = make_trainer(temperature=0.7, mini_batch_size=8)
    rollout = trainer.generate(PROMPTS)
    stats = trainer.update(rollout, np.arange(8.0))
    assert stats["clip_ratio/region_mean"] == 0  # one update: every ratio is 1


def test_online_dpo_trains_the_sampled_ids_to_their_end_and_no_prompt():
    """Elsewhere text is decoded and tokenised again, EOS lost, and the prompt trained."""
    queries, responses, rewards = random_groups(size=2)
    responses = [[*response[:3], END] for response in responses]
    options = {"online_dpo": True, "num_generations": 2, "beta": 0.3, "mini_batch_size": 8}
    trainer = shaken(make_trainer(**options), 0.05)
    model, tuning = trainer.model.model, trainer.model.tuning

    def sums() -> np.ndarray:
        pairs = zip(queries, responses, strict=True)
        return np.array([sum(logprobs_by_hand(model, q, r, 1.0)) for q, r in pairs])

    policy = sums()
    with tuning.disabled():
        deltas = (policy - sums()).reshape(-1, 2)
    better = np.sign(np.array(rewards).reshape(-1, 2) @ [1, -1])
    margins = 0.3 * better * (deltas[:, 0] - deltas[:, 1])
    stats = trainer.step(queries, responses, rewards)
    assert stats["rewards/margins"] == pytest.approx(margins.mean(), abs=1e-5)
    assert stats["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-5)


@pytest.mark.parametrize("verdict", [None, float("nan")])
def test_a_verdict_that_cannot_be_read_drops_its_pair(verdict):
    """Elsewhere it counts for the second answer."""
    queries, responses, _ = random_groups(size=2)
    options = {"online_dpo": True, "num_generations": 2, "beta": 0.1, "mini_batch_size": 8}
    for unread in ([verdict, 1.0], [1.0, verdict], [verdict, verdict]):
        whole = movement(make_trainer(**options), queries, responses, [2.0, 0.0] * 3 + unread)
        fewer = make_trainer(**{**options, "batch_size": 6, "mini_batch_size": 6})
        assert_close(whole, movement(fewer, queries[:6], responses[:6], [2.0, 0.0] * 3))


def test_a_mask_must_be_as_long_as_its_response():
    """TRL's #5144: a mask of a tool's output longer than the tokens it is of."""
    queries, responses, rewards = random_groups(length=4)
    masks = [[1] * 4] * 7 + [[1] * 5]
    with pytest.raises(UserError, match="row 7: the response mask has 5 places, "):
        make_trainer().step(queries, responses, rewards, response_masks=masks)


def test_losses_differ_and_a_kl_counts():
    """mlx-tune ignores loss_type and beta. (Of one update alone grpo, sapo and cispo agree.)"""
    queries, responses, rewards = random_groups()
    found = {}
    for loss_type in get_args(LossType):
        for beta in (0.0, 0.5):
            options = {"loss_type": loss_type, "beta": beta, "ppo_epochs": 3, "mini_batch_size": 8}
            trainer = shaken(make_trainer(optimizer=optim.SGD(1.0), **options), 0.05)
            moved = movement(trainer, queries, responses, rewards)
            found[loss_type, beta] = np.concatenate([moved[name].ravel() for name in sorted(moved)])
    same = {"bnpo", "dapo"}  # where a batch is one pass
    for one, other in itertools.combinations(found, 2):
        apart = np.abs(found[one] - found[other]).max()
        assert (apart > 1e-4) != (same == {one[0], other[0]} and one[1] == other[1]), (one, other)
