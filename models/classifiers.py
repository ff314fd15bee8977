"""Reward models in Hugging Face's form: ``*ForSequenceClassification`` with one label.

There the score is ``score.weight @ h``, h the final hidden state of the last token that is not the
padding token (transformers, GenericForSequenceClassification). There is no bias and no mean over
tokens. So our "mean" pooling has no counterpart; a constant that our head adds is kept in
config.json as `reward_offset`, and how texts end as `reward_reading`, which this program reads and
transformers does not.
"""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from errors import UserError
from models.adapter_description import read_json
from models.array_files import save_weights, write_json
from models.file_checks import safetensors_header
from models.load import (
    DTYPES,
    LoadedModel,
    cast,
    check_folder,
    default_dtype,
    read_config,
)
from models.model_folders import stored_dtype, tokenizer_of
from models.reading import Reading, imported_reading
from models.repairs import repair
from models.reward_network import RewardModel
from models.tokenizer_files import copy_tokenizer
from models.transformers_config import unnested
from models.trunk import find_trunk

ENDING = "ForSequenceClassification"
HEAD_NAMES = ("score.weight", "score.bias")
# Decoders whose weights have the same names in mlx-lm and whose classifiers pool as above.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Our own entries of config.json.
OFFSET, PREFIX, READING = "reward_offset", "reward_prefix", "reward_reading"


def is_classifier(folder: str | Path) -> bool:
    """Whether a model folder holds a sequence classifier."""
    if not (Path(folder) / "config.json").is_file():
        return False
    names = read_config(Path(folder)).get("architectures") or [""]
    return str(names[0]).endswith(ENDING)


# ---------------------------------------------------------------------------- in


def load_classifier(
    folder: str | Path, *, dtype: str = "auto", trust_remote_code: bool = False
) -> RewardModel:
    """The reward model in a folder of the transformers form.

    Raises UserError for families that are not read, for other than one label, and for weights
    that are missing.
    """
    folder = Path(folder)
    check_folder(folder, str(folder), trust_remote_code)
    config = read_config(folder)
    if config["model_type"] not in FAMILIES:
        raise UserError(
            f"{folder}: a classifier of type {config['model_type']}; reward models are "
            f"read of the types {', '.join(FAMILIES)}"
        )
    head = _read_head(folder)
    loaded = _load_trunk(folder, config, head)
    if dtype != "stored":
        cast(loaded.model, default_dtype() if dtype == "auto" else dtype)
    reward_model = RewardModel(loaded.model, pooling="last")
    arrays = {"weight": head["score.weight"], "bias": head.get("score.bias", mx.zeros((1,)))}
    description = {
        "pooling": "last",
        "offset": float(config.get(OFFSET, 0.0)),
        "prefix": config.get(PREFIX, ()),
        "pad_id": config.get("pad_token_id"),
    }
    reward_model.load_head(arrays, description, str(folder))
    reward_model.reading = reading_of(config, loaded.tokenizer)
    reward_model.source = loaded
    reward_model.freeze()
    reward_model.eval()
    mx.eval(reward_model.parameters())
    return reward_model


def reading_of(config: dict, tokenizer) -> Reading:
    """How a classifier reads texts: as its config.json records, else as TRL trains."""
    recorded = config.get(READING)
    return imported_reading(tokenizer, config) if recorded is None else Reading.described(recorded)


def reading_in(folder: Path) -> Reading:
    """`reading_of` a classifier's folder."""
    return reading_of(read_config(folder), tokenizer_of(folder))


