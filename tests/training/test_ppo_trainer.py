"""The identities of PPO_SPEC on whole steps of the trainer; numbers: test_ppo_step_oracle.py."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from tiny import flat, tiny_model
from tiny_ppo import (
    assert_close,
    assert_same_bits,
    make_trainer,
    movement,
    random_batch,
    rollout_of,
    shaken,
    weights,
)

from models.load import weight_bytes
from models.lora import LoraConfig, add_lora
from models.reward_model import RewardModel
from rl.rollouts import join_rollouts
from training.rollout_stages import reference_of

KINDS = ["lora", "dora", "prompt", "full"]


# ------------------------------------------------------------------------------ ratio and KL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rollout_logprobs", [True, False])
def test_the_ratio_is_1_on_the_first_minibatch(kind, temperature, rollout_logprobs):
    """Dropout off, the same temperature, positions and shift in sampling, scoring and update."""
    trainer = make_trainer(
        kind, head_std=0.2, temperature=temperature, rollout_logprobs=rollout_logprobs
    )
    shaken(trainer, 0.05)
    queries, _, scores = random_batch()
    responses = trainer.generate(queries)
    metrics = trainer.optimise(rollout_of(trainer, queries, responses, scores))
    assert metrics[0]["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics[0]["policy/approxkl"] < 1e-9 and metrics[0]["policy/clipfrac"] == 0
    assert metrics[0]["val/clipfrac"] == 0
    assert metrics[1]["policy/approxkl"] > 1e-7  # by then the weights have moved


@pytest.mark.parametrize("mode", ["kl", "abs", "mse", "full", "k1", "k2", "k3"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_kl_is_0_for_what_was_not_trained(kind, mode):
    trainer = make_trainer(kind, kl_penalty=mode, rollout_logprobs=False)
    stats = trainer.step(*random_batch())
    assert stats["objective/kl"] == pytest.approx(0, abs=2e-5)
    assert trainer.step(*random_batch(seed=1))["objective/kl"] != pytest.approx(0, abs=1e-4)


def test_a_soft_prompt_is_part_of_the_policy_and_not_of_the_reference():
    trainer = make_trainer("prompt", rollout_logprobs=False)
    queries, responses, scores = random_batch()
    rollout = rollout_of(trainer, queries, responses, scores)
    base = tiny_model()
    for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
        logits = base(mx.array([[*query, *response]]))[0, len(query) - 1 : -1]
        wanted = nn.log_softmax(logits)[mx.arange(len(response)), mx.array(response)]
        np.testing.assert_allclose(rollout.ref_logprobs[row, : len(response)], wanted, atol=1e-4)
    assert mx.abs(rollout.kls).max().item() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_kl_is_the_sum_over_the_vocabulary(kind):
    trainer = shaken(make_trainer(kind, kl_penalty="full", temperature=0.8))
    queries, responses, scores = random_batch()
    rollout = rollout_of(trainer, queries, responses, scores)
    prefix, base = trainer.model.tuning.prefix, tiny_model()

    def distribution(model, front, query, response):
        tokens = [*front, *query, *response]
        logits = model(mx.array([tokens]))[0, -len(response) - 1 : -1]
        return nn.log_softmax(logits / 0.8, axis=-1)

    for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
        policy = distribution(trainer.model.model, prefix, query, response)
        wanted = (mx.exp(policy) * (policy - distribution(base, (), query, response))).sum(axis=-1)
        np.testing.assert_allclose(rollout.kls[row, : len(response)], wanted, atol=1e-4)
        assert mx.abs(rollout.kls[row, len(response) :]).sum().item() == 0
    assert rollout.kls.max().item() > 0.01


# ------------------------------------------------------------------------------ scores and updates


def test_inverting_the_scores_inverts_the_update():
    """At the first update, with a fresh adapter and a value head of 0, exactly."""
    options = {"ppo_epochs": 1, "mini_batch_size": 8, "rollout_logprobs": False}
    queries, responses, scores = random_batch()
    one = movement(make_trainer(**options), queries, responses, scores)
    inverted = [-score for score in scores]
    other = movement(make_trainer(**options), queries, responses, inverted)
    assert_close({k: -v for k, v in other.items()}, one, 1e-3)


def test_several_updates_with_inverted_scores_end_elsewhere():
    queries, responses, scores = random_batch()
    ends = []
    for sign in (1, -1):
        trainer = make_trainer(ppo_epochs=4)
        trainer.step(queries, responses, [sign * score for score in scores])
        ends.append(weights(trainer))
    name = "model.model.layers.1.self_attn.v_proj.lora_b"
    assert np.abs(ends[0][name] - ends[1][name]).max() > 0.5 * np.abs(ends[0][name]).max() > 0


def test_equal_scores_without_kl_give_no_policy_gradient():
    """With gamma = lambda = 1 all advantages are the score, and whitening leaves nothing of it."""
    options = {"init_kl_coef": 0.0, "lam": 1.0, "vf_coef": 0.0, "ppo_epochs": 1}
    queries, responses, scores = random_batch()
    with pytest.warns(UserWarning, match="all scores of a batch are equal"):
        equal = movement(make_trainer(**options), queries, responses, [0.7] * 8)
    different = movement(make_trainer(**options), queries, responses, scores)
    largest = max(np.abs(array).max() for array in different.values())
    assert max(np.abs(array).max() for array in equal.values()) < 1e-4 * largest


def test_rewarded_responses_become_likelier():
    trainer = make_trainer(optimizer=optim.Adam(3e-3), ppo_epochs=4)
    queries, responses, _ = random_batch(length=4)
    scores = [1.0, -1.0] * 4
    before = np.array(rollout_of(trainer, queries, responses, scores).logprobs.sum(axis=1))
    for _ in range(3):
        trainer.step(queries, responses, scores)
    after = np.array(rollout_of(trainer, queries, responses, scores).logprobs.sum(axis=1))
    assert (after - before)[::2].mean() > 0.5 > -0.5 > (after - before)[1::2].mean()


# ------------------------------------------------------------------------------ layout


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_padding_changes_nothing(kind):
    batch = random_batch()
    moves, stats = [], []
    for multiple in (1, 16):
        trainer = shaken(make_trainer(kind, head_std=0.2, pad_to_multiple=multiple))
        before = weights(trainer)
        stats.append(trainer.step(*batch))
        moves.append({k: v - before[k] for k, v in weights(trainer).items()})
    assert_close(moves[1], moves[0])
    for name, value in stats[0].items():
        if not name.startswith("time/"):
            np.testing.assert_allclose(stats[1][name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_longer_neighbours_change_no_score():
    """Right padding: the same rows beside one that is far longer."""
    trainer = shaken(make_trainer(batch_size=2, mini_batch_size=2, head_std=0.2))
    queries, responses, scores = random_batch(2)
    alone = rollout_of(trainer, queries, responses, scores)
    trainer = shaken(make_trainer(batch_size=3, mini_batch_size=3, head_std=0.2))
    beside = rollout_of(
        trainer, [*queries, list(range(2, 42))], [*responses, [3] * 20], [*scores, 0.0]
    )
    width = alone.mask.shape[1]
    for name in ("logprobs", "ref_logprobs", "values", "kls", "rewards", "returns", "mask"):
        found = getattr(beside, name)[:2, :width]
        np.testing.assert_allclose(found, getattr(alone, name), atol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_8_minibatches_of_1_are_1_of_8(kind):
    """With responses of one length, for the loss is a mean over the tokens of a minibatch."""
    batch = random_batch(length=5)
    moves = [
        movement(
            make_trainer(
                kind, mini_batch_size=size, gradient_accumulation_steps=8 // size, head_std=0.2
            ),
            *batch,
        )
        for size in (8, 1, 2)
    ]
    assert_close(moves[1], moves[0])
    assert_close(moves[2], moves[0])


def test_every_response_is_seen_once_an_epoch():
    trainer = make_trainer(mini_batch_size=2, gradient_accumulation_steps=2, ppo_epochs=3)
    seen, real = [], trainer._gradient
    trainer._gradient = lambda rollout, rows: seen.append(list(rows)) or real(rollout, rows)
    trainer.step(*random_batch())
    epochs = [sum(seen[i : i + 4], []) for i in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3  # in another order each time


# ------------------------------------------------------------------------------ masks


def test_masked_tokens_at_the_end_are_as_if_they_were_not_there():
    queries, responses, scores = random_batch()
    longer = [[*response, 7, 9] for response in responses]
    masks = [[1] * len(response) + [0, 0] for response in responses]
    assert_close(
        movement(make_trainer(head_std=0.2), queries, longer, scores, masks),
        movement(make_trainer(head_std=0.2), queries, responses, scores),
    )


def test_masked_tokens_at_the_start_are_as_if_they_were_the_querys():
    queries, responses, scores = random_batch()
    longer = [[7, 9, *response] for response in responses]
    masks = [[0, 0] + [1] * len(response) for response in responses]
    moved = [[*query, 7, 9] for query in queries]
    assert_close(
        movement(make_trainer(head_std=0.2), queries, longer, scores, masks),
        movement(make_trainer(head_std=0.2), moved, responses, scores),
    )


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_holes_give_the_gradient_of_the_obvious_way(kind):
    """A tool's output inside responses, against the algorithm written out for single tokens."""
    queries, responses, scores = random_batch(4, length=6)
    masks = [[1, 1, 0, 0, 1, 1], [1, 0, 1, 0, 1, 0], [1] * 6, [0, 0, 1, 1, 0, 1]]
    options = dict(batch_size=4, mini_batch_size=4, ppo_epochs=1, head_std=0.2)
    trainer = shaken(make_trainer(kind, **options))
    wanted = by_hand(shaken(make_trainer(kind, **options)), queries, responses, scores, masks)
    moved = movement(trainer, queries, responses, scores, masks)
    assert_close({name: -10 * array for name, array in moved.items()}, wanted, 1e-3)  # SGD at 0.1


