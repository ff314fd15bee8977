"""What the loops ask of PyTorch (training/backend.py): state.pt, generators, memory."""

import resource
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from run_folder.checkpoint_folder import disk_refused, write_checkpoint
from run_folder.manifest import problem
from training.backend import Checkpoint
from training.groups import Group


class PyTorchBackend:
    """PyTorch on a device. A checkpoint is a state.pt, in the same folders, with the same sums."""

    def __init__(self, device: torch.device):
        self.device = device

    def save_checkpoint(self, folder, step, arrays, state, *, described, **options) -> Path:
        for name, weight in arrays["trained"].items():
            if not torch.isfinite(weight).all():
                raise FloatingPointError(f"{name} holds NaN or infinity; nothing was saved")

        def write(temporary: Path) -> None:
            whole = {"step": step, "arrays": arrays, "state": state}
            try:
                torch.save(whole, temporary / "state.pt")
            except RuntimeError as wrong:
                raise disk_refused(wrong, temporary) from None

        return write_checkpoint(folder, step, write, **options)

    def load_checkpoint(self, path: Path) -> Checkpoint:
        """No pickled code is ever run."""
        if wrong := problem(path):
            raise UserError(f"{path}: {wrong}; this checkpoint cannot be used")
        try:
            saved = torch.load(path / "state.pt", weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, ValueError, UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: cannot be read: {reason}") from None
        if "arrays" not in saved:
            saved = of_the_first_form(saved)
        return Checkpoint(path, saved["step"], saved["arrays"], saved["state"])

    def training_state(self, trainer: Any) -> tuple[dict, dict]:
        generators = {"cpu": torch.get_rng_state()}  # what dropout reads
        if self.device.type != "cpu":
            generators[self.device.type] = getattr(torch, self.device.type).get_rng_state()
        return trainer.optimizer.state_dict(), generators

    def restore_training(self, trainer: Any, arrays: dict, generators: dict, trained: dict) -> None:
        trainer.optimizer.load_state_dict(arrays)
        torch.set_rng_state(generators["cpu"])
        if self.device.type in generators and self.device.type != "cpu":
            getattr(torch, self.device.type).set_rng_state(generators[self.device.type])

    def peak_memory(self) -> float:
        """Of the GPU, or of the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory() / 1e9
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def of_the_first_form(saved: dict) -> dict:
    """A state.pt in which the parts of a run stood side by side, until November 2026."""
    loop = saved.pop("state")
    arrays = {name: saved.pop(name) for name in ("optimizer", "schedule")}
    if "trainer" in saved:
        trainer = saved["trainer"]
        trainer |= {"kl_controller": {"value": trainer.pop("kl_coef")}, "warned": []}
    else:
        loop["totals"] = {name: loop.pop(name) for name in ("tokens", "skipped")}
    arrays = {"trained": saved.pop("trained"), "optimizer": arrays}
    return {"step": saved.pop("step"), "arrays": arrays, "state": saved | loop}


def trained_group(parameters: dict[str, nn.Parameter]) -> dict[str, Group]:
    """The trained weights, as a checkpoint holds them."""

    def put(arrays: dict[str, Tensor]) -> None:
        shapes = [{name: a.shape for name, a in some.items()} for some in (arrays, parameters)]
        if shapes[0] != shapes[1]:
            raise UserError("--resume: the checkpoint holds other weights than are trained now")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(arrays[name])

    return {"trained": Group(lambda: {n: p.detach().cpu() for n, p in parameters.items()}, put)}
