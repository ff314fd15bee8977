"""preference_training.py refuses options that no loss reads, and rows that do not fit."""

import inspect
import json

import pytest
from reliable_runs import ROOT, words

import preference_training
from command_line import preference_flags
from command_line.preference_flags import CPO_READS, DPO_READS, KTO_OPTIONS, READS
from rl.preference_losses import DPO_LOSSES, KTO_LOSSES, kto, scores
from rl.reference_free_losses import CPO_LOSSES, odds_ratio, simpo

PAIR = {"prompt": "8 20", "chosen": " 22 30", "rejected": " 21 7"}
SINGLE = {"prompt": "8 20", "completion": " 22 30", "label": True}


def parse(line: str):
    return preference_flags.parse_arguments(["--train", *words(line), "--data", str(ROOT / "data")])


def refusal(capsys, run, *args) -> str:
    """What follows "error: " on the one line that a refused command ends with."""
    with pytest.raises(SystemExit) as end:
        run(*args)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("error: ") == 1 and "Traceback" not in err, err
    return err.rpartition("error: ")[2]


# ---- what each loss reads ----------------------------------------------------------------------


def read_by(loss) -> set[str]:
    """Keyword parameters of a loss; ``**divergence`` stands for those of `scores`."""
    found = set()
    for name, parameter in inspect.signature(loss).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            found.add(name)
        elif parameter.kind is parameter.VAR_KEYWORD:
            inner = {"divergence": scores, "options": simpo if "alpha" in found else kto}[name]
            found |= {
                n
                for n, p in inspect.signature(inner).parameters.items()
                if p.default is not p.empty
            }
    return found


def test_the_table_of_options_is_what_the_functions_take():
    assert {name: set(v) for name, v in DPO_READS.items()} == {
        name: read_by(loss) for name, loss in DPO_LOSSES.items()
    }
    assert {name: set(v) for name, v in CPO_READS.items()} == {
        name: read_by(loss) for name, loss in CPO_LOSSES.items()
    }
    assert READS["kto"].keys() == KTO_LOSSES.keys()
    assert all(read_by(loss) == set(KTO_OPTIONS) for loss in KTO_LOSSES.values())
    assert read_by(odds_ratio) == {"beta"}


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("", {"loss_type": ["sigmoid"], "beta": 0.1, "label_smoothing": 0.0}),
        ("--algorithm kto", {"loss_type": ["kto"], "beta": 0.1}),
        ("--algorithm simpo", {"loss_type": ["simpo"], "beta": 2.0, "cpo_alpha": 0.0}),
        ("--algorithm simpo --beta 2.5", {"beta": 2.5, "simpo_gamma": 0.5}),
        ("--algorithm alphapo", {"beta": 2.0, "cpo_alpha": 0.0, "alpha": 0.25}),
        ("--algorithm cpo", {"loss_type": ["sigmoid"], "beta": 0.1, "cpo_alpha": 1.0}),
        ("--algorithm cpo --loss_type simpo", {"beta": 0.1, "cpo_alpha": 1.0}),
        ("--loss_type exo_pair", {"label_smoothing": 1e-3}),
        (
            "--algorithm dpo --loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1.0",
            {"loss_weights": [0.8, 0.2, 1.0]},
        ),
        ("--loss-type hinge --label-smoothing 0 --discopop-tau 0.05 --simpo-gamma 0.5", {}),
    ],
)
def test_defaults_and_defaults_written_out(line, wanted):
    args = parse(line)
    for name, value in wanted.items():
        assert getattr(args, name) == value, name


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("--loss-type hinge --label-smoothing 0.1", "--label-smoothing 0.1 has no effect"),
        ("--discopop-tau 0.2", "--discopop-tau 0.2 has no effect"),
        ("--loss-type sft --beta 0.5", "--beta 0.5 has no effect"),
        ("--loss-type sft --ld-alpha 0.5", "--ld-alpha 0.5 has no effect"),
        ("--simpo-gamma 1", "--simpo-gamma 1 has no effect with --algorithm dpo"),
        ("--desirable-weight 2", "--desirable-weight 2 has no effect"),
        ("--algorithm orpo --cpo-alpha 2", "--cpo-alpha 2 has no effect with --algorithm orpo"),
        ("--algorithm cpo --alpha 1", "--alpha 1 has no effect"),
        ("--algorithm simpo --alpha 1", "--alpha 1 has no effect"),
        ("--algorithm kto --use-weighting", "--use-weighting has no effect"),
        ("--algorithm simpo --precompute-ref-log-probs", "has no effect with --algorithm simpo"),
        ("--algorithm cpo --loss-weights 1", "cpo has one loss"),
        ("--algorithm cpo --loss-type kto", "cpo has sigmoid, hinge, ipo, simpo, alphapo"),
        ("--algorithm kto --loss-type kto apo_zero_unpaired", "mixtures are for --algorithm dpo"),
        ("--loss-type sigmoid sft --loss-weights 1", "1 weights for 2 losses"),
        ("--loss-type sigmoid sft --loss-weights 1 -1", "would train the opposite"),
        ("--loss-type sigmoid sft --loss-weights 0 0", "all are 0, so nothing would be learned"),
        ("--loss-type sft sigmoid sft", "--loss-type sft is given twice"),
        (
            "--algorithm kto --desirable-weight 0 --undesirable-weight 0",
            "nothing would be learned; one may be 0",
        ),
        ("--loss-type sigmoid nca_pair --f-divergence-type forward_kl", "nca_pair has no such"),
        ("--f-alpha-divergence-coef 2", "needs --f-divergence-type alpha_divergence"),
        ("--loss-type aot --use-weighting", "--use-weighting weighs pairs"),
        ("--loss-type aot_unpaired --use-weighting", "pairs, and aot_unpaired compares sorted"),
        ("--loss-type sigmoid aot_unpaired --use-weighting", "and aot_unpaired compares sorted"),
        ("--loss-type exo_pair --label-smoothing 0", "exo_pair needs one above 0"),
        ("--loss-type robust --label-smoothing 0.5", "not including, 0.5"),
        ("--beta 0", "--beta: give a number above 0"),
        ("--ld-alpha 2", "from 0 to 1"),
        ("--algorithm kto --batch-size 1", "--batch-size 1: KTO compares"),
        ("--reference base", "without --resume-adapter-file"),
        ("--reference-quantize 4", "needs --fine-tune-type full"),
        ("--lora-dropout 0.1", "--lora-dropout 0.1 has no effect here"),
        ("--algorithm ppo", "invalid choice"),
        ("--no-train", "nothing to do"),
        ("--no-train --test", "--test needs --resume-adapter-file, or --train"),
    ],
)
def test_what_has_no_effect_or_makes_no_sense_is_refused(capsys, line, wanted):
    assert wanted in refusal(capsys, parse, line)


