"""The exponentials for x86 equal MLX's own, gradients included, and stay where they are meant."""

import fast_blas

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import activations
from mlx_lm.models import llama as llama_module
from tiny import tiny_model, tiny_model_folder

from models.load import load_model

X = mx.array([-np.inf, -200.0, -87.5, -20.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 20.0, 88.0])


@pytest.fixture
def x86(monkeypatch):
    """Take the way of x86 on any processor, with MLX on the CPU."""
    monkeypatch.setattr(fast_blas, "X86", True)
    with mx.stream(mx.cpu):
        yield


def test_exp_equals_mlxs(x86):
    # The base is rounded to float32: relative error |x| * 3e-8 at most, and 6e-8 of rounding.
    ours, theirs = np.array(fast_blas.exp(X)), np.array(mx.exp(X))
    np.testing.assert_allclose(ours, theirs, rtol=88 * 3e-8 + 2e-7, atol=1e-37)
    assert ours[0] == 0 and ours[6] == 1
    assert np.isnan(fast_blas.exp(mx.array(float("nan"))).item())
    gradient = mx.grad(lambda x: fast_blas.exp(x).sum())(X[1:])
    np.testing.assert_allclose(gradient, mx.exp(X[1:]), rtol=88 * 3e-8 + 2e-7, atol=1e-37)


def test_swiglu_equals_mlx_lms(x86):
    gate, x = X[1:], mx.arange(1.0, 11.0)
    np.testing.assert_allclose(
        fast_blas.swiglu(gate, x), activations.swiglu(gate, x), rtol=4e-6, atol=1e-35
    )
    ours, theirs = (
        mx.grad(lambda g, x, f=f: mx.sin(f(g, x)).sum(), argnums=(0, 1))(gate, x)
        for f in (fast_blas.swiglu, activations.swiglu)
    )
    for a, b in zip(ours, theirs, strict=True):
        # sin of numbers up to 900 has an error of 900 * 1e-7 by itself.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-2)
    assert not np.isnan(np.array(fast_blas.swiglu(mx.array([-1e30]), mx.array([1.0])))).any()


def test_they_are_used_for_float32_on_x86_processors_alone(x86, monkeypatch):
    def is_own(x: mx.array) -> bool:
        return np.array_equal(fast_blas.exp(x).astype(mx.float32), mx.exp(x).astype(mx.float32))

    many = mx.linspace(-30, 30, 1001)
    assert not is_own(many)  # a bit differs somewhere: the power was taken
    assert is_own(many.astype(mx.bfloat16)) and is_own(many.astype(mx.float16))
    monkeypatch.setattr(fast_blas, "X86", False)
    assert is_own(many)


def test_a_loaded_model_uses_them_and_mlx_lms_function_stays(x86, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_module, "swiglu", activations.swiglu)
    own, tokens = activations.swiglu, mx.array([[5, 9, 60, 3]])
    folder = tiny_model_folder(tmp_path / "model")
    model = load_model(folder, dtype="float32").model
    assert llama_module.swiglu is fast_blas.swiglu and activations.swiglu is own
    ours = model(tokens)
    monkeypatch.setattr(llama_module, "swiglu", own)
    np.testing.assert_allclose(ours, model(tokens), atol=1e-5)


def test_a_model_with_an_activation_module_leaves_mlx_lms_function_alone():
    """GPT OSS keeps an object of mlx_lm.models.activations; a loop of calls was the end of it."""
    from mlx_lm.models import activations

    own = activations.swiglu
    fast_blas.use_in(tiny_model("gpt_oss"))
    assert activations.swiglu is own
    x = mx.ones((2, 3), dtype=mx.bfloat16)
    assert fast_blas.swiglu(x, x).shape == (2, 3)
