"""Runs of preference_training.py: what they write, exact resume, references, warnings."""

import json
import math

import numpy as np
import pytest
from reliable_runs import ROOT, words

import preference_training
from errors import UserError
from models.adapter_files import read_adapter
from training.preference_warnings import STUCK, WINDOW, PreferenceWatch

LORA = "--lora-rank 2 --lora-layers 2 "
COMMON = (
    "--train --iters 6 --batch-size 8 --save-every 2 "
    "--learning-rate 1e-3 --steps-per-eval 3 --val-batches 2 --steps-per-report 2 "
)


OTHER_KINDS = ("--prompt-tuning", "--fine-tune-type", "--resume ")  # a resumed run has its own


def train(folder, line: str = "", save: str = "out.npz") -> dict:
    """The arrays of a finished run in `folder`/run."""
    lora = "" if any(kind in line for kind in OTHER_KINDS) else LORA
    done = preference_training.main(
        [
            *words(COMMON + lora),
            "--data",
            str(ROOT / "data"),
            "--output-dir",
            str(folder / "run"),
            "--save-file",
            str(folder / save),
            *words(line),
        ]
    )
    assert done == 0
    return {k: np.array(v) for k, v in read_adapter(folder / save)[0].items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in open(folder / "run" / "metrics.jsonl")]


@pytest.mark.parametrize(
    "line",
    [
        "--loss-type sigmoid sft --loss-weights 1 0.5 --gradient-accumulation-steps 2",
        pytest.param("--algorithm kto --save-best", marks=pytest.mark.long),
        pytest.param("--algorithm orpo --prompt-tuning", marks=pytest.mark.long),
    ],
)
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path, line):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arrays = train(whole, line)
    train(parts, f"{line} --iters 3")
    again = train(parts, f"--resume {parts / 'run'} --iters 6")
    assert same(arrays, again)
    one, other = rows_of(whole), rows_of(parts)
    steps = [row for row in one if "train/loss" in row]
    assert [r["train/loss"] for r in steps] == [r["train/loss"] for r in other if "train/loss" in r]
    assert steps[-1]["train/num_tokens"] > steps[0]["train/num_tokens"]
    assert (whole / "run" / "plots" / "preferences.png").exists()


@pytest.mark.long
def test_the_same_seed_gives_the_same_run_and_another_loss_another(tmp_path):
    first = train(tmp_path / "a")
    assert same(first, train(tmp_path / "b"))
    assert not same(first, train(tmp_path / "c", "--loss-type ipo"))
    assert not same(first, train(tmp_path / "d", "--beta 0.5"))


def test_reference_log_probabilities_are_computed_once_and_found_again(tmp_path, capsys):
    plain = train(tmp_path / "a")
    cached = train(tmp_path / "b", "--precompute-ref-log-probs")
    for name in plain:
        np.testing.assert_allclose(cached[name], plain[name], atol=2e-4)  # Adam near 0
    files = sorted((tmp_path / "b" / "run" / "reference").iterdir())
    assert len(files) == 2
    assert "kept in" in capsys.readouterr().out
    before = [file.stat().st_mtime_ns for file in files]
    train(tmp_path / "b", f"--resume {tmp_path / 'b' / 'run'} --iters 7")
    assert "read from" in capsys.readouterr().out
    assert [file.stat().st_mtime_ns for file in files] == before
    assert same(cached, train(tmp_path / "c", "--precompute-ref-log-probs"))


@pytest.mark.parametrize(
    "damage",
    ["bit", *(pytest.param(other, marks=pytest.mark.long) for other in ("end", "header"))],
)
def test_damaged_reference_log_probabilities_are_computed_anew(tmp_path, capsys, damage):
    """They were read as other numbers in silence, or ended in a traceback."""
    train(tmp_path, "--precompute-ref-log-probs")
    for file in (files := sorted((tmp_path / "run" / "reference").iterdir())):
        content = bytearray(file.read_bytes())
        at = {"bit": -3, "header": 20}.get(damage, 0)
        content[at] ^= damage != "end"
        file.write_bytes(content[: -40 if damage == "end" else None])
    capsys.readouterr()
    train(tmp_path, f"--resume {tmp_path / 'run'} --iters 7")
    out, err = capsys.readouterr()
    assert err.count("is torn or was altered; it is computed anew") == 2 and "kept in" in out
    assert sorted((tmp_path / "run" / "reference").iterdir()) == files