# ---- rows --------------------------------------------------------------------------------------


def main(tmp_path, rows: list[dict], line: str = "") -> int:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return preference_training.main(
        [
            "--train",
            "--iters",
            "1",
            "--batch-size",
            "2",
            "--output-dir",
            str(tmp_path / "run"),
            "--save-file",
            str(tmp_path / "out.npz"),
            "--lora-rank",
            "2",
            "--lora-layers",
            "1",
            "--train-file",
            str(file),
            *words(line),
        ]
    )


def user_error(tmp_path, rows, line="") -> str:
    from errors import UserError

    with pytest.raises(UserError) as wrong:
        main(tmp_path, rows, line)
    assert not (tmp_path / "run").exists()
    assert "\n" not in str(wrong.value)
    return str(wrong.value)


@pytest.mark.parametrize(
    "row, line, wanted",
    [
        ({**PAIR, "prompt": ""}, "", "the row has no prompt"),
        ({"chosen": "yes it is", "rejected": "no"}, "", "the row has no prompt"),
        ({**PAIR, "rejected": " 22 30"}, "", "chosen and rejected are the same"),
        ({**PAIR, "rejected": " "}, "", "rejected is empty"),
        ({**PAIR, "chosen": ""}, "", "chosen is empty"),
        (SINGLE, "", "use --algorithm kto"),
        (SINGLE, "--algorithm orpo", "use --algorithm kto"),
        ({"text": "1 2 3"}, "", "a row of kind text where chosen and rejected are needed"),
        ({"text": "1 2 3", "reward": 1}, "--algorithm kto", "which has no prompt and answer"),
        ({"prompt": "8", "completion": " 9"}, "--algorithm kto", "true or false is needed"),
        ({"prompt": "8", "completion": " 9", "reward": 1}, "--algorithm kto", "--desirable-from"),
        (PAIR, "--algorithm kto --desirable-from 1", "--desirable-from has no effect"),
        (
            {"prompt": "8 20", "responses": [" 22", " 30", " 7"]},
            "--loss-type aot",
            "give pairs, or another --loss-type",
        ),
    ],
)
def test_a_row_that_does_not_fit_ends_in_one_line_before_training(tmp_path, row, line, wanted):
    others = [PAIR] if "chosen" in row else []
    assert wanted in user_error(tmp_path, [*others, row], line)


