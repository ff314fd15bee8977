"""The command line of preference training: its losses and what they read. Loads no MLX."""

from typing import Any

from command_line.adapter_file import settle_adapter
from command_line.curriculum_flags import add_curriculum_arguments
from command_line.data_flags import (
    add_data_arguments,
)
from command_line.parser import Parser
from command_line.rules import Needs, flag_of, needs, shown_value
from command_line.sft_flags import HARMLESS, LOOP_NEEDS, add_loop_arguments
from command_line.shared_flags import (
    add_adapter_arguments,
    add_any_base,
    add_model_arguments,
    add_optimizer_arguments,
    add_run_arguments,
    at_least,
)
from command_line.worker_flags import add_worker_arguments, refuse_across_rows
from errors import UserError

DESCRIPTION = "Preference training: DPO and its family, KTO, ORPO, CPO, SimPO, AlphaPO."
LEARNING_RATES = {"lora": 1e-4, "dora": 1e-4, "full": 1e-6, "prompt": 1e-3}

# Which options each loss reads; tests compare it with the functions of rl/preference_losses.py and
# rl/reference_free_losses.py.
DIVERGENCE = ("f_divergence_type", "f_alpha_divergence_coef")
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
DPO_READS = {
    "sigmoid": ("beta", "label_smoothing", "soft_labels", *DIVERGENCE),
    "hinge": ("beta", *DIVERGENCE),
    "ipo": ("beta", *DIVERGENCE),
    "sigmoid_norm": ("beta", *DIVERGENCE),
    "exo_pair": ("beta", "label_smoothing", *DIVERGENCE),
    "robust": ("beta", "label_smoothing", *DIVERGENCE),
    "nca_pair": ("beta",),
    "bco_pair": ("beta",),
    "sppo_hard": ("beta",),
    "aot": ("beta", "label_smoothing"),
    "aot_unpaired": ("beta", "label_smoothing"),
    "apo_zero": ("beta",),
    "apo_down": ("beta",),
    "discopop": ("beta", "discopop_tau", *DIVERGENCE),
    "sft": (),
}
KTO_OPTIONS = ("beta", "desirable_weight", "undesirable_weight")
CPO_READS = {
    "sigmoid": ("beta", "label_smoothing"),
    "hinge": ("beta",),
    "ipo": ("beta",),
    "simpo": ("beta", "simpo_gamma", "label_smoothing"),
    "alphapo": ("beta", "simpo_gamma", "label_smoothing", "alpha"),
}
READS = {
    "dpo": DPO_READS,
    "kto": {"kto": KTO_OPTIONS, "apo_zero_unpaired": KTO_OPTIONS},
    "orpo": {"odds_ratio": ("beta",)},
    "cpo": CPO_READS,
    "simpo": {"simpo": CPO_READS["simpo"]},
    "alphapo": {"alphapo": CPO_READS["alphapo"]},
}
# What an algorithm reads whatever its loss is.
ALSO_READS = {
    "dpo": ("loss_weights", "use_weighting"),
    "kto": ("desirable_from",),
    "cpo": ("cpo_alpha",),
    "simpo": ("cpo_alpha",),
    "alphapo": ("cpo_alpha",),
}
WITH_REFERENCE = ("dpo", "kto")
OF_A_REFERENCE = ("reference", "reference_quantize", "precompute_ref_log_probs")
LOSS_TYPES = list(dict.fromkeys(name for losses in READS.values() for name in losses))
DEFAULTS = {
    "beta": 0.1,
    "label_smoothing": 0.0,
    "soft_labels": False,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "discopop_tau": 0.05,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "cpo_alpha": 1.0,
    "simpo_gamma": 0.5,
    "alpha": 0.25,
}
# Where TRL's default would not do: SimPO and AlphaPO by name are those of their papers.
OWN_DEFAULTS = {
    "simpo": {"beta": 2.0, "cpo_alpha": 0.0},
    "alphapo": {"beta": 2.0, "cpo_alpha": 0.0},
    "exo_pair": {"label_smoothing": 1e-3},
}


# ------------------------------------------------------------------------------ arguments


def parse_arguments(words=None):
    """The parsed and checked command line."""
    parser = Parser(script="preference_training.py", description=DESCRIPTION, harmless=HARMLESS)
    add_loop_arguments(parser)
    add_loss_arguments(parser)
    add_curriculum_arguments(parser)
    add_data_arguments(parser, max_length=1024, test_rows=True)
    parser.set_defaults(data_base="preference_increasing_mult_2_")
    add_model_arguments(parser)
    add_any_base(parser, "resume_adapter_file")
    add_adapter_arguments(parser, lora_scale=4.0)
    note = "default: lora 1e-4, full 1e-6, prompt 1e-3, by flags or --resume-adapter-file"
    add_optimizer_arguments(parser, learning_rate=None, max_grad_norm=1.0, learning_rate_note=note)
    add_run_arguments(parser)
    add_worker_arguments(parser)
    never = Needs(
        "lora_dropout",
        met=lambda args: False,
        why="here: policy and reference are compared, so dropout is off",
    )
    cached = Needs(
        "precompute_ref_log_probs", met=lambda args: args.train, why="without --train", typed=True
    )
    parser.checks += [check_losses, needs((*LOOP_NEEDS, never, cached)), settle_arguments]
    return parser.parse_args(words)


