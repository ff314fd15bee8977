"""Groups of flags that three or more scripts share.

Each function declares its flags on a parser and adds the checks that refuse contradictions, so a
flag that would change nothing ends in an error. Importing this loads no MLX.
"""

import argparse
import math
from typing import Any

from command_line.fused_dir import check_fused_dir
from command_line.parser import Parser
from command_line.rules import Needs, flag_of, needs, refuse_idle
from errors import UserError
from run_folder.loggers import LOGGERS

OPTIMIZERS = ("adam", "adamw", "adafactor", "lion", "sgd", "muon")
SCHEDULES = ("constant", "linear", "polynomial", "cosine", "cosine_with_restarts")

# ------------------------------------------------------------------------------ run


def add_run_arguments(parser: Parser, *, save_every: int = 100) -> None:
    """Where a training run is kept, how it is repeated, and how it goes on after a stop."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--output-dir", help="run folder (default: runs/<script>-<time>)")
    add("--fused-dir", help="model folder to write as well: the base with what was trained on it")
    add("--overwrite", type=bool, default=False, help="delete the run that --output-dir holds")
    add("--seed", type=int, default=0, help="seed of everything random")
    add(
        "--config",
        "--config-path",
        help="YAML, JSON or .conf file of options; the command line overrides it",
    )
    add(
        "--save-every",
        type=int,
        default=save_every,
        help="steps between checkpoints; 0: at the end",
    )
    add(
        "--keep-checkpoints",
        type=int,
        default=2,
        help="newest checkpoints kept; the best one stays",
    )
    add("--resume", help="run folder, or one of its checkpoints, to go on with")
    add("--force-resume", type=bool, default=False, help="resume even though options changed")
    add("--log-with", choices=("none", *LOGGERS), default="none", help="where else metrics go")
    add("--wandb-project", help="project on W&B (default: WANDB_PROJECT, else mlx-rlhf)")
    add("--wandb-run-name", help="name of the run on W&B (default: that of its folder)")
    add(
        "--memory-limit",
        type=float,
        help="GB to keep to: minibatches are chosen to fit, and more ends in advice",
    )
    add(
        "--max-bad-steps",
        type=int,
        default=5,
        help="stop after this many steps in a row with NaN or infinity in them",
    )

    named = Needs(
        "wandb_project wandb_run_name",
        met=lambda args: args.log_with == "wandb",
        why="without --log-with wandb",
    )

    def check(args: argparse.Namespace) -> None:
        named.check(args)
        at_least(args, 0, "save_every", "seed")
        at_least(args, 1, "keep_checkpoints", "max_bad_steps")
        if args.memory_limit is not None and not 0 < args.memory_limit <= 1e6:
            raise UserError("--memory-limit: give a number of GB above 0, up to 1e6")
        if args.output_dir == "":
            raise UserError("--output-dir: the name is empty; give a folder, or leave the flag out")
        if args.overwrite and args.resume:
            raise UserError("--overwrite deletes the run that --resume would go on with; drop one")
        if args.overwrite and args.output_dir is None:
            raise UserError("--overwrite needs --output-dir: the default folder is always new")
        if args.force_resume and args.resume is None:
            raise UserError("--force-resume needs --resume RUN_FOLDER")
        check_fused_dir(args)

    parser.checks.append(check)


def schedule_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the schedules of all loops have in common, but for how long they are."""
    return {
        "report_every": args.steps_per_report,
        "save_every": args.save_every,
        "keep_checkpoints": args.keep_checkpoints,
        "max_bad_steps": args.max_bad_steps,
        "memory_limit": args.memory_limit,
    }


# ------------------------------------------------------------------------------ model


def add_model_arguments(parser: Parser) -> None:
    """Which model is loaded, and in which precision."""
    add = parser.add_argument_group("model").add_argument
    add("--model", help="local folder or hub name (default: the embedded digits model)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the base weights; auto: float32 on the CPU, bfloat16 on Metal and CUDA",
    )
    add("--fp16", type=bool, default=False, help="the same as --dtype float16")
    add("--quantize", type=int, choices=(4, 8), help="bits per base weight (default: as stored)")
    add("--tokenizer", help="folder or hub name of its tokenizer (default: the model's own)")
    add(
        "--trust-remote-code",
        type=bool,
        default=False,
        help="run Python code that comes with the model's files",
    )
    parser.checks.append(settle_precision)


