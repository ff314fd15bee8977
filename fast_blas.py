"""Gives MLX's Linux CPU backend a fast BLAS; import this before anything imports ``mlx.core``.

The Linux CPU wheel of MLX links the reference BLAS (4 to 8 GFLOP/s in float32). A library that
exports the same symbols and is loaded first takes their place. macOS has Accelerate and Metal and
needs none of this.
"""

import ctypes
import os
import platform

# One thread is fastest at the sizes that the MLX CPU backend hands over one by one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

CANDIDATES = ("libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0", "libmkl_rt.so.2")


def load() -> str | None:
    """Load the first BLAS found; return its name, or None (macOS, none found, or turned off).

    ``MLX_RLHF_BLAS=off`` keeps the BLAS of the wheel; a path names another library.
    """
    wanted = os.environ.get("MLX_RLHF_BLAS", "")
    if platform.system() != "Linux" or wanted == "off":
        return None
    for name in (wanted,) if wanted else CANDIDATES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            return name
        except OSError:
            continue
    return None


NAME = load()


def notice() -> str | None:
    """One line for the start of a run when matrix products will be slow, else None."""
    if platform.system() != "Linux" or NAME is not None:
        return None
    return (
        "note: no fast BLAS found, matrix products are 10 to 20 times slower than they could be; "
        "on Debian or Ubuntu: apt-get install libopenblas0-pthread"
    )
