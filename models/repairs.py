"""Models of mlx-lm 0.32 that compute otherwise than transformers, put right after loading.

Each repair swaps the class of a module for a subclass of it, so that names and weights stay. A
repair is for what config.json says and mlx-lm does not heed.
"""

from functools import cache

import mlx.core as mx
import mlx.nn as nn

from errors import UserError
from models.transformers_config import ATTENTION_NAMES, FULL, SLIDING, give_positions, layer_types

# Models of mlx-lm that give their layers windows by themselves.
HAVE_WINDOWS = ("gemma3_text", "cohere2", "gpt_oss", "olmo3", "llama", "smollm3")
TANH, EXACT = "gelu by tanh", "gelu"
ACTIVATIONS = {
    "gelu_pytorch_tanh": TANH,
    "gelu_new": TANH,
    "gelu_fast": TANH,
    "gelu": EXACT,
    "gelu_python": EXACT,
    "silu": "silu",
    "swish": "silu",
    "relu2": "relu2",
}
# What mlx-lm computes, whatever a configuration says.
SILU = (
    "llama mistral qwen2 qwen3 phi3 olmo2 mixtral cohere cohere2 exaone glm4 granite helium "
    "internlm2 olmo3 olmoe qwen2_moe qwen3_moe smollm3 stablelm minicpm"
).split()
COMPUTED = {
    "gemma": EXACT,
    "starcoder2": EXACT,
    "gpt_neox": TANH,
    "phi": TANH,
    "gpt2": TANH,
    "gemma2": TANH,
    "gemma3_text": TANH,
    "nemotron": "relu2",
    **dict.fromkeys(SILU, "silu"),
}


def repair(model: nn.Module, config: dict) -> None:
    """Make `model` (mlx-lm's) compute what `config` (its config.json) says."""
    give_positions(model, config)
    text = config.get("text_config") or config
    kind = text.get("model_type")
    _give_windows(model, text, kind)
    _give_activations(model, text, kind)
    if kind == "gemma3_text":
        trunk = (model.language_model if "language_model" in model else model).model
        trunk.__class__ = _exact_scale(type(trunk))
    if kind == "qwen2_moe" and text.get("norm_topk_prob"):
        _swap(model, "mlp", _normalised_experts, having="switch_mlp")
    if kind == "mamba2" and text.get("n_groups", 1) > 1:
        for block in model.layers:
            block.mixer.norm.__class__ = _grouped_norm(type(block.mixer.norm))
            block.mixer.norm._groups = text["n_groups"]


def _swap(model: nn.Module, name: str, repaired, having: str | None = None) -> None:
    for block in model.layers:
        if having is not None and having not in block[name]:
            continue
        block[name].__class__ = repaired(type(block[name]))


# ---------------------------------------------------------------------------- windows


def _give_windows(model: nn.Module, config: dict, kind: str | None) -> None:
    window, types = config.get("sliding_window"), layer_types(config)
    by_pattern = config.get("sliding_window_pattern") == 1 and SLIDING in types
    if not window or (kind in HAVE_WINDOWS and not by_pattern):
        return
    for block, kind_of_layer in zip(model.layers, types, strict=False):
        name = next((name for name in ATTENTION_NAMES if name in block), None)
        if name is None or kind_of_layer == FULL:
            continue
        attention = block[name]
        attention.__class__ = _windowed(type(attention))
        attention._window = int(window)
        if hasattr(attention, "use_sliding_window"):  # Cohere 2: positions in these layers alone
            attention.use_sliding_window = True


@cache
def _windowed(kind: type) -> type:
    """Attention that sees the last `_window` tokens, its own included."""

    class Windowed(kind):
        def __call__(self, x: mx.array, mask=None, cache=None, *args, **kwargs):
            from mlx_lm.models.base import create_causal_mask

            count = x.shape[1]
            seen = 0 if cache is None else getattr(cache, "_idx", None)
            seen = cache.offset if seen is None else seen
            if count + seen > self._window:
                if cache is None:
                    mask = create_causal_mask(count, window_size=self._window)
                else:
                    mask = cache.make_mask(count, return_array=True, window_size=self._window)
            return super().__call__(x, mask, cache, *args, **kwargs)

    return _named_as(Windowed, kind)


