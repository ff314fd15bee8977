"""Composite rewards: an external score and signals of the text itself, as arithmetic.

reward = (1 - alpha) * external + alpha * internal, where internal is the (weighted) mean of
components in [0, 1]. What a component is made from, likelihoods and embeddings under the reference
model, is measured in models/text_signals.py; rewards/internal.py puts both together.

Legend: B responses, n tokens of a response without EOS, D width of hidden states.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

GRAM = 4  # tokens of the n-grams that repetition and copying are counted in
ALONE = 0.5  # coherence of a response that is one segment: nothing says more or less


def compute_adlf_rewards(
    external: Sequence[float],
    components: Mapping[str, Sequence[float]],
    alpha: float,
    weights: Mapping[str, float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(rewards (B,), internal (B,)): (1 - alpha) * external + alpha * weighted mean of components.

    external (B,); components: scores (B,) in [0, 1] by name; weights of these (default: all 1, and
    0 for a name that is left out), of which only ratios count. "external" among the weights is the
    external score as one more objective. Raises ValueError for an alpha outside [0, 1], or weights
    that are negative or all 0.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha}: must be from 0 to 1")
    external = np.asarray(external, dtype=np.float64)
    shares = normalised(dict.fromkeys(components, 1.0) if weights is None else weights)
    columns = {"external": external, **components}
    parts = [share * np.asarray(columns[name]) for name, share in shares.items() if share]
    internal = np.sum(parts, axis=0)
    return (1 - alpha) * external + alpha * internal, internal


def normalised(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights divided by their sum, as the decimals that they are written as: .3 of 1 is 3 of 10.

    Raises ValueError where one is negative, or all are 0.
    """
    if not all(0 <= weight < np.inf for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights {dict(weights)}: none may be negative, and one must be above 0")
    exact = {name: Fraction(repr(float(weight))) for name, weight in weights.items()}
    total = sum(exact.values())
    return {name: float(weight / total) for name, weight in exact.items()}


def to_unit_range(scores: Sequence[float], low: float, high: float) -> np.ndarray:
    """Scores (B,) mapped from [low, high] to [0, 1], clipped; NaN stays NaN."""
    return np.clip((np.asarray(scores, dtype=np.float64) - low) / (high - low), 0, 1)


def pareto_share(objectives: Sequence[Sequence[float]]) -> float:
    """The share of B responses that no other one beats in every objective; objectives (K, B)."""
    values = np.asarray(objectives, dtype=np.float64)  # (K, B)
    beats = (values[:, :, None] > values[:, None, :]).all(axis=0)  # (B, B): row beats column
    return float(1 - beats.any(axis=0).mean())


# ------------------------------------------------------------------------------ components


def length_score(count: int, target: int) -> float:
    """min(1, n / target): short answers lose."""
    return min(1.0, count / target)


def fluency_score(log_ppl: float, log_ppl0: float) -> float:
    """1 / (1 + ppl / ppl0), from the logarithms of both perplexities."""
    return float(1 / (1 + np.exp(np.clip(log_ppl - log_ppl0, -50, 50))))


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """(1 + cos) / 2 of two vectors (D,); half where one of them is zero."""
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    return float((1 + one @ other / norms) / 2) if norms > 0 else 0.5


def coherence_score(segments: np.ndarray) -> float:
    """Mean likeness of neighbours among segments (S, D); `ALONE` for fewer than two."""
    if len(segments) < 2:
        return ALONE
    return float(np.mean([likeness(*pair) for pair in zip(segments, segments[1:], strict=False)]))


def grams(tokens: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Every run of `size` neighbouring tokens."""
    return [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]


def distinct_share(response: Sequence[int]) -> float:
    """d: the share of distinct 4-grams; of distinct tokens in a response of fewer than 4."""
    found = grams(response, GRAM if len(response) >= GRAM else 1)
    return len(set(found)) / len(found) if found else 0.0


def copied_share(response: Sequence[int], prompt: Sequence[int]) -> float:
    """The share of 4-grams that stand in the prompt; of a shorter response, whether it does."""
    size = min(GRAM, len(response))
    if not size:
        return 0.0
    known = set(grams(prompt, size))
    found = grams(response, size)
    return sum(gram in known for gram in found) / len(found)


def guard(response: Sequence[int], prompt: Sequence[int]) -> float:
    """What every component is multiplied by: d times the share that is not copied; 0 at n = 0."""
    return distinct_share(response) * (1 - copied_share(response, prompt))
