"""What must hold of a step of the group trainer, whatever the numbers."""

import math
import warnings

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from tiny_group import make_trainer, random_groups
from tiny_ppo import assert_close, assert_same_bits, movement, shaken, weights

import training.rollout_stages
from errors import UserError
from models.packing import pack
from models.reference import without_effect
from rl.group_statistics import STEPS_OF_EQUAL_REWARDS

PROMPTS = [[5, 6, 7], [8]]
KINDS = ["lora", "dora", "prompt", "full"]
ESTIMATORS = ["grpo", "rloo", "reinforce", "reinforce_baseline"]


def update(trainer, rewards=None, part: int = 0, **options) -> dict:
    """A whole step: responses of the trainer's own, with rewards."""
    rollout = trainer.generate(PROMPTS, part=part)
    rewards = np.random.default_rng(1).normal(size=8) if rewards is None else rewards
    return trainer.update(rollout, rewards, **options)


# ---- generation --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_kept_log_probabilities_are_those_of_a_forward_pass(kind):
    trainer = shaken(make_trainer(kind), 0.05)
    rollout = trainer.generate(PROMPTS)
    assert rollout.queries == [p for p in PROMPTS for _ in range(4)]
    prefix = trainer.model.tuning.prefix
    logprobs, _ = trainer.model(pack(rollout.queries, rollout.responses, prefix=prefix))
    for row, kept in enumerate(rollout.sampled_logprobs):
        np.testing.assert_allclose(kept, np.array(logprobs[row, : len(kept)]), atol=1e-4)


def test_every_call_of_a_step_draws_its_own_numbers_and_repeats_them():
    trainer = make_trainer()
    first, again, other = (trainer.generate(PROMPTS, part=part).responses for part in (0, 0, 1))
    assert first == again != other
    trainer.steps_done = 1
    assert trainer.generate(PROMPTS).responses != first


# ---- what a step computes ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_moves_every_kind_and_the_first_ratio_is_1(kind, estimator):
    trainer = make_trainer(kind, advantage_estimator=estimator, beta=0.05, mini_batch_size=8)
    before = weights(trainer)
    stats = update(trainer)
    assert any((weights(trainer)[name] != array).any() for name, array in before.items())
    assert stats["clip_ratio/region_mean"] == 0 and stats["not_finite"] == 0
    if kind != "prompt":  # what was just made is the reference; a soft prompt is text
        assert abs(stats["kl"]) < 1e-5
    assert all(math.isfinite(value) for value in stats.values())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_rewards_without_kl_move_nothing(estimator):
    trainer = make_trainer(advantage_estimator=estimator, beta=0)
    before = weights(trainer)
    stats = update(trainer, [0.1] * 8)
    assert stats["frac_reward_zero_std"] == 1
    assert_same_bits(weights(trainer), before)


def test_inverted_rewards_invert_the_update():
    batch = random_groups()
    one = movement(make_trainer(mini_batch_size=8), *batch)
    inverted = [-reward for reward in batch[2]]
    other = movement(make_trainer(mini_batch_size=8), *batch[:2], inverted)
    assert_close(one, {name: -array for name, array in other.items()})


def test_permuted_groups_give_the_same_update():
    queries, responses, rewards = random_groups()
    order = [7, 5, 6, 4, 1, 0, 3, 2]
    one = movement(make_trainer(mini_batch_size=8), queries, responses, rewards)
    moved = [[column[i] for i in order] for column in (queries, responses, rewards)]
    assert_close(one, movement(make_trainer(mini_batch_size=8), *moved))


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "cispo"])
def test_eight_rows_once_are_one_row_eight_times(loss_type):
    batch = random_groups()
    whole = make_trainer(mini_batch_size=8, loss_type=loss_type)
    parts = make_trainer(mini_batch_size=1, gradient_accumulation_steps=8, loss_type=loss_type)
    assert_close(movement(whole, *batch), movement(parts, *batch))


def test_gradient_checkpointing_changes_nothing():
    batch = random_groups()
    plain = movement(make_trainer(beta=0.1), *batch)
    trainer = make_trainer(beta=0.1)
    trainer.grad_checkpoint = True
    assert_close(plain, movement(trainer, *batch))


@pytest.mark.long  # g++ compiles for half a minute
def test_the_compiler_changes_nothing():
    batch = random_groups()
    plain = movement(make_trainer(beta=0.1), *batch)
    assert_close(plain, movement(make_trainer(beta=0.1, compile=True), *batch))


def test_several_updates_a_rollout_have_a_ratio():
    """A peer sees each rollout once with old = new, so its epsilon does nothing."""
    one = make_trainer(ppo_epochs=4, epsilon=0.2)
    other = make_trainer(ppo_epochs=4, epsilon=1e-4)
    rewards = 100 * np.random.default_rng(1).normal(size=8)
    stats = [update(t, rewards) for t in (one, other)]
    assert stats[1]["clip_ratio/region_mean"] > 0
    assert any((weights(one)[k] != v).any() for k, v in weights(other).items())


