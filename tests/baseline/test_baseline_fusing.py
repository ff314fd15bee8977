"""Folders that fuse.py wrote open in transformers, and compute there what base and adapter do."""

import mlx.core as mx
import numpy as np
import pytest
from fuse_setup import fuse, make_adapter
from tiny import tiny_model_folder

pytest.importorskip("torch")
from transformers_models import CASES, SIBLINGS, TOKENS, logits, write  # noqa: E402

pytestmark = pytest.mark.torch
DENSE = ("qwen2_moe-dense", "qwen3_moe-first_dense")  # MLPs in some layers
SOON = ("mixtral", "olmoe", "qwen2_moe", "mamba2", "gemma3", *DENSE)
EVERY = [pytest.param(c, marks=() if c in SOON else pytest.mark.long) for c in (*CASES, *DENSE)]


def check_fused(tmp_path, base) -> None:
    """LoRA on every linear layer, experts too; `logits` wants every weight found."""
    loaded, _ = make_adapter(tmp_path / "a.npz", "lora", base)
    expected = np.array(loaded.model(mx.array([TOKENS]))[0])
    fuse(tmp_path, "--adapter-file", "a.npz", "--save-path", "fused")
    theirs = logits(tmp_path / "fused")
    assert np.abs(expected[:, : theirs.shape[1]] - theirs).max() < 1e-3


@pytest.mark.parametrize("case", EVERY)
def test_fused_models_compute_the_same_in_transformers(case, tmp_path):
    write(case, tmp_path / "base")
    check_fused(tmp_path, tmp_path / "base")


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "qwen2_moe"])
def test_so_do_those_of_a_base_in_mlx_lms_form(architecture, tmp_path):
    base = tiny_model_folder(tmp_path / "base", architecture=architecture, norm_topk_prob=False)
    check_fused(tmp_path, base)


@pytest.mark.long
@pytest.mark.parametrize("case", SIBLINGS)
def test_names_of_models_that_transformers_has_not(case, tmp_path):
    write(case, tmp_path / "base")
    make_adapter(tmp_path / "a.npz", "lora", tmp_path / "base")
    fuse(tmp_path, "--adapter-file", "a.npz", "--save-path", "fused")