def by_hand(trainer, queries, responses, scores, masks) -> dict[str, np.ndarray]:
    """The gradient of the first update, token by token."""
    policy, config = trainer.model, trainer.config
    base, prefix = tiny_model(), trainer.model.tuning.prefix

    def scored(model, front, query, response, mask):
        """Log-probabilities and hidden states of the tokens that count."""
        sequence, start = [*front, *query, *response], len(front) + len(query)
        places = [start + i for i, counts in enumerate(mask) if counts]
        logits = nn.log_softmax(model(mx.array([sequence]))[0], axis=-1)
        hidden = model.model(mx.array([sequence]))[0]
        return mx.stack([logits[p - 1, sequence[p]] for p in places]), hidden[mx.array(places) - 1]

    experience = []
    for query, response, score, mask in zip(queries, responses, scores, masks, strict=True):
        logprobs, hidden = scored(policy.model, prefix, query, response, mask)
        reference, _ = scored(base, (), query, response, mask)
        values = np.array(policy.value_head(hidden))
        rewards = -config.init_kl_coef * np.array(logprobs - reference)
        rewards[-1] += score
        advantages, carried = np.zeros(len(values)), 0.0
        for t in reversed(range(len(values))):
            following = values[t + 1] if t + 1 < len(values) else 0.0
            carried = rewards[t] + following - values[t] + 0.95 * carried
            advantages[t] = carried
        experience.append((np.array(logprobs), values, advantages))
    everything = np.concatenate([advantages for _, _, advantages in experience])
    mean, std = everything.mean(), np.sqrt(everything.var(ddof=1) + 1e-8)

    def loss(parameters):
        policy.update(parameters)
        terms = []
        for row, (old, old_values, advantages) in enumerate(experience):
            logprobs, hidden = scored(
                policy.model, prefix, queries[row], responses[row], masks[row]
            )
            ratio = mx.exp(logprobs - mx.array(old))
            gain = -mx.array((advantages - mean) / std) * ratio
            error = policy.value_head(hidden) - mx.array(advantages + old_values)
            terms.append(gain + config.vf_coef * 0.5 * error.square())
        return mx.concatenate(terms).mean()

    gradients = mx.grad(loss)(policy.trainable_parameters())
    return {name: np.array(array) for name, array in flat(gradients).items()}


