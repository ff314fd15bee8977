"""A run's checkpoints: what both loops save, and how they go back to it."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distributed.membership import member
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
from training.together import from_worker_0, largest, largest_difference, speaks, stay_alike


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
        saved = from_worker_0(lambda: self.checked(path, force))
        if saved is not None:
            self.take(saved)
        # Nothing refuses from here on, and until here the run folder is as it was.
        if speaks():
            set_aside_after(path, self.run_folder.checkpoints)
            number_old_ones(self.run_folder.checkpoints, self.run_folder.own_options)
        self.run_folder.load_state_dict({} if saved is None else saved.state["run"])
        if saved is not None and force:  # what was allowed to differ is a checkpoint's own now
            self.checkpoint()

    def checked(self, path: Path | None, force: bool) -> Checkpoint | None:
        """The checkpoint at `path`, which this run may go on from; UserError where it may not."""
        if path is None:
            return None
        saved = self.backend.load_checkpoint(path)
        check_checkpoint_options(path, self.run_folder, force)
        if not force:
            check_same_data(saved.state, self.data)
            check_same_base(saved.state, self.base)
            self.check_position(saved)
        return saved

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
        if member() is not None:
            self.even_out()
        self.save(self.snapshot(), metric)

    def even_out(self) -> None:
        """Worker 0's weights at all workers, where they have come apart."""
        before = self.snapshot().arrays
        if (arrays := stay_alike(before)) is None:
            return
        optimizer, (_, generators) = (
            arrays.pop("optimizer"),
            self.backend.training_state(self.trainer),
        )
        for name, group in self.groups.items():
            group.put(arrays[name])
        self.backend.restore_training(self.trainer, optimizer, generators, self.trained())
        drift = largest_difference(arrays, before)
        self.run_folder.log(self.step, {"distributed/drift": drift})

    def save(self, now: Snapshot, metric: Metric | None = None, unfinished: bool = False) -> None:
        """Write a checkpoint; rows of the run folder that are younger than it are taken back."""
        self.run_folder.cut_back(now.state["run"])
        try:
            if not speaks():  # worker 0 writes, and raises the same
                self.backend.refuse_non_finite(now.arrays)
                return
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
        if (limit := self.schedule.memory_limit) is not None:
            check_memory(limit, largest(self.backend.peak_memory()))