def add_loss_arguments(parser: Parser) -> None:
    """The algorithm, its losses, and what these read; names are TRL's."""
    add = parser.add_argument_group("loss").add_argument
    add("--algorithm", choices=tuple(READS), default="dpo", help="family of the loss")
    add(
        "--loss-type",
        nargs="+",
        choices=LOSS_TYPES,
        metavar="LOSS",
        help="one loss of the algorithm, with dpo also several: "
        + "; ".join(f"{name}: {', '.join(losses)}" for name, losses in READS.items())
        + " (default: the first)",
    )
    add("--loss-weights", type=float, nargs="+", help="weights of several losses (default: 1 each)")
    add(
        "--beta",
        type=float,
        help="how much moving away from the reference counts (default: 0.1; simpo, alphapo 2)",
    )
    add(
        "--label-smoothing",
        type=float,
        help="share of pairs that may be swapped (default: 0; exo_pair 0.001)",
    )
    add(
        "--soft-labels",
        type=bool,
        default=False,
        help="dpo, sigmoid: pairs count by the probability in judge.p, or a margin of log-odds",
    )
    add(
        "--ld-alpha", type=float, help="weight of tokens beyond the shorter answer's length, 0 to 1"
    )
    add("--use-weighting", type=bool, default=False, help="weigh pairs as WPO does")
    add(
        "--f-divergence-type",
        choices=F_DIVERGENCES,
        default="reverse_kl",
        help="divergence from the reference",
    )
    add("--f-alpha-divergence-coef", type=float, default=0.5, help="alpha of alpha_divergence")
    add("--discopop-tau", type=float, default=0.05, help="temperature of discopop")
    add("--desirable-weight", type=float, default=1.0, help="of wanted answers (kto)")
    add("--undesirable-weight", type=float, default=1.0, help="of unwanted answers (kto)")
    add("--desirable-from", type=float, help="rows with a reward from this on are wanted (kto)")
    add(
        "--cpo-alpha",
        type=float,
        help="weight of the NLL of chosen answers (default: 1; simpo, alphapo 0)",
    )
    add("--simpo-gamma", type=float, default=0.5, help="margin that simpo and alphapo ask for")
    add("--alpha", type=float, default=0.25, help="shape of AlphaPO's reward; 0 is SimPO's")
    add(
        "--reference",
        choices=("loaded", "base"),
        default="loaded",
        help="with --resume-adapter-file: what the policy is compared with (--test alone: base)",
    )
    add("--reference-quantize", type=int, choices=(4, 8), help="bits of full fine-tuning's copy")
    add(
        "--precompute-ref-log-probs",
        type=bool,
        default=False,
        help="compute those of all rows once, and keep them in the run folder",
    )


def check_losses(args) -> None:
    """Refuse losses that do not fit the algorithm or their options; fill in defaults."""
    losses, algorithm = READS[args.algorithm], args.algorithm
    named = args.loss_type or [next(iter(losses))]
    if wrong := [name for name in named if name not in losses]:
        raise UserError(f"--loss-type {wrong[0]}: {algorithm} has {', '.join(losses)}")
    if len(named) > 1 and algorithm != "dpo":
        raise UserError(f"--loss-type {' '.join(named)}: mixtures are for --algorithm dpo")
    weights = args.loss_weights
    if weights is not None and len(weights) != len(named):
        raise UserError(f"--loss-weights: {len(weights)} weights for {len(named)} losses")
    if twice := [name for name in named if named.count(name) > 1]:
        raise UserError(f"--loss-type {twice[0]} is given twice; --loss-weights weighs losses")
    args.loss_type = named
    check_idle(args)
    own = OWN_DEFAULTS.get(algorithm, {}) | OWN_DEFAULTS.get(
        named[0] if len(named) == 1 else "", {}
    )
    if algorithm == "cpo":  # as TRL: alphapo drops the NLL there too, simpo does not
        own = {"cpo_alpha": 0.0} if named == ["alphapo"] else {}
    for name, value in (DEFAULTS | own).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_ranges(args)
    for name in {"aot", "aot_unpaired"} & {*named}:
        refuse_across_rows(args, f"--loss-type {name}", "compares the rows of a batch")


