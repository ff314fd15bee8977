"""A run's checkpoints: what both loops save, and how they go back to it."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from run_folder.checkpoint_folder import set_aside_after
from run_folder.manifest import Metric, number_old_ones
from run_folder.resuming import (
    check_checkpoint_options,
    check_same_base,
    check_same_data,
    fingerprint,
)
from run_folder.run import Run
from run_folder.stopping import GracefulStop, StepGivenUp
from training.backend import Backend, Checkpoint
from training.endings import check_memory, not_finite
from training.groups import Arrays, Group


@dataclass
class Snapshot:
    """What a checkpoint of `step` holds, before it is written."""

    step: int
    arrays: dict[str, Arrays]
    described: dict[str, dict[str, Any]]
    state: dict[str, Any]
    unfinished: bool  # its evaluation has not been made


class Resumable:
    """The part of a loop that saves it and goes back; the loop has these, and says the rest."""

    run_folder: Run
    trainer: Any
    backend: Backend
    groups: Mapping[str, Group]
    schedule: Any  # with keep_checkpoints and memory_limit
    base: str | None  # fingerprint of the model that is trained
    step: int
    bad_in_a_row: int

    def rows(self) -> Sequence:
        """The rows that are trained on; a resumed run must have the same."""
        raise NotImplementedError

    def trained(self) -> dict:
        """The parameters that the optimizer moves."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Plain values of this loop that a checkpoint holds as well."""
        raise NotImplementedError

    def take_state(self, state: Mapping[str, Any]) -> None:
        """What `state` gave, back."""
        raise NotImplementedError

    def evaluation_due(self) -> bool:
        """Whether this step ends with an evaluation that has not been made."""
        raise NotImplementedError

    def check_position(self, saved: Checkpoint) -> None:
        """Raise UserError where a longer run would not have come past a checkpoint."""

    @cached_property
    def data(self) -> str:
        return fingerprint(self.rows())

    def resume(self, path: Path | None, *, force: bool = False) -> None:
        """Go back to a checkpoint (None: to the start); `force`: also with other data or base."""
        saved = self.backend.load_checkpoint(path) if path is not None else None
        if saved is not None:
            check_checkpoint_options(path, self.run_folder, force)
            if not force:
                check_same_data(saved.state, self.data)
                check_same_base(saved.state, self.base)
                self.check_position(saved)
            self.take(saved)
        # Nothing refuses from here on, and until here the run folder is as it was.
        set_aside_after(path, self.run_folder.checkpoints)
        number_old_ones(self.run_folder.checkpoints, self.run_folder.own_options)
        self.run_folder.load_state_dict({} if saved is None else saved.state["run"])
        if saved is not None and force:  # what was allowed to differ is a checkpoint's own now
            self.checkpoint()

    def take(self, saved: Checkpoint) -> None:
        """The weights of a checkpoint, and where its run stood."""
        for name, group in self.groups.items():
            group.put(saved.arrays[name])
        optimizer, generators = saved.arrays["optimizer"], saved.state["rng"]
        self.backend.restore_training(self.trainer, optimizer, generators, self.trained())
        self.step, self.bad_in_a_row = saved.step, saved.state["bad_in_a_row"]
        self.take_state(saved.state)

    @contextmanager
    def stopped_by(self, stop: GracefulStop) -> Iterator[None]:
        """Around the loop: a step that a signal gave up leaves a checkpoint from before it."""
        self.stop, self.before = stop, None
        self.trainer.before_update = self.weights_move
        try:
            yield
        except StepGivenUp:
            self.save(self.before, unfinished=self.before.unfinished)

    @contextmanager
    def step_to_give_up(self) -> Iterator[None]:
        """Around a step or an evaluation: a signal gives it up until `weights_move` is called."""
        self.before = self.snapshot()
        with self.stop.giving_up():
            yield

    def weights_move(self) -> None:
        """The trainer is about to change the first weight of this step."""
        self.stop.finish_step()
        self.before = None  # or the old weights would stay in memory beside the new ones

    def snapshot(self) -> Snapshot:
        """All that the next checkpoint holds; arrays are not copied."""
        arrays = {name: group.get() for name, group in self.groups.items()}
        arrays["optimizer"], generators = self.backend.training_state(self.trainer)
        state = copy.deepcopy(self.state()) | {
            "bad_in_a_row": self.bad_in_a_row,
            "data": self.data,
            "base": self.base,
            "run": self.run_folder.state_dict(),
            "rng": generators,
        }
        return Snapshot(
            self.step,
            arrays,
            {name: group.described() for name, group in self.groups.items()},
            state,
            self.evaluation_due(),
        )

    def checkpoint(self, metric: Metric | None = None) -> None:
        self.save(self.snapshot(), metric)

    def save(self, now: Snapshot, metric: Metric | None = None, unfinished: bool = False) -> None:
        """Write a checkpoint; rows of the run folder that are younger than it are taken back."""
        self.run_folder.cut_back(now.state["run"])
        try:
            self.backend.save_checkpoint(
                self.run_folder.checkpoints,
                now.step,
                now.arrays,
                now.state,
                described=now.described,
                keep=self.schedule.keep_checkpoints,
                metric=metric,
                unfinished=unfinished,
                options=self.run_folder.own_options,
            )
        except FloatingPointError as wrong:
            raise not_finite(self.run_folder, str(wrong)) from None

    def check_memory(self) -> None:
        check_memory(self.schedule.memory_limit, self.backend.peak_memory())
