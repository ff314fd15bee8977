"""Scores of replies: by a learned reward model, by the user's functions, or by both."""

from collections.abc import Sequence

from chat.speaker import Reply, Speaker, is_adapter, switch_off
from errors import UserError
from rewards.learned import learned_reward
from rewards.reward_set import Reward, RewardSet
from rewards.texts import reward_columns
from rewards.user_function import load_function


class Scorer:
    """{name: score} of a reply; empty where no reward was asked for.

    A reward model that is an adapter scores on the first speaker's base, with that speaker's own
    adapter off, as in PPO.
    """

    def __init__(
        self,
        speakers: Sequence[Speaker],
        reward_model: str | None = None,
        functions: Sequence[str] = (),
        **options,
    ):
        """`options` are those of models.reward_model.load_reward_model."""
        rewards = [Reward(spec.rpartition(":")[2], load_function(spec)) for spec in functions]
        self._tunings = speakers[0].tunings
        learned = self._load(speakers[0], reward_model, options) if reward_model else None
        self._sets = {}
        for speaker in speakers:
            mine = [*([self._learned(learned, speaker)] if learned else []), *rewards]
            self._sets[speaker] = RewardSet(mine) if mine else None

    def __call__(self, speaker: Speaker, reply: Reply) -> dict[str, float]:
        """Raises UserError, naming the reward, where it fails."""
        rewards = self._sets[speaker]
        if rewards is None:
            return {}
        switch_off(self._tunings)
        columns = reward_columns(
            {name: [value] for name, value in reply.extras.items()},
            token_ids=[[*reply.prompt_tokens, *reply.tokens]],
            ended=[reply.ended == "stop"],
            prompt_text=[reply.prompt_text],
            response_start=[len(reply.prompt_tokens)],
        )
        _, parts = rewards([reply.prompt], [reply.text], **columns)
        return {name: scores[0] for name, scores in parts.items()}

    def _load(self, speaker: Speaker, path: str, options: dict):
        from models.reward_model import load_reward_model

        if speaker.tuning is not None and speaker.tuning.kind == "full" and is_adapter(path):
            raise UserError(
                f"{path}: an adapter scores with the base's weights, which "
                "--resume-file has replaced; fuse the reward model"
            )
        switch_off(self._tunings)
        return load_reward_model(path, speaker.loaded, **options)

    @staticmethod
    def _learned(model, speaker: Speaker) -> Reward:
        prompting = speaker.prompting
        return learned_reward(
            model,
            speaker.tokenizer,
            prompt_template=prompting.prompt_template,
            token_format=prompting.token_format,
        )
