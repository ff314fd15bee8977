"""Files that are read back before they get their name, links, swapped folders, left-overs."""

import fast_blas  # noqa: F401  isort: skip

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from fuse_setup import fuse, make_adapter
from hub_server import TOKEN, Hub

import safe_files
from errors import UserError
from models import array_files
from models.adapter_files import load_adapter, read_adapter, save_adapter, save_head
from models.load import DEFAULT_MODEL, load_model
from models.model_folders import new_folder
from publishing.hub import Upload, files_to_upload, upload_folder
from run_folder.checkpoint_folder import saving
from safe_files import copy_file, refuse_links, sweep, write_atomically
from training.checkpoints import save_checkpoint

ARRAYS = {"a": mx.arange(6.0).reshape(2, 3), "b": mx.array([1.5, float("nan")])}


def dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


# ------------------------------------------------------------------------------ read back


def without_last(write):
    """MLX's writer, which loses an array, as it does where the write of it failed."""
    return lambda file, *words, **arrays: write(
        file,
        *[dict(list(w.items())[:-1]) if i == 0 else w for i, w in enumerate(words)],
        **(arrays if words else dict(list(arrays.items())[:-1])),
    )


def with_a_flipped_bit(write):
    """A disk that keeps the last byte of the last array as something else."""

    def writer(file, *words, **arrays):
        write(file, *words, **arrays)
        if file.endswith(".npz"):  # in the middle of the first array, behind the zip's header
            at = Path(file).read_bytes().index(b"\x93NUMPY") + 130
        else:
            at = os.path.getsize(file) - 1
        with open(file, "rb+") as opened:
            opened.seek(at)
            byte = opened.read(1)[0]
            opened.seek(at)
            opened.write(bytes([byte ^ 1]))

    return writer


def cut_short(write):
    def writer(file, *words, **arrays):
        write(file, *words, **arrays)
        os.truncate(file, os.path.getsize(file) - 8)

    return writer


@pytest.mark.parametrize("fault", [without_last, with_a_flipped_bit, cut_short])
@pytest.mark.parametrize("name", ["out.npz", "out.safetensors", "out"])
def test_an_adapter_that_was_not_written_whole_is_not_given_its_name(
    tmp_path, monkeypatch, name, fault
):
    loaded, tuning = make_adapter(tmp_path / "before.npz", "lora")
    path = tmp_path / name
    save_adapter(path, tuning, loaded)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for write in ("savez", "save_safetensors"):
        monkeypatch.setattr(mx, write, fault(getattr(mx, write)))
    with pytest.raises(UserError, match=rf"{path}: cannot write: .*{safe_files.NOT_WHOLE}"):
        with saving(path):
            save_adapter(path, tuning, loaded)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("fault", [without_last, with_a_flipped_bit, cut_short])
def test_nor_is_a_checkpoint_or_a_fused_model(tmp_path, monkeypatch, fault):
    make_adapter(tmp_path / "a.npz", "lora")
    whole = save_checkpoint(tmp_path / "checkpoints", 1, {"g": ARRAYS | {"b": mx.ones(2)}}, {})
    monkeypatch.setattr(mx, "save_safetensors", fault(mx.save_safetensors))
    with pytest.raises(UserError, match=safe_files.NOT_WHOLE):
        save_checkpoint(tmp_path / "checkpoints", 2, {"g": ARRAYS | {"b": mx.ones(2)}}, {})
    err = fuse(tmp_path, "--adapter-file", "a.npz", "--save-path", "fused", status=2)
    assert "fused: cannot write:" in err and safe_files.NOT_WHOLE in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "checkpoints"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [whole.name]


def test_text_and_copies_are_read_back(tmp_path, monkeypatch):
    (tmp_path / "old").write_text("old")
    (tmp_path / "source").write_text("1234")
    sync = os.fsync

    def fsync(handle):  # the disk loses the last byte
        sync(handle)
        try:
            os.ftruncate(handle, os.fstat(handle).st_size - 1)
        except OSError:
            pass  # a folder, or a file that is open for reading alone

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=f"old: cannot write: {safe_files.NOT_WHOLE}"):
        write_atomically(tmp_path / "old", "new")
    assert (tmp_path / "old").read_text() == "old"
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(shutil, "copyfile", lambda a, b: Path(b).write_text("123"))
    with pytest.raises(OSError, match=safe_files.NOT_WHOLE):
        copy_file(tmp_path / "source", tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "old", "source"]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.bool_])
def test_what_was_written_whole_is_taken_for_it(tmp_path, dtype):
    arrays = {"x": mx.ones((3, 5)).astype(dtype), "one": mx.array(1).astype(dtype)}
    arrays |= {"none": mx.zeros((0, 4), dtype=dtype), "turned": arrays["x"].T}
    array_files.save_arrays(tmp_path / "x.safetensors", arrays, {"format": "mlx"})
    if dtype != mx.bfloat16:
        array_files.save_arrays(tmp_path / "x.npz", arrays, {})


