"""The command line of ReST, and the prompts and rows it asks for. Loads no MLX."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

from command_line.adapter_file import check_save_file, settle_adapter
from command_line.conditioning_flags import add_conditioning_arguments
from command_line.data_flags import (
    NO_VALIDATION,
    add_data_arguments,
    data_sources,
    has_validation,
    settle_date,
    tokenising,
    warn_of_model,
)
from command_line.model_limits import check_rows
from command_line.model_size import SMALL, millions
from command_line.parser import Parser
from command_line.reward_flags import add_reward_arguments
from command_line.rules import Needs, needs, refuse_idle
from command_line.sampling import add_sampling_arguments, check_sampling
from command_line.shared_flags import (
    add_adapter_arguments,
    add_any_base,
    add_model_arguments,
    add_optimizer_arguments,
    add_run_arguments,
    at_least,
)
from data_utils import (
    REWARDS,
    Conditioning,
    Record,
    conditioned,
    data_report,
    first_words,
    load_data,
    mix_records,
    read_records,
    tokenise_prompts,
    tokenise_sft,
)
from errors import UserError

DESCRIPTION = "ReST: sample from the policy, keep what scores well, fine-tune on it, again."
QUANTILES = [0.5, 0.75, 0.9]
SMALL_RATES = {"lora": 3e-3, "dora": 3e-3, "full": 3e-4, "prompt": 1e-1}
LARGE_RATES = {"lora": 2e-4, "dora": 2e-4, "full": 2e-5, "prompt": 1e-2}
HARMLESS = ("eval_prompts", "eval_samples")
NEEDS = (
    Needs("eval_prompts eval_samples", met=has_validation, why=NO_VALIDATION),
    Needs(
        "thresholds quantiles",
        met=lambda args: not args.use_decision_transformer,
        why="with --use-decision-transformer, which keeps every row and says its score",
    ),
)


# ------------------------------------------------------------------------------ arguments


def parse_arguments(words=None):
    """The parsed and checked command line."""
    parser = Parser(script="rest.py", description=DESCRIPTION, harmless=HARMLESS)
    add_reward_arguments(parser)
    add = parser.add_argument_group("task").add_argument
    add("--grow-steps", type=int, default=2, help="how often the policy is sampled from")
    add("--samples-per-prompt", type=int, default=8, help="responses to each prompt in a grow step")
    text = "improve steps of each grow: the reward from which rows are kept, rising"
    add("--thresholds", type=float, nargs="+", help=text)
    text = "the same as quantiles of the grow step's rewards (default: .5 .75 .9)"
    add("--quantiles", type=float, nargs="+", help=text)
    add("--iters", "--steps", type=int, default=60, help="updates of each improve step")
    add("--batch-size", type=int, default=32, help="rows per gradient")
    add("--gradient-accumulation-steps", type=int, default=1, help="gradients per update")
    text = "what an improve step fine-tunes: the last policy, or (ReST-EM) the model as it was"
    add("--start-from", choices=("policy", "base"), default="policy", help=text)
    text = "train on scored rows too that reach the threshold: of these files, or without any of "
    text += "the training data"
    add("--mix-data", nargs="*", help=text)
    add_sampling_arguments(add)
    add("--sampling-batch-size", type=int, default=64, help="responses sampled, scored together")
    add("--prompt-words", type=int, default=2, help="of a plain text, how many words are a prompt")
    add("--save-file", default="rest_weights.npz", help=".npz, .safetensors, or a folder to write")
    add("--resume-adapter-file", "--resume-file", help="adapter to start from")
    add("--eval-prompts", type=int, default=128, help="validation prompts to use; -1: all")
    add("--eval-samples", type=int, default=4, help="sampled responses to each of them")
    add("--steps-per-report", type=int, default=20, help="updates between lines of metrics")
    add_conditioning_arguments(parser)
    add_data_arguments(parser, max_length=1024)
    add_model_arguments(parser)
    add_any_base(parser, "resume_adapter_file", "reward_model")
    add_adapter_arguments(parser, lora_scale=4.0)
    note = "default for models below 5 million weights: lora 3e-3, full 3e-4, prompt 0.1; else "
    note += "lora 2e-4, full 2e-5, prompt 1e-2"
    add_optimizer_arguments(parser, learning_rate=None, max_grad_norm=1.0, learning_rate_note=note)
    add_run_arguments(parser)
    parser.alternatives.append({"thresholds", "quantiles"})
    parser.checks += [check_arguments, needs(NEEDS), settle_arguments]
    return parser.parse_args(words)


def check_arguments(args) -> None:
    """Refuse what contradicts itself."""
    if {"thresholds", "quantiles"} <= args.changed:
        raise UserError("--thresholds and --quantiles both say which rows are kept; give one")
    for name in ("thresholds", "quantiles"):
        values = getattr(args, name) or []
        if any(later <= before for before, later in pairwise(values)):
            raise UserError(f"--{name} {' '.join(f'{v:g}' for v in values)}: must rise")
    if args.quantiles and not 0 <= args.quantiles[0] <= args.quantiles[-1] < 1:
        raise UserError("--quantiles: give shares from 0 up to, not including, 1")
    at_least(args, 1, "grow_steps", "samples_per_prompt", "iters", "batch_size", "prompt_words")
    at_least(args, 1, "gradient_accumulation_steps", "sampling_batch_size", "eval_samples")
    at_least(args, 1, "steps_per_report")
    if args.eval_prompts == 0 or args.eval_prompts < -1:
        raise UserError("--eval-prompts: give a number above 0, or -1 for all")
    check_sampling(args)
    if not args.temperature:
        raise UserError("--temperature 0: all samples of a prompt would be the same; give another")
    check_save_file(args.save_file)


def settle_arguments(args) -> None:
    """Fill in the quantiles, and make sure of the adapter that training starts from."""
    if args.thresholds is None and args.quantiles is None and not args.use_decision_transformer:
        args.quantiles = QUANTILES
    rate = args.learning_rate  # which comes later, by the model's size
    kind = settle_adapter(args, args.resume_adapter_file, SMALL_RATES)
    args.learning_rate = rate
    if kind == "full" and args.resume_adapter_file is not None:
        raise UserError(
            f"--resume-adapter-file takes an adapter, and {args.resume_adapter_file} holds every "
            "weight; fuse it first (fuse.py), and give the model with --model"
        )


def settle_for_model(args, weights: int) -> None:
    """Fill in the learning rate for a model of so many weights, and say so."""
    known = args.learning_rate is not None
    rates = SMALL_RATES if weights < SMALL else LARGE_RATES
    kind = settle_adapter(args, args.resume_adapter_file, rates)
    if not known and args.resume is None:
        print(f"default for {millions(weights)}, {kind}: --learning-rate {args.learning_rate:g}")


# ------------------------------------------------------------------------------ data


def load_prompts(args, tokenizer) -> dict[str, Any]:
    """{split: (records, tokenised prompts)} to train on and, where there are any, to validate on"""
    settle_date(args, tokenizer)
    loaded = load_data(splits=("train", "valid"), **data_sources(args))
    if not any("text" in records.kinds for records in loaded.values()):
        refuse_idle(args, "prompt_words", "on rows that have prompts of their own")
    found = {}
    for split, records in loaded.items():
        warn_of_model(args, records, tokenizer)
        prompts = tokenise_prompts(
            records,
            tokenizer,
            prompt_words=args.prompt_words,
            **tokenising(args),
        )
        print(data_report(f"{split} prompts", records, prompts))
        found[split] = records, prompts
    return found


def mixed_rows(args, records, loaded, prefix: int, conditioning: Conditioning | None) -> list:
    """Rows of --mix-data as tokens whose answers are trained, with their rewards; [] without."""
    if args.mix_data is None:
        return []
    reading = {name: getattr(args, name) for name in ("format", "skip_bad_rows", "max_rows")}
    if args.mix_data:
        records = mix_records([read_records(path, **reading) for path in args.mix_data])
    rows = []
    for record in records:
        if record.reward is None:
            raise UserError(
                f"{record.where}: --mix-data: the row has no score; the field reward or "
                "meta_eval_score is needed"
            )
        record = parted(record, args.prompt_words)
        rows.append(record if conditioning is None else conditioned(record, conditioning))
    done = tokenise_sft(rows, loaded.tokenizer, mask_prompt=True, **tokenising(args))
    for name in REWARDS:  # which say what is kept
        done.unused.pop(name, None)
    print(data_report("mixed", records, done))
    check_rows(done.rows, loaded.limits, prefix=prefix)
    return done.rows


def parted(record: Record, words: int) -> Record:
    """A plain text as its first words and what follows them; other rows as they are."""
    if record.kind != "text":
        return record
    prompt = first_words(record.text, words)
    rest = record.text[len(prompt) :]
    return replace(record, kind="prompt_completion", prompt=prompt, completion=rest, text="")