# ------------------------------------------------------------------------------ ways to compute


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradient_checkpointing_changes_nothing_and_leaves_the_class_alone(kind):
    from mlx_lm.models.llama import TransformerBlock

    call = TransformerBlock.__call__
    batch = random_batch()
    trainers = [make_trainer(kind, grad_checkpoint=on, head_std=0.2) for on in (False, True)]
    moves = [movement(trainer, *batch) for trainer in trainers]
    assert TransformerBlock.__call__ is call
    assert_close(moves[1], moves[0])
    calls = []
    trainers[1]._loss_and_grad = lambda *args: calls.append(TransformerBlock.__call__) or 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainers[1].step(*batch)
    assert calls[0] is not call and TransformerBlock.__call__ is call


def test_compiled_updates_equal_plain_ones():
    """One tiny case: on Linux g++ compiles each new shape for seconds."""
    batch = random_batch(4, length=3)
    options = {"batch_size": 4, "mini_batch_size": 4, "ppo_epochs": 2, "pad_to_multiple": 16}
    moves = []
    for on in (False, True):
        model = tiny_model(num_hidden_layers=1)
        trainer = make_trainer(model=model, compile=on, **options)
        assert trainer.compiled is on
        moves.append(movement(trainer, *batch))
    assert_close(moves[1], moves[0])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["lora", "dora", "prompt"])
def test_a_quantised_base_learns(kind, bits):
    model = tiny_model()
    nn.quantize(model, 32, bits)
    base = {k: np.array(v) for k, v in flat(model.parameters()).items()}
    trainer = make_trainer(kind, model=model, optimizer=optim.Adam(1e-2), ppo_epochs=4)
    queries, responses, _ = random_batch(length=4)
    scores = [1.0, -1.0] * 4
    before = rollout_of(trainer, queries, responses, scores).logprobs.sum(axis=1)
    for _ in range(4):
        trainer.step(queries, responses, scores)
    gained = np.array(rollout_of(trainer, queries, responses, scores).logprobs.sum(axis=1) - before)
    assert gained[::2].mean() > gained[1::2].mean() + 0.5
    trainer.model.tuning.deactivate()
    assert_same_bits(flat(model.parameters()), base)


