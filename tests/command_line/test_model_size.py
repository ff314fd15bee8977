"""Defaults by the model's size: the digits recipe for tiny models, another for real ones."""

import pytest
from tiny import tiny_model_folder

from command_line import group_flags, ppo_flags
from command_line.model_size import EPOCH, REFERENCE, settle_evaluation
from models.load import load_model

TINY, REAL = 130_000, 134_515_008
REWARD = "--ground-truth-reward "


def settled(line="", weights=REAL, flags=ppo_flags):
    args = flags.parse_arguments((REWARD + line).split())
    flags.settle_for_model(args, weights)
    return args


def test_a_tiny_model_keeps_the_digits_recipe_and_says_so(capsys):
    args = settled(weights=TINY)
    assert (args.batch_size, args.max_new_tokens, args.eval_samples) == (64, 32, 4)
    assert args.learning_rate == 3e-3
    said = capsys.readouterr().out
    assert "0.13 million weights" in said and "digits recipe" in said
    assert "--learning-rate 0.003 --batch-size 64 --max-new-tokens 32" in said


@pytest.mark.parametrize("reward", ["--ground-truth-reward", "--reward-function f"])
def test_a_real_model_gets_its_own_whatever_the_reward(reward, capsys):
    args = ppo_flags.parse_arguments(reward.split())
    ppo_flags.settle_for_model(args, REAL)
    assert (args.batch_size, args.max_new_tokens, args.eval_samples) == (16, 64, 1)
    assert args.learning_rate == 1e-4
    said = capsys.readouterr().out
    assert "134.5 million weights" in said and "digits" not in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "line, rate", [("--fine-tune-type full", 1e-6), ("--prompt-tuning", 1e-2), ("", 1e-4)]
)
def test_the_rate_is_that_of_the_kind(line, rate):
    assert settled(line).learning_rate == rate
    assert settled(line + " --learning-rate 0.5").learning_rate == 0.5


def test_what_was_asked_for_stays(capsys):
    args = settled("--batch-size 8 --max-new-tokens 5 --eval-samples 2 --learning-rate 1e-5")
    assert (args.batch_size, args.max_new_tokens, args.eval_samples) == (8, 5, 2)
    assert capsys.readouterr().out == ""
    # A default of the digits recipe that is written out was asked for, too.
    assert settled("--batch-size 64").batch_size == 64


@pytest.mark.parametrize(
    "line, batch",
    [
        ("--mini-batch-size 4", 16),
        ("--mini-batch-size 8 --gradient-accumulation-steps 2", 16),
        ("--mini-batch-size 32", 32),
    ],
)
def test_the_batch_is_a_multiple_of_what_was_asked_for(line, batch):
    assert settled(line).batch_size == batch


def test_groups_divide_the_batch():
    assert settled(flags=group_flags).batch_size == 16
    assert settled("--num-generations 4 --batch-size 12", flags=group_flags).batch_size == 12
    assert settled("--num-generations 32", flags=group_flags).batch_size == 32
    assert settled(weights=TINY, flags=group_flags).batch_size == 64
    assert settled(flags=group_flags).learning_rate == 1e-5


def test_a_resumed_run_keeps_its_options(tmp_path):
    args = ppo_flags.parse_arguments(REWARD.split())
    args.resume, args.learning_rate = "run", 7e-4
    ppo_flags.settle_for_model(args, REAL)
    assert (args.batch_size, args.learning_rate) == (64, 7e-4)


@pytest.mark.parametrize("line", ["", "--num-steps 10", "--num-steps 500", "--eval-every 5"])
def test_evaluations_take_a_tenth_of_the_work_at_most(line):
    args = settled(line)
    settle_evaluation(args, REAL)
    count = 1 + -(-args.num_steps // args.eval_every)
    responses = count * args.eval_prompts * (1 + args.eval_samples)
    work = args.num_steps * args.batch_size * (1 + REFERENCE + EPOCH * args.ppo_epochs)
    assert args.eval_prompts == 8 or responses <= 0.1 * work
    assert args.eval_prompts >= 8


def test_evaluations_of_tiny_models_and_those_asked_for_stay():
    args = settled("--eval-prompts 100")
    settle_evaluation(args, REAL)
    assert args.eval_prompts == 100
    args = settled(weights=TINY)
    settle_evaluation(args, TINY)
    assert args.eval_prompts == 128


def test_weights_are_counted_as_they_are_before_packing(tmp_path):
    folder = tiny_model_folder(tmp_path, hidden_size=64)
    plain = load_model(folder).weights
    assert plain > 10_000
    assert load_model(folder, quantize=4).weights == pytest.approx(plain, rel=0.01)
    assert load_model(folder, quantize=8).weights == load_model(folder, quantize=4).weights