# ---- the reference -----------------------------------------------------------------------------


@pytest.fixture
def reference_passes(monkeypatch):
    calls = []
    inner = training.rollout_stages.reference_logprobs

    def counted(*args):
        calls.append(args)
        return inner(*args)

    monkeypatch.setattr(training.rollout_stages, "reference_logprobs", counted)
    return calls


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_without_a_kl_no_reference_is_run(reference_passes, kind):
    update(make_trainer(kind, beta=0, reference=False))
    assert reference_passes == []
    update(make_trainer(kind, beta=0.1))
    assert len(reference_passes) == 2  # minibatches


def test_full_fine_tuning_with_a_kl_needs_a_reference():
    with pytest.raises(UserError, match="needs a reference model"):
        make_trainer("full", beta=0.1, reference=False)


def test_the_kl_pulls_back_to_the_reference():
    trainer = shaken(make_trainer(beta=1.0, optimizer=optim.SGD(0.02)), 0.1)
    stats = [update(trainer, [0.0] * 8) for _ in range(6)]
    assert stats[-1]["kl"] < 0.9 * stats[0]["kl"]


def test_kl_in_the_reward_is_rloo_s():
    batch = random_groups()
    options = {"beta": 0.5, "scale_rewards": "none", "mini_batch_size": 8}
    trainer = shaken(make_trainer(kl_in_reward=True, **options))
    rollout = trainer_rollout(trainer, *batch)
    other = shaken(make_trainer(advantage_estimator="rloo", beta=0.5, mini_batch_size=8))
    theirs = trainer_rollout(other, *batch)
    assert_close(
        {"a": 4 / 3 * np.array(rollout.advantages)}, {"a": np.array(theirs.advantages)}, 1e-5
    )


def trainer_rollout(trainer, queries, responses, rewards):
    """What `step` makes of a batch before it optimises."""
    seen, inner = [], trainer.optimise
    trainer.optimise = lambda rollout: seen.append(rollout) or inner(rollout)
    trainer.step(queries, responses, rewards)
    return seen[0]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_reference_is_blended(kind):
    trainer = make_trainer(
        kind, beta=0.1, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.25
    )
    expected = {k: np.array(v) for k, v in trainer.blend.arrays().items()}
    assert not any(v.any() for k, v in expected.items() if k.endswith("lora_b"))
    for _ in range(2):
        update(trainer)  # two updates
        own = trainer.model.tuning.arrays()
        expected = {k: 0.25 * np.array(own[k]) + 0.75 * v for k, v in expected.items()}
        found = {k: np.array(v) for k, v in trainer.blend.arrays().items()}
        assert_close(found, expected, 1e-6)
    assert update(trainer)["kl"] >= 0


def test_the_blended_reference_is_what_the_kl_is_to():
    options = {"beta": 0.1, "mini_batch_size": 8}
    trainer = make_trainer(**options, sync_ref_model=True, ref_model_mixup_alpha=1.0)
    shaken(trainer).blend.blend()  # the reference is the policy now
    assert abs(update(trainer)["kl"]) < 1e-5
    plain = shaken(make_trainer(**options))
    assert update(plain)["kl"] > 1e-3


def test_blending_is_refused_where_weights_do_not_add_up():
    for kind in ("dora", "prompt"):
        with pytest.raises(UserError, match=f"a {kind} adapter does not"):
            make_trainer(kind, beta=0.1, sync_ref_model=True)
    assert without_effect({"x.lora_a": mx.ones(1), "x.lora_b": mx.ones(1)})["x.lora_b"].item() == 0


# ---- rows, tokens ------------------------------------------------------------------------------


def test_an_unscored_row_is_left_out_and_does_not_end_the_run():
    queries, responses, rewards = random_groups()
    rewards[2] = None
    trainer = make_trainer()
    advantages = np.array(trainer_rollout(trainer, queries, responses, rewards).advantages)
    assert advantages[2] == 0 and advantages[:2].any()
    found = make_trainer().step(queries, responses, rewards)
    assert found["reward"] == pytest.approx(np.mean([r for r in rewards if r is not None]))


def test_a_function_that_is_only_logged_changes_nothing():
    queries, responses, rewards = random_groups()
    rollout = make_trainer().as_rollout(queries, responses)
    one, other = make_trainer(), make_trainer()
    one.update(rollout, [[r, 7.0] for r in rewards], names=["a", "b"], weights=[1.0, 0.0])
    other.step(queries, responses, rewards)
    assert_same_bits(weights(one), weights(other))


