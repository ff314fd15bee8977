"""Weights under the names and in the shapes that transformers has for a family.

mlx-lm stacks the experts of a layer, turns convolutions and drops prefixes while it loads. A folder
in that form opens in transformers with random numbers in place of what it does not find, and no
error. mlx-lm reads transformers' form, so that is the one written; only of GPT OSS it does not.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from errors import UserError
from models.file_checks import safetensors_header
from models.load import LoadedModel

STACKED = {  # part between layer and experts, and the experts' own names
    "mixtral": ("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
    "olmoe": ("mlp", {}),
    "qwen2_moe": ("mlp", {}),
    "qwen3_moe": ("mlp", {}),
}
TURNED = ("mamba", "mamba2", "lfm2")  # kernels of convolutions are (channels, 1, width)
KERNEL = re.compile(r".*\.conv(1d)?\.weight")
GPT2_TURNED = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")  # (in, out) in transformers
NOT_READ = ("vision_tower", "multi_modal_projector")  # of multimodal models: kept as they were
# Masks and frequencies that older programs stored, and no program needs.
BUFFERS = re.compile(r".*(\.attn\.(masked_)?bias|\.attention\.(masked_)?bias|inv_freq)")


def family_weights(loaded: LoadedModel) -> dict[str, mx.array]:
    """The weights of `loaded` as transformers names them; a quantised model's stay as they are."""
    weights, kind = dict(tree_flatten(loaded.model.parameters())), loaded.config["model_type"]
    if "quantization" in loaded.config:
        return weights
    found = {}
    for name, array in weights.items():
        found.update(_one(kind, name, array))
    if kind == "gpt_oss":
        found = _joined(found)
    return {**_not_read(loaded.path), **found}


def _one(kind: str, name: str, array: mx.array) -> Iterator[tuple[str, mx.array]]:
    if kind in STACKED and (match := re.fullmatch(r"(.*)\.switch_mlp\.(\w+)\.(\w+)", name)):
        own = STACKED[kind][1]
        root, part, leaf = match.groups()
        for expert in range(len(array)):
            yield f"{root}.experts.{expert}.{own.get(part, part)}.{leaf}", array[expert]
    elif kind in TURNED and KERNEL.fullmatch(name):
        yield name, array.swapaxes(1, 2)
    elif kind == "gpt2":
        name = name.removeprefix("model.")
        yield name, array.T if GPT2_TURNED.fullmatch(name) else array
    elif kind == "opt":
        yield name.replace("model.", "model.decoder.", 1), array
    elif kind == "gpt_neox":
        name = name.removeprefix("model.").replace("h.", "layers.", 1 if name[6:8] == "h." else 0)
        yield name if name.startswith("embed_out") else f"gpt_neox.{name}", array
    else:
        yield name, array


