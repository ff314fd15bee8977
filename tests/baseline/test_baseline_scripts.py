"""pytorch_sft.py and pytorch_ppo_training.py: flags, commands, files that both sides read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from baseline_runs import MODEL, PPO, SMALL, losses, other_base, ppo, sft
from baseline_setup import DIGITS, ROOT, close, torch
from files import tree
from flag_check import unread_flags
from pytorch_files import load_adapter as load_torch_adapter
from pytorch_models import load_model as load_torch
from pytorch_ppo_training import main as ppo_main
from pytorch_reward_model import load_reward_model as load_torch_reward_model
from pytorch_runs import REFUSED, BaselineParser, parse
from pytorch_sft import main as sft_main

from command_line import ppo_flags, sft_flags
from errors import UserError
from models.adapter_files import load_adapter, read_adapter, save_adapter
from models.base_fingerprint import KEY, base_fingerprint
from models.load import load_model
from models.reward_model import load_reward_model
from ppo_training import main as mlx_ppo_main
from run_folder.run import read_rows

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("in_root")]
ROOMS = ("pytorch_baseline", "command_line", "run_folder", "training", "rewards", "rl")
SOURCES = [file for room in ROOMS for file in ROOT.glob(f"{room}/*.py")]


# ---- flags -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [sft_flags, ppo_flags])
def test_flags_are_those_of_the_mlx_script(script):
    words = ["--train"] if script is sft_flags else ["--ground_truth_reward"]
    ours, theirs = vars(parse(script, words)), vars(script.parse_arguments(words))
    for mine, other in ((ours, theirs), (ours.pop("defaults"), theirs.pop("defaults"))):
        assert mine.keys() - other.keys() == {"device"}
        assert {name for name in other if other[name] != mine[name]} == {"save_file"}


@pytest.mark.parametrize("script", [sft_flags, ppo_flags])
def test_every_flag_is_read(script, monkeypatch):
    seen = []

    class Kept(BaselineParser):
        def __init__(self, **options):
            super().__init__(**options)
            seen.append(self)

    monkeypatch.setattr(script, "Parser", Kept)
    script.parse_arguments(["--train"] if script is sft_flags else ["--ground_truth_reward"])
    unread = unread_flags(seen[0], SOURCES, owners=("args", "config"))
    assert set(unread) <= REFUSED.keys() | {"contrastive_temp", "contrastive_weight"}  # need one


@pytest.mark.parametrize(
    "words", [["--quantize", "4"], ["--device", "cuda"], ["--model", "nowhere/at_all/x"]]
)
def test_refused(words, tmp_path):
    if words[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises((UserError, SystemExit)):
        sft(tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_compile_is_refused(capsys):
    with pytest.raises(SystemExit):
        ppo_main([*PPO, "--compile", "True"])
    assert "--compile" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--prompt-tuning", "--lora-rank=3", "--fine-tune-type=full"])
def test_what_describes_an_adapter_is_refused_at_a_test_of_none(flag, capsys):
    with pytest.raises(SystemExit):
        sft_main(["--test", flag])
    said = f"{flag.replace('=', ' ')} has no effect without --train or --resume-adapter-file"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("--prompt-tuning",)])
def test_a_folder_that_is_there_is_not_replaced(tmp_path, words):
    """Of a run, of the base model, of anything else; nor the run's own folder."""
    run, base = tmp_path / "run", other_base(tmp_path / "base")
    sft(run)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    before = tree(tmp_path)
    for there in (tmp_path / "mine", run, run / "model", base):
        said = "exists already; give another name|is, or holds, what --model names"
        with pytest.raises(UserError, match=said):
            sft(tmp_path / "new", "--model", str(base), *words, "--save-file", str(there))
    with pytest.raises(UserError, match="exists already"):
        sft_main(["--resume", str(run), "--save-file", str(base)])
    for there in (tmp_path / "new", tmp_path):
        with pytest.raises(UserError, match="is, or holds, what --output-dir names"):
            sft(tmp_path / "new", *words, "--save-file", str(there))
    assert tree(tmp_path) == before


