"""What a person gets wrong with group_training.py ends in one line, before anything is loaded."""

import json
import warnings

import pytest

import group_training
from command_line.exits import run_main
from command_line.group_flags import config_of, settle_for_model

REWARD = ["--ground_truth_reward"]


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        group_training.parse_arguments([*REWARD, *words])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "line, message",
    [
        ("--batch-size 30", "--batch-size 30 is not a multiple of --num-generations 8"),
        ("--num-generations 1", "at least 2 are needed"),
        ("--gradient-accumulation-steps 0", "--gradient-accumulation-steps: must be at least 1"),
        ("--gradient-accumulation-steps -1", "--gradient-accumulation-steps: must be at least 1"),
        ("--mini-batch-size 0", "--mini-batch-size: must be at least 1"),
        ("--loss-type cispo --epsilon 0.1", "--epsilon 0.1 has no effect with this --loss-type"),
        ("--loss-type sapo --epsilon-high 0.3", "--epsilon-high 0.3 has no effect"),
        ("--loss-type vespo --delta 2", "--delta 2 has no effect"),
        ("--loss-type vespo --importance-sampling-level sequence", "whose weight is always one"),
        ("--sapo-temperature-pos 2", "has no effect without --loss-type sapo"),
        ("--vespo-k-neg 2", "has no effect without --loss-type vespo"),
        ("--advantage-estimator rloo --loss-type grpo", "rloo, which has a loss of its own"),
        ("--advantage-estimator rloo --entropy-coef 0.1", "rloo, which has a loss of its own"),
        ("--advantage-estimator rloo --scale-rewards none", "without --advantage-estimator grpo"),
        ("--advantage-estimator reinforce --scale-rewards none", "estimator grpo"),
        ("--normalize-advantages", "without --advantage-estimator rloo"),
        ("--reward-clip-range -1 1", "without --advantage-estimator rloo"),
        ("--kl-in-reward", "--kl-in-reward has no effect without --beta"),
        ("--no-use-bias-correction-kl", "has no effect without --beta"),
        ("--beta 0.1 --kl-in-reward --no-use-bias-correction-kl", "where the loss has no KL"),
        ("--max-resample 5", "without --dynamic-sampling"),
        ("--dynamic-sampling --max-resample 0", "--max-resample: must be at least 1"),
        ("--epsilon-high -1", "--epsilon-high: -1.0 given, must be above 0"),
        ("--loss-type cispo --epsilon-high 0", "--epsilon-high: 0.0 given, must be above 0"),
        ("--entropy-target 1", "without --use-adaptive-entropy"),
        ("--ref-model-sync-steps 5 --beta 0.1", "without --sync-ref-model"),
        ("--sync-ref-model", "--sync-ref-model has no effect at --beta 0"),
        ("--online-dpo --loss-type grpo", "with --online-dpo"),
        ("--online-dpo --advantage-estimator rloo", "with --online-dpo"),
        ("--dpo-loss ipo", "without --online-dpo"),
        ("--online-dpo --num-generations 4", "--num-generations 2"),
        ("--use_peft False --reference-quantize 4", "at --beta 0, where no reference is run"),
        ("--lora-dropout 0.1", "on rollouts, which are without dropout"),
        ("--multi-objective-aggregation normalize_then_sum --scale-rewards none", "scales by"),
        ("--answer-tag x", "without --answer-reward"),
        ("--num-iterations 0", "--ppo-epochs: must be at least 1"),
    ],
)
def test_refused_in_one_line(capsys, line, message):
    assert message in refused(capsys, *line.split())


def test_options_that_do_something_are_taken():
    for line in (
        "--loss-type cispo --epsilon-high 3",
        "--advantage-estimator rloo --epsilon 0.4 --reward-clip-range -1 1 --beta 0.1",
        "--online-dpo --dpo-loss ipo --batch-size 32",
        "--beta 0.1 --sync-ref-model --ref-model-sync-steps 8",
        "--loss-type dapo --epsilon 0.2 --scale-rewards group",  # defaults, written out
    ):
        group_training.parse_arguments([*REWARD, *line.split()])


def test_num_iterations_is_ppo_epochs(tmp_path):
    for words in (["--num-iterations", "3"], ["--num_iterations", "3"], ["--ppo-epochs", "3"]):
        assert config_of(group_training.parse_arguments([*REWARD, *words])).ppo_epochs == 3
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"num_iterations": 3}))
    args = group_training.parse_arguments([*REWARD, "--config", str(file)])
    assert config_of(args).ppo_epochs == 3


def test_defaults_are_trl_s():
    config = config_of(group_training.parse_arguments(REWARD))
    assert (config.num_generations, config.beta, config.loss_type) == (8, 0, "dapo")
    rloo = config_of(group_training.parse_arguments([*REWARD, "--advantage-estimator", "rloo"]))
    assert rloo.beta == 0.05
    online = config_of(group_training.parse_arguments([*REWARD, "--online-dpo"]))
    assert (online.num_generations, online.beta) == (2, 0.1)
    full = group_training.parse_arguments([*REWARD, "--fine-tune-type", "full"])
    settle_for_model(full, 10**8)
    assert full.learning_rate == 1e-6


def test_a_column_that_is_not_there_is_said_before_training(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "2 4", "level": 1}\n' * 4)
    own = tmp_path / "own.py"
    own.write_text("def score(prompts, responses, answer):\n    raise AssertionError\n")
    for words in (["--answer_reward", "answer"], ["--reward_function", f"{own}:score"]):
        line = [*words, "--train-file", str(rows), "--eval-every", "0"]
        with pytest.raises(Exception, match="asks for the column .answer..*are: group_ids, level"):
            group_training.main([*line, "--output-dir", str(tmp_path / "run")])
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "answers, said",
    [
        ([None] * 4, "error: --answer-reward answer: no row has an answer there"),
        ([["5", "6"]] * 4, "rows.jsonl:1: answer is ['5', '6']"),
        (["", {}, " ", None], "error: --answer-reward answer: no row has an answer there"),
        (["6", None, 8, ["1"]], "warning: 2 of 4 rows have no answer in answer"),
        (["6", True, 8, 0.5], ""),
    ],
)
def test_rows_without_an_answer_are_said_before_training(tmp_path, capsys, answers, said):
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": "2 4", "answer": answer, "a": 1}) for answer in answers]
    rows.write_text("\n".join(lines))
    line = ["--answer-reward", "answer", "--train-file", str(rows), "--eval-every", "0"]
    with warnings.catch_warnings(record=True) as heard, pytest.raises(SystemExit) as end:
        warnings.simplefilter("always")
        run_main(lambda: group_training.main([*line, "--preview"]))
    err = "".join([capsys.readouterr().err, *(f"warning: {w.message}" for w in heard)])
    assert end.value.code == 2 * ("no row" in err)
    assert said in err if said else "answer" not in err
