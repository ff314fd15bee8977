"""What MLX's wheel for Linux processors lacks: a fast BLAS, and exponentials in vector code.

Import this before anything imports ``mlx.core``: the wheel links the reference BLAS (4 to 8 GFLOP/s
in float32), and a library that exports the same symbols and is loaded first takes their place.
`use_in(model)` is called once a model is loaded. On x86 the wheel has no vector instructions: its
exponential takes 14 ns where libm's power takes 5, a sigmoid 20 ns; in a small model's PPO step
they are a fifth of all time (docs/LOG.md). macOS has Accelerate and Metal and needs none of this;
on any other device or processor, and for any type but float32, `exp` and `swiglu` are MLX's own.
Loads no MLX until one of them is called.
"""

import right_python  # noqa: F401, I001  before what only the right one can read

import ctypes
import functools
import math
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# One thread is fastest for small models; larger ones get more once they are loaded (`settle`).
THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
THREADS_ASKED_FOR = any(os.environ.get(name) for name in THREADS)
if not THREADS_ASKED_FOR:
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

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
X86 = platform.machine() in ("x86_64", "AMD64")


def tell_of_slowness() -> None:
    """One line on stderr, for the start of a run, where matrix products will be slow."""
    if platform.system() == "Linux" and NAME is None:
        print(
            "note: no fast BLAS found, matrix products are 10 to 20 times slower than they could "
            "be; on Debian or Ubuntu: apt-get install libopenblas0-pthread",
            file=sys.stderr,
        )


# ------------------------------------------------------------------------------ kernels, threads