def check_idle(args) -> None:
    """UserError for an option that no loss reads; a default written out is no mistake."""
    algorithm, named = args.algorithm, args.loss_type
    read = {name for loss in named for name in READS[algorithm][loss]}
    read |= {*ALSO_READS.get(algorithm, ())}
    if algorithm == "dpo" and named != ["sft"]:
        read.add("ld_alpha")
    options = {*DEFAULTS, "ld_alpha", "use_weighting", "loss_weights", "desirable_from"}
    if algorithm in WITH_REFERENCE:
        read |= {*OF_A_REFERENCE}
    options |= {*OF_A_REFERENCE}
    how = f"with --algorithm {algorithm}"
    if algorithm in ("dpo", "kto", "cpo"):
        how += f" --loss-type {' '.join(named)}"
    for name in sorted(options - read):
        given = name in args.changed and getattr(args, name) != DEFAULTS.get(name)
        if given and name == "loss_weights" and algorithm != "dpo":
            raise UserError(f"--loss-weights: {algorithm} has one loss")
        if given:
            raise UserError(f"{written(args, name)} has no effect {how}")
    if "f_alpha_divergence_coef" in args.changed and args.f_divergence_type != "alpha_divergence":
        raise UserError("--f-alpha-divergence-coef needs --f-divergence-type alpha_divergence")
    fixed = [n for n in named if n != "sft" and "f_divergence_type" not in READS["dpo"].get(n, ())]
    if algorithm == "dpo" and args.f_divergence_type != "reverse_kl" and fixed:
        raise UserError(f"{written(args, 'f_divergence_type')}: {fixed[0]} has no such form")
    if args.use_weighting and (ranks := [name for name in named if name.startswith("aot")]):
        raise UserError(
            f"--use-weighting weighs pairs, and {ranks[0]} compares sorted sides; drop one"
        )
    if args.reference == "base" and args.resume_adapter_file is None:
        raise UserError("--reference base has no effect without --resume-adapter-file")


def written(args, name: str) -> str:
    """An option with its value, as the user wrote it."""
    value = getattr(args, name)
    return flag_of(name) + ("" if value is True else f" {shown_value(value)}")


def check_ranges(args) -> None:
    """UserError for numbers outside of what a loss is defined for."""
    at_least(args, 0, "desirable_weight", "undesirable_weight", "cpo_alpha", "simpo_gamma")
    if args.loss_weights is not None and min(args.loss_weights) < 0:
        raise UserError("--loss-weights: a weight below 0 would train the opposite")
    if args.loss_weights is not None and not any(args.loss_weights):
        raise UserError("--loss-weights: all are 0, so nothing would be learned")
    if args.algorithm == "kto" and not (args.desirable_weight or args.undesirable_weight):
        raise UserError(
            "--desirable-weight 0 --undesirable-weight 0: nothing would be learned; one may be 0"
        )
    for name in ("beta", "discopop_tau"):
        if getattr(args, name) <= 0:
            raise UserError(f"{flag_of(name)}: give a number above 0")
    if args.ld_alpha is not None and not 0 <= args.ld_alpha <= 1:
        raise UserError("--ld-alpha: give a number from 0 to 1")
    smoothing = args.label_smoothing
    if not 0 <= smoothing < 0.5:
        raise UserError("--label-smoothing: give a number from 0 up to, not including, 0.5")
    if args.soft_labels and smoothing:
        raise UserError(
            "--label-smoothing and --soft-labels both say how certain a pair is; drop one"
        )
    if "exo_pair" in args.loss_type and not smoothing:
        raise UserError("--label-smoothing: exo_pair needs one above 0; its paper takes 0.001")
    if args.algorithm == "kto" and args.batch_size < 2:
        raise UserError(
            "--batch-size 1: KTO compares each prompt with the answer of another row; "
            "give 2 or more"
        )


def settle_arguments(args) -> None:
    """Fill in what follows from the adapter that is made or loaded."""
    kind = settle_adapter(args, args.resume_adapter_file, LEARNING_RATES)
    if args.test and not args.train:
        own = "a model that is its own reference has no margin to measure"
        if args.resume_adapter_file is None:
            raise UserError(f"--test needs --resume-adapter-file, or --train: {own}")
        if "reference" in args.explicit and args.reference == "loaded":
            raise UserError(f"--reference loaded needs --train: {own}; leave it out")
        args.reference = "base"
    if args.reference_quantize and kind != "full":
        raise UserError("--reference-quantize needs --fine-tune-type full: else there is no copy")
    if args.reference_quantize and args.resume_adapter_file and args.reference == "loaded":
        raise UserError(
            "--reference-quantize: the reference is the loaded weights as they are; "
            "give --reference base, or leave it out"
        )


def task_options(args) -> dict[str, Any]:
    """Keyword arguments of `mlx_preference_tasks.make_task` that say what the loss is."""
    values = {
        "beta": args.beta,
        "label_smoothing": args.label_smoothing,
        "soft_labels": args.soft_labels,
        "f_divergence_type": args.f_divergence_type,
        "f_alpha_divergence_coef": args.f_alpha_divergence_coef,
        "discopop_tau": args.discopop_tau,
        "desirable_weight": args.desirable_weight,
        "undesirable_weight": args.undesirable_weight,
        "simpo_gamma": args.simpo_gamma,
        "alpha": args.alpha,
    }
    reads = READS[args.algorithm]
    return {
        "loss_type": args.loss_type,
        "options": {n: {option: values[option] for option in reads[n]} for n in args.loss_type},
        "loss_weights": args.loss_weights,
        "beta": args.beta,
        "cpo_alpha": args.cpo_alpha,
        "ld_alpha": args.ld_alpha,
        "use_weighting": args.use_weighting,
    }
