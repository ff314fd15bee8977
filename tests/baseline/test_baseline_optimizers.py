"""Optimizers and learning rates of the PyTorch baseline and of the MLX side."""

import mlx.core as mx
import numpy as np
import pytest
from baseline_setup import close, torch
from pytorch_optimizers import build_optimizer

from training.optimizers import build_optimizer as build_mlx_optimizer
from training.schedules import learning_rate_schedule

pytestmark = pytest.mark.torch

# ---- optimizers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "adamw", "adafactor", "lion", "sgd", "muon"])
def test_optimizers(name):
    rng = np.random.default_rng(0)
    start = {"a": rng.normal(size=(6, 4)), "head": rng.normal(size=(4, 3)), "b": rng.normal(size=5)}
    options = dict(weight_decay=0.05, momentum=0.9 if name in ("sgd", "muon") else None)
    options |= dict(schedule="linear", steps=10, warmup=2, end_factor=0.1)
    parameters = {
        k: torch.nn.Parameter(torch.tensor(v, dtype=torch.float32)) for k, v in start.items()
    }
    optimizer = build_optimizer(parameters, name, 0.01, **options)
    model = {k: mx.array(v.astype(np.float32)) for k, v in start.items()}
    mlx_optimizer = build_mlx_optimizer(name, 0.01, **options)
    mlx_optimizer.init(model)
    for _ in range(6):
        gradients = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in start.items()}
        for key, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[key])
        optimizer.step()
        model = mlx_optimizer.apply_gradients({k: mx.array(g) for k, g in gradients.items()}, model)
    # Muon orthogonalises in bfloat16 in torch.
    relative = 2e-2 if name == "muon" else 1e-5
    for key, parameter in parameters.items():
        moved_by = np.abs(np.array(model[key]) - start[key]).max()
        assert moved_by > 1e-3
        close(model[key], parameter, key, relative=0, absolute=relative * moved_by + 1e-6)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine_with_restarts"])
def test_schedules(name):
    options = dict(steps=20, warmup=4, cycles=2, end_factor=0.25)
    factor = learning_rate_schedule(name, 1.0, **options)
    rate = learning_rate_schedule(name, 0.5, xp=mx, **options)
    for done in range(25):
        close(0.5 * factor(done), rate(done), f"{name} {done}", relative=1e-6)
