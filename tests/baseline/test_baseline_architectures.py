"""Every architecture of docs/architectures.md: logits of models that transformers 5 saved."""

import re

import mlx.core as mx
import numpy as np
import pytest
from files import ROOT

pytest.importorskip("torch")
from transformers_models import CASES, MORE, SIBLINGS, TOKENS, write  # noqa: E402

from models.load import load_model  # noqa: E402

pytestmark = pytest.mark.torch
TABLE = ROOT / "docs" / "architectures.md"
SHORT = [*CASES, *SIBLINGS]


@pytest.mark.parametrize(
    "case", [*SHORT, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)]
)
def test_logits_are_those_of_transformers(case, tmp_path):
    theirs = write(case, tmp_path)
    ours = np.array(load_model(tmp_path, dtype="float32").model(mx.array([TOKENS]))[0])
    assert np.std(theirs) > 0.05
    assert np.abs(ours[:, : theirs.shape[1]] - theirs).max() < 1e-3


def test_every_architecture_on_the_page_is_tried():
    rows = re.findall(r"^\| [\w ]+ \| `(\w+)` \|", TABLE.read_text(encoding="utf-8"), re.M)
    assert {*rows} - {"model_type"} == {*SHORT}
