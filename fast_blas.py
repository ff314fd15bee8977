"""What MLX's wheel for Linux processors lacks: a fast BLAS, and exponentials in vector code.

Import this before anything imports ``mlx.core``: the wheel links the reference BLAS (4 to 8 GFLOP/s
in float32), and a library that exports the same symbols and is loaded first takes their place.
`use_in(model)` is called once a model is loaded. On x86 the wheel has no vector instructions: its
exponential takes 14 ns where libm's power takes 5, a sigmoid 20 ns; in a small model's PPO step
they are a fifth of all time (docs/LOG.md). macOS has Accelerate and Metal and needs none of this;
on any other device or processor, and for any type but float32, `exp` and `swiglu` are MLX's own.
Loads no MLX until one of them is called.
"""

import ctypes
import functools
import importlib.util
import math
import os
import platform
import sys
from pathlib import Path

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


def refuse_wrong_python() -> None:
    """Exit with one line where a script runs in a Python that lacks what all of them need."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    if main is None or Path(main).resolve().parent != Path(__file__).resolve().parent:
        return
    for library in ("numpy", "mlx"):
        if importlib.util.find_spec(library) is None:
            line = (
                f"error: {sys.executable} has no {library}: type `. .venv/bin/activate` first, or "
                ".venv/bin/python in place of python; `make setup` makes that environment"
            )
            print(line, file=sys.stderr)
            raise SystemExit(2)


refuse_wrong_python()
NAME = load()


def tell_of_slowness() -> None:
    """One line on stderr, for the start of a run, where matrix products will be slow."""
    if platform.system() == "Linux" and NAME is None:
        print(
            "note: no fast BLAS found, matrix products are 10 to 20 times slower than they could "
            "be; on Debian or Ubuntu: apt-get install libopenblas0-pthread",
            file=sys.stderr,
        )


# ------------------------------------------------------------------------------ exponentials

X86 = platform.machine() in ("x86_64", "AMD64")


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
