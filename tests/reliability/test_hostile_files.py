"""Files from strangers: refused with the reason, nothing run, nothing written elsewhere."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from fuse_setup import fuse, largest, logits, make_adapter

from errors import UserError
from models.adapter_files import load_adapter, read_adapter
from models.array_files import read_arrays
from models.file_checks import safetensors_header
from models.load import load_model
from models.reward_model import RewardModel, load_reward_model, save_reward_head


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def model_folder(tmp_path):
    """A copy of the embedded model that may be spoilt."""
    return shutil.copytree(load_model().path, tmp_path / "model")


def refusal(function, *words) -> str:
    with pytest.raises(UserError) as caught:
        function(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_npz_with_a_pickle_inside(tmp_path):
    trap = np.empty(1, dtype=object)
    trap[0] = Trap(tmp_path / "sprung")
    np.savez(tmp_path / "bad.npz", **{"model.layers.0.self_attn.q_proj.lora_a": trap})
    assert "pickled Python objects" in refusal(read_adapter, tmp_path / "bad.npz")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("evil.pkl", pickle.dumps(Trap(tmp_path / "sprung")))
    assert "evil.pkl is no array" in refusal(read_adapter, tmp_path / "other.npz")
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert "not a sound .npz" in refusal(read_adapter, tmp_path / "plain.npz")
    err = fuse(tmp_path, "--adapter-file", "bad.npz", "--save-path", "x", status=2)
    assert "pickled" in err
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "x").exists()


def test_npz_whose_arrays_lie(tmp_path):
    header = np.lib.format.header_data_from_array_1_0(np.zeros((4, 4), np.float32))
    body = io.BytesIO()
    np.lib.format.write_array_header_1_0(body, {**header, "shape": (1 << 40, 4)})
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("a.lora_a.npy", body.getvalue() + bytes(64))
    assert "does not fill its" in refusal(read_arrays, tmp_path / "bad.npz")
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        archive.writestr("a.lora_a.npy", body.getvalue()[:20])
    assert "not a sound .npz" in refusal(read_arrays, tmp_path / "cut.npz")


def safetensors(path, header, data=bytes(64)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "header, why",
    [
        ({"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 1 << 40]}}, "cannot lie at"),
        ({"a": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 64]}}, "cannot lie at"),
        ({"a": {"dtype": "F32", "shape": [-4, -4], "data_offsets": [0, 64]}}, "no list of counts"),
        (
            {
                "a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
                "b": {"dtype": "F32", "shape": [8], "data_offsets": [32, 64]},
            },
            "cannot lie at",
        ),
        ({"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}, "arrays end at 32"),
        ({"a": {"dtype": "PICKLE", "shape": [16], "data_offsets": [0, 64]}}, "unknown type"),
        ({"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 64]}}, "no list of counts"),
        ({"a": [1]}, "not a sound safetensors"),
        ([], "not a sound safetensors"),
        (b"{" * 100_000, "not a sound safetensors"),
        (b'{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}, "a": 1}', "twice"),
        (b"\xff\xfe", "not a sound safetensors"),
    ],
    ids=range(12),
)
def test_safetensors_headers_that_lie(tmp_path, model_folder, header, why):
    file = safetensors(tmp_path / "bad.safetensors", header)
    assert why in refusal(read_arrays, file)
    shutil.copy(file, model_folder / "model.safetensors")
    assert why in refusal(load_model, model_folder)


def test_safetensors_that_are_cut_or_claim_too_much(tmp_path):
    mx.save_safetensors(str(tmp_path / "good.safetensors"), {"a": mx.zeros((4, 4))})
    good = (tmp_path / "good.safetensors").read_bytes()
    assert safetensors_header(tmp_path / "good.safetensors").keys() == {"a"}
    for number in (0, 4, 8, 40, len(good) - 1):
        (tmp_path / "cut.safetensors").write_bytes(good[:number])
        assert "not a sound" in refusal(read_arrays, tmp_path / "cut.safetensors")
    (tmp_path / "huge.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + good[8:])
    assert "claims 4611686018427387904 bytes" in refusal(read_arrays, tmp_path / "huge.safetensors")


def test_names_with_directories(tmp_path, model_folder):
    loaded = load_model()
    arrays = {"../../escaped.lora_a": mx.zeros((64, 4)), "../../escaped.lora_b": mx.zeros((4, 64))}
    mx.savez(str(tmp_path / "a.npz"), **arrays)
    assert refusal(load_adapter, loaded, tmp_path / "a.npz")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "'../../secret.safetensors'" in refusal(load_model, model_folder)
    assert not [path for path in tmp_path.rglob("*") if "escaped" in path.name]


def test_links_out_of_the_folder(tmp_path, model_folder):
    secret = tmp_path / "secret.json"
    secret.write_text('{"bos_token": "private"}')
    (model_folder / "special_tokens_map.json").unlink()
    (model_folder / "special_tokens_map.json").symlink_to(secret)
    assert "leads out of its folder" in refusal(load_model, model_folder)
    make_adapter(tmp_path / "adapter", "lora")
    weights = tmp_path / "adapter" / "adapters.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    assert "leads out of its folder" in refusal(read_adapter, tmp_path / "adapter")
    # The hub's own cache is made of links, from snapshots/ to blobs/ beside it.
    snapshot = tmp_path / "models--u--n" / "snapshots" / "abc"
    blobs = tmp_path / "models--u--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in load_model().path.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert load_model(snapshot).config["vocab_size"] == 469


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_folders_that_ask_for_code(tmp_path, model_folder, file):
    (model_folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\n")
    settings = json.loads((model_folder / file).read_text())
    asks = {"auto_map": {"AutoTokenizer": ["evil.X", None]}}
    if file == "config.json":
        asks = {"model_file": "evil.py"}
    (model_folder / file).write_text(json.dumps({**settings, **asks}))
    assert "code of its own" in refusal(load_model, model_folder)
    loaded, tuning = make_adapter(tmp_path / "a.npz", "lora")
    err = fuse(
        tmp_path, "--model", model_folder, "--adapter-file", "a.npz", "--save-path", "x", status=2
    )
    assert "--trust-remote-code" in err
    save_reward_head(model_folder, RewardModel(loaded.model))
    assert "code of its own" in refusal(load_reward_model, model_folder)
    assert not (tmp_path / "sprung").exists()


def test_pickled_weights_are_not_read(tmp_path, model_folder):
    (model_folder / "model.safetensors").unlink()
    (model_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert "pickled *.bin weights can run code" in refusal(load_model, model_folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "{",
        '{"fine_tune_type": "lora"}',
        '{"fine_tune_type": "evil", "lora_parameters": {}}',
        '{"lora_parameters": {"rank": "x", "scale": 1}}',
        '{"lora_parameters": 3}',
        '{"lora_parameters": {"rank": 4, "scale": 1, "keys": ["../../x"]}}',
        "[" * 100_000,
    ],
    ids=range(8),
)
def test_adapter_descriptions_that_make_no_sense(tmp_path, config):
    make_adapter(tmp_path / "adapter", "lora")
    (tmp_path / "adapter" / "adapter_config.json").write_text(config)
    assert refusal(load_adapter, load_model(), tmp_path / "adapter")


def test_an_adapter_of_another_shape_changes_nothing(tmp_path):
    make_adapter(tmp_path / "a.npz", "lora", rank=4)
    arrays, config = read_adapter(tmp_path / "a.npz")
    name = next(n for n in arrays if n.endswith("q_proj.lora_a"))
    arrays[name] = mx.zeros((32, 4))
    mx.savez(str(tmp_path / "b.npz"), **arrays)
    loaded = load_model()
    before = logits(loaded.model, loaded.tokenizer)
    said = refusal(load_adapter, loaded, tmp_path / "b.npz")
    assert largest(before, logits(loaded.model, loaded.tokenizer)) == 0
    assert not any("lora_a" in module for module in loaded.model.modules())
    assert f"{name} is (32, 4) in the file and (64, 4) in the model" in said