def _joined(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """GPT OSS: gate and up of the experts interleaved in one array, (E, in, out)."""
    found = {}
    for name, array in weights.items():
        root, _, leaf = name.rpartition(".experts.")
        if not root:
            found[name] = array
        elif leaf.startswith("gate_proj."):
            both = [array, weights[f"{root}.experts.up_proj.{leaf.rpartition('.')[2]}"]]
            if leaf.endswith("weight"):
                both = [part.swapaxes(1, 2) for part in both]
            shape = (*both[0].shape[:-1], 2 * both[0].shape[-1])
            joined = mx.stack(both, axis=-1).reshape(shape)
            found[f"{root}.experts.gate_up_proj{'_bias' * leaf.endswith('bias')}"] = joined
        elif leaf.startswith("down_proj."):
            plain = array.swapaxes(1, 2) if leaf.endswith("weight") else array
            found[f"{root}.experts.down_proj{'_bias' * leaf.endswith('bias')}"] = plain
    return found


def _not_read(folder: Path) -> dict[str, mx.array]:
    """Weights in `folder` of parts that mlx-lm leaves out, such as what sees images."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        names = [n for n in safetensors_header(file) if any(part in n for part in NOT_READ)]
        if names:
            arrays = mx.load(str(file))
            found.update({name: arrays[name] for name in names})
    return found


# ---------------------------------------------------------------------------- check


def about_transformers(loaded: LoadedModel) -> list[str]:
    """What a person has to know who opens the written folder elsewhere."""
    if "quantization" in loaded.config:
        return [
            "note: transformers cannot read MLX's quantised weights; --dequantize writes what "
            "it reads"
        ]
    if loaded.config["model_type"] == "gpt_oss":
        return ["note: written as transformers has it; mlx-lm alone reads GPT OSS in MXFP4 only"]
    if loaded.config["model_type"] == "gemma3" and not _not_read(loaded.path):
        return [
            "note: the base has no weights for images, so transformers makes random ones; "
            "texts are as they should be"
        ]
    return []


def check_names(folder: Path, loaded: LoadedModel) -> None:
    """Raise UserError unless `folder` holds the names and shapes that transformers expects.

    These are those of the base's own folder (`loaded.path`), but for a grown vocabulary and an
    output layer that was tied before; and of experts, what config.json says.
    """
    config = loaded.config
    if "quantization" in config:
        return
    written, base = _shapes(folder), _shapes(loaded.path)
    wrong = []
    kind = config["model_type"]
    if not _is_mlx_form(kind, base):
        base = {_plain_name(kind, name): shape for name, shape in base.items()}
        there = {_plain_name(kind, name): shape for name, shape in written.items()}
        extra = {name for name in there if name not in base and not _is_output(name)}
        wrong += [f"{name} is not known there" for name in sorted(extra)]
        for name, shape in sorted(base.items()):
            if name not in there:
                tied = _is_output(name) and config.get("tie_word_embeddings")
                wrong += [] if tied or BUFFERS.fullmatch(name) else [f"{name} is missing"]
            elif there[name] != shape and there[name][1:] != shape[1:]:
                wrong.append(f"{name} is {there[name]}, not {shape}")
    wrong += _wrong_experts(written, config)
    if wrong:
        raise UserError(
            "the result is not what transformers expects, which would fill it with "
            f"random numbers: {'; '.join(wrong[:5])}; nothing was written"
        )


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for file in folder.glob("model*.safetensors"):
        found |= {name: tuple(e["shape"]) for name, e in safetensors_header(file).items()}
    return found


def _is_mlx_form(kind: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether a folder was written by mlx-lm, with its names and shapes, or quantised."""
    if kind == "opt":
        return not any("decoder." in name for name in shapes)
    if kind in ("gpt2", "gpt_neox"):
        return any(name.startswith("model.") for name in shapes)
    if kind in TURNED:
        return any(KERNEL.fullmatch(n) and shape[-1] == 1 for n, shape in shapes.items())
    marks = (".switch_mlp.", ".experts.gate_proj.weight")
    return any(any(m in name for m in marks) or name.endswith(".scales") for name in shapes)


def _plain_name(kind: str, name: str) -> str:
    if kind == "opt":  # whose first files have no "model."
        return f"model.{name}" if name.startswith("decoder.") else name
    return name.removeprefix("transformer.") if kind == "gpt2" else name


def _is_output(name: str) -> bool:
    return name.endswith(("lm_head.weight", "lm_head.bias"))


def _wrong_experts(written: dict, config: dict) -> list[str]:
    """What is amiss with the experts' arrays, by the numbers in config.json."""
    kind = config["model_type"]
    if kind not in STACKED:
        return []
    part, own = STACKED[kind]
    width = config["hidden_size"]
    own_width = kind in ("qwen2_moe", "qwen3_moe")
    inner = config["moe_intermediate_size" if own_width else "intermediate_size"]
    wrong, layers = [], config["num_hidden_layers"]
    for layer in range(layers):
        root = f"model.layers.{layer}.{part}"
        if f"{root}.gate.weight" not in written:  # a layer without experts
            continue
        for expert in range(written[f"{root}.gate.weight"][0]):
            for name, shape in (
                ("gate_proj", (inner, width)),
                ("up_proj", (inner, width)),
                ("down_proj", (width, inner)),
            ):
                name = f"{root}.experts.{expert}.{own.get(name, name)}.weight"
                if written.get(name) != shape:
                    wrong.append(f"{name} is {written.get(name, 'missing')}, not {shape}")
    return wrong
