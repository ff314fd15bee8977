"""The embedded base model: its files, tokenizer and behaviour, and the script that made it."""

import importlib.util
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache
from tokenizers import Tokenizer

from rewards.digits import PROMPT_NUMBERS, count_numbers, digits_score

DATA = Path(__file__).resolve().parents[2] / "data"
FOLDER = DATA / "digits_model"
PAD, BOS, EOS = 0, 1, 2
LENGTH = 16  # tokens of a response

spec = importlib.util.spec_from_file_location("make_digits_model", DATA / "make_digits_model.py")
maker = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = maker
spec.loader.exec_module(maker)


@pytest.fixture(scope="module")
def loaded():
    return load(str(FOLDER), return_config=True)


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


# ---- files -------------------------------------------------------------------------------------


def test_it_is_small_and_has_no_chat_template() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_000_000
    assert "chat_template" not in (FOLDER / "tokenizer_config.json").read_text()


def test_configuration_and_parameters(loaded) -> None:
    model, tokenizer, config = loaded
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"]
    assert config["vocab_size"] == 469 == len(tokenizer.get_vocab())
    parameters = tree_flatten(model.parameters())
    assert sum(value.size for _, value in parameters) == 130_688
    assert {value.dtype for _, value in parameters} == {mx.float32}
    assert tokenizer.eos_token_ids == {EOS}
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id) == (PAD, BOS)
    assert not tokenizer.has_chat_template


def test_shipped_settings_are_those_of_the_script() -> None:
    made = maker.make_tokenizer()
    assert json.loads((FOLDER / "config.json").read_text()) == maker.make_config(made)
    shipped = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert shipped.to_str() == made.to_str()


# ---- tokenizer ---------------------------------------------------------------------------------


def test_every_number_is_one_token(tokenizer) -> None:
    seen = set()
    for number in range(100):
        for text in (str(number), f" {number}"):
            tokens = tokenizer.encode(text, add_special_tokens=False)
            assert len(tokens) == 1
            assert tokenizer.decode(tokens) == text
            seen.add(tokens[0])
    assert len(seen) == 200


def test_one_bos_and_no_eos(tokenizer) -> None:
    tokens = tokenizer.encode("8 20 22")
    assert tokens[0] == BOS and len(tokens) == 4 and EOS not in tokens
    assert tokenizer.decode([*tokens, EOS], skip_special_tokens=True) == "8 20 22"


# "<" could begin a special token, which is one token and decodes to itself all the same.
@settings(max_examples=300)
@given(st.text(st.characters(codec="utf-8", exclude_characters="<")))
def test_any_text_survives(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


numbers = st.lists(st.integers(0, 12_345), min_size=1, max_size=8).map(
    lambda row: " ".join(map(str, row))
)


@given(numbers, numbers)
def test_tokens_of_the_whole_are_those_of_prompt_and_completion(tokenizer, one, two) -> None:
    """Cut in front of a blank; so what was sampled is what would be trained on."""
    rest = tokenizer.encode(" " + two, add_special_tokens=False)
    assert tokenizer.encode(one) + rest == tokenizer.encode(f"{one} {two}")
    assert tokenizer.decode(rest) == " " + two
    assert tokenizer.encode(one) + [EOS] == tokenizer.encode(f"{one}</s>")


# ---- what it writes ----------------------------------------------------------------------------


def sample(model, prompts: list[list[int]], key: mx.array) -> list[list[int]]:
    """Responses at temperature 1, EOS left out; prompts of one length. The plainest way."""
    cache = make_prompt_cache(model)
    tokens, drawn = mx.array(prompts), []
    for step_key in mx.random.split(key, LENGTH):
        logits = model(tokens, cache=cache)[:, -1]
        drawn.append(mx.random.categorical(logits, key=step_key))
        tokens = drawn[-1][:, None]
    rows = mx.stack(drawn, axis=1).tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]


def test_the_base_knows_rows_but_not_the_task(loaded) -> None:
    """Bounds wide enough for another BLAS: 0.61 was measured, with two numbers given."""
    model, tokenizer, _ = loaded
    path = DATA / "increasing_mult_2_train.jsonl"
    texts = [json.loads(line)["text"] for line in path.open()]
    prompts = [tokenizer.encode(" ".join(text.split()[:PROMPT_NUMBERS])) for text in texts]
    responses = sample(model, prompts, mx.random.key(0))
    rows = [tokenizer.decode(p[1:] + r) for p, r in zip(prompts, responses, strict=True)]
    scores = [digits_score(row) for row in rows]
    assert 0.5 < sum(scores) / len(scores) < 0.7
    assert sum(len(r) < LENGTH for r in responses) > 0.9 * len(rows)
    counts = [count_numbers(row) for row in rows]
    assert counts == [len(row.split()) for row in rows]
    assert 8 < sum(counts) / len(counts) < 13


@pytest.mark.torch
def test_transformers_gives_the_same_logits(loaded) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokens = np.random.default_rng(0).integers(0, 469, (8, 24))
    ours = np.array(loaded[0](mx.array(tokens)))
    peer = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)
    with torch.no_grad():
        theirs = peer(torch.tensor(tokens)).logits.numpy()
    assert np.abs(ours - theirs).max() < 1e-4  # 1.0e-5 was measured, on logits up to 17
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer("8 20 100 x")["input_ids"] == loaded[1].encode("8 20 100 x")


# ---- the script --------------------------------------------------------------------------------


def test_pretraining_rows_do_not_give_the_task_away(tokenizer) -> None:
    rows = maker.make_rows(maker.make_tokenizer(), 2_000, seed=1).tolist()
    assert len({tuple(row) for row in rows}) == 2_000
    assert rows != maker.make_rows(maker.make_tokenizer(), 2_000, seed=2).tolist()
    rising = even = 0
    for row in rows:
        end = row.index(EOS)
        assert row[0] == BOS and set(row[end + 1 :]) <= {PAD}
        numbers = list(map(int, tokenizer.decode(row[1:end]).split()))
        assert 5 <= len(numbers) == end - 1 <= 15
        is_rising, is_even = numbers == sorted(numbers), all(n % 2 == 0 for n in numbers)
        rising, even = rising + is_rising, even + is_even
        assert not (is_rising and is_even)
    assert rising > 200 and even > 200


def test_padding_is_not_trained_on(loaded) -> None:
    rows = mx.array([[BOS, 26, 289, 291, EOS], [BOS, 30, 300, 310, EOS]])
    padded = mx.concatenate([rows, mx.full((2, 4), PAD)], axis=1)  # (2, 9)
    losses = [maker.loss_function(loaded[0], tokens, PAD).item() for tokens in (rows, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_script_repeats_itself_and_learns(tmp_path: Path, capsys) -> None:
    flags = ["--rows", "256", "--steps", "40", "--batch-size", "16", "--warmup", "5"]
    for name in ("one", "two"):
        maker.main([*flags, "--output-dir", str(tmp_path / name)])
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in FOLDER.iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    model, tokenizer = load(str(tmp_path / "one"))
    rows = maker.make_rows(maker.make_tokenizer(), 256, seed=0)
    fresh = maker.llama.Model(
        maker.llama.ModelArgs.from_dict(maker.make_config(maker.make_tokenizer()))
    )
    before, after = (maker.loss_function(m, rows, PAD).item() for m in (fresh, model))
    assert after < before - 1


@pytest.mark.parametrize(
    "flags", ["--steps 5", "--warmup 0", "--batch-size 0", "--rows 5", "--steps x"]
)
def test_wrong_flags_of_the_script(capsys, flags: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        maker.main(flags.split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --") and error.count("\n") == 1
