"""What transformers 5 writes into config.json reaches the model: positions, windows, and so on."""

import json

import mlx.core as mx
import numpy as np
import pytest
from tiny import tiny_model_folder

from errors import UserError
from models.decoding import generate
from models.load import load_model
from models.packing import pack
from models.trunk import picked_hidden, token_logprobs

TOKENS = mx.array([list(range(20, 60))])
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e4}
LOCAL = {"rope_type": "default", "rope_theta": 3e3}
NESTED = {"full_attention": LINEAR, "sliding_attention": LOCAL}
OLD = {
    "rope_theta": 5e4,
    "rope_local_base_freq": 3e3,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
TYPES = ["sliding_attention", "full_attention"]


def logits(folder, drop=(), **changes):
    """Logits (40, V) of the model in `folder` with other entries in its configuration."""
    file = folder / "config.json"
    before = file.read_text()
    config = {k: v for k, v in json.loads(before).items() if k not in drop}
    file.write_text(json.dumps({**config, **changes}))
    try:
        return np.array(load_model(folder, dtype="float32").model(TOKENS)[0])
    finally:
        file.write_text(before)


@pytest.mark.parametrize("architecture", ["gemma3_text", "olmo3", "gemma3"])
def test_positions_by_layer_type_are_those_of_the_older_names(architecture, tmp_path):
    folder = tiny_model_folder(tmp_path, architecture=architecture)
    plain, old = (
        logits(folder),
        {k: v for k, v in OLD.items() if architecture != "olmo3" or k != "rope_local_base_freq"},
    )
    new = NESTED
    if architecture == "olmo3":  # whose older files have one base for all layers
        new = {"full_attention": LINEAR, "sliding_attention": {**LOCAL, "rope_theta": 5e4}}
    new, drop = {"rope_parameters": new, "layer_types": TYPES}, ("rope_theta",)
    if architecture == "gemma3":
        text = json.loads((folder / "config.json").read_text())["text_config"]
        old = {"text_config": {**text, **old}}
        new = {"text_config": {k: v for k, v in {**text, **new}.items() if k != "rope_theta"}}
    found, wanted = logits(folder, drop, **new), logits(folder, **old)
    assert np.abs(found - wanted).max() < 1e-4
    assert np.abs(found - plain).max() > 1e-2


@pytest.mark.parametrize("architecture", ["mixtral", "cohere", "gemma2", "helium", "qwen3_moe"])
def test_scaling_that_mlx_lm_does_not_know_is_not_lost(architecture, tmp_path):
    """Linear scaling by 8 is one eighth of every angle; by base alone the first angle stays."""
    folder = tiny_model_folder(tmp_path, architecture=architecture)
    plain = logits(folder, ("rope_theta",), rope_parameters={**LINEAR, "rope_type": "default"})
    scaled = logits(folder, ("rope_theta",), rope_parameters=LINEAR)
    older = logits(folder, rope_theta=5e4, rope_scaling={"type": "linear", "factor": 8.0})
    assert np.abs(scaled - older).max() < 1e-5
    assert np.abs(scaled - plain).max() > 1e-2


def test_layers_with_windows_by_name(tmp_path):
    """A pattern of 2 said in words, and an order that no pattern describes."""
    folder = tiny_model_folder(tmp_path, architecture="cohere2", num_hidden_layers=4)
    by_pattern = logits(folder, sliding_window_pattern=2)
    drop = ("sliding_window_pattern",)
    assert np.array_equal(logits(folder, drop, layer_types=TYPES * 2), by_pattern)
    odd = logits(folder, drop, layer_types=[*TYPES[::-1], *TYPES[::-1]])
    assert np.abs(odd - by_pattern).max() > 1e-3


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "starcoder2"])
def test_a_window_hides_what_lies_before_it(architecture, tmp_path):
    """Of one layer: the last token's logits depend on the last 8 tokens alone, padded or not."""
    folder = tiny_model_folder(
        tmp_path, architecture=architecture, num_hidden_layers=1, sliding_window=8
    )
    model = load_model(folder, dtype="float32").model
    changed = mx.concatenate([TOKENS[:, :20] + 1, TOKENS[:, 20:]], axis=1)
    both = np.array(model(mx.concatenate([TOKENS, changed])))
    assert np.abs(both[0, 27:] - both[1, 27:]).max() < 1e-4  # position 27 sees 20 to 27
    assert np.abs(both[0, 26] - both[1, 26]).max() > 1e-3


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "starcoder2", "gemma3_text"])
def test_sampling_beyond_a_window_gives_the_log_probabilities_of_a_forward_pass(
    architecture, tmp_path
):
    folder = tiny_model_folder(tmp_path, architecture=architecture, sliding_window=8)
    model = load_model(folder, dtype="float32").model
    prompts = [[5, 9, 60], list(range(20, 33)), [7, 8, 9, 10, 11]]
    made = generate(model, prompts, max_tokens=12, eos_ids={2}, key=mx.random.key(0))
    packed = pack(prompts, made.responses)
    hidden = picked_hidden(model, packed.tokens, packed.index)
    found = packed.spread(token_logprobs(model, hidden, packed.targets)[0])
    for row, logprobs in enumerate(made.logprobs):
        np.testing.assert_allclose(found[row, : len(logprobs)], logprobs, atol=1e-4)


def test_activations(tmp_path):
    """GPT NeoX's exact GELU is given; an activation that mlx-lm has not is refused."""
    folder = tiny_model_folder(tmp_path, architecture="gpt_neox")
    exact, tanh = logits(folder, hidden_act="gelu"), logits(folder, hidden_act="gelu_new")
    assert 1e-5 < np.abs(exact - tanh).max() < 0.1
    other = tiny_model_folder(tmp_path / "llama")
    with pytest.raises(UserError, match="activation relu"):
        logits(other, hidden_act="relu")
