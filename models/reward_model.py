"""Reward models in files: beside an adapter, in a model folder, or in transformers' form."""

from pathlib import Path

from errors import UserError
from models.adapter_description import REWARD_HEAD
from models.adapter_files import head_path, load_adapter, read_adapter, read_head, save_head
from models.classifiers import is_classifier, load_classifier
from models.encoder_reward import EncoderReward, is_encoder
from models.hub_files import download, looks_like_hub_name
from models.load import LoadedModel, load_model
from models.reward_network import POOLINGS, RewardModel, normalise

__all__ = [
    "POOLINGS",
    "RewardModel",
    "load_reward_head",
    "load_reward_model",
    "normalise",
    "save_reward_head",
]


def save_reward_head(adapter_path: str | Path, model: RewardModel) -> Path:
    """Write head, pooling and normalisation beside an adapter, or into a model folder."""
    return save_head(adapter_path, REWARD_HEAD, model.head_arrays(), model.description())


def load_reward_head(model: RewardModel, adapter_path: str | Path) -> None:
    """Take over the head beside an adapter, or in a model folder. UserError where none is."""
    found = read_head(adapter_path, REWARD_HEAD)
    if found is None:
        raise UserError(f"{adapter_path}: has no reward head beside it "
                        f"({head_path(adapter_path, REWARD_HEAD)}); make one with sft.py "
                        "--reward-model --train")  # fmt: skip
    model.load_head(*found, source=str(head_path(adapter_path, REWARD_HEAD)))


def load_reward_model(
    path: str | Path,
    base: LoadedModel | None = None,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    any_base: bool = False,
) -> RewardModel | EncoderReward:
    """A reward model from a model folder with a head, or from an adapter with a head.

    Hub names and *ForSequenceClassification models of transformers are read as well; those on an
    encoder (BERT and the like) come back as an `EncoderReward`.

    An adapter goes on `base`, whose weights it then shares; its own adapter is left switched off.
    Whatever is on `base` must be switched off before. Raises UserError where there is no head, and
    for an adapter that was trained on another base, unless `any_base`.
    """
    name, path = str(path), Path(path)
    if not path.exists():
        if not looks_like_hub_name(name):
            raise UserError(f"{name}: no such reward model; give a fused reward model's folder, or "
                            "the adapter that sft.py --reward-model wrote")  # fmt: skip
        path = download(name, with_code=trust_remote_code)
    if is_encoder(path):
        return EncoderReward(path, dtype=dtype, trust_remote_code=trust_remote_code)
    if is_classifier(path):
        return load_classifier(path, dtype=dtype, trust_remote_code=trust_remote_code)
    if path.is_dir() and (path / "config.json").exists():
        source = load_model(path, dtype=dtype, trust_remote_code=trust_remote_code)
        reward_model = RewardModel(source.model)
    elif base is None:
        raise UserError(f"{path}: is an adapter; it needs its base model as well")
    else:
        if read_adapter(path)[1].get("fine_tune_type") == "full":  # would overwrite the base
            raise UserError(f"{path}: every weight was trained, so it shares none with its base; "
                            "fuse it first (fuse.py) and give that folder")  # fmt: skip
        tuning = load_adapter(base, path, any_base=any_base)
        tuning.deactivate()
        source, reward_model = base, RewardModel(base.model, tuning=tuning)
    reward_model.source = source
    load_reward_head(reward_model, path)
    reward_model.freeze()
    reward_model.eval()
    return reward_model