def test_truncated_responses_are_masked_but_stay_in_their_group():
    queries, responses, rewards = random_groups()
    responses = [[*r, 1] for r in responses]
    responses[3] = responses[3][:-1]  # the one without an end
    trainer = make_trainer(mask_truncated_completions=True, mini_batch_size=8)
    rollout = trainer_rollout(trainer, queries, responses, rewards)
    assert not rollout.masks[3].any() and rollout.masks[0].all()
    plain = trainer_rollout(make_trainer(mini_batch_size=8), queries, responses, rewards)
    np.testing.assert_array_equal(np.array(rollout.advantages), np.array(plain.advantages))
    assert (np.array(rollout.mask)[3] == 0).all()


def test_a_batch_that_is_masked_as_a_whole_moves_nothing():
    queries, responses, rewards = random_groups()
    for estimator in ESTIMATORS:
        trainer = make_trainer(advantage_estimator=estimator, mask_truncated_completions=True)
        before = weights(trainer)
        stats = trainer.step(queries, [[2, 3]] * 8, rewards)
        assert_same_bits(weights(trainer), before)
        assert stats["not_finite"] == 0 and stats["completions/clipped_ratio"] == 1


def test_a_tool_s_tokens_are_read_but_not_trained_or_counted():
    queries, responses, rewards = random_groups(length=5)
    masks = [[1, 0, 0, 1, 1]] * 8
    trainer = make_trainer()
    stats = trainer.step(queries, responses, rewards, response_masks=masks)
    assert stats["completions/mean_length"] == 3
    rollout = trainer_rollout(make_trainer(), queries, responses, rewards)
    assert rollout.mask.sum().item() == 40
    other = [[r[0], 9, 9, *r[3:]] for r in responses]  # what the tool wrote counts as context
    one, two = (
        movement(make_trainer(), queries, rows, rewards, response_masks=masks)
        for rows in (responses, other)
    )
    assert any((one[name] != two[name]).any() for name in one)


def test_penalties_for_length_come_off_the_reward():
    queries, responses, _ = random_groups()
    responses[0] = [*responses[0][:2], 1]
    options = {"missing_eos_penalty": 1.0, "scale_rewards": "none"}
    rollout = trainer_rollout(make_trainer(**options), queries, responses, [0.0] * 8)
    np.testing.assert_allclose(np.array(rollout.advantages)[:4, 0], [0.75, -0.25, -0.25, -0.25])


# ---- entropy -----------------------------------------------------------------------------------


def test_the_entropy_term_raises_entropy():
    trainer, batch = make_trainer(entropy_coef=1.0, ppo_epochs=2), random_groups()
    found = [trainer.step(*batch[:2], [0.0] * 8)["entropy"] for _ in range(3)]
    assert found[0] < found[1] < found[2]


def test_the_adaptive_coefficient_is_what_the_rule_says():
    trainer = make_trainer(
        use_adaptive_entropy=True,
        entropy_target=3.9,
        entropy_coef_delta=0.01,
        entropy_coef=0.02,
        entropy_coef_max=0.03,
        mini_batch_size=8,
    )
    coefficient = 0.02
    assert trainer.entropy_weight == 0  # nothing is known yet
    for _ in range(4):
        stats = update(trainer)
        low = stats["entropy"] <= 3.9
        coefficient = min(max(coefficient + (0.01 if low else -0.01), 0.0), 0.03)
        assert stats["entropy_coef"] == pytest.approx(coefficient)
        assert trainer.entropy_weight == (trainer.entropy_coef if low else 0.0)


# ---- online DPO --------------------------------------------------------------------------------

PAIRS = {"online_dpo": True, "num_generations": 2, "beta": 0.1}