def settle_precision(args: argparse.Namespace) -> None:
    """--fp16 as --dtype float16; adapters, heads and losses stay float32."""
    if args.fp16:
        if args.dtype not in ("auto", "float16"):
            raise UserError(f"--fp16 and --dtype {args.dtype} contradict each other; drop one")
        args.dtype = "float16"


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `models.load.load_model` takes, the name or folder as ``model``."""
    names = ("model", "dtype", "quantize", "trust_remote_code", "tokenizer")
    return {name: getattr(args, name) for name in names}


# ------------------------------------------------------------------------------ adapter


def add_any_base(parser: Parser, *adapters: str) -> None:
    """--any-base, in a script where the options `adapters` name what may be an adapter file."""
    group = parser.add_argument_group("adapter of another base")
    text = "use an adapter although it was trained on another base, such as a quantised copy"
    group.add_argument("--any-base", type=bool, default=False, help=text)

    names = " or ".join(map(flag_of, adapters))
    given = Needs(
        "any_base",
        met=lambda args: any(getattr(args, name) for name in adapters),
        why=f"without {names}",
    )
    parser.checks.append(needs([given]))


LORA_ONLY = "lora_layers lora_rank lora_scale lora_alpha lora_dropout lora_keys rslora".split()
ADAPTER_NEEDS = (
    Needs(
        " ".join(LORA_ONLY),
        met=lambda args: not args.prompt_tuning,
        why="with --prompt-tuning; leave one of them out",
        valued=False,
    ),
    Needs(
        " ".join(LORA_ONLY),
        met=lambda args: args.fine_tune_type != "full",
        why="with --fine-tune-type full; leave one of them out",
        valued=False,
    ),
    Needs("num_prompt_tokens", "prompt_tuning", valued=False),
)


def add_adapter_arguments(parser: Parser, *, lora_scale: float = 20.0) -> None:
    """What is trained: LoRA or DoRA on some layers, a soft prompt, or every weight.

    After parsing, ``args.lora_scale`` is the final factor of the low-rank product whichever of
    scale, alpha and rsLoRA was asked for.
    """
    add = parser.add_argument_group("adapter").add_argument
    add("--fine-tune-type", choices=("lora", "dora", "full"), default="lora", help="what to train")
    add("--prompt-tuning", type=bool, default=False, help="train virtual prompt tokens instead")
    add("--num-prompt-tokens", type=int, default=10, help="virtual tokens with --prompt-tuning")
    add("--lora-layers", type=int, default=16, help="last layers that get LoRA; -1: all of them")
    add("--lora-rank", type=int, default=8, help="rank of the low-rank product")
    add("--lora-scale", type=float, help=f"factor of the product (default: {lora_scale:g})")
    add("--lora-alpha", type=float, help="the same as PEFT writes it: scale = alpha / rank")
    add("--lora-dropout", type=float, default=0.0, help="dropout before the low-rank product")
    add("--lora-keys", nargs="+", help="modules inside a layer, such as self_attn.q_proj")
    add("--rslora", type=bool, default=False, help="scale = alpha / sqrt(rank); takes --lora-alpha")
    add("--grad-checkpoint", type=bool, default=False, help="recompute layers: less memory, slower")

    idle = needs(ADAPTER_NEEDS)

    def check(args: argparse.Namespace) -> None:
        if args.prompt_tuning and args.fine_tune_type != "lora":
            raise UserError(
                "--prompt-tuning trains virtual tokens alone; leave out --fine-tune-type"
            )
        idle(args)
        at_least(args, 1, "num_prompt_tokens", "lora_rank")
        if args.lora_layers == 0 or args.lora_layers < -1:
            raise UserError("--lora-layers: give a number of layers, or -1 for all of them")
        if not 0 <= args.lora_dropout < 1:
            raise UserError("--lora-dropout: give a probability from 0 up to, not including, 1")
        if args.lora_keys:
            args.lora_keys = [key for item in args.lora_keys for key in item.split(",") if key]
        settle_lora_scale(args, lora_scale)

    parser.alternatives.append({"lora_scale", "lora_alpha"})
    parser.checks.append(check)


def settle_lora_scale(args: argparse.Namespace, default: float) -> None:
    """Fill in ``args.lora_scale`` from scale, alpha or rsLoRA (arXiv 2312.03732, section 3)."""
    if {"lora_scale", "lora_alpha"} <= args.changed:
        raise UserError("--lora-scale and --lora-alpha set the same factor; give one of them")
    if args.rslora and args.lora_alpha is None:
        raise UserError("--rslora needs --lora-alpha: the scale is alpha / sqrt(rank)")
    if args.lora_alpha is not None:
        args.lora_scale = args.lora_alpha / args.lora_rank ** (0.5 if args.rslora else 1)
    elif args.lora_scale is None:
        args.lora_scale = default


# ------------------------------------------------------------------------------ optimizer

# Which optimizers read an option that not all of them have.
READERS = {
    "adam_beta1": ("adam", "adamw", "lion", "muon"),
    "adam_beta2": ("adam", "adamw", "lion", "muon"),
    "adam_eps": ("adam", "adamw", "muon"),
    "momentum": ("sgd", "muon"),
}


OPTIMIZER_NEEDS = (
    Needs(
        "lr_power",
        met=lambda args: args.lr_schedule == "polynomial",
        why="without --lr-schedule polynomial",
        valued=False,
    ),
    Needs(
        "num_cycles",
        met=lambda args: args.lr_schedule == "cosine_with_restarts",
        why="without --lr-schedule cosine_with_restarts",
        valued=False,
    ),
    Needs(
        "lr_end_factor",
        met=lambda args: args.lr_schedule != "constant",
        why="with --lr-schedule constant",
        valued=False,
    ),
)


def add_optimizer_arguments(
    parser: Parser,
    *,
    learning_rate: float | None,
    optimizer: str = "adam",
    lr_schedule: str = "constant",
    max_grad_norm: float | None = None,
    warmup_steps: int = 0,
    lr_end_factor: float = 0.0,
    learning_rate_note: str = "",
) -> None:
    """How weights move; the defaults are the script's own. Read it with ``optimizer_options``."""
    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", choices=OPTIMIZERS, default=optimizer, help="rule that moves the weights")
    note = f"; {learning_rate_note}" if learning_rate_note else ""
    add("--learning-rate", type=float, default=learning_rate, help="peak learning rate" + note)
    add(
        "--lr-schedule",
        "--scheduler",
        choices=SCHEDULES,
        default=lr_schedule,
        help="course after the warm-up",
    )
    add(
        "--num-cycles",
        "--cosine-cycles",
        type=int,
        default=1,
        help="cycles of cosine_with_restarts",
    )
    add("--lr-power", type=float, default=2.0, help="of polynomial: (1 - progress) to this power")
    add("--warmup-steps", type=int, default=warmup_steps, help="updates that climb to the peak")
    add("--lr-end-factor", type=float, default=lr_end_factor, help="share of the peak at the end")
    add("--weight-decay", type=float, help="(default: 0.01 for adamw and muon, else 0)")
    add("--max-grad-norm", type=float, default=max_grad_norm, help="clip gradients to this norm")
    add("--adam-beta1", type=float, default=0.9, help="decay of the mean of gradients")
    add("--adam-beta2", type=float, help="decay of their squares (default: 0.999; lion 0.99)")
    add("--adam-eps", type=float, default=1e-8, help="added to the root of the squares")
    add("--momentum", type=float, help="of sgd and muon (default: 0 and 0.95)")

    def check(args: argparse.Namespace) -> None:
        for name, readers in READERS.items():
            if args.optimizer not in readers:
                refuse_idle(args, name, f"with --optimizer {args.optimizer}", valued=False)
        at_least(args, 0, "learning_rate", "warmup_steps", "weight_decay", "lr_end_factor")
        at_least(args, 1, "num_cycles")
        if not 0 < args.lr_power < math.inf:
            raise UserError("--lr-power: give a number above 0")
        for name in ("adam_beta1", "adam_beta2", "momentum"):
            if not 0 <= (getattr(args, name) or 0) < 1:
                raise UserError(f"{flag_of(name)}: give a number from 0 up to, not including, 1")
        if args.max_grad_norm is not None and args.max_grad_norm <= 0:
            raise UserError(
                "--max-grad-norm: give a number above 0; a large one, such as 1e9, clips nothing"
            )

    parser.checks += [needs(OPTIMIZER_NEEDS), check]


