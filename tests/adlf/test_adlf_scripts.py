"""adlf/training.py and adlf/Advanced_training.py: their stages, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from files import ROOT

import fuse
import ppo_training
import sft
from adlf import Advanced_training, stages, training
from adlf.stages import RECORD, Stage, found, run_stages
from command_line.exits import run_main
from command_line.parser import Parser
from errors import UserError

EXAMPLE = (
    "--run_sft --sft_epochs 3 --sft_batch_size 8 --run_rlhf --ppo_epochs 1 --ppo_batch_size 4 "
    "--adlf_alpha 0.3 --use_coherence_reward --use_length_penalty --max_seq_length 1024 --fp16"
)
ADVANCED = (
    "--run_sft --sft_epochs 2 --sft_batch_size 4 --run_rlhf --ppo_epochs 1 --ppo_batch_size 2 "
    "--use_curriculum --use_multi_objective --fluency_weight 0.25 --faithfulness_weight 0.25 "
    "--quality_weight 0.5 --use_dynamic_kl --kl_target 0.05 --token_format role_markers "
    "--scheduler cosine_with_restarts --cosine_cycles 2 --fp16"
)
WANDB = "--use_wandb --wandb_project P"
DATA = "data/conversations.jsonl"  # from the project's root, wherever the script is started


def start(script: str, line: str, folder: Path, cwd: Path = ROOT, **options) -> subprocess.Popen:
    words = [
        sys.executable,
        str(ROOT / "adlf" / script),
        *line.split(),
        "--output_dir",
        str(folder),
    ]
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def run(script: str, line: str, folder: Path, cwd: Path = ROOT) -> str:
    child = start(script, line, folder, cwd)
    said = child.communicate()[0]
    assert child.returncode == 0, said[-3000:]
    return said


def answers(folder: Path) -> str:
    """What the chat says with the fused model."""
    done = subprocess.run(
        [sys.executable, "talk_to_model.py", "--model", str(folder), "--max-tokens", "3"],
        cwd=ROOT,
        input="How do I keep bread fresh?\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- whole -------------------------------------------------------------------------------------


def few_rows(tmp_path: Path) -> Path:
    rows = (ROOT / DATA).read_text("utf-8").splitlines()
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(rows[:12]) + "\n", encoding="utf-8")
    return path


def test_basic_commands_end_with_a_model(tmp_path):
    """Short forms: the first from adlf/, and the second goes on with the first's fine-tuning."""
    few, small = few_rows(tmp_path), "--sft_epochs 0.4 --ppo_epochs 0.2 --eval_steps 0"
    small += " --max_seq_length 220"
    folder = tmp_path / "basic"
    line = f"--data_path {few} --run_sft --run_rlhf {small}"
    said = run("training.py", line, folder, ROOT / "adlf")
    assert "coherence and length it is" in said
    assert "== ppo\npython ppo_training.py" in said and "--score-range 0.5 5" in said
    assert list(json.loads((folder / stages.RECORD).read_text())) == [
        "sft",
        "fuse sft",
        "reward",
        "ppo",
        "fuse ppo",
    ]
    row = json.loads((folder / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    assert "adlf/coherence_mean" in row and "adlf/length_mean" in row
    answers(folder / "model")
    line = (
        f"--data_path {few} --run_rlhf --sft_checkpoint {folder / 'sft_model'} {small} "
        "--use_curriculum --use_multi_objective --use_dynamic_kl --token_format role_markers"
    )
    run("Advanced_training.py", line, tmp_path / "advanced")
    row = json.loads((tmp_path / "advanced/ppo/metrics.jsonl").read_text().splitlines()[0])
    assert {"curriculum/competence", "objectives/pareto", "objective/kl_per_token"} <= row.keys()
    assert (tmp_path / "advanced/model/config.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("cwd", [ROOT, ROOT / "adlf"], ids=["root", "adlf"])
@pytest.mark.parametrize(
    "script, line", [("training.py", EXAMPLE), ("Advanced_training.py", ADVANCED)]
)
def test_examples_run_unchanged(script, line, cwd, tmp_path):
    pytest.importorskip("wandb")
    run(script, f"--data_path {DATA} {line} {WANDB}", tmp_path / "D", cwd)
    answers(tmp_path / "D" / "model")


@pytest.mark.long
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_killed_run_goes_on_to_the_same_model(stage, tmp_path):
    """Killed inside a stage, after its first checkpoint; and once more between two stages."""
    few = few_rows(tmp_path)
    line = (
        f"--data_path {few} --sft_epochs 4 --ppo_epochs 2 --eval_steps 0 --save_steps 1 "
        "--max_seq_length 220 --sft_batch_size 2"
    )
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    run("training.py", line, whole)
    child = start("training.py", line, folder, start_new_session=True)
    while not list(folder.glob(f"{stage}/checkpoints/step-*")):
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    said = run("training.py", line, folder)
    assert f"--resume {folder / stage}" in said or f"== {stage}" not in said
    assert run("training.py", line, folder).count("done before") == 5
    for name in ("sft_model", "model"):
        one, other = (f / name / "model.safetensors" for f in (whole, folder))
        assert one.read_bytes() == other.read_bytes()


# ---- stages ------------------------------------------------------------------------------------


def made_stages(tmp_path: Path, *words: str) -> list[Stage]:
    """Two stages that write down that they ran; the second fails while a file is there."""
    script = tmp_path / "stage.py"
    script.write_text(
        "import sys, pathlib\n"
        "with open('ran.txt', 'a') as file: file.write(' '.join(sys.argv[1:]) + '\\n')\n"
        "sys.exit(3 if sys.argv[1] == 'two' and pathlib.Path('broken').exists() else\n"
        "         pathlib.Path(sys.argv[1]).write_text('x') and 0)\n"
    )
    return [
        Stage(name, str(script), [name, *words], tmp_path / name, tmp_path / f"run_{name}")
        for name in ("one", "two")
    ]


def test_what_is_finished_is_not_done_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken").touch()
    with pytest.raises(SystemExit) as end:
        run_stages(tmp_path / "D", made_stages(tmp_path))
    assert end.value.code == 3 and "error: two ended with status 3" in capsys.readouterr().err
    Path("broken").unlink()
    run_stages(tmp_path / "D", made_stages(tmp_path))
    assert Path("ran.txt").read_text().split() == ["one", "two", "two"]
    with pytest.raises(UserError, match="stage one was made by other options"):
        run_stages(tmp_path / "D", made_stages(tmp_path, "more"))


def test_a_stage_that_says_what_is_wrong_says_it_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "stage.py"
    script.write_text("import sys; print('error: no such model', file=sys.stderr); sys.exit(2)")
    with pytest.raises(SystemExit) as end:
        run_stages(tmp_path / "D", [Stage("one", str(script), [], tmp_path / "made")])
    assert end.value.code == 2 and capfd.readouterr().err == "error: no such model\n"


@pytest.mark.parametrize("there", ["{}", "[]", None])
def test_a_record_that_is_a_link_is_refused_before_the_first_stage(tmp_path, monkeypatch, there):
    monkeypatch.chdir(tmp_path)
    Path("D").mkdir()
    if there is not None:
        Path("mine").write_text(there)
    Path("D", RECORD).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="stages.json: is a symbolic link"):
        run_stages(tmp_path / "D", made_stages(tmp_path))
    assert not Path("ran.txt").exists()
    assert (Path("mine").read_text() if there is not None else None) == there


def test_a_stage_that_was_begun_is_resumed_or_begun_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run_one/checkpoints/step-00000002").mkdir(parents=True)
    Path("run_two").mkdir()
    with pytest.raises(UserError, match="is missing"):
        run_stages(tmp_path / "D", made_stages(tmp_path))  # "--resume" is what it writes
    first = Path("ran.txt").read_text().splitlines()[0]
    assert first == f"--resume {tmp_path / 'run_one'}"
    (tmp_path / "one").touch()
    stages.run(made_stages(tmp_path)[1])
    assert Path("ran.txt").read_text().splitlines()[1] == "two --overwrite"


def test_paths_are_looked_up_from_the_root_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert found(DATA) == str(ROOT / DATA)
    Path("data").mkdir()
    Path(DATA).touch()
    assert found(DATA) == str(tmp_path / DATA)
    assert found("org/model-on-the-hub") == "org/model-on-the-hub"


# ---- what they ask for -------------------------------------------------------------------------


@pytest.mark.parametrize("module, line", [(training, EXAMPLE), (Advanced_training, ADVANCED)])
def test_every_stage_of_the_examples_has_a_line_that_its_script_takes(
    module, line, tmp_path, monkeypatch
):
    """The words of each stage go through its script's own parser."""
    scripts = {"sft.py": sft, "ppo_training.py": ppo_training, "fuse.py": fuse}
    made = []
    monkeypatch.setattr("adlf.pipeline.run_stages", lambda folder, stages: made.extend(stages))
    module.main(f"--data_path {DATA} {line} {WANDB} --output_dir {tmp_path / 'D'}".split())
    assert [stage.name for stage in made] == ["sft", "fuse sft", "reward", "ppo", "fuse ppo"]
    for stage in made:
        args = parsed(scripts[stage.script], stage.words)
        if stage.run is not None:
            assert args.dtype == "float16" and args.wandb_project == "P"
    ppo = parsed(ppo_training, next(s.words for s in made if s.name == "ppo"))
    if module is training:
        assert (ppo.adlf_alpha, ppo.score_range) == (0.3, [0.5, 5.0])
        assert ppo.use_coherence_reward and ppo.use_length_penalty
    else:
        assert ppo.use_multi_objective and ppo.quality_weight == 0.5 and ppo.use_curriculum
        assert ppo.use_dynamic_kl and ppo.kl_target == 0.05 and ppo.token_format == "role_markers"
        assert (ppo.lr_schedule, ppo.num_cycles) == ("cosine_with_restarts", 2)


def parsed(script, words):
    """The words as the script's parser has them, before it looks for files."""

    def no_checks(self, *options, **more):
        built(self, *options, **more)
        self.checks = OnlySettled()

    built = Parser.__init__
    with patch.object(Parser, "__init__", no_checks):
        return script.parse_arguments(words)


class OnlySettled(list):
    """Checks, less those that open files which are not made yet."""

    def __iter__(self):
        names = ("settle_arguments", "check_fused", "check_files")
        return (f for f in list.__iter__(self) if getattr(f, "__name__", "") not in names)


SEVERAL = "--data_path x --use_multi_objective"
NO_WEIGHT = "--fluency_weight 0 --faithfulness_weight 0 --quality_weight 0"
CONTRAST = "--data_path x --use_contrastive"


@pytest.mark.parametrize(
    "module, line, said",
    [
        (training, "", "data-path"),
        (training, "--data_path x --adlf_alpha 2", "from 0 to 1"),
        (training, "--data_path x --wandb_project P", "without --use-wandb"),
        (training, "--data_path x --sft_epochs 0", "--sft-epochs: give a number above 0"),
        (training, "--data_path x --ppo_epochs 2e6", "--ppo-epochs: give a number above 0"),
        (training, "--data_path x --ppo_learning_rate -1", "--ppo-learning-rate: -1.0 is below 0"),
        (training, "--data_path x --max_seq_length 1", "--max-seq-length: 1 is below 2"),
        (training, "--data_path x --run_sft --ppo_epochs 3", "without --run_rlhf"),
        (training, "--data_path x --run_sft --use_coherence_reward", "without --run_rlhf"),
        (training, "--data_path x --adlf_alpha 0 --use_length_penalty", "at --adlf-alpha 0"),
        (training, "--data_path x --adlf_alpha 0 --length_target 7", "at --adlf_alpha 0"),
        (
            training,
            "--data_path x --use_coherence_reward --length_target 7",
            "without --use_length_penalty",
        ),
        (training, "--data_path x --run_sft --sft_checkpoint y", "give one of them"),
        (training, "--data_path nowhere.jsonl", "nowhere.jsonl"),
        (training, "--data_path UNSCORED", "no score"),
        (training, "--data_path EQUAL", "every score is 3"),
        (Advanced_training, "--data_path x --kl_target 1", "without --use-dynamic-kl"),
        (Advanced_training, "--data_path x --fluency_weight 1", "without --use-multi-objective"),
        (Advanced_training, f"{SEVERAL} --fluency_weight -1", "not below 0"),
        (Advanced_training, f"{SEVERAL} {NO_WEIGHT}", "all 0"),
        (Advanced_training, f"{SEVERAL} --adlf_alpha 0", "no effect at --adlf-alpha 0"),
        (Advanced_training, f"{SEVERAL} --use_coherence_reward", "with --use-multi-objective"),
        (Advanced_training, f"{SEVERAL} --run_sft", "without --run_rlhf"),
        (Advanced_training, "--data_path x --use_dynamic_kl --run_sft", "without --run_rlhf"),
        (Advanced_training, "--data_path x --use_dynamic_kl --kl_target 0", "above 0"),
        (Advanced_training, f"{CONTRAST} --contrastive_temp 0", "above 0"),
        (Advanced_training, f"{CONTRAST} --sft_batch_size 3", "--sft-batch-size 3 is below 4"),
        (Advanced_training, f"{CONTRAST} --use_self_critique", "drop one"),
        (
            Advanced_training,
            "--data_path x --use_decision_transformer --score_template x",
            "must hold {score}",
        ),
        (Advanced_training, "--data_path x --use_self_critique --critique_weight 2", "from 0 to 1"),
        (Advanced_training, "--data_path x --cosine_cycles 2", "without --scheduler"),
        (Advanced_training, "--data_path x --length_target 7", "without --use-length-penalty"),
    ],
)
def test_mistakes_are_one_line(module, line, said, tmp_path, monkeypatch, capsys):
    """Before the first stage, whichever stage they are about: "x" is no file, and not read."""
    monkeypatch.chdir(tmp_path)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    Path("UNSCORED").write_text(json.dumps(row) + "\n")
    Path("EQUAL").write_text(json.dumps(row | {"meta_eval_score": 3}) + "\n")
    with pytest.raises(SystemExit) as end:
        run_main(lambda: module.main(line.split()))
    assert end.value.code == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert said in error


def test_another_tokenizer_is_put_beside_a_copy_of_a_local_model(tmp_path):
    model, other = tmp_path / "model", tmp_path / "other"
    for folder, names in ((model, ("config.json", "tokenizer.json")), (other, ("tokenizer.json",))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(folder.name)
    made = Path(stages.with_tokenizer(str(model), str(other), tmp_path / "D"))
    assert (made / "config.json").read_text() == "model"
    assert (made / "tokenizer.json").read_text() == "other"
    with pytest.raises(UserError, match="not a folder"):
        stages.with_tokenizer("org/name", str(other), tmp_path / "E")
