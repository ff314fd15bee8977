"""Every single bit of a run's metadata, flipped: refused, said, or without effect on the result."""

import fast_blas  # noqa: F401  isort: skip

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from reliable_runs import Server, differences, left_by, shared_server
from script_table import words

import sft
from command_line import option_files
from errors import UserError
from run_folder import checkpoint_folder, resuming, run_config
from run_folder import rows as rows_module
from run_folder.checkpoint_folder import list_checkpoints, read_best
from run_folder.manifest import problem, read_manifest
from run_folder.resuming import check_checkpoint_options
from run_folder.rows import RowFile
from run_folder.run import Run
from safe_files import plain
from training.checkpoints import load_checkpoint

LINE = words(
    "--train --data DATA --output-dir run --save-file out.npz --lora-rank 1 --lora-layers 1 "
    "--max-rows 8 --batch-size 2 --iters 3 --save-every 1 --steps-per-eval 1 --val-batches 1 "
    "--save-best --keep-checkpoints 2"
)
METADATA = (
    "config.json",
    "checkpoints/best.json",
    "metrics.jsonl",
    "samples.jsonl",
    "bad_rows.jsonl",
)
OF_A_CHECKPOINT = ("manifest.json", "options.json", "state.json", "adapter_config.json")


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


@pytest.fixture(scope="module")
def run(server, tmp_path_factory):
    """A run that was killed in its third update, with two checkpoints and a best one."""
    folder = tmp_path_factory.mktemp("flips")
    assert server.run("sft.py", [*LINE, "--iters", "2"], folder).code == 0
    (folder / "run" / "summary.json").unlink()
    return folder


def metadata(folder: Path) -> list[Path]:
    checkpoints = sorted((folder / "run" / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 2
    found = [folder / "run" / name for name in METADATA]
    return found + [c / name for c in checkpoints for name in OF_A_CHECKPOINT]


def flips(file: Path) -> range:
    return range(file.stat().st_size * 8)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def what_a_resume_goes_by(file: Path, folder: Path):
    """As the program reads it from `file`; a UserError or SystemExit where it is refused."""
    checkpoint = file.parent
    if file.name == "config.json":
        args = vars(sft.parse_arguments(["--resume", str(folder)]))
        options = {n: v for n, v in args.items() if n not in run_config.OF_ONE_START}
        with Run("sft", {**options, "may_change": ()}, output_dir=folder, resume=True) as run:
            check_checkpoint_options(list_checkpoints(run.checkpoints)[-1], run, False)
        return json.dumps(plain(options), sort_keys=True)
    if file.name == "best.json":
        return read_best(checkpoint)
    if file.name.endswith(".jsonl"):
        rows = RowFile(file)
        rows.cut_back(ROWS[file])
        return rows.close()
    if wrong := problem(checkpoint):
        raise UserError(wrong)
    return read_manifest(checkpoint), (checkpoint / "state.json").read_bytes()


ROWS: dict[Path, dict] = {}  # what the newest checkpoint says of a file of rows


def flip(run: Path, monkeypatch, pick: random.Random | None) -> Counter:
    """(file, outcome) of every flip, or of 40 a file that `pick` chooses."""
    told: list[str] = []
    monkeypatch.chdir(run)  # elsewhere a resume says where --save-file is
    for module in (checkpoint_folder, option_files, resuming, rows_module):
        monkeypatch.setattr(module, "tell", told.append)
    folder, counts, silent = run / "run", Counter(), []
    state = load_checkpoint(list_checkpoints(folder / "checkpoints")[-1]).state
    ROWS.update({folder / name: there for name, there in state["run"].items()})
    for file in metadata(run):
        data = file.read_bytes()
        before, bits = what_a_resume_goes_by(file, folder), flips(file)
        assert not told, told
        for bit in bits if pick is None else pick.sample(bits, min(len(bits), 40)):
            file.write_bytes(flipped(data, bit))
            try:
                after = what_a_resume_goes_by(file, folder)
                outcome = "without effect" if after == before else "silent"
                outcome = "said" if told else outcome
            except (UserError, SystemExit):
                outcome = "refused"
            told.clear()
            counts[file.name, outcome] += 1
            if outcome == "silent":
                silent.append(f"{file.name}: bit {bit}")
        file.write_bytes(data)
    assert not silent
    return counts


def test_a_flipped_bit_of_metadata_is_refused_said_or_without_effect(run, monkeypatch):
    counts = flip(run, monkeypatch, random.Random(0))
    assert sum(counts.values()) > 300
    assert sum(count for (_, how), count in counts.items() if how == "refused") > 100


@pytest.mark.long
def test_every_flipped_bit_is(run, monkeypatch):
    counts = flip(run, monkeypatch, None)
    total = Counter()
    for (file, how), count in sorted(counts.items()):
        print(f"{file}: {count} {how}")
        total[how] += count
    print(f"{total.total()} flipped bits: {dict(total)}")


@pytest.mark.parametrize(
    "name, bit",
    [
        ("config.json", b'"learning_rate": 0.000'),
        ("checkpoints/best.json", b"step-0000000"),
        ("checkpoints/step-00000002/manifest.json", b'"step": '),
        ("checkpoints/step-00000002/state.json", b'"step": '),
        ("checkpoints/step-00000002/options.json", b'"seed": '),
    ],
)
def test_one_digit_never_gives_another_result_in_silence(server, run, tmp_path, name, bit):
    """The script itself: it refuses, or says something and ends with the bytes of a whole run."""
    shutil.copytree(run, tmp_path / "whole")
    shutil.copytree(run, tmp_path / "hit")
    line = ["--resume", "run", "--iters", "3"]
    assert server.run("sft.py", line, tmp_path / "whole").code == 0
    file = tmp_path / "hit" / "run" / name
    data = file.read_bytes()
    at = data.index(bit) + len(bit)
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    ended = server.run("sft.py", line, tmp_path / "hit")
    assert ended.code in (0, 2), ended.err
    if ended.code == 2:
        assert "error: " in ended.err and "Traceback" not in ended.err
        return
    assert "warning: " in ended.err, ended.err
    there = (left_by(tmp_path / which / "run", "out.npz") for which in ("whole", "hit"))
    assert [d for d in differences(*there) if "python" not in d] == []
