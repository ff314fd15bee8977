"""The run folder: rows, locks, old runs, secrets, W&B, and what the console shows."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from errors import UserError
from run_folder.rows import RowFile
from run_folder.run import Run, read_rows
from run_folder.secrets import REDACTED, redact
from training.endings import check_memory
from training.memory import peak_memory

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "run"


def python(code: str, *words: str, env: dict | None = None, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *words],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# ------------------------------------------------------------------------------ rows


def test_a_row_is_in_the_file_at_once_and_always_json(folder):
    with Run("sft", {}, output_dir=folder) as run:
        numbers = {
            "a": mx.array(1.5),
            "b": np.float32(2.5),
            "c": float("nan"),
            "d": -np.inf,
            "e": 3,
        }
        row = run.log(1, numbers)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert row == {"step": 1, "a": 1.5, "b": 2.5, "c": None, "d": None, "e": 3}
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [row]


def test_samples_hold_any_text(folder):
    texts = ["2 4 6", "naïve 日本", 'quote " and \n newline', "half \ud800 pair", "\u2028"]
    with Run("ppo", {}, output_dir=folder) as run:
        run.log_samples(4, [{"prompt": text, "score": mx.array(0.5)} for text in texts])
    rows = read_rows(folder / "samples.jsonl")
    assert [row["prompt"] for row in rows] == texts
    assert all(row["step"] == 4 and row["score"] == 0.5 for row in rows)


def test_a_torn_last_line_is_left_out_and_a_broken_one_is_named(folder):
    with Run("sft", {}, output_dir=folder) as run:
        run.log(1, {"x": 1})
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "x"')
    assert read_rows(folder) == [{"step": 1, "x": 1}]
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2"):
        read_rows(folder)


def test_a_full_disk_is_a_clear_error(tmp_path):
    file = RowFile(tmp_path / "rows.jsonl")
    with open("/dev/full", "ab", buffering=0) as full:
        os.dup2(full.fileno(), file._file.fileno())
    with pytest.raises(UserError, match="rows.jsonl: cannot write: No space left"):
        file.append({"step": 1})


def test_half_a_row_does_not_stay(tmp_path, monkeypatch):
    """What is written next would be glued to it."""
    file = RowFile(tmp_path / "rows.jsonl")
    file.append({"step": 1})
    whole = (tmp_path / "rows.jsonl").read_bytes()

    class Torn:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def write(self, data):
            if len(data) < 8:
                raise OSError(28, "No space left on device")
            return self.inner.write(data[:8])

    inner = file._file
    monkeypatch.setattr(file, "_file", Torn(inner))
    with pytest.raises(UserError, match="No space left"):
        file.append({"step": 2})
    monkeypatch.setattr(file, "_file", inner)
    assert (tmp_path / "rows.jsonl").read_bytes() == whole
    file.append({"step": 3})
    assert read_rows(tmp_path / "rows.jsonl") == [{"step": 1}, {"step": 3}]


def test_a_folder_that_vanishes_is_a_clear_error(folder):
    with Run("sft", {}, output_dir=folder) as run:
        shutil.rmtree(folder)
        with pytest.raises(UserError, match="metrics.jsonl: was deleted"):
            run.log(1, {"x": 1})


def test_resume_cuts_the_files_back_to_the_checkpoint(folder, capsys):
    with Run("sft", {"iters": 9}, output_dir=folder) as run:
        run.log(1, {"x": 1})
        run.log_samples(1, [{"prompt": "a"}])
        state = json.loads(json.dumps(run.state_dict()))
        run.log(2, {"x": 2})
        run.log_samples(2, [{"prompt": "b"}])
        run.log_bad_rows(2, "loss is NaN", [{"prompt": "b", "score": float("nan")}])
        bad = {"step": 2, "reason": "loss is NaN", "prompt": "b", "score": None}
        assert read_rows(folder / "bad_rows.jsonl") == [bad]
    created = json.loads((folder / "config.json").read_text())["created"]
    with Run("sft", {"iters": 12}, output_dir=folder, resume=True) as run:
        run.load_state_dict(state)
        run.log(2, {"x": 3})
    assert read_rows(folder) == [{"step": 1, "x": 1}, {"step": 2, "x": 3}]
    assert [row["prompt"] for row in read_rows(folder / "samples.jsonl")] == ["a"]
    assert read_rows(folder / "bad_rows.jsonl") == []
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["iters"] == 12 and config["created"] == created
    with pytest.raises(UserError, match="is a run of sft, and reward_model cannot go on"):
        Run("reward_model", {}, output_dir=folder, resume=True)
    # Killed before its first checkpoint: everything is made again.
    with Run("sft", {}, output_dir=folder, resume=True) as run:
        run.load_state_dict({})
    assert read_rows(folder) == [] == read_rows(folder / "samples.jsonl")
    assert capsys.readouterr().err == ""
    with Run("sft", {}, output_dir=folder, resume=True) as run:
        run.load_state_dict(state)
    assert "metrics.jsonl" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_bytes() == b""


# ------------------------------------------------------------------------------ the folder


def test_config_holds_options_versions_and_machine(folder):
    options = {"iters": 3, "keys": ["a"], "resume": None, "explicit": {"iters"}, "path": Path("x")}
    with Run("sft", options, output_dir=folder, computing={"blas": "libopenblas.so.0"}):
        pass
    config = json.loads((folder / "config.json").read_text())
    assert config["script"] == "sft" and config["machine"]["blas"] == "libopenblas.so.0"
    assert config["options"] == {"iters": 3, "keys": ["a"], "path": "x"}
    assert config["versions"]["mlx"] and config["versions"]["transformers"]
    assert config["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_the_default_folder_is_new_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []
    for _ in range(3):
        with Run("ppo", {}) as run:
            folders.append(run.folder)
    assert len(set(folders)) == 3
    assert all(re.fullmatch(r"runs/ppo-\d{8}-\d{6}(-\d)?", str(folder)) for folder in folders)


def test_a_folder_with_a_run_in_it_is_refused_or_overwritten_never_mixed(folder):
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with Run("sft", {}, output_dir=folder) as run:
        run.log(1, {"x": 1})
        run.checkpoints.mkdir()
        (run.checkpoints / "old").write_text("")
        (folder / "adapters.npz").write_text("")
        run.finish({"score": float("nan")})
    assert json.loads((folder / "summary.json").read_text())["score"] is None
    with pytest.raises(UserError, match="--resume.*--overwrite"):
        Run("sft", {}, output_dir=folder)
    with Run("sft", {}, output_dir=folder, overwrite=True, outputs=("adapters.npz",)) as run:
        there = sorted(path.name for path in folder.iterdir())
        rows = ["bad_rows.jsonl", "config.json", "metrics.jsonl", "mine.txt", "samples.jsonl"]
        assert there == [".lock", *rows]
        assert read_rows(folder) == []


def test_overwrite_does_not_follow_links_out_of_the_folder(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("")
    Run("sft", {}, output_dir=folder).close()
    (folder / "checkpoints").symlink_to(outside)
    with pytest.raises(UserError, match="checkpoints: is a symbolic link"):
        Run("sft", {}, output_dir=folder, overwrite=True)
    assert (outside / "precious").exists()


LINKS = [
    ".lock",
    "config.json",
    "metrics.jsonl",
    "samples.jsonl",
    "bad_rows.jsonl",
    "summary.json",
    "checkpoints",
    "plots",
    "wandb",
    "checkpoints/step-00000001",
    "checkpoints/best.json",
    "checkpoints/step-00000001/state.json",
    "plots/loss.png",
    "wandb/run-id",
]


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("way", ["anew", "overwrite", "resume"])
def test_links_within_a_run_are_refused_before_anything_is_written(folder, tmp_path, name, way):
    (outside := tmp_path / "outside").mkdir()
    (precious := outside / "precious").write_text("mine")
    Run("sft", {"a": 1}, output_dir=folder).close()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if name == "config.json":
        (folder / name).rename(precious)
    (folder / name).unlink(missing_ok=True)
    before = precious.read_text()
    (folder / name).symlink_to(outside if "." not in name and "id" not in name else precious)
    there = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(UserError, match="is a (symbolic link|link that leads out)|holds a run"):
        Run(
            "sft", {"a": 1}, output_dir=folder, resume=way == "resume", overwrite=way == "overwrite"
        )
    assert precious.read_text() == before and list(outside.iterdir()) == [precious]
    assert sorted(path.name for path in folder.rglob("*")) == there


def test_w_and_b_s_own_links_stay(folder):
    """latest-run, say: within its folder."""
    Run("sft", {}, output_dir=folder).close()
    (folder / "wandb" / "run-1").mkdir(parents=True)
    (folder / "wandb" / "latest-run").symlink_to("run-1")
    Run("sft", {}, output_dir=folder, resume=True).close()


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    Run("sft", {}, output_dir=tmp_path / "link").close()
    assert (folder / "config.json").exists()


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", '{"model_type": "llama", "options": {}}'),
        ("config.json", '{"script": "sft"'),
        ("config.json", "[" * 100_000),
        ("summary.json", "{}"),
        ("plots", None),
        ("model", None),  # what the script itself writes there
    ],
)
def test_files_under_the_names_of_a_run_that_are_none_stay(folder, name, text):
    folder.mkdir()
    (folder / name).write_text(text) if text else (folder / name / "mine").mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"holds {name}, and no run that it belongs to"):
            Run("sft", {}, output_dir=folder, overwrite=overwrite, outputs=("model",))
    there = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    assert sorted(there) == ([name] if text else [name, f"{name}/mine"])
    assert text is None or (folder / name).read_text() == text


def test_an_overwrite_that_is_cut_short_can_be_repeated(folder, monkeypatch):
    """What is left of the old run is still a run's folder."""
    Run("sft", {}, output_dir=folder).close()

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("run_folder.run.write_json", cut)
        Run("sft", {}, output_dir=folder, overwrite=True)
    Run("sft", {}, output_dir=folder, overwrite=True).close()


