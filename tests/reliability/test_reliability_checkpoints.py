"""Going back: to the best checkpoint, to an older one, past a torn one; other data or base."""

import random
import shutil
import signal

import mlx.core as mx
import pytest
from files import tree
from reliable_runs import (
    DATA,
    RUNS,
    SHORT,
    Server,
    differences,
    left_by,
    quick,
    shared_server,
    whole,
)
from script_table import TRAINED

from errors import UserError
from run_folder import checkpoint_folder as checkpoint_folders
from run_folder.checkpoint_folder import (
    Metric,
    best_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    set_aside_after,
)
from run_folder.resuming import check_same_base
from training.checkpoints import save_checkpoint


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


def save(folder, step: int, value: float | None = None, **options):
    metric = None if value is None else Metric("loss", value)
    return save_checkpoint(folder, step, {"a": {"x": mx.array(step)}}, {}, metric=metric, **options)


# ------------------------------------------------------------------------------ best


def test_the_best_is_known_although_a_kill_came_before_the_note_of_it(tmp_path, monkeypatch):
    save(tmp_path, 1, 0.5)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folders, "note_best", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, 0.1)
    assert best_checkpoint(tmp_path).name == "step-00000001"
    for step in (3, 4, 5):
        save(tmp_path, step, 0.3, keep=1)
    assert best_checkpoint(tmp_path).name == "step-00000002"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000005"]


def test_the_same_step_saved_again_without_its_metric_stays_the_best(tmp_path):
    path = save(tmp_path, 1, 0.5)
    assert save(tmp_path, 1) == path
    save(tmp_path, 2, 0.9)
    assert best_checkpoint(tmp_path) == path


def test_only_the_newest_metric_counts(tmp_path):
    save(tmp_path, 1, 0.5)
    save_checkpoint(tmp_path, 2, {}, {}, metric=Metric("score", 0.2, higher_is_better=True))
    save_checkpoint(tmp_path, 3, {}, {}, metric=Metric("score", 0.1, higher_is_better=True))
    assert best_checkpoint(tmp_path).name == "step-00000002"


# ------------------------------------------------------------------------------ back


def test_a_torn_newest_one_does_not_push_out_the_whole_ones(tmp_path):
    save(tmp_path, 1)
    torn = save(tmp_path, 5)
    (torn / "a.safetensors").write_bytes(b"half")
    set_aside_after(latest_checkpoint(tmp_path), tmp_path)
    save(tmp_path, 2, keep=1)
    assert latest_checkpoint(tmp_path).name == "step-00000002"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "aside-step-00000005",
        "step-00000002",
    ]


def test_what_is_newer_is_set_aside_and_never_lost(tmp_path, capsys):
    for step in (1, 2, 3):
        save(tmp_path, step, 1 / step, keep=9)
    set_aside_after(tmp_path / "step-00000001", tmp_path)
    assert "aside-step-00000003" in capsys.readouterr().err
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    save(tmp_path, 2, 9.0, keep=9)
    assert best_checkpoint(tmp_path).name == "step-00000001"
    set_aside_after(None, tmp_path)
    assert list_checkpoints(tmp_path) == [] and latest_checkpoint(tmp_path) is None
    names = {path.name for path in tmp_path.glob("aside-*")}
    assert names == {f"aside-step-0000000{n}" for n in (1, 2, 3)} | {"aside-step-00000002.2"}


def test_a_run_goes_back_to_an_older_checkpoint_and_ends_the_same(server, tmp_path):
    """Also when it is killed before it has come by the newer ones again."""
    script, line = RUNS["sft"]
    ended = server.run(script, [*line, "--keep-checkpoints", "100"], tmp_path)
    assert ended.code == 0, ended.err
    folder = tmp_path / "run" / "checkpoints"
    line = ["--resume", "run/checkpoints/step-00000002"]
    killed = server.run(script, line, tmp_path, kill_at=random.Random(3).randint(95, 110))
    assert killed.code == -signal.SIGKILL
    assert max(path.name for path in folder.glob("step-*")) < "step-00000006"
    ended = server.run(script, ["--resume", "run"], tmp_path)
    assert ended.code == 0, ended.err
    assert differences(whole("sft")[0], left_by(tmp_path / "run", "out.npz")) == []


