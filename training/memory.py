"""How much memory MLX took, and a limit that ends in advice and not in a frozen machine."""

import mlx.core as mx

from errors import MEMORY_ADVICE, UserError

GB = 1e9


def set_memory_limit(gigabytes: float | None) -> None:
    """Let MLX free its caches before it passes ``gigabytes``; None leaves its own limit."""
    if gigabytes is not None:
        mx.set_memory_limit(int(gigabytes * GB))
        mx.set_cache_limit(int(gigabytes * GB) // 4)


def check_memory(gigabytes: float | None) -> None:
    """Raise ``UserError`` once the peak has passed a limit that MLX exceeds in silence."""
    if gigabytes is not None and peak_memory() > gigabytes:
        raise UserError(
            f"--memory-limit: {peak_memory():.3g} GB were needed, {gigabytes:g} allowed; "
            + MEMORY_ADVICE
        )


def peak_memory() -> float:
    """The most memory that MLX has held in this process so far, in GB (1e9 bytes)."""
    return mx.get_peak_memory() / GB


def say_gb(gigabytes: float) -> str:
    """``1.23 GB``, or ``45.6 MB`` below a tenth of one."""
    return f"{gigabytes:.2f} GB" if gigabytes >= 0.1 else f"{gigabytes * 1000:.1f} MB"
