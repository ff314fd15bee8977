"""Generalised advantage estimation (Schulman et al. 2016) that steps over masked tokens.

Legend: B batch, T tokens.
"""

import mlx.core as mx


def gae(
    rewards: mx.array, values: mx.array, mask: mx.array, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[mx.array, mx.array]:
    """(advantages, returns), both (B, T), unwhitened, 0 at masked places; inputs (B, T).

    delta_t = r_t + gamma V' - V_t,  A_t = delta_t + gamma lam A',  return_t = A_t + V_t,
    where ' is the next token of the row that counts, and V' = A' = 0 after the last one. So padding
    on either side and holes inside a response change nothing: TRL puts V = 0 into
    a hole and lets the recursion run through it. No gradient flows through either result.
    """
    counted = mask > 0
    rewards, values = mx.where(counted, rewards, 0.0), mx.where(counted, values, 0.0)
    # V' of token t: skip = 1 passes the search on to the right, skip = 0 ends it at this token.
    skip = 1.0 - counted.astype(mx.float32)
    next_values = _shifted(_scan_from_right(skip, values), 1)
    deltas = mx.where(counted, rewards + gamma * next_values - values, 0.0)
    decay = mx.where(counted, gamma * lam, 1.0)
    advantages = mx.where(counted, _scan_from_right(decay, deltas), 0.0)
    returns = advantages + values
    return mx.stop_gradient(advantages), mx.stop_gradient(returns)


def _scan_from_right(a: mx.array, b: mx.array) -> mx.array:
    """x (B, T) with x_t = b_t + a_t x_{t+1} and 0 after the end.

    In log2(T) rounds instead of T steps: after each, x_t = b_t + a_t x_{t + reach}, and reach has
    doubled. The loop that it replaces is in tests/rl/test_rl_identities.py.
    """
    reach = 1
    while reach < b.shape[1]:
        b = b + a * _shifted(b, reach)
        a = a * _shifted(a, reach)
        reach *= 2
    return b


def _shifted(x: mx.array, by: int) -> mx.array:
    """x_{t + by} at t, (B, T); 0 where that is beyond the end."""
    return mx.pad(x[:, by:], [(0, 0), (0, min(by, x.shape[1]))])