def test_a_place_where_no_folder_can_be_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Run("sft", {}, output_dir=tmp_path / "file" / "run")


# ------------------------------------------------------------------------------ the lock

HOLDER = """
    import sys, time
    from run_folder.run import Run
    run = Run("sft", {}, output_dir=sys.argv[1])
    print("open", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_dead_one_leaves_no_lock(folder):
    holder = python(HOLDER, str(folder))
    assert holder.stdout.readline() == "open\n"
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=f"by process {holder.pid}"):
            Run("sft", {}, output_dir=folder, **options)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with Run("sft", {}, output_dir=folder, resume=True) as run:
        run.log(1, {"x": 1})
    assert read_rows(folder) == [{"step": 1, "x": 1}]


def test_a_closed_run_frees_its_folder(folder):
    Run("sft", {}, output_dir=folder).close()
    with pytest.raises(UserError, match="holds a run"):
        Run("sft", {}, output_dir=folder)
    Run("sft", {}, output_dir=folder, resume=True).close()


# ------------------------------------------------------------------------------ secrets


def test_secrets_are_redacted_by_name_by_value_and_in_urls(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    monkeypatch.setenv("SHORT_KEY", "digits")
    options = {
        "hub_token": "anything",
        "note": "my hf_abcdefghij here",
        "url": "http://me:pw@host/x",
        "nested": [{"api_key": "k"}],
        "stop_token": "<end>",
        "num_prompt_tokens": 10,
        "model": "data/digits_model",
    }
    clean = redact(options)
    text = json.dumps(clean)
    for secret in ("anything", "hf_abcdefghij", "me:pw", '"k"'):
        assert secret not in text
    assert clean["note"] == f"my {REDACTED} here" and clean["url"] == f"http://{REDACTED}@host/x"
    kept = ("stop_token", "num_prompt_tokens", "model")
    assert all(clean[name] == options[name] for name in kept)


# ------------------------------------------------------------------------------ W&B

TRACKED = """
    import random, sys
    import numpy as np
    from PIL import Image
    from run_folder.run import Run
    folder, steps = sys.argv[1], int(sys.argv[2])
    options = {"learning_rate": 0.125, "hub_token": "tok_in_options"}
    with Run("ppo", options, output_dir=folder, log_with="wandb") as run:
        random.seed(0), np.random.seed(0)
        before = random.getstate(), np.random.get_state()[1].tolist()
        for step in range(1, steps + 1):
            run.log(step, {"ppo/mean_scores": step / 8, "objective/kl": float("nan")})
            run.log_samples(step, [{"prompt": "2 4", "response": "6 8", "score": 1.0}])
            run.log_values(step, "scores", [1.0, 2.5, float("nan")])
            if step == 2:  # a look at held-out rows sends the samples so far
                run.log(step, {"eval/greedy/score": 0.5})
        run.plots.mkdir()
        Image.new("RGB", (4, 4)).save(run.plots / "ppo.png")
        # Seeded draws must not depend on whether W&B listens.
        assert before == (random.getstate(), np.random.get_state()[1].tolist())
        run.finish({"score": 0.875})