# OpenBLAS's kernels for AVX2 and later. A library that is older than the processor takes those of
# Prescott or Nehalem, a fifth as fast (docs/LOG.md).
MODERN = ("Haswell", "Zen", "SkylakeX", "Cooperlake", "SapphireRapids")
AVX2 = {"avx2", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
# Flags that a processor needs for some kernels; the first two are what is chosen from, in order.
NEEDED = {
    "SkylakeX": AVX512,
    "Haswell": AVX2,
    "Zen": AVX2,
    "Cooperlake": AVX512 | {"avx512_bf16"},
    "SapphireRapids": AVX512 | {"avx512_bf16", "amx_bf16"},
}
CORETYPE = "OPENBLAS_CORETYPE"
SMALL = 5_000_000  # weights below which a second thread costs more than it gives
MOST_THREADS = 8  # more were never tried


def better_kernels(current: str, flags: set[str]) -> str | None:
    """Kernels for a processor with these flags in place of the `current` ones; None: they fit."""
    if current in MODERN:
        return None
    return next((name for name in ("SkylakeX", "Haswell") if NEEDED[name] <= flags), None)


def processor_flags(file: str = "/proc/cpuinfo") -> set[str]:
    """What the first processor can do, by Linux; nothing where that is not told."""
    try:
        lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


@functools.cache
def _openblas() -> ctypes.CDLL | None:
    """The BLAS that was loaded, if it is an OpenBLAS that can be asked and told."""
    library = ctypes.CDLL(NAME) if NAME else None
    if not hasattr(library, "openblas_get_corename"):
        return None
    library.openblas_get_corename.restype = ctypes.c_char_p
    return library


def kernels() -> str | None:
    """The processor whose kernels OpenBLAS computes with; None: no OpenBLAS."""
    library = _openblas()
    return None if library is None else library.openblas_get_corename().decode()


def threads() -> int | None:
    """How many threads share a large product; None: no OpenBLAS."""
    library = _openblas()
    return None if library is None else library.openblas_get_num_threads()


def use_kernels(name: str) -> bool:
    """Compute with the kernels for another processor from now on; whether that could be done.

    OpenBLAS picks them when it is loaded; both functions are what it does then, and what it takes
    from the environment. No product may be under way.
    """
    library = _openblas()
    if library is None or not hasattr(library, "gotoblas_dynamic_quit"):
        return False
    before = os.environ.get(CORETYPE)
    os.environ[CORETYPE] = name
    library.gotoblas_dynamic_quit()
    library.gotoblas_dynamic_init()
    if kernels() != name and before is None:
        del os.environ[CORETYPE]
    return kernels() == name


def use_threads(count: int) -> None:
    """Share large products among so many threads from now on."""
    if (library := _openblas()) is not None:
        library.openblas_set_num_threads(count)


def available_processors() -> int:
    """Processors that this process may use: by its affinity, and by its container's limit."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return count or 1


def settle(weights: int, recorded: Mapping[str, Any] | None = None, alone: bool = True) -> None:
    """Fix what the bytes of a run depend on, for a model of so many weights.

    Threads: those that the environment asks for, else one for a small model, or where the process
    is not `alone` (one of several workers), and one for each processor for others. `recorded`: what
    a run that is resumed was computed with (`settings`); it is used again, with a line where it
    cannot be.
    """
    if _openblas() is None:
        return
    few = THREADS_ASKED_FOR or weights < SMALL or not alone
    count = threads() if few else min(available_processors(), MOST_THREADS)
    if recorded is not None:
        count = recorded.get("threads") or 1  # it was always one before it was recorded
    use_threads(count)
    name = (recorded or {}).get("kernels") or kernels()
    possible = NEEDED.get(name, set()) <= processor_flags()
    if name != kernels() and not (possible and use_kernels(name)):
        print(
            f"note: the run was computed with OpenBLAS's kernels for {name}; here they are those "
            f"for {kernels()}, so that it goes on with other rounding",
            file=sys.stderr,
        )


def settings() -> dict[str, Any]:
    """Library, kernels and threads, for a run to record."""
    return {"blas": NAME, "kernels": kernels(), "threads": threads()}


def told() -> str:
    """``OpenBLAS for SkylakeX, 2 threads``; nothing without one."""
    count = threads()
    plural = "" if count == 1 else "s"
    return "" if count is None else f"OpenBLAS for {kernels()}, {count} thread{plural}"


def pick_kernels() -> None:
    """Better kernels where the library does not know the processor and nobody asked for any."""
    found = kernels() if X86 and not os.environ.get(CORETYPE) else None
    better = found and better_kernels(found, processor_flags())
    if better:
        use_kernels(better)


pick_kernels()

# ------------------------------------------------------------------------------ exponentials


def use_in(model) -> None:
    """Let the blocks of `model`'s architecture use `swiglu` of this file.

    mlx-lm's modules import theirs by name, so the name is what changes; not in mlx_lm.activations.
    """
    from mlx_lm.models.activations import swiglu as own

    names = {type(module).__module__ for module in model.modules()} if X86 else set()
    for name in names - {own.__module__}:  # GPT OSS has a module of that file
        if getattr(sys.modules[name], "swiglu", None) is own:
            sys.modules[name].swiglu = swiglu


def exp(x):
    """e to the power of x."""
    import mlx.core as mx

    return _powers()[0](x) if _slow_here(x) else mx.exp(x)


def swiglu(gate, x):
    """silu(gate) * x, the gated activation of Llama's family."""
    if _slow_here(gate):
        return gate * _powers()[1](gate) * x
    from mlx_lm.models.activations import swiglu as own

    return own(gate, x)


def _slow_here(x) -> bool:
    import mlx.core as mx

    # In bfloat16 the base of the power would be rounded too.
    return X86 and x.dtype == mx.float32 and mx.default_device().type == mx.DeviceType.cpu


@functools.cache
def _powers():
    """(exp, sigmoid); their gradients are written out: that of a power takes logarithms of e."""
    import mlx.core as mx

    @mx.custom_function
    def power(x):
        return mx.power(math.e, x)

    @power.vjp
    def _(x, cotangent, output):
        return cotangent * output

    @mx.custom_function
    def sigmoid(x):
        return 1 / (1 + mx.power(math.e, -x))

    @sigmoid.vjp
    def _(x, cotangent, output):
        return cotangent * (output - output * output)

    return power, sigmoid