def optimizer_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``training.optimizers.build_optimizer``, all but ``steps``."""
    return {
        "name": args.optimizer,
        "learning_rate": args.learning_rate,
        "schedule": args.lr_schedule,
        "cycles": args.num_cycles,
        "power": args.lr_power,
        "warmup": args.warmup_steps,
        "end_factor": args.lr_end_factor,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_eps,
        "momentum": args.momentum,
    }


# ------------------------------------------------------------------------------ helpers


def at_least(args: argparse.Namespace, least: float, *names: str) -> None:
    """Raise ``UserError`` when one of the named options is set and below ``least``."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"{flag_of(name)}: {value} is below {least:g}")


def check_epochs(args: argparse.Namespace, *names: str) -> None:
    """Raise ``UserError`` when one of the named numbers of passes is set and trains nothing."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value <= 1e6:
            raise UserError(f"{flag_of(name)}: give a number above 0, up to 1e6")


def adapter_description(args: argparse.Namespace) -> dict[str, Any]:
    """What the adapter flags ask for, in the form of mlx-lm's adapter_config.json."""
    if args.prompt_tuning:
        return {"fine_tune_type": "prompt", "num_prompt_tokens": args.num_prompt_tokens}
    settings = {
        "rank": args.lora_rank,
        "scale": args.lora_scale,
        "dropout": args.lora_dropout,
        "keys": args.lora_keys,
    }
    return {
        "fine_tune_type": args.fine_tune_type,
        "num_layers": args.lora_layers,
        "lora_parameters": settings,
    }
