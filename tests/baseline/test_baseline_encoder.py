"""An encoder trained on pairs by pytorch_sft.py is the reward model that every script reads."""

import json
import random

import pytest
from baseline_setup import torch
from tiny_encoders import WORDS, tiny_bert, transformers_scores

pytestmark = pytest.mark.torch
COMMON = ["--reward-model", "--train", "--iters", "20", "--batch-size", "16", "--save-every", "0"]
COMMON += ["--learning-rate", "3e-3", "--steps-per-eval", "0", "--data-base", ""]


@pytest.fixture
def pairs(tmp_path):
    """Even numbers are better than odd ones."""
    chance = random.Random(0)
    for split, count in (("train", 100), ("valid", 40)):
        rows = []
        for _ in range(count):
            better = " ".join(chance.choices(["2", "4", "6", "8"], k=3))
            worse = " ".join(chance.choices(["1", "3", "5", "7"], k=3))
            rows.append({"prompt": chance.choice("09"), "chosen": better, "rejected": worse})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text)
    return tmp_path


def base_encoder(folder):
    """A BERT without a head, as encoders are published; its config.json names no head either."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    tiny_bert(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(WORDS), intermediate_size=64, **sizes)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_encoder_learns_pairs_and_scores_as_it_was_trained(pairs, tmp_path, capsys):
    import pytorch_encoder
    import pytorch_sft
    from pytorch_runs import parse

    from command_line import sft_flags
    from models.encoder_families import read_pair
    from models.encoder_reward import EncoderReward, is_encoder

    model = base_encoder(tmp_path / "bert")
    assert not is_encoder(model)  # not yet a reward
    words = [*COMMON, "--model", str(model), "--data", str(pairs)]
    words += ["--test", "--test-file", str(pairs / "valid.jsonl")]
    places = ["--output-dir", str(tmp_path / "run"), "--save-file", str(tmp_path / "out")]
    assert pytorch_sft.main([*words, *places]) == 0
    said = capsys.readouterr().out
    assert "test: loss" in said and "has no classifier.bias, classifier.weight" in said
    assert f"ppo_training.py --reward-model {tmp_path / 'out'}" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["heldout/accuracy"] >= 0.95, summary
    assert is_encoder(tmp_path / "out")
    asked = [("0", "2 4 8"), ("9", "1 3 5"), ("", "6 6 6"), ("0", "7")]
    trained = EncoderReward(tmp_path / "out").score(asked)
    assert trained == pytest.approx(transformers_scores(tmp_path / "out", asked), abs=1e-5)
    assert min(trained[0], trained[2]) > max(trained[1], trained[3])
    # What is trained sees a pair as it is read afterwards: segments, padding and all.
    loaded = pytorch_encoder.load_encoder(
        parse(sft_flags, [*words, "--model", str(tmp_path / "out")])
    )
    tokens = [read_pair(loaded.tokenizer, *pair, longest=64)[0]["input_ids"] for pair in asked]
    scores = pytorch_encoder.Encoder(loaded).score(tokens)
    assert scores == pytest.approx(trained, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train"], "an encoder writes no text; give --reward-model"),
        (["--train", "--reward-model", "--prompt-tuning"], "every weight is trained"),
        (["--train", "--reward-model", "--lora-rank", "4"], "--lora-rank has no effect"),
        (["--train", "--reward-model", "--save-file", "x.npz"], "is written as a folder"),
    ],
)
def test_what_an_encoder_cannot_do_is_one_line(words, said, tmp_path):
    import pytorch_sft

    from errors import UserError

    with pytest.raises((UserError, SystemExit)) as wrong:
        pytorch_sft.main([*words, "--model", str(tiny_bert(tmp_path / "bert"))])
    assert said in str(wrong.value)