# ------------------------------------------------------------------------------ links


def test_a_link_is_refused_by_every_writer_and_copier(tmp_path):
    (outside := tmp_path / "outside").mkdir()
    (precious := outside / "precious").write_text("mine")
    (folder := tmp_path / "folder").mkdir()
    for name in ("text", "out.npz", "out.safetensors", "copy", "gguf"):
        (folder / name).symlink_to(precious)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").symlink_to(precious)
    loaded, tuning = make_adapter(tmp_path / "a.npz", "lora")
    writers = {
        "text": lambda path: write_atomically(path, "x"),
        "out.npz": lambda path: save_adapter(path, tuning, loaded),
        "out.safetensors": lambda path: save_adapter(path, tuning, loaded),
        "copy": lambda path: copy_file(tmp_path / "a.npz", path),
        "adapter": lambda path: save_adapter(path, tuning, loaded),
    }
    for name, write in writers.items():
        with pytest.raises(UserError, match="is a symbolic link, to .*precious"):
            write(folder / name)
    (folder / "h.value_head.safetensors").symlink_to(precious)
    with pytest.raises(UserError, match="is a symbolic link"):
        save_head(folder / "h.npz", "value_head", ARRAYS, {})
    assert precious.read_text() == "mine" and list(outside.iterdir()) == [precious]


def test_links_above_a_folder_are_followed(tmp_path):
    (tmp_path / "real" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomically(tmp_path / "link" / "run" / "text", "x")
    refuse_links(tmp_path / "link" / "run" / "text", tmp_path / "link")
    assert (tmp_path / "real" / "run" / "text").read_text() == "x"
    (tmp_path / "real" / "run" / "plots").symlink_to(tmp_path)
    with pytest.raises(UserError, match="plots: is a symbolic link"):
        refuse_links(tmp_path / "link" / "run" / "plots" / "new.png", tmp_path / "link" / "run")


def test_plots_that_are_links_are_not_published(tmp_path):
    make_adapter(tmp_path / "a.npz", "lora")
    (tmp_path / "run" / "plots").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text('{"script": "sft", "options": {}}')
    (tmp_path / "key").write_text("secret")
    (tmp_path / "run" / "plots" / "x.png").symlink_to(tmp_path / "key")
    words = ("--adapter-file", "a.npz", "--run", "run", "--save-path", "fused")
    assert "x.png: is a symbolic link" in fuse(tmp_path, *words, status=2)
    assert not (tmp_path / "fused").exists()


def test_the_hub_cache_s_own_links_are_followed(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (blobs := tmp_path / "models--a--b" / "blobs").mkdir()
    for file in DEFAULT_MODEL.glob("*"):
        if file.is_file():
            shutil.copyfile(file, blobs / file.name)
            (snapshot / file.name).symlink_to(blobs / file.name)
    make_adapter(tmp_path / "a.npz", "lora")
    fuse(tmp_path, "--model", snapshot, "--adapter-file", "a.npz", "--save-path", "fused")
    assert not any(path.is_symlink() for path in (tmp_path / "fused").iterdir())


# ------------------------------------------------------------------------------ uploads


ODD = ["model[1].safetensors", "all*.json", "what?.txt", "a[!b]c", "[ab].json"]


def test_files_are_sent_by_name_and_not_by_pattern(tmp_path, monkeypatch):
    """Names with [, * and ? would stand for others; what was listed is what arrives."""
    from huggingface_hub import constants

    folder = tmp_path / "folder"
    folder.mkdir()
    for number, name in enumerate([*ODD, "model1.safetensors", "a.json", "sub/x[0].json"]):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(str(number))
    wanted = {file.as_posix(): (folder / file).read_bytes() for file in files_to_upload(folder)}
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        upload_folder(folder, Upload("a/b"))
        assert hub.repos["a/b"].branches["main"] == wanted and len(wanted) == 8


@pytest.mark.parametrize("name", ["model[1]", "a*", "what?", "[!x]"])
def test_a_model_may_lie_in_a_folder_named_like_a_pattern(tmp_path, name):
    """mlx-lm looks for weights by a pattern, which would find none or those of another folder."""
    make_adapter(tmp_path / "a.npz", "lora")
    for folder in ("model1", "aa", "whats", "y"):
        shutil.copytree(DEFAULT_MODEL, tmp_path / folder)
    fuse(tmp_path, "--adapter-file", "a.npz", "--save-path", name)
    there, base = load_model(str(tmp_path / name)), load_model(None)
    ids = mx.array([[1, 5, 9]])
    assert not mx.array_equal(there.model(ids), base.model(ids))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_linked_folder_is_not_left_out_in_silence(tmp_path):
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "sub" / "x").write_text("x")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "sub")
    with pytest.raises(UserError, match="link: is a link to a folder"):
        files_to_upload(tmp_path / "a")