# ---------------------------------------------------------------------------- layers


def _give_activations(model: nn.Module, config: dict, kind: str | None) -> None:
    """Give MLPs the GELU that is asked for. Raises UserError for what mlx-lm does not compute."""
    names = ("hidden_activation", "hidden_act", "activation_function")
    given = next((config[name] for name in names if config.get(name)), None)
    wanted, computed = ACTIVATIONS.get(given, given), COMPUTED.get(kind)
    if kind == "gemma":  # whose first files say "gelu" and mean the one by tanh
        wanted = TANH
    if None in (wanted, computed) or wanted == computed:
        return
    if {wanted, computed} != {TANH, EXACT}:
        raise UserError(
            f"model type {kind}: its activation {given} is not what mlx-lm computes ({computed})"
        )
    _swap(model, "mlp", _tanh_gelu if wanted == TANH else _exact_gelu)


@cache
def _tanh_gelu(kind: type) -> type:
    return _with_gelu(kind, nn.gelu_approx)


@cache
def _exact_gelu(kind: type) -> type:
    return _with_gelu(kind, nn.gelu)


def _with_gelu(kind: type, gelu) -> type:
    """An MLP with this GELU: gated (Gemma), or of two layers under one of three pairs of names."""

    class WithGelu(kind):
        def __call__(self, x: mx.array) -> mx.array:
            if "gate_proj" in self:
                return self.down_proj(gelu(self.gate_proj(x)) * self.up_proj(x))
            pairs = (("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("fc1", "fc2"))
            first, second = next(pair for pair in pairs if pair[0] in self)
            return self[second](gelu(self[first](x)))

    return _named_as(WithGelu, kind)


@cache
def _exact_scale(kind: type) -> type:
    """Gemma 3's embedding times sqrt(D); mlx-lm rounds that to bfloat16 for every type."""

    class ExactScale(kind):
        def __call__(self, inputs: mx.array, cache=None, input_embeddings=None) -> mx.array:
            h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
            exact = self.args.hidden_size**0.5
            rounded = mx.array(exact, mx.bfloat16).astype(mx.float32)
            if h.dtype != mx.bfloat16:
                h = h * (exact / rounded).astype(h.dtype)
            return super().__call__(inputs, cache, h)

    return _named_as(ExactScale, kind)


@cache
def _normalised_experts(kind: type) -> type:
    """Qwen 2's experts with the weights of the chosen ones made to sum to 1 (norm_topk_prob)."""

    class NormalisedExperts(kind):
        def __call__(self, x: mx.array) -> mx.array:
            gates = mx.softmax(self.gate(x), axis=-1, precise=True)
            k = self.top_k
            chosen = mx.stop_gradient(mx.argpartition(-gates, kth=k - 1, axis=-1)[..., :k])
            scores = mx.take_along_axis(gates, chosen, axis=-1)
            scores = scores / scores.sum(axis=-1, keepdims=True)
            y = (self.switch_mlp(x, chosen) * scores[..., None]).sum(axis=-2)
            return y + mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)

    return _named_as(NormalisedExperts, kind)


@cache
def _grouped_norm(kind: type) -> type:
    """Mamba 2's gated norm over each group by itself (Mamba2RMSNormGated of transformers)."""

    class GroupedNorm(kind):
        def __call__(self, hidden: mx.array, gate: mx.array | None = None) -> mx.array:
            if gate is not None:
                hidden = nn.silu(gate) * hidden
            grouped = hidden.reshape(*hidden.shape[:-1], self._groups, -1)
            normed = mx.fast.rms_norm(grouped, None, self.eps)
            return self.weight * normed.reshape(hidden.shape)

    return _named_as(GroupedNorm, kind)


def _named_as(repaired: type, kind: type) -> type:
    """Under the name and module of the class it stands for: fast kernels are found by these."""
    repaired.__name__ = repaired.__qualname__ = kind.__name__
    repaired.__module__ = kind.__module__
    return repaired


# ---------------------------------------------------------------------------- weights


def model_classes(config: dict):
    """(Model, ModelArgs) for mlx-lm's `load_model`: its own, reading weights as transformers 5
    writes them where mlx-lm does not, or one of ours."""
    from mlx_lm.utils import _get_classes

    if config["model_type"] == "opt":  # which mlx-lm does not have
        from models import opt

        return opt.Model, opt.ModelArgs
    model, arguments = _get_classes(config)
    repaired = {"gpt_oss": _reads_plain_experts, "gpt2": _reads_nested_names}
    if config["model_type"] == "qwen2_moe" and (dense := _dense_layers(config)):
        model = _mixed_layers(model, dense)
    if (change := repaired.get(config["model_type"])) is not None:
        model = change(model)
    return model, arguments


def _dense_layers(config: dict) -> tuple[int, ...]:
    """Layers without experts (Qwen2MoeDecoderLayer of transformers)."""
    count, step = config["num_hidden_layers"], config.get("decoder_sparse_step") or 1
    alone = config.get("mlp_only_layers") or ()
    return tuple(i for i in range(count) if i in alone or (i + 1) % step)


@cache
def _mixed_layers(kind: type, dense: tuple[int, ...]) -> type:
    """Qwen 2's mixture of experts with MLPs in some layers, which mlx-lm gives experts too."""

    class MixedLayers(kind):
        def __init__(self, args):
            from mlx_lm.models.qwen2_moe import MLP

            super().__init__(args)
            for i in dense:
                self.layers[i].mlp = MLP(args.hidden_size, args.intermediate_size)

        def sanitize(self, weights: dict) -> dict:
            if any(".switch_mlp." in name for name in weights):
                return weights
            for i in sorted({*range(len(self.layers))} - {*dense}):
                root, experts = f"model.layers.{i}.mlp", range(self.args.num_experts)
                for name in ("gate_proj", "up_proj", "down_proj"):
                    arrays = [weights.pop(f"{root}.experts.{e}.{name}.weight") for e in experts]
                    weights[f"{root}.switch_mlp.{name}.weight"] = mx.stack(arrays)
            return weights

    return _named_as(MixedLayers, kind)


@cache
def _reads_nested_names(kind: type) -> type:
    """GPT 2 whose weights stand under ``transformer.``, as all but the first files of it have."""

    class ReadsNestedNames(kind):
        def sanitize(self, weights: dict) -> dict:
            return super().sanitize({k.removeprefix("transformer."): v for k, v in weights.items()})

    return _named_as(ReadsNestedNames, kind)


@cache
def _reads_plain_experts(kind: type) -> type:
    """GPT OSS whose experts are not in MXFP4: (E, in, out), gate and up interleaved."""

    class ReadsPlainExperts(kind):
        def sanitize(self, weights: dict) -> dict:
            found = {}
            for name, array in weights.items():
                if name.endswith("experts.gate_up_proj"):
                    root = name.removesuffix("gate_up_proj")
                    found[f"{root}gate_proj.weight"] = array[..., ::2].swapaxes(1, 2)
                    found[f"{root}up_proj.weight"] = array[..., 1::2].swapaxes(1, 2)
                elif name.endswith("experts.gate_up_proj_bias"):
                    root = name.removesuffix("gate_up_proj_bias")
                    found[f"{root}gate_proj.bias"] = array[..., ::2]
                    found[f"{root}up_proj.bias"] = array[..., 1::2]
                elif name.endswith("experts.down_proj"):
                    found[f"{name}.weight"] = array.swapaxes(1, 2)
                elif name.endswith("experts.down_proj_bias"):
                    found[f"{name.removesuffix('_bias')}.bias"] = array
                else:
                    found[name] = array
            plain = any(name.endswith("experts.gate_up_proj") for name in weights)
            return found if plain else super().sanitize(weights)

    return _named_as(ReadsPlainExperts, kind)