@pytest.mark.parametrize("loss, value", [("sigmoid", math.log(2)), ("ipo", 25.0)])
def test_online_dpo_starts_where_dpo_starts(loss, value):
    queries, responses, rewards = random_groups(size=2)
    trainer = make_trainer(**PAIRS, dpo_loss=loss, mini_batch_size=8)
    stats = trainer.step(queries, responses, rewards)
    assert stats["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert stats["loss"] == pytest.approx(value, rel=1e-4) and stats["ties"] == 0


def test_online_dpo_raises_the_better_response():
    queries, responses, rewards = random_groups(size=2)
    trainer = make_trainer(**PAIRS, ppo_epochs=5)
    stats = [trainer.step(queries, responses, rewards) for _ in range(2)]
    assert stats[-1]["rewards/margins"] > 0.01 and stats[-1]["rewards/accuracies"] > 0.7
    assert stats[-1]["loss"] < stats[0]["loss"]


def test_online_dpo_drops_ties():
    """TRL counts a tie as a win of the first."""
    queries, responses, _ = random_groups(size=2)
    trainer = make_trainer(**PAIRS)
    before = weights(trainer)
    stats = trainer.step(queries, responses, [1.0] * 8)
    assert_same_bits(weights(trainer), before)
    assert stats["ties"] == 1
    some = [1.0, 1.0, 2.0, 0.0, 0.0, 3.0, None, 1.0]
    one = movement(make_trainer(**PAIRS, mini_batch_size=8), queries, responses, some)
    pairs = slice(2, 6)
    other = make_trainer(**PAIRS, batch_size=4, mini_batch_size=4)
    assert_close(one, movement(other, queries[pairs], responses[pairs], some[pairs]))


# ---- what is refused and what is said ----------------------------------------------------------


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_generations": 1}, "at least 2 are needed"),
        ({"num_generations": 3}, "--batch-size 8 is not a multiple of --num-generations 3"),
        ({"mini_batch_size": 3}, "--batch-size 8 is not a multiple of --mini-batch-size 3"),
        ({"advantage_estimator": "ppo"}, "--advantage-estimator: 'ppo' is none of grpo, rloo"),
        ({"epsilon": math.nan}, "--epsilon: nan given, must be above 0"),
        ({"reward_clip_range": [1.0, -1.0]}, "--reward-clip-range"),
        ({"top_entropy_quantile": 0}, "--top-entropy-quantile"),
        ({"sync_ref_model": True}, "--sync-ref-model has no effect at --beta 0"),
        ({"online_dpo": True}, "--num-generations 2"),
        ({**PAIRS, "beta": 0.0}, "--online-dpo needs --beta above 0"),
    ],
)
def test_options_that_cannot_work_are_refused(config, message):
    with pytest.raises(UserError) as caught:
        make_trainer(**config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_batches_that_cannot_be_learned_from_are_refused():
    queries, responses, rewards = random_groups()
    step = make_trainer().step
    for arguments, message in (
        ((queries[:4], responses[:4], rewards[:4]), "queries: 4 given, the batch size is 8"),
        (([[9], *queries[1:]], responses, rewards), "row 1: its prompt is not that of its group"),
        ((queries, [[], *responses[1:]], rewards), "row 0: the response is empty"),
        ((queries, responses, [math.inf, *rewards[1:]]), "row 0: the score is inf"),
        ((queries, responses, ["a", *rewards[1:]]), "numbers or None are needed"),
        ((queries, [[999], *responses[1:]], rewards), "row 0: the response has the token id 999"),
    ):
        with pytest.raises(UserError) as caught:
            step(*arguments)
        assert message in str(caught.value)


def test_twenty_steps_of_equal_rewards_are_said_once():
    trainer = make_trainer(max_new_tokens=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(STEPS_OF_EQUAL_REWARDS + 3):
            update(trainer, [step % 2] * 4 + [0.5] * 4)
            named = [w for w in said if "had the same reward" in str(w.message)]
            assert len(named) == (step + 1 >= STEPS_OF_EQUAL_REWARDS)


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_twenty_steps_without_any_score_are_said_to_be_that(nothing):
    trainer = make_trainer(max_new_tokens=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(STEPS_OF_EQUAL_REWARDS):
            update(trainer, [nothing] * 8)
    texts = [str(w.message) for w in said]
    assert len([text for text in texts if "as no reward scored them" in text]) == 1
    assert not [text for text in texts if "had the same reward" in text]


@pytest.mark.parametrize("loss", ["dapo", "sapo", "bnpo"])
def test_a_sequence_ratio_with_another_loss_is_said(loss):
    with pytest.warns(UserWarning, match="GSPO is --loss-type grpo"):
        make_trainer(importance_sampling_level="sequence", loss_type=loss)


def test_luspo_is_asked_for_one_ratio_a_response_and_not_warned_of_it():
    with pytest.warns(UserWarning, match="--importance-sampling-level sequence"):
        make_trainer(loss_type="luspo")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(importance_sampling_level="sequence", loss_type="luspo")
        make_trainer(importance_sampling_level="sequence", loss_type="grpo")
        make_trainer(loss_type="dapo")


def test_a_loss_that_is_not_finite_skips_its_update():
    trainer = make_trainer()
    before = weights(trainer)
    queries, responses, rewards = random_groups()
    rollout = trainer.as_rollout(queries, responses)
    rollout.sampled_logprobs = [np.full(len(r), np.nan, np.float32) for r in responses]
    stats = trainer.update(rollout, rewards)
    assert stats["not_finite"] == 1
    assert_same_bits(weights(trainer), before)


def test_state_goes_through_json():
    import json

    trainer = make_trainer(use_adaptive_entropy=True, entropy_target=9.0)
    for _ in range(2):
        update(trainer)
    other = make_trainer(use_adaptive_entropy=True, entropy_target=9.0)
    other.load_state_dict(json.loads(json.dumps(trainer.state_dict())))
    assert other.state_dict() == trainer.state_dict() and other.entropy_coef > 0
    assert other.entropy_weight == trainer.entropy_weight
