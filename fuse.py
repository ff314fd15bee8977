"""Make a model of its own out of a base model and what was trained on it; export it, upload it.

LoRA, DoRA and fully fine-tuned weights, soft prompts and reward heads become a folder in Hugging
Face format that mlx-lm, transformers and every script here load. The result is loaded again and
compared with the unfused model before it gets its name. --format writes other forms: an adapter
for mlx-lm or PEFT, a GGUF file, a reward model as transformers' sequence classifier.

    python fuse.py --adapter-file lora_weights.npz --save-path ./sft_fine_tune/
    python fuse.py --adapter-file a.npz b.npz --adapter-weights 0.7 0.3 --save-path mixed/ \\
        --upload-repo USER/NAME --private
"""

import fast_blas

from pathlib import Path

from command_line.exits import run_main
from command_line.parser import Parser
from command_line.rules import Needs, needs, refuse_idle
from command_line.shared_flags import add_any_base
from errors import UserError
from run_folder.private import keep_private, marked_above
from run_folder.secrets import tell
from safe_files import check_place, scratch_folder

FORMATS = ("model", "adapter", "peft", "classifier", "gguf")
UNFUSED = ("adapter", "peft")
SINGLE_FILES = {"adapter": (".npz", ".safetensors"), "gguf": (".gguf",)}
SINGLE_FILES.update(model=(), peft=(), classifier=())
NEEDS = (
    Needs("private revision commit_message dry_run", "upload_repo", valued=False),
    Needs("force", "save_path"),
)


# ------------------------------------------------------------------------------ arguments


