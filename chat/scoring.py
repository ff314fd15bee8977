"""Scores of replies: by a learned reward model, by the user's functions, or by both."""

from collections.abc import Sequence
from pathlib import Path

from chat.speaker import Reply, Speaker
from errors import UserError
from rl.reward_functions import load_function
from rl.reward_set import Reward, RewardSet


class Scorer:
    """{name: score} of a reply; empty where no reward was asked for."""

    def __init__(self, speaker: Speaker, reward_model: str | None, functions: Sequence[str]):
        rewards = [Reward(spec.rpartition(":")[2], load_function(spec)) for spec in functions]
        self._functions = RewardSet(rewards) if rewards else None
        self._model = None
        if reward_model is not None:
            self._model = ModelScorer(reward_model, speaker)

    def __call__(self, speaker: Speaker, reply: Reply) -> dict[str, float]:
        """Raises UserError, naming the reward, where it fails."""
        scores = {}
        if self._model is not None:
            scores["reward model"] = self._model(speaker, reply)
        if self._functions is not None:
            _, parts = self._functions([reply.prompt_text], [reply.text])
            scores |= {name: values[0] for name, values in parts.items()}
        return scores


class ModelScorer:
    """A reward model: a fused folder, or an adapter with a head on the speaker's own base."""

    def __init__(self, path: str, speaker: Speaker):
        from models.load import resolve_path
        from models.reward_model import load_reward_model

        is_local = Path(path).exists() or Path(path).suffix
        folder = Path(path) if is_local else resolve_path(path)
        self._tunings = speaker.tunings
        self._tokenizer = speaker.tokenizer
        if speaker.tuning is not None and speaker.tuning.kind == "full" and is_adapter(folder):
            raise UserError(f"{path}: an adapter scores with the base model's weights, which "
                            "--resume-file has replaced; fuse the reward model")  # fmt: skip
        switch_off(self._tunings)
        self._model = load_reward_model(folder, base=speaker.loaded)
        if not is_adapter(folder):
            self._tokenizer = own_tokenizer(folder)

    def __call__(self, speaker: Speaker, reply: Reply) -> float:
        switch_off(self._tunings)
        tokens = [*reply.prompt_tokens, *reply.tokens]
        if speaker.tokenizer.get_vocab() != self._tokenizer.get_vocab():
            eos = [self._tokenizer.eos_token_id] * (reply.ended == "stop")
            tokens = [*self._tokenizer.encode(reply.prompt_text + reply.text), *eos]
        return self._model.score([tokens])[0]


def switch_off(tunings) -> None:
    for tuning in tunings:
        if tuning.active and tuning.kind != "full":
            tuning.deactivate()


def is_adapter(path: Path) -> bool:
    """An adapter's file or folder, and not a model's folder."""
    if path.is_dir():
        return (path / "adapter_config.json").exists() and not (path / "config.json").exists()
    return path.suffix in (".npz", ".safetensors")


def own_tokenizer(folder: Path):
    """The tokenizer in a fused reward model's folder."""
    from mlx_lm.utils import load_tokenizer

    try:
        return load_tokenizer(folder)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {reason}") from error
