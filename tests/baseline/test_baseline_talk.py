"""pytorch_talk_to_model.py replies as talk_to_model.py does."""

import io
import sys

import pytest
from baseline_setup import DIGITS
from tiny import tiny_model_folder

import talk_to_model

pytestmark = pytest.mark.torch


def lines_of(main, words, text, monkeypatch, capsys) -> list[str]:
    """What a script prints for the lines of a pipe, without what a random model makes of bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    main([str(word) for word in words])
    lines = capsys.readouterr().out.split("\n")[:-1]
    return ["".join(c for c in line if " " <= c <= "~").strip() for line in lines]


@pytest.mark.parametrize("model", ["digits", "chatml"])
def test_replies_to_a_pipe_are_those_of_the_mlx_side(model, tmp_path, monkeypatch, capsys):
    import pytorch_talk_to_model

    folder = DIGITS
    if model == "chatml":
        folder = tiny_model_folder(tmp_path / "m", template="chatml", bos=False)
    words = ["--model", folder, "-m", 7, "-c", 30]
    asked = "8 20 22\n\nwhat is 4 6\n"
    mlx = lines_of(talk_to_model.main, words, asked, monkeypatch, capsys)
    torch = lines_of(pytorch_talk_to_model.main, words, asked, monkeypatch, capsys)
    assert torch == mlx and "".join(mlx)


def test_the_seed_repeats_samples(monkeypatch, capsys):
    import pytorch_talk_to_model

    words = ["--model", DIGITS, "--temp", 1, "--max-tokens", 12]
    first, again, other = (
        lines_of(pytorch_talk_to_model.main, [*words, "--seed", s], "8 20\n", monkeypatch, capsys)
        for s in (3, 3, 4)
    )
    assert first == again != other