def parse_arguments(words=None):
    """The command line of fuse.py; see --help."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("what goes in").add_argument
    add("--model", help="base: local folder or hub name (default: the one the adapter names)")
    add("--adapter-file", nargs="+", default=[], help=".npz, .safetensors, or adapter folder(s)")
    add("--adapter-weights", nargs="+", type=float, help="a factor for each adapter (default: 1)")
    add("--tokenizer", help="folder or hub name of its tokenizer (default: the model's own)")
    add("--trust-remote-code", type=bool, default=False, help="run code that the model brings")
    text = "round the base to so many bits first, as --quantize did in training"
    add("--quantize", type=int, choices=(4, 8), help=text)
    add_any_base(parser, "adapter_file")
    add = parser.add_argument_group("what comes out").add_argument
    add("--save-path", help="folder to write; for gguf a file, for adapter also .npz, .safetensors")
    add("--format", choices=FORMATS, default="model", help="what is written there")
    add("--force", type=bool, default=False, help="replace the model or adapter at --save-path")
    add("--dequantize", type=bool, default=False, help="leave no quantised weight in the result")
    add(
        "--dtype",
        choices=("stored", "float32", "bfloat16", "float16"),
        default="stored",
        help="of the fused weights; stored: as the base has it",
    )
    add = parser.add_argument_group("upload").add_argument
    add("--upload-repo", help="USER/NAME on the Hugging Face hub, made if it is not there")
    add("--private", type=bool, default=False, help="make the repository private")
    add("--revision", help="branch to upload to, made if it is not there (default: main)")
    add("--commit-message", help="of the upload")
    add(
        "--dry-run",
        type=bool,
        default=False,
        help="show what would be uploaded; write nothing, contact no hub",
    )
    add("--run", help="run folder for the model card (default: the one that saved the adapter)")
    add("--license", help="for the model card, such as apache-2.0 (default: the base's)")
    parser.checks += [check_arguments, needs(NEEDS)]
    return parser.parse_args(words)


def check_arguments(args):
    """Refuse flags that would change nothing or contradict each other; fill in the weights."""
    count = len(args.adapter_file)
    if args.adapter_weights is None:
        args.adapter_weights = [1.0] * count
    if len(args.adapter_weights) != count:
        raise UserError(f"--adapter-weights: give {count} numbers, one for each --adapter-file")
    if args.save_path == "":  # pathlib takes it for the current folder
        raise UserError("--save-path: the name is empty; give the folder to write")
    if args.save_path is None:
        check_upload_alone(args)
    elif args.format in UNFUSED:
        check_adapter_alone(args, count)
    elif not count and args.format == "model" and not changes_weights(args):
        raise UserError(
            "nothing to do: give --adapter-file, --quantize, --dequantize, --dtype or a --format"
        )


def changes_weights(args):
    """Whether a flag asks for other weights than the base has, adapters apart."""
    return args.dequantize or args.quantize or args.dtype != "stored"


def check_upload_alone(args):
    """Without --save-path a folder is uploaded as it is."""
    if not args.upload_repo:
        raise UserError("--save-path: give the folder to write")
    if args.adapter_file or args.format != "model" or changes_weights(args):
        raise UserError("--save-path: give the folder to write before it is uploaded")
    if args.model is None:
        raise UserError(
            "--upload-repo: give --model FOLDER to upload, or --adapter-file and --save-path"
        )


def check_adapter_alone(args, count):
    """An adapter is written as it is: there is nothing to fuse, weigh or dequantise."""
    if count != 1:
        raise UserError(f"--format {args.format} writes one adapter: give one --adapter-file")
    for name in ("adapter_weights", "quantize", "dequantize", "dtype"):
        refuse_idle(args, name, f"with --format {args.format}", valued=False)


# ------------------------------------------------------------------------------ main


def main(words=None) -> None:
    args = parse_arguments(words)
    # MLX and what stands on it come after the command line: help and mistakes answer at once.
    from models.model_folders import check_free
    from publishing.hub import check_repo_name

    fast_blas.tell_of_slowness()
    if args.upload_repo:
        check_repo_name(args.upload_repo)
    if args.save_path is None:
        return upload_alone(args)
    path = Path(args.save_path).expanduser()
    single = path.suffix if path.suffix in SINGLE_FILES[args.format] else None
    check_free(path.absolute(), args.force, suffix=single)
    if not args.dry_run:
        check_place(path.absolute())

    # ------ what goes in, and what it computes before anything is fused
    from models.parts import load_parts
    from publishing.export import Check

    parts = load_parts(
        args.model,
        args.adapter_file,
        args.adapter_weights,
        dtype=args.dtype,
        quantize=args.quantize,
        trust_remote_code=args.trust_remote_code,
        any_base=args.any_base,
        tokenizer=args.tokenizer,
    )
    if path.resolve() == parts.base.path.resolve():
        raise UserError(f"--save-path {path}: is the base model itself; give another folder")
    for note in parts.notes:
        print(f"note: {note}")
    check = Check.of(parts)

    # ------ what comes out, compared and given its name
    from publishing.export import export

    with scratch_folder("fuse") as scratch:
        place = scratch / f"model{single or ''}" if args.dry_run else path
        written = export(
            parts,
            place,
            args.format,
            check,
            card_choices(args),
            force=args.force,
            dequantize=args.dequantize,
        )
        done = "would write" if args.dry_run else "wrote"
        print("\n".join([*written.messages, f"{done} {args.save_path}"]))
        if args.dry_run:
            upload(place, args)
    if args.dry_run:
        return
    if any(marked_above(source) for source in (args.model, *args.adapter_file) if source):
        keep_private(path)
    if args.upload_repo:
        upload(args.save_path, args)
    elif written.next_commands:
        print("next:")
        for command in written.next_commands:
            print(f"  {command}")


def upload_alone(args) -> None:
    """Upload a folder that is there already: a model, a reward model or an adapter."""
    folder = Path(args.model).expanduser()
    kinds = ("config.json", "adapter_config.json")
    if not any((folder / name).is_file() for name in kinds):
        raise UserError(f"{args.model}: no model or adapter folder to upload")
    from publishing.card import planned_files, write_card
    from publishing.card_facts import facts_of_folder

    facts = facts_of_folder(folder, card_choices(args))
    if facts is not None and not args.dry_run:
        write_card(folder, facts)
    upload(folder, args, planned_files(facts) if facts is not None else {})


def card_choices(args):
    """What the command line says about the model card, and the run that saved the adapter."""
    from publishing.card_facts import CardChoices
    from publishing.run_facts import find_run

    run = Path(args.run) if args.run else None
    for file in args.adapter_file:
        run = run or find_run(file)
    name = args.upload_repo or Path(args.save_path or args.model).name
    return CardChoices(name, run, args.license)


def upload(folder, args, planned=None) -> None:
    """Send a folder, or with --dry-run list it, with the files that are `planned` for it."""
    from publishing.hub import Upload, describe_upload, upload_folder

    wanted = Upload(args.upload_repo, args.private, args.revision, args.commit_message)
    if any(marked_above(source) for source in (folder, args.model, *args.adapter_file) if source):
        tell(
            f"warning: {args.upload_repo}: this was trained on private texts, which others could "
            "get out of it; data/memorisation.py looks for them"
        )
    if args.dry_run:
        print(describe_upload(folder, wanted, planned or {}))
        return
    print(f"uploaded to {upload_folder(folder, wanted)}")


if __name__ == "__main__":
    run_main(main, tidies=True)
