"""Sampling stops where training taught an answer to end; a scored adapter has no dropout."""

from argparse import Namespace

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny_tokenizers import TEMPLATES, tiny_tokenizer

from command_line.ppo_flags import ends
from data_utils import Template
from models.adapter_files import save_adapter
from models.load import load_model
from models.lora import LoraConfig, add_lora
from models.reward_model import RewardModel, load_reward_model, save_reward_head


def test_without_a_chat_template_only_eos_ends():
    tokenizer = tiny_tokenizer(bos=True)
    assert Template(tokenizer).turn_end_id() is None


@pytest.mark.parametrize("name", [n for n, text in TEMPLATES.items() if "im_end" in text])
def test_the_end_of_a_turn_ends_a_response(name):
    tokenizer = TokenizerWrapper(tiny_tokenizer(bos=True, template=name))
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain = {"prompt_template": None, "token_format": "standard", "ignore_eos": False}
    assert ends(Namespace(**plain), tokenizer) == {tokenizer.eos_token_id, turn_end}
    own = {"prompt_template": "Q: {prompt}", "token_format": "standard", "ignore_eos": False}
    assert ends(Namespace(**own), tokenizer) == {tokenizer.eos_token_id}


def test_a_reward_adapter_trained_with_dropout_scores_the_same_twice(tmp_path):
    base = load_model()
    tuning = add_lora(base.model, LoraConfig(dropout=0.5))
    arrays = {name: mx.random.normal(a.shape) * 0.1 for name, a in tuning.arrays().items()}
    tuning.load_arrays(arrays, "test")
    save_adapter(tmp_path / "r.npz", tuning, base)
    save_reward_head(tmp_path / "r.npz", RewardModel(base.model, tuning=tuning))
    loaded = load_reward_model(tmp_path / "r.npz", load_model())
    text = [[1, 20, 30, 40]]
    assert loaded.score(text) == loaded.score(text)
