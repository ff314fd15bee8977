"""A signal in the PyTorch scripts: a step that has moved no weight is given up and made again."""

import os
import signal
from pathlib import Path

import pytest
from baseline_setup import ROOT
from pytorch_ppo_training import main as ppo_main
from pytorch_sft import main as sft_main
from reliable_runs import metrics

from run_folder.checkpoint_folder import latest_checkpoint

pytestmark = pytest.mark.torch
PPO = (
    "--ground-truth-reward --num-steps 4 --batch-size 4 --max-new-tokens 4 --eval-every 2 "
    "--eval-prompts 2 --eval-samples 1 --use-score-scaling --adap-kl-ctrl --save-every 2"
)
SFT = (
    "--train --iters 4 --batch-size 2 --max-rows 8 --steps-per-eval 2 --val-batches 1 "
    "--lora-dropout 0.2 --save-every 2"
)
# Where the signal arrives; the call of it; the last step that is saved.
PLACES = {
    "sampling": (ppo_main, PPO, "pytorch_ppo_trainer.PPOTrainer.generate", 3, 2),
    "reward": (ppo_main, PPO, "training.rollout_loop.RolloutLoop.score", 6, 2),
    "reference": (ppo_main, PPO, "pytorch_ppo_trainer.PPOTrainer.score_reference", 2, 1),
    "first evaluation": (ppo_main, PPO, "training.rollout_loop.RolloutLoop.sample", 1, 0),
    "evaluation": (ppo_main, PPO, "training.rollout_loop.RolloutLoop.sample", 4, 2),
    "validation": (sft_main, SFT, "pytorch_sft_trainer.SFTTrainer.evaluate", 2, 2),
}


def run(main, words: str, folder: Path) -> None:
    line = ["--output-dir", str(folder / "run"), "--save-file", str(folder / "out.npz")]
    main([*words.split(), "--data", str(ROOT / "data"), *line])


def left(folder: Path) -> dict:
    found = {file.name: file.read_bytes() for file in sorted(folder.glob("out*"))}
    assert found
    samples = (folder / "run" / "samples.jsonl").read_bytes()
    return found | {"metrics": metrics(folder / "run"), "samples": samples}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What each script leaves that nothing stops."""
    found = {}
    for main, words in ((ppo_main, PPO), (sft_main, SFT)):
        folder = tmp_path_factory.mktemp("whole")
        run(main, words, folder)
        found[main] = left(folder)
    return found


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_gives_up_a_step_that_has_moved_no_weight(
    tmp_path, monkeypatch, capfd, whole, place
):
    main, words, target, call, saved = PLACES[place]
    module, owner, function = target.rsplit(".", 2)
    inner, calls = getattr(getattr(__import__(module, fromlist=[owner]), owner), function), []

    def signalled(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the signal gave nothing up")
        return inner(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{owner}.{function}", signalled)
        with pytest.raises(SystemExit) as end:
            run(main, words, tmp_path)
    assert end.value.code == 128 + signal.SIGTERM
    out, err = capfd.readouterr()
    assert "this step has moved no weight and is given up" in err
    assert f"--resume {tmp_path / 'run'}" in out
    last = latest_checkpoint(tmp_path / "run" / "checkpoints").name
    assert last.startswith(f"step-{saved:08d}") and not list(tmp_path.glob("out*"))
    main(["--resume", str(tmp_path / "run")])
    assert left(tmp_path) == whole[main]


def test_a_signal_during_the_update_finishes_the_step(tmp_path, monkeypatch, capfd, whole):
    import torch

    inner, calls = torch.optim.Optimizer.zero_grad, []

    def signalled(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("torch.optim.Optimizer.zero_grad", signalled)
        with pytest.raises(SystemExit) as end:
            run(ppo_main, PPO, tmp_path)
    assert end.value.code == 130 and "stopping after this step" in capfd.readouterr().err
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == "step-00000001"
    ppo_main(["--resume", str(tmp_path / "run")])
    assert left(tmp_path) == whole[ppo_main]