@pytest.mark.long
def test_a_loaded_adapter_stays_as_the_reference(tmp_path):
    train(tmp_path / "first")
    start = f"--resume-adapter-file {tmp_path / 'first' / 'out.npz'}"
    line = start
    for more, margin in (("", 0.0), (" --reference base", None)):
        folder = tmp_path / ("loaded" + more.replace(" ", ""))
        train(folder, line + more)
        zero = next(row for row in rows_of(folder) if "valid/loss" in row)
        if margin is None:  # the adapter has a margin over the base already
            assert abs(zero["valid/rewards/margins"]) > 1e-4
        else:
            assert zero["valid/rewards/margins"] == pytest.approx(0, abs=1e-6)
            assert zero["valid/loss"] == pytest.approx(math.log(2), abs=1e-6)
    # It is part of the checkpoints: the file may be gone, or another one, when a run goes on.
    whole = train(tmp_path / "whole", line)
    parts = tmp_path / "parts"
    train(parts, line + " --iters 3")
    assert same(whole, train(parts, f"--resume {parts / 'run'} --iters 6"))
    last = sorted((parts / "run" / "checkpoints").glob("step-*"))[-1]
    assert (last / "reference.safetensors").exists()


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_a_quantised_base_with_a_loaded_adapter_begins_at_no_margin(tmp_path, capsys, algorithm):
    line = f"--algorithm {algorithm} --quantize 4 --iters 2 --save-every 0 --steps-per-eval 2"
    first = train(tmp_path / "first", line)
    loaded = train(
        tmp_path / "second", f"{line} --resume-adapter-file {tmp_path / 'first' / 'out.npz'}"
    )
    assert not same(first, loaded)
    said = capsys.readouterr().out
    for script in ("fuse.py", "talk_to_model.py"):  # on the weights that it was trained on
        assert said.count(f"python {script} --quantize 4 ") == 2
    zero = next(row for row in rows_of(tmp_path / "second") if "valid/loss" in row)
    assert zero["valid/rewards/margins"] == pytest.approx(0, abs=1e-6)


@pytest.mark.long
def test_full_fine_tuning_has_a_frozen_copy(tmp_path):
    train(tmp_path, "--fine-tune-type full --reference-quantize 8")
    zero = next(row for row in rows_of(tmp_path) if "valid/loss" in row)
    assert 0 < abs(zero["valid/rewards/margins"]) < 0.1  # a quantised copy differs a little


FEW = "--fine-tune-type full --iters 2 --steps-per-eval 0 --save-every 1 --learning-rate 1e-4 "


@pytest.mark.parametrize(
    "line",
    [
        "--precompute-ref-log-probs",
        pytest.param("", marks=pytest.mark.long),
        pytest.param("--algorithm kto", marks=pytest.mark.long),
    ],
)
def test_a_reference_file_that_changed_under_a_run_is_said(tmp_path, line):
    """Weights that were loaded whole are the reference, and no checkpoint holds those."""
    train(tmp_path / "first", FEW)
    file = tmp_path / "first" / "out.npz"
    again = f"{FEW} --resume-adapter-file {file} {line} "
    before = file.read_bytes()
    train(tmp_path / "whole", again + "--iters 4")
    (tmp_path / "parts").mkdir()
    train(tmp_path / "parts", again, save="../first/out.npz")  # over its own reference
    resumed = f"{FEW} --iters 4 --resume {tmp_path / 'parts' / 'run'}"
    with pytest.raises(UserError, match="the reference, is not what the run was started with"):
        train(tmp_path / "parts", resumed, save="../first/out.npz")
    train(tmp_path / "parts", f"{resumed} --force-resume", save="../first/out.npz")
    file.write_bytes(before)
    (tmp_path / "back").mkdir()
    train(tmp_path / "back", again, save="kept.npz")
    resumed = resumed.replace("parts", "back")
    back = train(tmp_path / "back", resumed, save="kept.npz")
    whole, _ = read_adapter(tmp_path / "whole" / "out.npz")
    assert same(back, {name: np.array(array) for name, array in whole.items()})


