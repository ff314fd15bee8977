"""What the PPO trainer refuses, skips, stops at and warns of; and that it goes on exactly."""

import warnings

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny import flat, tiny_model
from tiny_ppo import (
    EOS,
    assert_same_bits,
    make_trainer,
    random_batch,
    rollout_of,
    shaken,
    weights,
)

from errors import UserError
from mlx_ppo_trainer import PPOConfig, PPOTrainer
from models.actor_critic import ActorCritic, ValueHead
from models.tuning import FullTuning
from rl.rollouts import Rollout
from training.optimizers import build_optimizer, optimizer_arrays, restore_optimizer


def state_of(trainer) -> dict[str, np.ndarray]:
    optimizer = {f"optimizer.{k}": np.array(v) for k, v in flat(trainer.optimizer.state).items()}
    return weights(trainer) | optimizer


def quietly(function, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


# ------------------------------------------------------------------------------ skipped updates


def test_the_ratio_guard_moves_neither_weights_nor_optimizer():
    trainer = make_trainer(optimizer=build_optimizer("adam", 1e-2), ppo_epochs=1)
    trainer.step(*random_batch())  # momentum that could move the weights on its own
    before = state_of(trainer)
    trainer.config.ratio_threshold = 0.5  # the mean ratio is 1
    with pytest.warns(UserWarning, match="mean ratio 1.00 is above --ratio-threshold 0.5"):
        stats = trainer.step(*random_batch(seed=1))
    assert_same_bits(state_of(trainer), before)
    assert stats["ppo/skipped"] == 1 and stats["ppo/not_finite"] == 0
    trainer.config.ratio_threshold = 10.0
    assert trainer.step(*random_batch(seed=2))["ppo/skipped"] == 0
    assert np.abs(state_of(trainer)["value_head.bias"] - before["value_head.bias"]).max() > 0


def test_the_guard_skips_one_minibatch_and_keeps_the_others():
    def trained(spoil: bool) -> list:
        trainer = make_trainer(ppo_epochs=1, mini_batch_size=2, gradient_accumulation_steps=4)
        trainer.minibatch_order = lambda epoch: np.arange(8)
        rollout = rollout_of(trainer, *random_batch(length=4))
        if spoil:
            rollout.logprobs = rollout.logprobs - 20 * (mx.arange(8) // 2 == 1)[:, None]
        seen, real = [], trainer.optimizer.update
        trainer.optimizer.update = lambda model, grad: seen.append(grad) or real(model, grad)
        metrics = quietly(trainer.optimise, rollout)
        return [[m["skipped"] for m in metrics], seen]

    skipped, (gradient,) = trained(True)
    assert skipped == [0, 1, 0, 0]
    _, (whole,) = trained(False)
    assert all(mx.isfinite(g).all().item() for _, g in tree_flatten(gradient))
    name = "value_head.bias"
    assert mx.abs(flat(gradient)[name] - flat(whole)[name]).max().item() > 0


@pytest.mark.parametrize("where", ["returns", "advantages", "logprobs", "values"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(where, bad):
    trainer = shaken(make_trainer(optimizer=build_optimizer("adam", 1e-2), head_std=0.2))
    trainer.step(*random_batch())
    before = state_of(trainer)
    rollout = rollout_of(trainer, *random_batch(seed=1))
    setattr(rollout, where, getattr(rollout, where).at[:, 0].add(bad))
    metrics = quietly(trainer.optimise, rollout)
    stopped = [m["skipped"] for m in metrics]
    if (where, bad) == ("logprobs", np.inf):  # the ratio is 0, which is a number
        return
    assert stopped == [1.0] * len(metrics) and {m["not_finite"] for m in metrics} == {1.0}
    assert_same_bits(state_of(trainer), before)


def test_a_bad_step_is_counted_and_leaves_nothing_behind():
    trainer = make_trainer(adap_kl_ctrl=True, target=0.1, horizon=100.0, use_score_scaling=True)
    quietly(trainer.step, *random_batch())
    before = trainer.state_dict()
    trainer.model.value_head.bias = mx.array([mx.nan])
    stats = quietly(trainer.step, *random_batch(seed=1))
    assert stats["ppo/not_finite"] == 1 and stats["ppo/skipped"] == 1
    assert trainer.skip() == {"ppo/not_finite": 1.0}
    after = trainer.state_dict()
    assert after.pop("steps_done") == before.pop("steps_done") + 2
    assert {**after, "warned": 0} == {**before, "warned": 0}


# ------------------------------------------------------------------------------ limits


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_norm_is_clipped_at_every_update(accumulation):
    """TRL clips the first one of a run alone."""
    trainer = make_trainer(
        max_grad_norm=1e-3,
        mini_batch_size=2,
        gradient_accumulation_steps=accumulation,
        head_std=0.2,
    )
    norms, real = [], trainer.optimizer.update

    def recording(model, gradient):
        norms.append(np.sqrt(sum((np.array(g) ** 2).sum() for _, g in tree_flatten(gradient))))
        real(model, gradient)

    trainer.optimizer.update = recording
    for seed in range(2):
        stats = trainer.step(*random_batch(seed=seed))
        assert stats["ppo/grad_norm"] > 1e-2  # the norm before clipping
    assert len(norms) == 2 * 2 * 4 // accumulation
    np.testing.assert_allclose(norms, 1e-3, rtol=1e-3)


def test_early_stopping_ends_the_epochs():
    def updates(**options) -> int:
        trainer = make_trainer(
            ppo_epochs=5, optimizer=optim.Adam(1e-2, bias_correction=True), **options
        )
        return len(quietly(trainer.optimise, rollout_of(trainer, *random_batch())))

    assert updates() == 10
    assert updates(early_stopping=True, target_kl=1e6) == 10
    found = updates(early_stopping=True, target_kl=1e-3)
    assert found in (2, 4, 6, 8)  # whole epochs


def test_early_stopping_is_at_one_and_a_half_times_the_target():
    trainer = make_trainer(ppo_epochs=4, early_stopping=True, target_kl=0.1)
    found = iter([0.2, 0.14, 0.2, 0.151])  # of each minibatch; the last of an epoch counts
    trainer._update = lambda rollout, rows: [{"policy/policykl": next(found)}]
    assert len(trainer.optimise(Rollout([[1]], [[2]], [True]))) == 4
    assert next(found, None) is None


# ------------------------------------------------------------------------------ refused


def spoiled(what: str, row: int, value):
    """A batch in which one row is bad."""
    batch = dict(zip(("queries", "responses", "scores"), random_batch(), strict=True))
    batch["response_masks"] = [[1] * len(r) for r in batch["responses"]]
    batch[what][row] = value
    return batch


@pytest.mark.parametrize(
    "what, value, said",
    [
        ("queries", [], "row 3: the query is empty"),
        ("responses", [], "row 3: the response is empty"),
        ("queries", [5, 64], "row 3: the query has the token id 64; the model's go from 0 to 63"),
        ("queries", [-1], "row 3: the query has the token id -1"),
        ("responses", [5, 2**30], "row 3: the response has the token id 1073741824"),
        ("scores", None, "row 3: the score is None, and no number"),
        ("scores", [1.0, 2.0], "row 3: the score is .*, and no number"),
        ("scores", float("nan"), "row 3: the score is nan"),
        ("scores", float("inf"), "row 3: the score is inf"),
        ("response_masks", [0] * 20, "row 3: the response mask has 20 places"),
        ("response_masks", None, "row 3: the response mask leaves no token"),
    ],
)
def test_a_row_that_cannot_be_learned_from_is_named(what, value, said):
    trainer = make_trainer(use_score_scaling=True)
    if (what, value) == ("response_masks", None):
        value = [0] * len(random_batch()[1][3])
    before, running = state_of(trainer), trainer.running.state_dict()
    with pytest.raises(UserError, match=said):
        trainer.step(**spoiled(what, 3, value))
    assert_same_bits(state_of(trainer), before)
    assert trainer.running.state_dict() == running and trainer.steps_done == 0


def test_virtual_tokens_are_legal_in_front_of_a_query_alone():
    """A soft prompt's ids begin at V, and the trainer puts them there itself."""
    trainer = make_trainer("prompt")
    assert trainer.vocabulary == 64 and trainer.model.tuning.prefix == (64, 65, 66)
    queries, _, scores = random_batch()
    quietly(trainer.update, trainer.generate(queries), scores)
    said = "row 2: the query has the token id 65"
    for wrong in (trainer.generate, lambda q: trainer.sample_for_evaluation(q, True)):
        with pytest.raises(UserError, match=said):
            wrong([*queries[:2], [65, 5], *queries[3:]])
    with pytest.raises(UserError, match="row 2: the response has the token id 65"):
        trainer.step(queries, [[5], [6], [7, 65], *[[8]] * 5], scores)


@pytest.mark.parametrize("what", ["queries", "responses", "scores"])
def test_a_batch_of_another_size_is_refused(what):
    batch = dict(zip(("queries", "responses", "scores"), random_batch(), strict=True))
    batch[what] = batch[what][:-1]
    with pytest.raises(UserError, match=f"{what}: 7 given, the batch size is 8"):
        make_trainer().step(**batch)
    batch = random_batch()
    with pytest.raises(UserError, match="response_masks: 1 given, the batch size is 8"):
        make_trainer().step(*batch, response_masks=[[1]])


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"--batch-size 8 is not a multiple of --mini-batch-size 3"):
        make_trainer(mini_batch_size=3)
    with pytest.raises(UserError, match=r"4 x --gradient-accumulation-steps 4"):
        make_trainer(gradient_accumulation_steps=4)


@pytest.mark.parametrize(
    "name, value",
    [
        (name, value)
        for name in (
            "cliprange",
            "cliprange_value",
            "ratio_threshold",
            "target",
            "kl_target",
            "horizon",
            "max_grad_norm",
        )
        for value in (0, -1.0, np.nan)
    ]
    + [
        (name, value)
        for name in ("init_kl_coef", "value_head_init_std", "vf_coef")
        for value in (-1e-3, np.nan, np.inf)
    ]
    + [("top_k", -1), ("pad_to_multiple", -3), ("kl_penalty", "nope"), ("kl_penalty", None)],
)
def test_a_value_that_makes_no_sense_is_refused_when_the_config_is_made(name, value):
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')}: "):
        PPOConfig(**{name: value})


def test_values_of_trl_are_legal():
    """Its defaults, its modes of the KL, and what switches a part off."""
    PPOConfig(
        batch_size=128,
        mini_batch_size=128,
        learning_rate=1.41e-5,
        adap_kl_ctrl=True,
        init_kl_coef=0.2,
        max_grad_norm=None,
        target=6,
        horizon=10000,
    )
    for mode in ("kl", "abs", "mse", "full"):
        PPOConfig(kl_penalty=mode)
    PPOConfig(init_kl_coef=0, vf_coef=0, top_k=0.0, value_head_init_std=0, pad_to_multiple=None)
    PPOConfig(cliprange=np.inf, cliprange_value=np.inf, ratio_threshold=np.inf, horizon=np.inf)


def test_full_fine_tuning_without_a_reference_is_refused():
    model = tiny_model()
    policy = ActorCritic(model, ValueHead(32), FullTuning(model))
    with pytest.raises(UserError, match="full fine-tuning needs a reference model"):
        PPOTrainer(PPOConfig(), policy, eos_ids=EOS)
    with pytest.raises(UserError, match="needs a tokenizer, or eos_ids"):
        PPOTrainer(PPOConfig(), policy, tiny_model())


# ------------------------------------------------------------------------------ warnings


def warned(trainer, batch) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.step(*batch)
    return [str(warning.message) for warning in found]


def ending(batch):
    """The batch with an EOS at the end of each response."""
    queries, responses, scores = batch
    return queries, [[*response[:-1], min(EOS)] for response in responses], scores


def assert_said_once(trainer, batch, said: str) -> None:
    assert sum(said in message for message in warned(trainer, batch)) == 1
    assert not any(said in message for message in warned(trainer, batch))


def test_a_healthy_step_warns_of_nothing():
    queries, responses, scores = ending(random_batch())
    assert warned(make_trainer(ppo_epochs=1), (queries, responses, scores)) == []


@pytest.mark.parametrize("score", [0.0, 0.7, -1e3])
def test_equal_scores_are_warned_of(score):
    queries, responses, _ = ending(random_batch())
    batch = queries, responses, [score] * 8
    assert_said_once(make_trainer(ppo_epochs=1), batch, "all scores of a batch are equal")


def test_responses_cut_off_are_warned_of():
    assert_said_once(make_trainer(ppo_epochs=1), random_batch(), "most responses reach the limit")


def test_a_negative_kl_is_warned_of():
    """Responses that the trained policy finds less likely than the reference does."""
    trainer = shaken(make_trainer(ppo_epochs=1))
    reference = tiny_model()
    queries = random_batch()[0]
    responses = [
        [reference(mx.array([query]))[0, -1].argmax().item()] * 3 + [1] for query in queries
    ]
    assert_said_once(trainer, (queries, responses, random_batch()[2]), "KL to the reference is -")


def test_no_entropy_is_warned_of():
    model = tiny_model()
    model.lm_head.weight = 1000 * model.lm_head.weight
    assert_said_once(make_trainer(model=model, ppo_epochs=1), random_batch(), "entropy is almost 0")


# ------------------------------------------------------------------------------ scores


def test_penalties_scaling_and_clipping_come_in_this_order():
    trainer = make_trainer(
        missing_eos_penalty=3.0, use_score_scaling=True, use_score_norm=True, score_clip=0.8
    )
    responses = [[5, 1], [5, 6], [5, 1], [5, 6]]
    ended = trainer.as_rollout([[2]] * 4, responses).ended
    assert ended == [True, False, True, False]
    shaped = trainer.shape_scores([1.0, 2.0, 3.0, 4.0], responses, ended)
    penalised = np.array([1.0, -1.0, 3.0, 1.0])
    scaled = (penalised - penalised.mean()) / penalised.std(ddof=1)
    np.testing.assert_allclose(shaped, np.clip(scaled, -0.8, 0.8), rtol=1e-6)


def test_long_responses_are_penalised_inside_the_buffer():
    trainer = make_trainer(max_new_tokens=10, overlong_buffer=4, overlong_penalty=2.0)
    responses = [[5] * n for n in (6, 8, 10)]
    shaped = trainer.shape_scores([0.0] * 3, responses, [True] * 3)
    np.testing.assert_allclose(shaped, [0.0, -1.0, -2.0])


def test_a_response_that_a_stop_function_ended_has_ended():
    trainer = make_trainer(missing_eos_penalty=1.0)
    trainer.eos_ids = set()
    queries = [[5, 6]] * 8
    rollout = trainer.generate(queries, should_stop=lambda tokens: len(tokens) == 3)
    assert rollout.ended == [True] * 8
    shaped = trainer.prepare(rollout, [2.0] * 8).scores
    assert shaped.tolist() == [2.0] * 8
    assert not trainer.as_rollout([[5, 6]], [[7, 8, 9]]).ended[0]


def test_the_adaptive_coefficient_follows_the_kl():
    trainer = shaken(make_trainer(adap_kl_ctrl=True, init_kl_coef=0.2, target=1e-3, horizon=100.0))
    stats = quietly(trainer.step, *random_batch())
    error = np.clip(stats["objective/kl"] / 1e-3 - 1, -0.2, 0.2)
    assert abs(error) == 0.2 and stats["objective/kl_coef"] == 0.2  # the one that was used
    assert trainer.kl_controller.value == pytest.approx(0.2 * (1 + error * 8 / 100))


# ------------------------------------------------------------------------------ going on


def run_steps(trainer, steps: range) -> dict:
    found = {}
    for step in steps:
        queries, _, scores = random_batch(seed=step)
        stats = quietly(trainer.update, trainer.generate(queries), scores)
        found = {k: v for k, v in stats.items() if not k.startswith("time/")}
    return found


@pytest.mark.parametrize("kind", ["lora", "prompt", "full"])
def test_a_resumed_trainer_goes_on_to_the_same_bits(kind):
    options = dict(
        adap_kl_ctrl=True,
        target=0.1,
        horizon=100.0,
        use_score_scaling=True,
        min_response_length=2,
        mini_batch_size=2,
    )

    def fresh():
        return make_trainer(kind, optimizer=build_optimizer("adamw", 3e-3), **options)

    whole = fresh()
    run_steps(whole, range(2))
    saved = weights(whole), optimizer_arrays(whole.optimizer), whole.state_dict()
    wanted = run_steps(whole, range(2, 4))
    other = fresh()
    other.model.load_weights([(k, mx.array(v)) for k, v in saved[0].items()], strict=False)
    restore_optimizer(other.optimizer, saved[1], other.model.trainable_parameters())
    other.load_state_dict(saved[2])
    found = run_steps(other, range(2, 4))
    assert_same_bits(state_of(other), state_of(whole))
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert other.state_dict() == whole.state_dict()


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    ends = []
    for seed in (0, 0, 1):
        trainer = make_trainer(seed=seed, optimizer=optim.Adam(1e-3))
        run_steps(trainer, range(2))
        ends.append(weights(trainer))
    assert_same_bits(ends[1], ends[0])
    name = "model.model.layers.1.self_attn.v_proj.lora_b"
    assert np.abs(ends[2][name] - ends[0][name]).max() > 0


def test_logged_statistics_are_scalars_under_their_names():
    rows = []
    trainer = make_trainer()
    trainer.log = lambda step, row: rows.append((step, row))
    batch = random_batch()
    stats = quietly(trainer.step, *batch)
    trainer.log_stats(stats, {"ground_truth": [1.0, 2.0], "texts": ["a", "b"]}, batch[2])
    ((step, row),) = rows
    assert step == 1 and all(np.ndim(value) == 0 for value in row.values())
    assert row["env/reward_mean"] == pytest.approx(np.mean(batch[2]))
    assert row["env/reward_std"] == pytest.approx(np.std(batch[2], ddof=1))
    assert row["env/ground_truth_mean"] == 1.5 and "env/texts_mean" not in row
    assert "objective/kl_dist" not in row and np.shape(stats["objective/kl_dist"]) == (8,)


def test_nothing_is_trained_that_has_dropout_on():
    """PPO_SPEC row 19: the adapter's dropout is 0.5 in these tests."""
    model = tiny_model()
    model.train()
    trainer = make_trainer(model=model)
    assert not any(module.training for module in trainer.model.modules())
    assert any(isinstance(m, nn.Dropout) and m._p_1 == 0.5 for m in trainer.model.modules())