def test_policy_reference_values_and_reward_share_one_base():
    model = tiny_model()
    size = weight_bytes(model.parameters())
    reward_adapter = add_lora(model, LoraConfig(rank=2))
    reward = RewardModel(model, tuning=reward_adapter)
    reward_adapter.deactivate()
    trainer = make_trainer(model=model)
    policy = trainer.model
    seen = {"policy": flat(policy.parameters())}
    with reference_of(policy.model, policy.tuning) as reference:
        seen["reference"] = flat(reference.parameters())
        reward_adapter.activate()
        seen["reward"] = flat(reward.parameters())
        reward_adapter.deactivate()
    own = [
        *policy.tuning.arrays().values(),
        *policy.value_head.arrays().values(),
        *reward_adapter.arrays().values(),
        *reward.head.values(),
    ]
    assert weight_bytes(*seen.values()) == size + sum(a.nbytes for a in own)
    assert weight_bytes(seen["reference"]) == size


def test_a_step_moves_what_is_trained_and_nothing_else():
    for kind in KINDS:
        model = tiny_model()
        trainer = make_trainer(kind, model=model, head_std=0.2)
        everything = {k: np.array(v) for k, v in flat(trainer.model.parameters()).items()}
        trained = set(flat(trainer.model.trainable_parameters()))
        trainer.step(*random_batch())
        for name, array in flat(trainer.model.parameters()).items():
            moved = not np.array_equal(np.array(array), everything[name])
            assert moved == (name in trained), (kind, name)


# ------------------------------------------------------------------------------ sampling


def test_values_of_sampling_are_used_where_they_are_the_same():
    queries, _, scores = random_batch()
    found = []
    for kept in (True, False):
        trainer = shaken(make_trainer(head_std=0.3, rollout_logprobs=kept), 0.05)
        responses = trainer.generate(queries)
        rollout = rollout_of(trainer, queries, responses, scores)
        found.append((rollout.logprobs, rollout.values))
    for kept, computed in zip(*found, strict=True):
        np.testing.assert_allclose(kept, computed, atol=1e-4)


def test_a_batch_made_in_several_calls_is_as_good_as_one():
    trainer = make_trainer()
    queries = [[5, 6]] * 8
    parts = [trainer.generate([query], part=part) for part, query in enumerate(queries)]
    assert len({tuple(part.responses[0]) for part in parts}) > 4  # each call draws other numbers
    assert make_trainer().generate(queries[:1]).responses == parts[0].responses
    rollout = trainer.prepare(join_rollouts(parts), [1.0, -1.0] * 4)
    trainer.model.set_dtype(mx.float16)  # another pass would give other numbers
    trainer.score_policy(rollout)
    for row, part in enumerate(parts):
        np.testing.assert_array_equal(
            rollout.logprobs[row, : len(part.responses[0])], part.sampled_logprobs[0]
        )


def test_responses_have_the_lengths_that_are_asked_for():
    trainer = make_trainer(min_response_length=2, max_new_tokens=9)
    trainer.eos_ids = set()
    lengths = [[len(r) for r in trainer.generate([[5, 6]] * 40).responses]]
    trainer.steps_done += 1
    lengths += [[len(r) for r in trainer.generate([[5, 6]] * 40).responses]]
    assert set(lengths[0]) == set(range(2, 10)) and lengths[0] != lengths[1]
    made = trainer.generate([[5]] * 3, max_tokens=[1, 2, 3])
    assert [len(response) for response in made.responses] == [1, 2, 3]


def test_arrays_of_tokens_will_do():
    queries, responses, scores = random_batch()
    wanted = movement(make_trainer(), queries, responses, scores)
    arrays = [mx.array(q) for q in queries], [np.array(r) for r in responses], mx.array(scores)
    assert_same_bits(movement(make_trainer(), *arrays), wanted)


def test_evaluation_moves_no_random_state():
    trainer, other = make_trainer(), make_trainer()
    queries = random_batch()[0]
    greedy = trainer.sample_for_evaluation(queries, greedy=True).responses
    sampled = trainer.sample_for_evaluation(queries, greedy=False).responses
    assert greedy == trainer.sample_for_evaluation(queries, greedy=True).responses
    assert greedy != sampled == trainer.sample_for_evaluation(queries, greedy=False).responses
    assert sampled != trainer.sample_for_evaluation(queries, greedy=False, part=1).responses
    assert trainer.generate(queries).responses == other.generate(queries).responses
