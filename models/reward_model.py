"""Reward models in files: beside an adapter, in a model folder, or in transformers' form."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from errors import UserError
from models.adapter_description import REWARD_HEAD
from models.adapter_files import head_path, load_adapter, read_adapter, read_head, save_head
from models.classifiers import is_classifier, load_classifier
from models.encoder_reward import EncoderReward, is_encoder
from models.hub_files import download, looks_like_hub_name
from models.load import LoadedModel, load_model
from models.reading import MARK, Ending, template_tail, trained_reading
from models.reward_network import RewardModel
from models.text_scores import POOLINGS, normalise

__all__ = [
    "POOLINGS",
    "RewardModel",
    "load_reward_head",
    "load_reward_model",
    "normalise",
    "retokeniser",
    "save_reward_head",
]


def save_reward_head(adapter_path: str | Path, model: RewardModel) -> Path:
    """Write head, pooling and normalisation beside an adapter, or into a model folder."""
    return save_head(adapter_path, REWARD_HEAD, model.head_arrays(), model.description())


def load_reward_head(model: RewardModel, adapter_path: str | Path) -> None:
    """Take over the head beside an adapter, or in a model folder. UserError where none is."""
    found = read_head(adapter_path, REWARD_HEAD)
    if found is None:
        raise UserError(
            f"{adapter_path}: has no reward head beside it "
            f"({head_path(adapter_path, REWARD_HEAD)}); make one with sft.py "
            "--reward-model --train"
        )
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
            raise UserError(
                f"{name}: no such reward model; give a fused reward model's folder, or "
                "the adapter that sft.py --reward-model wrote"
            )
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
            raise UserError(
                f"{path}: every weight was trained, so it shares none with its base; "
                "fuse it first (fuse.py) and give that folder"
            )
        tuning = load_adapter(base, path, any_base=any_base)
        tuning.deactivate()
        source, reward_model = base, RewardModel(base.model, tuning=tuning)
    reward_model.source = source
    load_reward_head(reward_model, path)
    reward_model.freeze()
    reward_model.eval()
    return reward_model


def retokeniser(policy: Any, reward: Any) -> Callable[[str, bool], list[int]] | None:
    """``encode(text, ended)`` of a policy's texts for a reward model with the tokenizer `reward`.

    For callers who have rendered texts alone: a prompt of one turn in the policy's template, with
    the response behind it, is rendered by the reward model's own; any other text is tokenised as it
    is. None where both render and tokenise alike. Training is told prompts as they were written
    (rewards/learned.py), of any number of turns.
    """
    same = getattr(policy, "chat_template", None) == getattr(reward, "chat_template", None)
    if policy is reward or (same and policy.get_vocab() == reward.get_vocab()):
        return None
    has_turns = template_tail(policy) is not None
    before, _, after = _rendered(policy, MARK).partition(MARK) if has_turns else ("", "", "")
    ending = Ending(reward, trained_reading(reward))

    def encode(text: str, ended: bool) -> list[int]:
        found = after and text.startswith(before) and after in text
        if not found:
            return ending.put(reward.encode(text), ended)
        prompt, _, response = text.removeprefix(before).partition(after)
        if template_tail(reward) is None:
            return ending.put(reward.encode(prompt + response), ended)
        rendered = _rendered(reward, prompt, response)
        twice = reward.bos_token is not None and rendered.startswith(reward.bos_token)
        return ending.put(ending.bare(reward.encode(rendered, add_special_tokens=not twice)), ended)

    return encode


def _rendered(tokenizer: Any, prompt: str, response: str | None = None) -> str:
    """A prompt of one turn, with the response or with what asks for one, in a chat template."""
    turns = [{"role": "user", "content": prompt}]
    if response is not None:
        turns.append({"role": "assistant", "content": response})
    return tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=response is None
    )
