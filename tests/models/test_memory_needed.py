"""A model larger than the memory is refused before it is read, with what would fit."""

import pytest
from mlx.utils import tree_flatten
from tiny import tiny_model_folder

from errors import UserError
from models import file_checks
from models.file_checks import safetensors_header
from models.load import load_model


@pytest.fixture
def folder(tmp_path):
    return tiny_model_folder(tmp_path, hidden_size=64)


def needed(folder, dtype, quantize=None) -> float:
    header = safetensors_header(folder / "model.safetensors")
    return file_checks.weights_bytes(list(header.values()), dtype, quantize)


@pytest.mark.parametrize("quantize, bits", [(None, 32), (8, 8.5), (4, 4.5)])
def test_bytes_are_those_of_the_loaded_model(folder, quantize, bits):
    loaded = load_model(folder, dtype="float32", quantize=quantize)
    real = sum(array.nbytes for _, array in tree_flatten(loaded.model.parameters()))
    found = needed(folder, "float32", quantize)
    assert found == pytest.approx(real, rel=0.001 if quantize is None else 0.15)
    count = sum(a.size for _, a in tree_flatten(load_model(folder).model.parameters()))
    assert found == pytest.approx(count * bits / 8, rel=0.03)


@pytest.mark.parametrize(
    "share, fits, not_said",
    [
        (0.6, ["--dtype bfloat16", "--quantize 8", "--quantize 4"], "billion"),
        (0.3, ["--quantize 8", "--quantize 4"], "bfloat16"),
        (0.2, ["--quantize 4"], "--quantize 8"),
        (0.1, ["at most", "billion weights"], "--quantize"),
    ],
)
def test_what_would_fit_is_said(folder, share, fits, not_said, monkeypatch):
    limit = int(share * needed(folder, "float32"))
    monkeypatch.setattr(file_checks, "machine_memory", lambda: limit)
    monkeypatch.setattr("models.load._load", None)  # nothing is read
    with pytest.raises(UserError, match="its weights need") as caught:
        load_model(folder, dtype="float32")
    assert all(text in str(caught.value) for text in fits) and not_said not in str(caught.value)


def test_memory_of_this_machine():
    assert 1e8 < file_checks.machine_memory() < 1e14
