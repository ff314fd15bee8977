"""How much memory MLX took, and a limit that ends in advice and not in a frozen machine."""

import mlx.core as mx

GB = 1e9


CACHE_SHARE = 0.25  # of what may be used: buffers that are kept for the next arrays


def set_memory_limit(gigabytes: float | None) -> None:
    """Let MLX free its caches before it passes ``gigabytes``; None leaves its own limit.

    Where the device says how much memory is to be used (Metal), so much is wired, as mlx-lm does in
    training, and a share of it is the most that buffers for later arrays may hold.
    """
    told = mx.device_info().get("max_recommended_working_set_size")
    if told is not None:
        mx.set_wired_limit(told)
        mx.set_cache_limit(int(CACHE_SHARE * told))
    if gigabytes is not None:
        mx.set_memory_limit(int(gigabytes * GB))
        mx.set_cache_limit(int(CACHE_SHARE * gigabytes * GB))


def peak_memory() -> float:
    """The most memory that MLX has held in this process so far, in GB (1e9 bytes)."""
    return mx.get_peak_memory() / GB
