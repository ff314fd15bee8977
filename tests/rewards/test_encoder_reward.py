"""Encoder classifiers (BERT and the like) as rewards: through transformers, if torch is there."""

import importlib.util
import json

import pytest
from files import ROOT
from tiny_encoders import tiny_bert, transformers_scores
from tiny_tokenizers import tiny_tokenizer

from errors import UserError
from models.encoder_reward import is_encoder
from models.load import load_model
from models.reward_model import load_reward_model
from rewards.entailment import load_entailment
from rewards.internal import Signals
from rewards.learned import learned_reward

HAS_TORCH = importlib.util.find_spec("torch") is not None
PAIRS = [("8 20", " 22 24"), ("2 4", " 6"), ("", "2 4 6 8"), ("8 20", " 22 24 26 28 1 3 5")]


def needs_torch(test):
    absent = pytest.mark.skipif(not HAS_TORCH, reason="make test-baseline installs PyTorch")
    return pytest.mark.torch(absent(test))


def write_config(folder, **changes):
    folder.mkdir(exist_ok=True)
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ------------------------------------------------------------------------------ without torch


@pytest.mark.parametrize(
    ("config", "is_one"),
    [
        ({}, True),
        ({"model_type": "deberta-v2"}, True),
        ({"model_type": "llama"}, False),
        ({"architectures": ["BertForMaskedLM"]}, False),
        ({"architectures": None}, False),
    ],
)
def test_which_folders_are_encoders(tmp_path, config, is_one):
    assert is_encoder(write_config(tmp_path / "m", **config)) is is_one
    assert not is_encoder(tmp_path)


@pytest.mark.skipif(HAS_TORCH, reason="torch is there")
@pytest.mark.parametrize("script", ["ppo_training.py", "score.py", "talk_to_model.py"])
def test_without_torch_one_line_says_what_to_install(tmp_path, script, capsys, monkeypatch):
    import ppo_training
    import score
    import talk_to_model
    from command_line.exits import run_main

    monkeypatch.chdir(tmp_path)
    folder = str(write_config(tmp_path / "bert"))
    data = str(ROOT / "data" / "increasing_mult_2_test.jsonl")
    words = {
        "ppo_training.py": ["--data", str(ROOT / "data"), "--output-dir", "run"],
        "score.py": ["--input", data],
        "talk_to_model.py": ["8 20"],
    }[script]
    module = {"ppo_training.py": ppo_training, "score.py": score, "talk_to_model.py": talk_to_model}
    with pytest.raises(SystemExit) as end:
        run_main(lambda: module[script].main([*words, "--reward-model", folder]))
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and error.endswith("not installed: pip install torch")
    assert "bert" in error and not (tmp_path / "run").exists()


def test_an_encoder_is_not_fused(tmp_path):
    with pytest.raises(UserError, match="neither fused nor exported"):
        load_reward_model(write_config(tmp_path / "bert"), dtype="stored")


def test_an_unknown_family_is_named(tmp_path):
    folder = write_config(
        tmp_path / "t5", model_type="t5", architectures=["T5ForSequenceClassification"]
    )
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="t5"):
        load_reward_model(folder)


TALK = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3?"},
]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [("8 20", "8 20"), (TALK[:1], "What is 2 + 2?"), (TALK, "What is 2 + 2?\n\n4\n\nAnd 3?")],
)
def test_a_reward_that_reads_pairs_gets_prompt_and_response_apart(prompt, text):
    seen = []

    class Reader:
        reads_pairs = True

        def score(self, pairs, batch_size):
            seen.extend(pairs)
            return [float(len(response)) for _, response in pairs]

    reward = learned_reward(Reader(), tiny_tokenizer(template="chatml"))
    assert reward.function([prompt], [" 22"], token_ids=[[1, 2]], ended=[True]) == [3.0]
    assert seen == [(text, " 22")]


# ------------------------------------------------------------------------------ with torch


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert") / "bert")


@needs_torch
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_those_of_transformers(bert, batch_size):
    model = load_reward_model(bert)
    expected = transformers_scores(bert, PAIRS)
    assert model.score(PAIRS, batch_size) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.05


@needs_torch
def test_a_long_text_is_cut_and_said_once(bert):
    model = load_reward_model(bert)
    long = ("8 20", " 22 24" * 100)
    fits = ("8 20", (" 22 24" * 100)[: len(" 22 24") * 29 + 3])  # 64 tokens with the marks
    assert model.max_tokens == 64
    with pytest.warns(UserWarning, match="reads 64 tokens") as said:
        cut = model.score([long, long])
    assert cut == pytest.approx(model.score([fits]) * 2, abs=1e-5)
    assert len([one for one in said if "reads 64 tokens" in str(one.message)]) == 1