def tree(folder: Path) -> dict:
    return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.rglob("*")}


def test_a_dry_run_writes_nothing(tmp_path):
    make_adapter(tmp_path / "a.npz", "lora")
    words = ["--adapter-file", "a.npz", "--save-path", "fused", "--upload-repo", "a/b"]
    before = tree(tmp_path)
    out = fuse(tmp_path, *words, "--dry-run")
    assert "would write fused" in out and "model.safetensors" in out and "README.md" in out
    assert tree(tmp_path) == before
    listed = out.partition("revision main:\n")[2]
    fuse(tmp_path, *words[:4])
    (tmp_path / "fused" / "README.md").unlink()
    before = tree(tmp_path)
    out = fuse(tmp_path, "--model", "fused", "--upload-repo", "a/b", "--dry-run")
    assert tree(tmp_path) == before

    def names(text):
        return {line.split()[-1] for line in text.splitlines() if line.startswith("  ")}

    assert names(out) == names(listed) >= {"README.md", "model.safetensors", "config.json"}


# ------------------------------------------------------------------------------ in one step


def test_a_replaced_model_is_there_at_every_moment(tmp_path, monkeypatch):
    """At every call that touches names, a model lies at --save-path."""
    make_adapter(tmp_path / "a.npz", "lora")
    words = ("--adapter-file", "a.npz", "--save-path", "fused")
    fuse(tmp_path, *words)
    seen = []
    for name in ("rename", "replace"):
        inner = getattr(os, name)

        def watched(one, other, inner=inner):
            inner(one, other)
            seen.append((tmp_path / "fused" / "model.safetensors").is_file())

        monkeypatch.setattr(os, name, watched)
    swaps = []
    monkeypatch.setattr(
        safe_files, "swap", lambda *names, f=safe_files.swap: swaps.append(f(*names)) or swaps[-1]
    )
    fuse(tmp_path, *words, "--force")
    assert swaps == [True], "this file system cannot swap two names"
    assert all(seen) and sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "fused"]


def test_where_names_cannot_be_swapped_a_kill_between_is_mended(tmp_path, monkeypatch):
    with new_folder(tmp_path / "m") as folder:
        (folder / "config.json").write_text("old")
    monkeypatch.setattr(safe_files, "swap", lambda *names: False)
    rename, calls = os.rename, itertools.count()
    dead = dead_process()

    class Killed(BaseException):
        pass

    def killed(one, other):
        rename(one, other)
        if next(calls) == 0:
            rename(other, str(other).replace(f"-{os.getpid()}", f"-{dead}"))
            raise Killed

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(Killed), new_folder(tmp_path / "m", force=True) as folder:
        (folder / "config.json").write_text("new")
    assert not (tmp_path / "m").exists()
    monkeypatch.setattr(os, "rename", rename)
    sweep(tmp_path / "m")
    assert (tmp_path / "m" / "config.json").read_text() == "old"
    with new_folder(tmp_path / "m", force=True) as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "m" / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_what_dead_processes_left_is_swept_and_nothing_else(tmp_path):
    dead, alive = dead_process(), os.getppid()
    own = [f".out.writing-{dead}.npz", f".out.writing-{os.getpid()}.npz", f".out.npz.tmp-{dead}"]
    others = [
        f".out.writing-{alive}.npz",
        f".other.writing-{dead}.npz",
        ".out.npz",
        "out.npz",
        f".out.writing-{dead}.npz.txt",
        f"out.writing-{dead}.npz",
    ]
    for name in own + others:
        (tmp_path / name).write_text("x")
    sweep(tmp_path / "out.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    sweep(tmp_path / "nowhere" / "out.npz")


# ------------------------------------------------------------------------------ heads


def test_no_moment_of_a_save_has_a_head_of_another_adapter(tmp_path, monkeypatch):
    """The old head goes before the new adapter has its name."""
    loaded, tuning = make_adapter(tmp_path / "x.npz", "lora")
    for name in ("out.npz", "folder"):
        path = tmp_path / name
        save_adapter(path, tuning, loaded, head="value_head")
        head = save_head(path, "value_head", ARRAYS, {})
        replace = os.replace

        def watched(one, other, replace=replace, head=head):
            assert not head.exists()
            replace(one, other)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", watched)
            save_adapter(path, tuning, loaded, head="value_head")
        assert not head.exists()


def test_a_description_that_is_not_the_arrays_own_is_said(tmp_path):
    loaded, tuning = make_adapter(tmp_path / "x.npz", "lora")
    save_adapter(tmp_path / "folder", tuning, loaded)
    read_adapter(tmp_path / "folder")
    file = tmp_path / "folder" / "adapter_config.json"
    text = file.read_text()
    file.write_text(text.replace('"scale": ', '"scale": 1'))
    with pytest.warns(UserWarning, match="is not what adapters.safetensors says of itself"):
        load_adapter(load_model(None), tmp_path / "folder")
