"""How much memory MLX took, and a limit that ends in advice and not in a frozen machine."""

import mlx.core as mx

GB = 1e9


def set_memory_limit(gigabytes: float | None) -> None:
    """Let MLX free its caches before it passes ``gigabytes``; None leaves its own limit."""
    if gigabytes is not None:
        mx.set_memory_limit(int(gigabytes * GB))
        mx.set_cache_limit(int(gigabytes * GB) // 4)


def peak_memory() -> float:
    """The most memory that MLX has held in this process so far, in GB (1e9 bytes)."""
    return mx.get_peak_memory() / GB
