"""The KL penalty between policy and reference; its coefficient: rl/scores.py."""

import mlx.core as mx

# How each mode turns d = logprobs - ref_logprobs of a sampled token into a penalty. k1, k2, k3 are
# the estimators of http://joschu.net/blog/kl-approx.html; "kl" and "mse" are TRL's names of two.
PER_TOKEN = {
    "kl": lambda d: d,
    "abs": mx.abs,
    "mse": lambda d: 0.5 * mx.square(d),
    "k1": lambda d: d,
    "k2": lambda d: 0.5 * mx.square(d),
    "k3": lambda d: mx.expm1(-d) + d,
}


def kl_penalty(logprobs: mx.array, ref_logprobs: mx.array, mode: str = "kl") -> mx.array:
    """Penalty per token, (B, T), from the log-probabilities of the sampled tokens, (B, T).

    Mode "full" needs whole distributions: see `full_kl`. Raises ValueError for any other mode.
    """
    if mode not in PER_TOKEN:
        raise ValueError(f"KL mode {mode!r}: one of {', '.join(PER_TOKEN)} is needed here")
    return PER_TOKEN[mode](logprobs - ref_logprobs)


def full_kl(logits: mx.array, ref_logits: mx.array) -> mx.array:
    """Exact KL(policy, reference): sum over V of p (log p - log p_ref); (..., V) -> (...).

    Logits or log-probabilities alike. A token that the policy cannot produce (-inf) adds 0.
    """
    logits, ref_logits = logits.astype(mx.float32), ref_logits.astype(mx.float32)
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)  # (..., V)
    ref_logp = ref_logits - mx.logsumexp(ref_logits, axis=-1, keepdims=True)
    possible = logp > -mx.inf
    difference = mx.where(possible, logp - ref_logp, 0.0)
    return (mx.where(possible, mx.exp(logp), 0.0) * difference).sum(axis=-1)