def test_a_run_is_not_replaced_by_its_model(tmp_path, monkeypatch):
    """Nor anything that holds it, or that it holds; whatever the run folder is called."""
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(ROOT / "data")]
    with pytest.raises(UserError, match="is, or holds, what --output-dir names"):
        sft_main(["--train", *SMALL, *data, "--save-file", "runs"])
    for there in (".", "o", "o/checkpoints"):
        with pytest.raises(UserError, match="--output-dir names|keeps files of its own"):
            sft("o", *data, "--save-file", there)
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_replaces_what_it_wrote(tmp_path):
    model = tmp_path / "model"
    run = sft(tmp_path / "run", "--save-file", str(model))
    before = tree(model)
    (model / ".DS_Store").touch()  # as a Mac does
    # Of a process that was killed; no process has a number above 4194304.
    (tmp_path / f".{model.name}.writing-4194305").mkdir()
    sft_main(["--resume", str(run), "--iters", "6", "--save-file", str(model)])
    after = tree(model)
    assert before.keys() == after.keys() and before != after
    assert {path.name for path in tmp_path.iterdir()} == {"model", "run"}
    (model / "letter.txt").touch()
    with pytest.raises(UserError, match="exists already"):
        sft_main(["--resume", str(run), "--iters", "7"])


def test_a_resumed_run_replaces_nothing_else(tmp_path):
    """Where it was told to write, too, as long as it has not."""
    model = tmp_path / "model"
    run = sft(tmp_path / "run")
    sft(tmp_path / "other", "--save-file", str(model))
    config = tmp_path / "c.yaml"
    config.write_text(f"save-file: {model}")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="exists already"):
        sft_main(["--resume", str(run), "--config", str(config)])
    assert tree(tmp_path) == before


def test_overwrite_deletes_the_model_with_its_run(tmp_path):
    run = tmp_path / "run"
    sft(run, "--save-file", str(run / "model"))
    sft(run, "--save-file", str(run / "model"), "--overwrite")
    assert (run / "model" / "config.json").exists()


@pytest.mark.parametrize("main", [ppo_main, mlx_ppo_main])
def test_a_reward_model_is_not_replaced_by_what_it_trains(main, tmp_path, capsys):
    file = str(tmp_path / "r.npz")
    with pytest.raises(SystemExit):
        main(["--reward_model", file, "--save-file", file])
    assert "--save-file: is the reward model of this run" in capsys.readouterr().err


# ---- the commands ------------------------------------------------------------------------------


def run_command(command: str, folder: Path) -> None:
    words = [sys.executable, *command.split()[1:]]
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_commands_as_written(tmp_path):
    pytest.importorskip("wandb")
    model = tmp_path / "sft"
    run_command(
        f"python pytorch_baseline/pytorch_sft.py --model {MODEL} --train --iters 3 "
        f"--save-file {model} --output-dir {tmp_path / 'a'}",
        tmp_path,
    )
    run_command(
        f"python pytorch_baseline/pytorch_ppo_training.py --model {model} --batch_size 32 "
        "--mini_batch_size 32 --ppo_epoch 4 --log_with wandb --ground_truth_reward --tokenizer "
        f"{MODEL} --num_steps 2 --adap_kl_ctrl True --init_kl_coef 0.2 --seed 7 "
        f"--output-dir {tmp_path / 'b'} --eval-samples 1",
        tmp_path,
    )
    assert len([row for row in read_rows(tmp_path / "b") if "objective/kl" in row]) == 2
    options = json.loads((tmp_path / "b" / "config.json").read_text())
    assert options["options"]["seed"] == 7 and options["versions"]["torch"] == torch.__version__
    assert list((tmp_path / "b" / "wandb").glob("offline-run-*"))


# ---- files that both sides read ----------------------------------------------------------------


def test_reward_model_and_ppo_against_it(tmp_path):
    reward, data = tmp_path / "reward", ["--data-base", "reward_function_increasing_mult_2_"]
    sft(tmp_path / "a", "--reward-model", "--save-file", str(reward), *data)
    texts = [[1, 30, 40, 50, 2], [1, 60, 20, 2]]
    ours, _ = load_torch_reward_model(str(reward))
    theirs = load_reward_model(reward, dtype="float32")
    close(theirs.score(texts), ours.score(texts), relative=1e-4)
    folder = tmp_path / "b"
    ppo_main(
        [
            "--output-dir",
            str(folder),
            *PPO[:-1],
            "--reward_model",
            str(reward),
            "--true-score",
            "--save-file",
            str(tmp_path / "ppo.npz"),
        ]
    )
    assert (folder / "plots" / "learned_and_true.png").exists()
    base = load_model(DIGITS, dtype="float32")
    tuning = load_adapter(base, tmp_path / "ppo.npz")
    assert tuning.kind == "lora" and (tmp_path / "ppo.value_head.safetensors").exists()
    assert max(np.abs(np.array(a)).max() for n, a in tuning.arrays().items() if "_b" in n) > 0


