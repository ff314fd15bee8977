"""Label what a model writes: two to four replies to each prompt, blind, in a terminal or a browser.

Replies are sampled ahead, in a process of its own; every label is on the disk before the next pair
is shown. The labels are preference records (above two replies: ranked ones) that training scripts
read as they are. With --report: how far labellers agree, and whether place or length sways them.

Within a minute on a laptop, on the embedded model:
    python label.py --prompts data/samples/prompts.jsonl --output labels.jsonl
A real one, two models against each other in a browser, then what the labels are worth:
    python label.py --prompts prompts.jsonl --model MODEL --against OTHER --web
    python label.py --report labels.jsonl judged.jsonl
"""

import fast_blas

import signal
import sys
from hashlib import sha256
from pathlib import Path

from command_line.data_flags import tokenising, warn_of_digits_model
from command_line.exits import run_main, stop, stop_at_signals
from command_line.label_flags import parse_arguments
from errors import UserError

# ------------------------------------------------------------------------------ main


def main(words=None) -> int:
    args = parse_arguments(words)
    if args.report:
        return report(args)
    return label(args)


# ------------------------------------------------------------------------------ labels


def label(args) -> int:
    """Label until all is done or the person leaves."""
    from data_loading.report import refusals
    from data_utils import mix_records, read_records
    from labelling.items import refuse_promptless
    from labelling.label_file import LabelFile
    from run_folder.secrets import tell

    reading = {name: getattr(args, name) for name in ("format", "skip_bad_rows", "max_rows")}
    sets = [read_records(path, refuse=refuse_promptless, **reading) for path in args.prompts]
    records = mix_records(sets)
    for line in [*records.notes, *refusals(records.refused)]:
        tell(f"note: {line}")
    face = make_face(args)  # a terminal or a port that is not there is an error before any work
    labels = LabelFile(args.output)
    try:
        return with_samples(args, records, labels, face)
    finally:
        labels.close()


def with_samples(args, records, labels, face) -> int:
    """Begin sampling what is not sampled yet, and label."""
    from labelling.desk import Desk, check_labels
    from labelling.items import item_ids
    from labelling.sample_file import SampleFile, sample_path

    ids = item_ids(records)
    samples = SampleFile(sample_path(labels.path))
    head = describe(args, ids, samples.head)
    samples.check_head(head)
    models = [model | {"sampling": head["sampling"]} for model in head["models"]]
    check_labels(labels, ids, models, args.aspects)
    sampler = None
    if any(id not in samples.rows for id in ids):
        warn_of_digits_model(args, records)
        fast_blas.tell_of_slowness()
        sampler = start_sampling(args, records, ids, head, samples.path)
    try:
        desk = Desk(
            ids,
            samples,
            labels,
            sampler,
            models=models,
            labeller=args.labeller,
            aspects=args.aspects,
            ranked=args.samples > 2,
            seed=args.seed,
        )
        return run_face(args, desk, face)
    finally:
        if sampler is not None:
            sampler.close()


def describe(args, ids, known) -> dict:
    """What the samples are made of, as the first line of their file; `known`: what it says now."""
    from data_utils import now

    names = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens")
    template = {name: getattr(args, name) for name in ("prompt_template", "token_format")}
    template |= {name: getattr(args, name) for name in ("max_length", "too_long")}
    return {
        "prompts": sha256(" ".join(ids).encode()).hexdigest(),
        "models": [
            describe_model(args, args.model, args.resume_file),
            *([describe_other(args)] if args.against else []),
        ],
        "samples": args.samples,
        "sampling": {name: getattr(args, name) for name in names},
        "seed": args.seed,
        "template": template,
        "template_date": args.template_date or (known or {}).get("template_date") or now(),
    }


def describe_other(args) -> dict:
    """--against: an adapter on --model, or a model."""
    from chat.speaker import is_adapter

    if is_adapter(args.against):
        return describe_model(args, args.model, args.against)
    return describe_model(args, args.against, None)