@needs_torch
def test_other_than_one_label_and_missing_weights_are_refused(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    with pytest.raises(UserError, match="3 labels"):
        load_reward_model(tiny_bert(tmp_path / "three", labels=3))
    folder = tiny_bert(tmp_path / "headless")
    arrays = load_file(folder / "model.safetensors")
    arrays = {k: v.contiguous() for k, v in arrays.items() if not k.startswith("classifier")}
    assert all(isinstance(v, torch.Tensor) for v in arrays.values())
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 2 arrays, such as classifier.bias"):
        load_reward_model(folder)


@needs_torch
def test_pickled_weights_are_refused(tmp_path):
    folder = tiny_bert(tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled"):
        load_reward_model(folder)


@needs_torch
def test_ppo_is_rewarded_by_it(bert, tmp_path, monkeypatch):
    import ppo_training
    from run_folder.run import read_rows

    monkeypatch.chdir(tmp_path)
    ppo_training.main(
        [
            "--reward_model",
            str(bert),
            "--data",
            str(ROOT / "data"),
            "--num_steps",
            "2",
            "--batch_size",
            "4",
            "--max-new-tokens",
            "6",
            "--eval-every",
            "0",
            "--samples-per-step",
            "4",
            "--output-dir",
            "run",
        ]
    )
    first = [row for row in read_rows(tmp_path / "run") if row["step"] == 1][-1]
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    samples = [sample for sample in map(json.loads, lines) if sample["step"] == 1]
    pairs = [(sample["prompt"], sample["response"]) for sample in samples]
    expected = transformers_scores(bert, pairs)
    assert [s["score"] for s in samples] == pytest.approx(expected, abs=1e-4)
    assert first["env/reward_mean"] == pytest.approx(sum(expected) / 4, abs=1e-4)


@needs_torch
def test_score_py_and_chat_give_the_same(bert, tmp_path, monkeypatch, capsys):
    import score
    import talk_to_model

    monkeypatch.chdir(tmp_path)
    row = {"prompt": "8 20", "completion": " 22 24"}
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    score.main(["--input", "in.jsonl", "--reward-model", str(bert), "--output", "out.jsonl"])
    (expected,) = transformers_scores(bert, [("8 20", " 22 24")])
    scored = json.loads((tmp_path / "out.jsonl").read_text())
    assert scored["score"] == pytest.approx(expected, abs=1e-5)
    capsys.readouterr()
    talk_to_model.main(["8 20", "--reward-model", str(bert), "--temp", "0"])
    reply = capsys.readouterr()
    (expected,) = transformers_scores(bert, [("8 20", reply.out.rstrip("\n"))])
    assert f"{expected:.3f}"[:4] in reply.err, reply


# ------------------------------------------------------------------------------ entailment


def test_an_entailment_model_has_to_be_an_encoder(tmp_path):
    with pytest.raises(UserError, match="no folder of an encoder"):
        load_entailment(str(write_config(tmp_path / "m", model_type="llama")))


@needs_torch
def test_faithfulness_by_entailment_is_the_mean_over_sentences(tmp_path):
    """Softmax over the labels, at the one that is called entailment."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tiny_bert(tmp_path / "nli", labels=3)
    with pytest.raises(UserError, match="none of its 3 labels is called entailment"):
        load_entailment(str(folder))
    config = json.loads((folder / "config.json").read_text())
    names = {0: "contradiction", 1: "neutral", 2: "ENTAILMENT"}
    config |= {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    responses, expected = ["22 24. 26 28!", " 6 8 10 12 14"], []
    for prompt, sentences in (("8 20", ["22 24.", "26 28!"]), ("2 4", ["6 8 10 12 14"])):
        with torch.no_grad():
            logits = [model(**tokenizer(prompt, s, return_tensors="pt")).logits for s in sentences]
        expected.append(sum(x.softmax(-1)[0, 2].item() for x in logits) / len(logits))
    digits = load_model(None).tokenizer
    signals = Signals(
        None, digits, ["faithfulness"], eos_ids={2}, entailment=load_entailment(str(folder))
    )
    fronts = [list(digits.encode(prompt)) for prompt in ("8 20", "2 4")]
    backs = [list(digits.encode(text, add_special_tokens=False)) for text in responses]
    found = signals.scores(
        ["8 20", "2 4"],
        responses,
        [front + back for front, back in zip(fronts, backs, strict=True)],
        [len(front) for front in fronts],
        ["8 20", "2 4"],
    )["faithfulness"]
    assert found == pytest.approx(expected, abs=1e-5)