def test_one_row_is_too_few_for_kto(tmp_path):
    assert "KTO needs two or more train rows" in user_error(tmp_path, [SINGLE], "--algorithm kto")


def test_rows_whose_prompt_fills_the_length_are_dropped_and_counted(tmp_path, capsys):
    long = {**PAIR, "prompt": " ".join(["8"] * 30)}
    assert main(tmp_path, [PAIR, long, PAIR], "--max-length 10") == 0
    out = capsys.readouterr().out
    assert "train: 2 rows (3 preference read; 1 refused, 0 cut)" in out
    assert "refused 1: the prompt fills the 10 tokens of --max-length" in out


def test_pairs_are_converted_for_kto_with_a_note(tmp_path, capsys):
    assert main(tmp_path, [PAIR, PAIR], "--algorithm kto") == 0
    out = capsys.readouterr().out
    assert "train: 4 rows (2 preference read" in out
    assert "note: of pairs, the chosen answers are wanted and the rejected ones are not" in out


def test_ranked_lists_ratings_and_dialogues_are_read(tmp_path, capsys):
    lists = {"prompt": "8 20", "responses": [" 22", " 30", " 7"]}
    common = {"chosen": "8 20 22 30", "rejected": "8 20 7"}  # the words in common are the prompt
    assert main(tmp_path, [PAIR, common]) == 0
    assert main(tmp_path, [lists, lists], "--overwrite") == 0
    rated = [{"prompt": "8", "completion": " 9", "reward": r} for r in (0.2, 0.8)]
    assert main(tmp_path, rated, "--algorithm kto --desirable-from 0.5 --overwrite") == 0
    for name in ("preference_messages", "hh_rlhf", "unpaired"):
        file = ROOT / "data" / "samples" / f"{name}.jsonl"
        line = f"--overwrite --train-file {file}" + " --algorithm kto" * (name == "unpaired")
        assert main(tmp_path, [], line) == 0, name
    capsys.readouterr()


def test_the_preview_shows_both_sides_and_their_masks(tmp_path, capsys):
    assert main(tmp_path, [PAIR], "--preview") == 0
    out = capsys.readouterr().out
    assert "rank 0: <s>8 20[[ 22 30</s>]]" in out and "rank 1: <s>8 20[[ 21 7</s>]]" in out
    assert main(tmp_path, [SINGLE, {**SINGLE, "label": False}], "--preview --algorithm kto") == 0
    assert "wanted, answer in [[ ]]" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


# ---- warnings about the data -------------------------------------------------------------------


def test_longer_chosen_answers_are_warned_of(tmp_path, capsys):
    long = {**PAIR, "chosen": " 22 30 36 40 44 50"}
    assert main(tmp_path, [long, long], "--preview") == 0
    assert "warning: chosen answers have 7.0 tokens, rejected ones 3.0" in capsys.readouterr().err
    assert main(tmp_path, [PAIR, PAIR], "--preview") == 0
    assert "warning" not in capsys.readouterr().err


def test_weights_far_from_the_balance_of_labels_are_warned_of(tmp_path, capsys):
    rows = [SINGLE, SINGLE, SINGLE, {**SINGLE, "label": False}]
    line = "--preview --algorithm kto"
    assert main(tmp_path, rows, line) == 0
    err = capsys.readouterr().err
    assert "3 wanted and 1 unwanted rows" in err
    assert "--desirable-weight 0.333 to 0.444 would balance them" in err
    assert main(tmp_path, rows, f"{line} --desirable-weight 0.4") == 0
    assert main(tmp_path, rows, f"{line} --undesirable-weight 2.5") == 0
    assert "warning" not in capsys.readouterr().err
    assert main(tmp_path, rows[:2], line) == 0
    assert "all 2 rows are wanted" in capsys.readouterr().err
