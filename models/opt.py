"""OPT (Zhang et al. 2022), which mlx-lm does not have; reference: transformers' modeling_opt.py.

Learned positions with two unused rows in front, biases, ReLU, a tied head. Norms stand before
attention and MLP, or behind them (opt-350m), where embeddings are also narrower than the rest and
projected in and out.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import (
    BaseModelArgs,
    create_attention_mask,
    scaled_dot_product_attention,
)

OFFSET = 2  # rows of the position table that no position uses (OPTLearnedPositionalEmbedding)
ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu}


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    vocab_size: int
    hidden_size: int
    ffn_dim: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    word_embed_proj_dim: int | None = None
    do_layer_norm_before: bool = True
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    activation_function: str = "relu"
    tie_word_embeddings: bool = True
    _remove_final_layer_norm: bool = False

    def __post_init__(self):
        self.word_embed_proj_dim = self.word_embed_proj_dim or self.hidden_size
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"activation_function {self.activation_function!r} is none of "
                f"{', '.join(ACTIVATIONS)}"
            )

    def norm(self) -> nn.LayerNorm:
        return nn.LayerNorm(self.hidden_size, affine=self.layer_norm_elementwise_affine)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.heads = args.num_attention_heads
        self.scale = (args.hidden_size // self.heads) ** -0.5
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self[name] = nn.Linear(args.hidden_size, args.hidden_size, bias=args.enable_bias)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        B, L, D = x.shape
        q, k, v = (
            project(x).reshape(B, L, self.heads, -1).transpose(0, 2, 1, 3)  # (B, heads, L, D/heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return self.out_proj(out.transpose(0, 2, 1, 3).reshape(B, L, D))


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.norm_first = args.do_layer_norm_before
        self.self_attn = Attention(args)
        self.self_attn_layer_norm = args.norm()
        self.fc1 = nn.Linear(args.hidden_size, args.ffn_dim, bias=args.enable_bias)
        self.fc2 = nn.Linear(args.ffn_dim, args.hidden_size, bias=args.enable_bias)
        self.final_layer_norm = args.norm()
        self.activation = ACTIVATIONS[args.activation_function]

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if self.norm_first:
            x = x + self.self_attn(self.self_attn_layer_norm(x), mask, cache)
            return x + self._mlp(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x + self.self_attn(x, mask, cache))
        return self.final_layer_norm(x + self._mlp(x))

    def _mlp(self, x: mx.array) -> mx.array:
        return self.fc2(self.activation(self.fc1(x)))


class OPTModel(nn.Module):
    """tokens (B, L) -> hidden states (B, L, word_embed_proj_dim)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        narrow = args.word_embed_proj_dim
        self.embed_tokens = nn.Embedding(args.vocab_size, narrow)
        self.embed_positions = nn.Embedding(args.max_position_embeddings + OFFSET, args.hidden_size)
        if narrow != args.hidden_size:
            self.project_in = nn.Linear(narrow, args.hidden_size, bias=False)
            self.project_out = nn.Linear(args.hidden_size, narrow, bias=False)
        if args.do_layer_norm_before and not args._remove_final_layer_norm:
            self.final_layer_norm = args.norm()
        self.layers = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        cache = cache or [None] * len(self.layers)
        # Of a padded row the offset is negative until its padding has passed, whose positions count
        # for nothing.
        offset = mx.array(0 if cache[0] is None else cache[0].offset)
        positions = mx.maximum(mx.arange(inputs.shape[1]) + offset[..., None], 0)
        h = self.embed_tokens(inputs)
        if "project_in" in self:
            h = self.project_in(h)
        h = h + self.embed_positions(positions + OFFSET)
        mask = create_attention_mask(h, cache[0])
        for layer, of_layer in zip(self.layers, cache, strict=True):
            h = layer(h, mask, of_layer)
        if "final_layer_norm" in self:
            h = self.final_layer_norm(h)
        return self.project_out(h) if "project_out" in self else h


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args, self.model_type = args, args.model_type
        self.model = OPTModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.word_embed_proj_dim, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        h = self.model(inputs, cache)
        return self.lm_head(h) if "lm_head" in self else self.model.embed_tokens.as_linear(h)

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """transformers' names ("model.decoder.…", in old files "decoder.…") to those here."""
        found = {}
        for name, array in weights.items():
            name = "model." + name.partition("decoder.")[2] if "decoder." in name else name
            if not (name == "lm_head.weight" and self.args.tie_word_embeddings):
                found[name] = array
        return found