@pytest.mark.parametrize("words", [(), ("--prompt-tuning",)], ids=["file", "soft prompt"])
def test_what_is_saved_over_a_reward_model_is_none(tmp_path, words, recwarn):
    """In a file; a folder of an adapter is not written over by another run."""
    path, short = tmp_path / "a.npz", ["--iters", "1", *words]
    data, reward = ["--data-base", "reward_function_increasing_mult_2_"], ["--reward-model"]
    for number, more in enumerate((reward + data, reward + data, [])):
        sft(tmp_path / f"{number}", *short, *more, "--save-file", str(path))
        assert (tmp_path / "a.reward_head.safetensors").exists() == bool(more)
    ppo(tmp_path / "ppo", "--num-steps", "1", *words, "--save-file", str(path))
    assert (tmp_path / "a.value_head.safetensors").exists()
    sft(tmp_path / "last", *short, "--save-file", str(path))
    assert not list(tmp_path.glob("a.*head*"))
    said = [str(each.message) for each in recwarn if "was removed" in str(each.message)]
    assert len(said) == 2 and "reward_head" in said[0] and "value_head" in said[1]


def test_reward_adapter_on_its_base(tmp_path):
    path, data = tmp_path / "reward.npz", ["--data-base", "preference_increasing_mult_2_"]
    sft(
        tmp_path / "a",
        "--reward-model",
        "--pooling",
        "last",
        "--normalize-samples",
        "20",
        "--save-file",
        str(path),
        *data,
    )
    texts = [[1, 30, 40, 50, 2], [1, 60, 20, 2]]
    ours, _ = load_torch_reward_model(str(path), MODEL)
    theirs = load_reward_model(path, load_model(DIGITS, dtype="float32"))
    assert ours.pooling == theirs.pooling == "last" and ours.gain != 1.0
    close(theirs.score(texts), ours.score(texts), relative=1e-4)


def test_a_model_that_transformers_writes_anew_is_the_same_base(tmp_path):
    model = load_torch(str(DIGITS)).model
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    ours = load_model(DIGITS).fingerprint
    assert base_fingerprint(tmp_path / "one") == base_fingerprint(tmp_path / "shards") == ours


@pytest.mark.parametrize(
    "name, words", [("a.npz", ()), ("a.safetensors", ()), ("folder", ("--prompt-tuning",))]
)
def test_adapters_go_on_their_own_base_alone(tmp_path, name, words):
    """On both sides, whichever side has written them."""
    path, other = tmp_path / name, other_base(tmp_path / "other")
    sft(tmp_path / "a", *words, "--save-file", str(path))
    base = load_model(DIGITS)
    described = read_adapter(path)[1]
    assert described[KEY] == load_torch(MODEL).fingerprint == base.fingerprint
    ours = tmp_path / f"ours-{name}"
    save_adapter(ours, load_adapter(base, path), base, run=tmp_path / "a")
    load_torch_adapter(load_torch(MODEL), str(ours))
    with pytest.raises(UserError, match="is another base"):
        load_adapter(load_model(other), path)
    line = ["--test", "--model", str(other), *words, "--resume-adapter-file", str(ours)]
    with pytest.raises(UserError, match="is another base; give --model .*, or --any-base"):
        sft_main(line)
    sft_main([*line, "--any-base"])


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_an_adapter_file_says_what_the_mlx_side_would(tmp_path, kind):
    path, ours = tmp_path / "a.npz", tmp_path / "ours.npz"
    sft(tmp_path / "a", "--fine-tune-type", kind, "--save-file", str(path))
    base = load_model(DIGITS, dtype="float32")
    save_adapter(ours, load_adapter(base, path), base, run=tmp_path / "a")
    assert read_adapter(ours)[1] == read_adapter(path)[1]
    tokens = torch.tensor([[1, 30, 40, 50, 60]])
    model = load_torch_adapter(load_torch(MODEL), str(path)).eval()
    theirs = model.logits(model.hidden_states(tokens))
    close(base.model(mx.array(tokens.numpy())), theirs, kind, relative=1e-4)