def _read_head(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        names = safetensors_header(file).keys() & set(HEAD_NAMES)
        if names:
            arrays = mx.load(str(file))
            found.update({name: arrays[name] for name in names})
    if "score.weight" not in found:
        raise UserError(f"{folder}: a sequence classifier without score.weight in its weights")
    labels = found["score.weight"].shape[0]
    if labels != 1:
        raise UserError(f"{folder}: has {labels} labels; a reward model has one")
    return found


def _load_trunk(folder: Path, config: dict, head: dict) -> LoadedModel:
    """The language model without its output layer; UserError names what is missing."""
    from mlx_lm.utils import load_model, load_tokenizer

    try:
        # Tied, so that no output layer is asked for; strict=False because of score.weight.
        settings = {"tie_word_embeddings": True, **unnested(config)}
        model, _ = load_model(folder, lazy=True, strict=False, model_config=settings)
        repair(model, {**config, **unnested(config)})
        tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # mlx-lm and transformers have dozens of kinds for a broken folder
        raise UserError(f"{folder}: cannot be loaded: {' '.join(str(error).split())}") from error
    given: set[str] = set()
    for file in folder.glob("model*.safetensors"):
        given |= safetensors_header(file).keys()
    missing = {name for name, _ in tree_flatten(model.parameters())} - given
    if missing:
        raise UserError(f"{folder}: lacks {len(missing)} arrays, such as {min(missing)}")
    model.freeze()
    return LoadedModel(model, tokenizer, {**config, **unnested(config)}, folder, str(folder))


# ---------------------------------------------------------------------------- out


def write_classifier(folder: Path, loaded: LoadedModel, reward_model: RewardModel) -> float:
    """Write a reward model on `loaded` in the transformers form; returns the constant left out.

    Scores of transformers plus that constant are ours. Raises UserError for mean pooling and for
    models that transformers has under other names.
    """
    from mlx_lm.utils import save_config

    config = dict(loaded.config)
    if reward_model.pooling != "last":
        raise UserError(
            f"pooling {reward_model.pooling!r} has no counterpart in transformers' "
            "classifiers, which read the last token: use --pooling last"
        )
    if config["model_type"] not in FAMILIES or find_trunk(loaded.model)[1] != "model":
        raise UserError(
            f"a classifier of type {config['model_type']} cannot be written; only "
            f"{', '.join(FAMILIES)}"
        )
    if "quantization" in config:
        raise UserError("transformers cannot read MLX's quantised weights: add --dequantize")
    dtype = stored_dtype(loaded)
    head = reward_model.head_arrays()
    parts = nn.Module()
    parts.model = loaded.model.model
    parts.score = nn.Linear(1, 1, bias=False)
    parts.score.weight = (reward_model.gain * head["weight"]).astype(DTYPES[dtype])
    save_weights(folder, parts)
    constant = float(reward_model.gain * head["bias"].item() + reward_model.offset)
    copy_tokenizer(loaded.path, folder)
    family = (config.get("architectures") or ["LlamaForCausalLM"])[0].split("For")[0]
    config.update(
        architectures=[family + ENDING],
        dtype=dtype,
        id2label={"0": "reward"},
        label2id={"reward": 0},
        pad_token_id=_padding_token(loaded, reward_model, folder),
    )
    config.pop("torch_dtype", None)
    config.update({OFFSET: constant} if constant else {})
    config[READING] = reward_model.reading.description()
    if prefix := reward_model.description().get("prefix"):
        config[PREFIX] = prefix
    save_config(config, folder / "config.json")
    return constant


def _padding_token(loaded: LoadedModel, reward_model: RewardModel, folder: Path) -> int:
    """An id that no text ends with, for transformers to find the last token by.

    A tokenizer that pads with EOS would make it overlook the EOS of a text, so BOS pads instead.
    """
    known = reward_model.description().get("pad_id")
    if known is not None:
        return known
    tokenizer = loaded.tokenizer
    pad, bos = tokenizer.pad_token_id, tokenizer.bos_token_id
    if pad is not None and pad not in loaded.eos_ids:
        return pad
    if bos is None or bos in loaded.eos_ids:
        raise UserError(
            f"{loaded.name}: its tokenizer has no token to pad with but EOS, which "
            "transformers would not score; add a pad token to it"
        )
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.exists() else {}
    write_json(file, {**settings, "pad_token": tokenizer.bos_token})
    return bos