def describe_model(args, name, adapter) -> dict:
    """A model as a label records it: names, no secrets, and what tells its weights from others."""
    from models.adapter_description import read_description
    from models.base_fingerprint import DEFAULT_MODEL, DEFAULT_NAME, base_fingerprint
    from run_folder.secrets import redact

    if name is None and adapter is not None:
        name = read_description(adapter).get("model")  # what it was trained on
    name = DEFAULT_NAME if name is None else str(name)
    folder = Path(DEFAULT_MODEL if name == DEFAULT_NAME else name)
    found = {"model": name}
    if folder.is_dir():
        found["fingerprint"] = base_fingerprint(folder)
    if adapter is not None:
        found["adapter"] = adapter
        place = Path(adapter)
        files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
        sums = [sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
        found["adapter_sum"] = sha256("".join(sums).encode()).hexdigest()[:16]
    more = {"dtype": args.dtype, "quantize": args.quantize, "tokenizer": args.tokenizer}
    return redact(found | {k: v for k, v in more.items() if v not in (None, "auto")})


def start_sampling(args, records, ids, head, path):
    """A `Sampler` whose models are loaded. Raises UserError where one cannot be."""
    from labelling.sampler import Plan, Sampler
    from run_folder.console import Wait

    names = ("dtype", "quantize", "tokenizer", "trust_remote_code", "any_base")
    loading = {name: getattr(args, name) for name in (*names, "token_format", "prompt_template")}
    sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    plan = Plan(
        path=path,
        head=head,
        ids=ids,
        records=list(records),
        model=args.model,
        resume_file=args.resume_file,
        against=args.against,
        loading=loading,
        tokenising=tokenising(args),
        template_date=head["template_date"],
        date_given="template_date" in args.typed,
        samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    sampler = Sampler(plan)
    try:
        with Wait("loading the model") as wait:
            while not (sampler.ready or sampler.problem):
                sampler.poll(0.1)
                wait.advance(0)
    except BaseException:
        sampler.close()
        raise
    if sampler.problem:
        sampler.close()
        raise UserError(sampler.problem)
    sampler.tell_notes()
    return sampler


# ------------------------------------------------------------------------------ faces


def make_face(args):
    """What a person labels with: the keys of the terminal, or a socket for the page."""
    if args.web:
        from labelling.server import open_socket

        return open_socket(args.port)
    from chat.keyboard import Keys

    return Keys("label.py without --web")


def run_face(args, desk, face) -> int:
    """Label; then say what there is and what to do with it. The exit status."""
    from chat.screen import Screen

    # Replies are for the person who presses keys, wherever standard output goes.
    screen, code = Screen(sys.stdout if sys.stdout.isatty() else sys.stderr), 0
    signal.signal(signal.SIGINT, stop)  # a shell's job may ignore it
    stop_at_signals()
    try:
        if args.web:
            from labelling.server import serve

            serve(desk, face, screen)
        else:
            from labelling.terminal import Terminal

            Terminal(desk, screen, face).run()
    except KeyboardInterrupt as stopped:  # every label is on the disk
        screen.progress("")
        code = 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
    finally:
        tell_end(args, desk)
    if desk.sampler is not None and desk.sampler.problem and not desk.finished:
        raise UserError(desk.sampler.problem)
    return code


def tell_end(args, desk) -> None:
    """What was labelled, what was not asked about, and commands to go on with."""
    from run_folder.console import command, next_lines

    print(desk.summary())
    if desk.same:
        print(
            f"not asked: {len(desk.same)} prompts whose replies are all the same or empty, or hold "
            "a NUL character"
        )
    if desk.left_out:
        print(f"not asked: {len(desk.left_out)} prompts that were refused or are too long")
    if not desk.labels.rows:
        return
    output = str(desk.labels.path)
    lines = [command("label.py", report=output)]
    if desk.labels.counts()["choice"]:
        asked = ("prompt_template", "token_format")
        own = {"model": args.model, "train_file": output}
        own |= {name: getattr(args, name) for name in asked if name in args.changed}
        kto = {"algorithm": "kto"} if args.samples == 1 else {}
        lines += [
            command("sft.py", "--reward-model", "--train", **own),
            command("preference_training.py", "--train", **kto, **own),
        ]
    if not desk.finished:
        left = desk.total - desk.done
        print(f"{left} prompts are left: the same command goes on there")
    print(next_lines(lines))


# ------------------------------------------------------------------------------ report


def report(args) -> int:
    """Print what the labels say about labellers, and draw it."""
    from labelling.agreement import make_report, read_labels
    from labelling.report import report_lines
    from reports.label_plots import plot_labels
    from safe_files import check_place

    check_place(args.plot)
    found = make_report([read_labels(path) for path in args.report], seed=args.seed)
    print("\n".join(report_lines(found)))
    plot_labels(found, args.plot)
    print(f"wrote {args.plot}")
    return 0


if __name__ == "__main__":
    run_main(main)
