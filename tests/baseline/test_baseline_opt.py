"""OPT against transformers: both places of the norms, both widths of the embedding."""

import numpy as np
import pytest
from baseline_setup import torch

import mlx.core as mx  # isort: skip
from mlx_lm.utils import load_model

from models.decoding import padded_cache
from models.repairs import model_classes

pytestmark = pytest.mark.torch
KINDS = {
    "pre-norm": {},
    "post-norm and projections, as opt-350m": {
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 16,
    },
    "no bias, no weights in norms": {"enable_bias": False, "layer_norm_elementwise_affine": False},
}
TOKENS = [[2, 5, 9, 33, 17, 40, 3, 8]]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            **KINDS[kind],
        }
    )
    theirs = OPTForCausalLM(config).eval()
    for parameter in theirs.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    ours, _ = load_model(tmp_path, get_model_classes=model_classes)
    np.testing.assert_allclose(ours(mx.array(TOKENS)), expected, atol=1e-5)  # asked: 1e-4
    # Left padding does not shift the learned positions.
    cache = padded_cache(ours, [3, 0])
    both = ours(mx.array([[0, 0, 0, *TOKENS[0][:5]], TOKENS[0]]), cache=cache)
    np.testing.assert_allclose(both[0, 3:], expected[0, :5], atol=1e-5)
    following = ours(mx.array([[TOKENS[0][5]], [1]]), cache=cache)
    np.testing.assert_allclose(following[0, 0], expected[0, 5], atol=1e-5)