"""


def tracked(folder: Path, steps: int, **env: str) -> tuple[list[Path], str]:
    """Files that a run of ``steps`` leaves in its folder with W&B, and its standard error."""
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"}
    process = python(TRACKED, str(folder), str(steps), env={**clean, "HOME": str(home), **env})
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert not [path for path in home.rglob("*") if path.is_file()]
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()], err


def test_wandb_offline_makes_a_table_an_evaluation_and_no_file_per_step(folder, tmp_path):
    pytest.importorskip("wandb")
    secret = "value_of_a_secret_variable"
    files, _ = tracked(folder, 50, WANDB_MODE="offline", MY_API_TOKEN=secret)
    few, _ = tracked(tmp_path / "few", 2, WANDB_MODE="offline")
    assert len(files) == len(few) + 1 < 20  # both tables of two steps are one file
    tables = [path for path in files if path.name.endswith(".table.json")]
    assert sorted(len(json.loads(table.read_text())["data"]) for table in tables) == [2, 50]
    assert len([path for path in files if path.suffix == ".png" and "media" in path.parts]) == 1
    (record,) = [path for path in files if path.suffix == ".wandb"]
    written = record.read_bytes()
    numbers = (b"ppo/mean_scores", b"6.25", b"learning_rate", b"0.125", b"0.875")
    for text in (*numbers, b"histogram", b"plots/ppo"):
        assert text in written, text
    for path in files:
        data = path.read_bytes()
        assert b"tok_in_options" not in data and secret.encode() not in data, path


def test_wandb_without_a_key_or_a_terminal_asks_nothing(folder):
    pytest.importorskip("wandb")
    files, err = tracked(folder, 2)
    assert "logging offline" in err
    assert any(path.suffix == ".wandb" for path in files)


def test_without_wandb_a_resumed_run_stays_as_it_was(folder, monkeypatch):
    Run("sft", {"log_with": "none"}, output_dir=folder).close()
    before = (folder / "config.json").read_bytes()
    monkeypatch.setattr("run_folder.loggers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--log-with wandb: not installed"):
        Run("sft", {"log_with": "wandb"}, output_dir=folder, resume=True, log_with="wandb")
    with pytest.raises(UserError, match="--log-with wandb: not installed"):
        Run("sft", {}, output_dir=folder.with_name("new"), log_with="wandb")
    assert (folder / "config.json").read_bytes() == before and not folder.with_name("new").exists()


# ------------------------------------------------------------------------------ TensorBoard


def events(folder: Path) -> list:
    """Every event of a run's files, by TensorBoard's record format: length, sum, bytes, sum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    return found


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    return [
        (event.step, value.tag, value.simple_value)
        for event in events(folder)
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


def test_tensorboard_gets_the_numbers_and_no_secret(folder):
    pytest.importorskip("tensorboardX")
    with Run("sft", {"token": "hf_" + "a" * 34}, output_dir=folder, log_with="tensorboard") as run:
        for step in (1, 2):
            run.log(step, {"train/loss": step / 4, "what": "text", "nothing": math.nan})
        run.log_samples(2, [{"prompt": "8 20", "response": " 22"}])
        run.finish({"steps": 2})
    assert scalars(folder) == [(1, "train/loss", 0.25), (2, "train/loss", 0.5)]
    written = b"".join(file.read_bytes() for file in (folder / "tensorboard").iterdir())
    assert b"8 20" in written and b"hf_" + b"a" * 34 not in written


def test_a_resumed_run_voids_what_tensorboard_had_of_later_steps(folder):
    pytest.importorskip("tensorboardX")
    first = Run("sft", {}, output_dir=folder, log_with="tensorboard")
    first.log(1, {"loss": 1.0})
    state = first.state_dict()
    first.log(2, {"loss": 2.0})
    first.close()
    with Run("sft", {}, output_dir=folder, resume=True, log_with="tensorboard") as again:
        again.load_state_dict(state)
        again.log(2, {"loss": 3.0})
    starts = [event.step for event in events(folder) if event.session_log.status == 1]
    assert starts == [2]  # from this step on, TensorBoard forgets what came before
    assert scalars(folder)[-1] == (2, "loss", 3.0)


def test_without_a_logger_s_library_nothing_is_touched(folder, monkeypatch):
    monkeypatch.setattr("run_folder.loggers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--log-with tensorboard: not installed; pip install ten"):
        Run("sft", {}, output_dir=folder, log_with="tensorboard")
    assert not folder.exists()


# ------------------------------------------------------------------------------ memory


def test_a_memory_limit_ends_in_advice():
    held = mx.zeros(1_000_000)
    mx.eval(held)
    assert peak_memory() >= 0.004
    check_memory(None, peak_memory())
    check_memory(1000.0, peak_memory())
    with pytest.raises(UserError, match="--memory-limit.*0.001 allowed.*--batch-size"):
        check_memory(0.001, peak_memory())
