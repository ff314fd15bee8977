"""The model that a training script leaves beside its adapter: fused, loadable, with a card."""

from argparse import Namespace
from pathlib import Path

from models.parts import load_parts
from publishing.card_facts import CardChoices
from publishing.checks import Check
from publishing.export import export


def write_fused(args: Namespace, run: Path) -> list[str]:
    """Fuse what a run saved to --save-file into --fused-dir, as fuse.py does; print what it says.

    The base is read once more, so that the result has the types it is stored in. Returns commands
    to go on with. Raises UserError, with --fused-dir not written, where the result is not what was
    trained.
    """
    path = Path(args.fused_dir).expanduser()
    parts = load_parts(
        args.model,
        [args.save_file],
        [1.0],
        quantize=args.quantize,
        trust_remote_code=args.trust_remote_code,
        any_base=args.any_base,
        tokenizer=args.tokenizer,
    )
    force = bool(args.resume or args.overwrite)  # which was checked when the run began
    done = export(parts, path, "model", Check.of(parts), CardChoices(path.name, run), force=force)
    print("\n".join([*done.messages, f"wrote {args.fused_dir}"]))
    return done.next_commands