def test_a_torn_checkpoint_costs_time_and_nothing_else(server, tmp_path):
    script, line = RUNS["ppo"]
    ended = server.run(script, line, tmp_path)
    assert ended.code == 0, ended.err
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    with open(newest / "optimizer.safetensors", "r+b") as file:
        file.truncate(100)
    ended = server.run(script, ["--resume", "run"], tmp_path)
    assert ended.code == 0, ended.err
    assert "optimizer.safetensors is torn or was altered; using the one before it" in ended.err
    assert differences(whole("ppo")[0], left_by(tmp_path / "run", "out.npz")) == []


def test_a_run_that_stopped_early_does_not_go_on(server, tmp_path):
    """Killed after its last checkpoint, before anything says that it has finished."""
    script, line = RUNS["sft"]
    line = [
        *line,
        "--learning-rate",
        "0",
        "--steps-per-eval",
        "1",
        "--early-stopping-patience",
        "2",
    ]
    ended = server.run(script, line, tmp_path)
    assert ended.code == 0 and "stopped early" in ended.err, ended.err
    expected = left_by(tmp_path / "run", "out.npz")
    assert expected["summary"]["steps"] == 2
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "out.npz").unlink()
    ended = server.run(script, ["--resume", "run"], tmp_path)
    assert ended.code == 0, ended.err
    assert differences(expected, left_by(tmp_path / "run", "out.npz")) == []


# ------------------------------------------------------------------------------ other data


@pytest.mark.parametrize("name", quick("sft ppo", TRAINED))
def test_changed_training_data_is_refused_unless_forced(server, tmp_path, name):
    script, line = SHORT[name].script, SHORT[name].line
    for file in DATA.glob("*increasing_mult_2_*.jsonl"):
        shutil.copy(file, tmp_path)
    line = [*line, "--data", "."]
    ended = server.run(script, line, tmp_path)
    assert ended.code == 0, ended.err
    for file in tmp_path.glob("*_train.jsonl"):
        rows = file.read_text().splitlines(keepends=True)
        file.write_text("".join([*rows[1:], rows[0]]))
    before = tree(tmp_path / "run")
    ended = server.run(script, ["--resume", "run", "--save-every", "3"], tmp_path)
    assert (
        ended.code == 2 and "the training data is not what the run was started with" in ended.error
    )
    assert tree(tmp_path / "run") == before  # the options too
    ended = server.run(script, ["--resume", "run", "--force-resume"], tmp_path)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("name", quick("sft ppo", TRAINED))
def test_changed_weights_of_the_base_are_refused_unless_forced(server, tmp_path, name):
    script, line = SHORT[name].script, SHORT[name].line
    model = shutil.copytree(DATA / "digits_model", tmp_path / "model")
    ended = server.run(script, [*line, "--model", "model"], tmp_path)
    assert ended.code == 0, ended.err
    weights = mx.load(str(model / "model.safetensors"))
    weights["model.norm.weight"] *= 1.01
    mx.save_safetensors(str(model / "model.safetensors"), weights, metadata={"format": "pt"})
    before = tree(tmp_path / "run")
    ended = server.run(script, ["--resume", "run", "--save-every", "3"], tmp_path)
    assert ended.code == 2 and "the weights of the model are not what" in ended.error
    assert tree(tmp_path / "run") == before  # the options too
    ended = server.run(script, ["--resume", "run", "--force-resume"], tmp_path)
    assert ended.code == 0, ended.err


def test_a_base_that_is_not_known_is_not_compared():
    check_same_base({"base": "a"}, "a")
    check_same_base({"base": "a"}, None)
    check_same_base({}, "a")  # a checkpoint from before fingerprints
    with pytest.raises(UserError, match="fingerprint a, now b"):
        check_same_base({"base": "a"}, "b")


def test_a_broken_option_file_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text("{")
    from command_line.option_files import read_run_options

    with pytest.raises(UserError, match="not the config.json of a run"):
        read_run_options(tmp_path)
