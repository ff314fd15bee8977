"""The rewards that come with the project: the digits score, and a learned reward model."""

from collections.abc import Callable, Sequence

from rewards.digits import count_numbers, digits_score
from rewards.reward_set import Reward

GROUND_TRUTH, NUMBERS, LEARNED = "ground_truth", "numbers", "reward_model"


def digits_rewards(
    *, increasing: bool, multiple_of: int, min_length: int, weight: float = 1.0
) -> list[Reward]:
    """The true score of a row of numbers, and (weight 0) how many numbers it has.

    The count stands beside the score because a score can rise by texts getting shorter.
    """

    def ground_truth(
        prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]
    ) -> list[float]:
        rows = zip(prompts, responses, ended, strict=True)
        return [
            digits_score(
                prompt + response,
                increasing=increasing,
                multiple_of=multiple_of,
                min_length=min_length,
                cut_off=not end,
            )
            for prompt, response, end in rows
        ]

    def numbers(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        rows = zip(prompts, responses, strict=True)
        return [count_numbers(prompt + response) for prompt, response in rows]

    return [Reward(GROUND_TRUTH, ground_truth, weight), Reward(NUMBERS, numbers, 0.0)]


def learned_reward(
    score: Callable[[list[list[int]]], list[float]],
    encode: Callable[[str, bool], list[int]] | None = None,
    weight: float = 1.0,
) -> Reward:
    """A reward model's `score` of whole token sequences.

    `encode(text, ended)` is given where the reward model reads other tokens than the policy writes;
    if it has a method `pairs(prompts, responses)`, `score` gets what that returns.
    """

    def reward_model(
        prompts: Sequence[str],
        responses: Sequence[str],
        token_ids: Sequence[Sequence[int]],
        ended: Sequence[bool],
    ) -> list[float]:
        if encode is None:
            return score([list(ids) for ids in token_ids])
        if hasattr(encode, "pairs"):
            return score(encode.pairs(prompts, responses))
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return score([encode(text, end) for text, end in zip(texts, ended, strict=True)])

    return Reward(LEARNED, reward_model, weight)
