"""Sampling ahead of the person, in a process of its own: no key waits for a model.

The child appends to the file of samples, which the parent reads as it grows; the pipe between them
carries what is to be said. Where the parent ends, however it does, the child ends after its batch.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data_utils import Record, asks_for_date, use_date
from errors import UserError
from labelling.sample_file import HEAD, LEFT_OUT, SampleFile
from run_folder.secrets import tell
from safe_files import refuse_links, sync_folder, writing

NICENESS = 10  # below whatever answers keys
FIRST_PROMPTS = 2  # in the first batch, so that there is soon something to label; then doubled


@dataclass(frozen=True)
class Plan:
    """What is sampled, in plain values that another process can be given."""

    path: Path  # the file of samples
    head: dict[str, Any]  # its first line
    ids: list[str]
    records: list[Record]
    model: str | None
    resume_file: str | None
    against: str | None
    loading: dict[str, Any]  # of chat.speaker.Loader
    tokenising: dict[str, Any]  # of tokenise_prompts
    template_date: str
    date_given: bool  # by the user, so that it must have an effect
    samples: int
    max_new_tokens: int
    sampling: dict[str, float]
    batch_size: int
    seed: int


class Sampler:
    """The process that samples; `poll` says what it said. Close it, or use a context manager."""

    def __init__(self, plan: Plan):
        context = get_context("spawn")  # a fork would share MLX's threads and locks
        self._pipe, child_end = context.Pipe(duplex=True)
        self._process = context.Process(target=run, args=(plan, child_end), daemon=True)
        self._process.start()
        child_end.close()
        self.ready = self.done = False
        self.notes: list[str] = []
        self.problem: str | None = None  # why it has stopped, a line for people

    def poll(self, seconds: float = 0) -> None:
        """Hear what there is, waiting at most so long for the first of it.

        Raises RuntimeError, with the child's traceback, for a bug in it.
        """
        while not (self.done or self.problem):
            try:
                if not self._pipe.poll(seconds):
                    return
                what, text = self._pipe.recv()
            except (EOFError, OSError):
                self._process.join()
                self.problem = (
                    "the process that samples has ended with status "
                    f"{self._process.exitcode}; start again to go on"
                )
                return
            seconds = 0
            if what == "ready":
                self.ready = True
            elif what == "done":
                self.done = True
            elif what == "note":
                self.notes.append(text)
            elif what == "error":
                self.problem = text
            else:
                raise RuntimeError(f"the process that samples has failed:\n{text}")

    def tell_notes(self) -> None:
        """Say what it had to say so far: warnings of loading, for the most part."""
        for note in filter(None, self.notes):
            tell(note)
        self.notes.clear()

    def close(self) -> None:
        self._pipe.close()
        if self._process.is_alive():
            self._process.terminate()
        self._process.join()

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ------------------------------------------------------------------------------ the child


def run(plan: Plan, pipe: Any) -> None:
    """What the child does: load, say so, sample what is not there yet."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    os.nice(NICENESS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # standard output is the labeller's
    warnings.showwarning = lambda message, *_, **__: pipe.send(("note", f"warning: {message}"))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the parent has gone
        try:
            fill(plan, pipe)
            pipe.send(("done", ""))
        except UserError as wrong:
            pipe.send(("error", str(wrong)))
        except (BrokenPipeError, ConnectionResetError):
            raise
        except BaseException:
            pipe.send(("bug", traceback.format_exc()))


