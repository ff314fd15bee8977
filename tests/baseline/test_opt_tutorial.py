"""docs/opt_tutorial.md, each command as it is written, on a tiny OPT and a tiny encoder."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from baseline_setup import ROOT
from tiny import tiny_model_folder
from tiny_encoders import WORDS

from models.load import load_model
from run_folder.run import read_rows

pytestmark = pytest.mark.torch
PAGE = (ROOT / "docs" / "opt_tutorial.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()
]
STEPS = ["sft", "fuse", "pytorch_sft", "ppo_training", "fuse", "talk_to_model"]


def write(folder, rows):
    folder.mkdir()
    for split, some in (("train", rows), ("valid", rows[:4])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def tiny_deberta(folder):
    """A random DeBERTa-v2 without a head, and a word-level tokenizer."""
    import torch
    from transformers import BertTokenizerFast, DebertaV2Config, DebertaV2Model

    torch.manual_seed(0)
    folder.mkdir()
    words = [*WORDS, "what", "is", "the", "hello", "world", "answer", "question", ":"]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DebertaV2Config(
        vocab_size=len(words), intermediate_size=32, max_position_embeddings=512, **sizes
    )
    DebertaV2Model(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the page says that you need."""
    made = tmp_path_factory.mktemp("opt")
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 1024}
    more = {"word_embed_proj_dim": 64, "ffn_dim": 64}
    tiny_model_folder(made / "opt", architecture="opt", bos=False, **sizes, **more)
    tiny_deberta(made / "deberta")
    asked = [f"what is the answer {number}" for number in range(20)]
    write(made / "orca", [{"question": q, "response": "the hello world " * 160} for q in asked])
    talk = "\n\nHuman: {}\n\nAssistant: {}"
    sides = ("the answer is hello", "what what what")
    pairs = [[talk.format(question, answer) for answer in sides] for question in asked]
    write(made / "hh", [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs])
    write(made / "prompts", [{"question": q} for q in asked[:4]])
    return made


def test_the_page_has_the_steps_of_the_lesson():
    scripts = [shlex.split(line)[1].removesuffix(".py").rpartition("/")[2] for line in COMMANDS]
    assert scripts == STEPS


def test_every_command_runs_as_it_is_written(folder):
    told = []
    for line in COMMANDS:
        python, script, *words = shlex.split(line)
        assert python == "python"
        done = subprocess.run(
            [sys.executable, ROOT / script, *words], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        told.append(done.stdout)
    sft, _, reward, _, _, talk = told
    assert re.search(r"wrapped into \d+ rows of 1024 tokens, \d+% full", sft)
    assert "held-out rows: accuracy" in reward
    assert talk.strip()
    lengths = [row["tokens/responses_len_mean"] for row in read_rows(folder / "runs" / "opt_ppo")]
    assert len(lengths) == 2 and all(32 <= length <= 400 for length in lengths)
    assert load_model(folder / "opt_rlhf").model.model_type == "opt"