def test_the_cache_is_named_by_what_the_reference_file_holds(tmp_path):
    line = FEW + "--precompute-ref-log-probs "
    file, names = tmp_path / "weights.npz", []
    for rate in (1e-4, 1e-2):
        train(tmp_path / f"{rate}", f"{FEW} --learning-rate {rate}")
        file.write_bytes((tmp_path / f"{rate}" / "out.npz").read_bytes())
        train(tmp_path / f"{rate} again", f"{line} --resume-adapter-file {file}")
        folder = tmp_path / f"{rate} again" / "run" / "reference"
        names.append({path.name.partition("-")[0] for path in folder.iterdir()})
    assert not names[0] & names[1]


def test_a_test_alone_compares_with_the_base(tmp_path, capsys):
    """The adapter against itself would have no margin, whatever it has learned."""
    train(tmp_path, "--iters 3 --learning-rate 1e-2 --steps-per-eval 0")
    file = tmp_path / "out.npz"
    capsys.readouterr()
    line = f"--test --data {ROOT / 'data'} --resume-adapter-file {file} "
    for more in ("", "--reference base", "--algorithm kto"):
        assert preference_training.main(words(line + more)) == 0
        said = capsys.readouterr().out.partition("test: rewards/chosen")[2]
        assert abs(float(said.partition("rewards/margins ")[2].split()[0])) > 0.01
    with pytest.raises(SystemExit):
        preference_training.main(words(line + "--reference loaded"))
    assert "--reference loaded needs --train" in capsys.readouterr().err


@pytest.mark.long
def test_test_rows_and_samples(tmp_path, capsys):
    train(tmp_path, "--test --sample-prompts 8")
    assert "test: " in capsys.readouterr().out
    samples = [json.loads(line) for line in open(tmp_path / "run" / "samples.jsonl")]
    assert [row["step"] for row in samples] == [0, 3, 6]


# ---- warnings while training -------------------------------------------------------------------


def watched(rows: list[dict], **options) -> list[str]:
    watch = PreferenceWatch(**{"log_2": True, "reference": True, **options})
    return [text for row in rows for text in watch(row)]


def updates(count: int, chosen: float, margin: float, loss: float = 0.5, seed: int = 0) -> list:
    noise = np.random.default_rng(seed).normal(0, 0.1, (count, 2))
    return [
        {
            "loss": loss,
            "rewards/chosen": chosen * i + a,
            "logps/chosen": chosen * i + a,
            "rewards/margins": margin * i + b,
        }
        for i, (a, b) in enumerate(noise)
    ]


@pytest.mark.parametrize("reference", [True, False])
def test_likelihood_displacement_is_warned_of_once(reference):
    (text,) = watched(updates(200, -0.02, 0.02), reference=reference)
    assert "log-probability of chosen answers falls while margins grow" in text
    assert watched(updates(200, 0.02, 0.02), reference=reference) == []  # both grow
    assert watched(updates(200, -0.02, -0.02), reference=reference) == []
    assert watched(updates(2 * WINDOW - 1, -1, 1), reference=reference) == []


def test_a_loss_stuck_at_log_2_is_warned_of():
    stuck = updates(STUCK, 0, 0, loss=math.log(2))
    (text,) = watched(stuck)
    assert "the loss has been log 2 for 50 updates" in text
    assert watched(stuck[:-1]) == []
    assert watched(stuck, log_2=False) == []


@pytest.mark.long
def test_a_run_says_its_warnings(tmp_path, capsys):
    train(tmp_path, "--learning-rate 1e-9 --iters 51 --batch-size 2 --steps-per-eval 0")
    out = capsys.readouterr()
    assert "warning: the loss has been log 2 for 50 updates" in out.out + out.err