def fill(plan: Plan, pipe: Any) -> None:
    """Load the models and write a row of samples for every item that has none."""
    speakers = load(plan)
    prompts = [prompts_of(plan, speaker) for speaker in speakers]
    refuse_links(plan.path)
    with writing(plan.path), open(plan.path, "ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # a child whose parent was killed ends its batch first
        there = SampleFile(plan.path)
        os.ftruncate(file.fileno(), there.end)  # half a line of a killed one
        if there.head is None:
            append(file, [{HEAD: plan.head}])
            sync_folder(plan.path.absolute().parent)
        else:
            there.check_head(plan.head)
        pipe.send(("ready", ""))
        places = [i for i in range(len(plan.ids)) if all(i in p for p in prompts)]
        rows = [{"pair": plan.ids[i], LEFT_OUT: True} for i in {*range(len(plan.ids))} - {*places}]
        append(file, [row for row in rows if row["pair"] not in there.rows])
        for start, some in batches(places, max(1, plan.batch_size // plan.samples)):
            if all(plan.ids[i] in there.rows for i in some):
                continue
            made = sample(plan, speakers, [[p[i] for i in some] for p in prompts], start)
            names = [{"pair": plan.ids[i], "extras": plan.records[i].extras} for i in some]
            rows = [name | row for name, row in zip(names, made, strict=True)]
            append(file, [row for row in rows if row["pair"] not in there.rows])
            pipe.send(("note", ""))  # fails, and so ends the child, where nobody listens


def append(file: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows in one piece and sync them."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    rest = memoryview(text.encode("utf-8", "backslashreplace"))
    while rest:
        rest = rest[file.write(rest) :]
    os.fsync(file.fileno())


def batches(places: Sequence[int], most: int) -> Iterator[tuple[int, list[int]]]:
    """(how many came before, places): small ones first. The same, whatever is sampled already."""
    start, size = 0, min(FIRST_PROMPTS, most)
    while start < len(places):
        yield start, list(places[start : start + size])
        start += size
        size = min(2 * size, most)


def load(plan: Plan) -> list[Any]:
    """The speakers: that of --model, and that of --against where there is one."""
    import mlx.core as mx

    from chat.speaker import Loader

    if mx.default_device().type == mx.DeviceType.cpu:
        mx.disable_compile()  # else mlx-lm's filters run g++, which need not be there
    loader = Loader(**plan.loading)
    speakers = [loader.speaker(plan.model, plan.resume_file)]
    if plan.against is not None:
        speakers.append(loader.other(plan.against, plan.model))
    if plan.date_given and not any(asks_for_date(speaker.tokenizer) for speaker in speakers):
        raise UserError("--template-date has no effect: no chat template here reads the date")
    for speaker in speakers:
        use_date(speaker.tokenizer, plan.template_date)
    return speakers


def prompts_of(plan: Plan, speaker: Any) -> dict[int, Any]:
    """Prompts of one model by their place among the records; those that were refused are not there.

    Raises UserError for a prompt that is bad or too long, unless bad rows are skipped.
    """
    from command_line.data_flags import without_roles
    from command_line.model_limits import check_rows
    from data_utils import tokenise_prompts
    from models.base_fingerprint import DEFAULT_NAME

    speaker.step_forward()
    limits, options = speaker.loaded.limits, dict(plan.tokenising)
    prefix = len(speaker.tuning.prefix) if speaker.tuning is not None else 0
    if limits.positions is not None:
        room = limits.positions - prefix - plan.max_new_tokens
        if room < 1:
            raise UserError(
                f"--max-new-tokens {plan.max_new_tokens}: the model has {limits.positions} "
                "positions; give fewer"
            )
        options["max_length"] = min(options["max_length"], room)
    plain = options["prompt_template"] is None and options["token_format"] == "standard"
    if plain and (name := speaker.loaded.name) != DEFAULT_NAME:
        if (problem := without_roles(name, speaker.tokenizer, plan.records)) is not None:
            warnings.warn(problem, stacklevel=1)
    found = tokenise_prompts(plan.records, speaker.tokenizer, **options)
    check_rows(found.rows, limits, prefix=prefix, response=plan.max_new_tokens)
    if found.unused:  # the same words of a second model are said once
        warnings.warn(f"fields that nothing used: {', '.join(found.unused)}", stacklevel=1)
    kept, places = iter(found.rows), {}
    row = next(kept, None)
    for i, record in enumerate(plan.records):  # in order: a file that is given twice has each twice
        if row is not None and row.where == record.where:
            places[i], row = row, next(kept, None)
    return places


def sample(
    plan: Plan, speakers: Sequence[Any], prompts: Sequence[list[Any]], start: int
) -> list[dict[str, Any]]:
    """Rows of samples to the prompts of a batch, `prompts[model][k]`; models take turns."""
    import mlx.core as mx

    from chat.speaker import continuation
    from models.decoding import Sampling, generate

    as_messages = all(speaker.prompting.has_turns for speaker in speakers)
    replies: list[list[dict[str, Any]]] = [[] for _ in prompts[0]]
    for number, speaker in enumerate(speakers):
        share = len(range(number, plan.samples, len(speakers)))
        speaker.step_forward()
        prefix = list(speaker.tuning.prefix) if speaker.tuning is not None else []
        words = f"label {plan.seed} {start} {number}".encode()
        rollout = generate(
            speaker.loaded.model,
            [[*prefix, *row.tokens] for row in prompts[number]],
            max_tokens=plan.max_new_tokens,
            eos_ids=speaker.loaded.eos_ids,
            sampling=Sampling(**plan.sampling),
            key=mx.random.key(int.from_bytes(hashlib.sha256(words).digest()[:8])),
            samples=share,
        )
        for k, tokens in enumerate(rollout.responses):
            row = prompts[number][k // share]
            text = continuation(speaker.tokenizer, row.tokens, tokens, speaker.loaded.eos_ids)
            messages = as_messages or not isinstance(row.prompt, str)
            reply = {"text": text.strip() if messages else text, "model": number}
            replies[k // share].append(reply | {"ended": bool(rollout.finished[k])})
    rows = []
    for k, row in enumerate(prompts[0]):
        prompt = row.prompt
        if as_messages and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        rows.append({"prompt": prompt, "replies": replies[k]})
    return rows