def test_a_reward_adapter_goes_on_its_own_base_alone(tmp_path):
    path, other = tmp_path / "reward.npz", other_base(tmp_path / "other")
    data = ["--data-base", "preference_increasing_mult_2_"]
    sft(tmp_path / "a", "--reward-model", "--save-file", str(path), *data)
    words = ["--model", str(other), "--reward_model", str(path), "--num-steps", "1"]
    with pytest.raises(UserError, match="is another base"):
        ppo(tmp_path / "b", *words)
    ppo(tmp_path / "b", *words, "--any-base")
    with pytest.raises(UserError, match="is another base"):
        ppo(tmp_path / "c", "--model", str(other), "--resume_file", str(path))


def test_a_base_without_safetensors_has_no_fingerprint(tmp_path):
    folder = other_base(tmp_path / "bin")
    (folder / "model.safetensors").unlink()
    torch.save(load_torch(MODEL).model.state_dict(), folder / "pytorch_model.bin")
    path = tmp_path / "a.npz"
    sft(tmp_path / "a", "--model", str(folder), "--save-file", str(path))
    assert KEY not in read_adapter(path)[1]


def test_soft_prompt_folder(tmp_path):
    prompt = tmp_path / "prompt"
    run = sft(
        tmp_path / "a",
        "--prompt-tuning",
        "--num-prompt-tokens",
        "3",
        "--save-file",
        str(prompt),
        "--sample-prompts",
        "2 4",
        "8",
    )
    tuning = load_adapter(load_model(DIGITS, dtype="float32"), prompt)
    assert tuning.kind == "prompt" and tuning.num_tokens == 3
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["prompt"] for sample in samples] == ["2 4", "8"] * 3
    again = ppo(
        tmp_path / "b",
        "--prompt_tuning",
        "--num-prompt-tokens",
        "3",
        "--resume-file",
        str(prompt),
        "--save-file",
        str(tmp_path / "ppo.safetensors"),
    )
    assert losses(again)


def test_flags_that_contradict_an_adapter_are_refused(tmp_path, capsys):
    """By the code of the MLX side: what a file says at once, layers once the model is there."""
    file = str(tmp_path / "a.npz")
    sft(tmp_path / "a", "--lora-rank", "4", "--save-file", file)
    for main, line in (
        (sft_main, ["--train", *SMALL, "--resume-adapter-file", file]),
        (ppo_main, [*PPO, "--resume-file", file]),
    ):
        line += ["--output-dir", str(tmp_path / "b")]
        with pytest.raises(SystemExit):
            main([*line, "--lora-rank", "64"])
        assert f"--lora-rank 64: {file} has 4" in capsys.readouterr().err
        with pytest.raises(UserError, match="--lora-layers 1: .* has 2"):
            main([*line, "--lora-layers", "1"])
    assert not (tmp_path / "b").exists()


def test_another_pooling_than_that_of_the_reward_head_is_refused(tmp_path):
    file = str(tmp_path / "rm.npz")
    words = ["--reward-model", "--data-base", "preference_increasing_mult_2_"]
    sft(tmp_path / "a", *words, "--pooling", "last", "--save-file", file)
    with pytest.raises(UserError, match="--pooling mean: .* trained with last"):
        sft(tmp_path / "b", *words, "--pooling", "mean", "--resume-adapter-file", file)


def test_full_fine_tuning_into_a_folder_that_mlx_loads(tmp_path):
    run = ppo(tmp_path / "a", "--use_peft", "False")
    merged, base = load_model(run / "model", dtype="float32"), load_model(DIGITS, dtype="float32")
    tokens = mx.array([[1, 30, 40, 50]])
    theirs = load_torch(str(run / "model")).model(torch.tensor([[1, 30, 40, 50]])).logits
    close(merged.model(tokens), theirs, relative=1e-4)
    assert mx.abs(merged.model(tokens) - base.model(tokens)).max().item() > 1e-3
