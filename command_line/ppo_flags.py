"""The command line of PPO, and the prompts it asks for. Loads no MLX.

Shared by ppo_training.py and its PyTorch twin.
"""

import math
import shlex
from pathlib import Path

from command_line.adapter_file import check_save_file, refuse_other_head, settle_adapter
from command_line.conditioning_flags import add_target_score
from command_line.critique_flags import add_revision_arguments
from command_line.curriculum_flags import add_curriculum_arguments
from command_line.data_flags import (
    NO_VALIDATION,
    add_data_arguments,
    data_sources,
    has_validation,
    settle_date,
    tokenising,
    warn_of_model,
)
from command_line.dataclass_flags import add_dataclass_arguments, dataclass_from_arguments
from command_line.model_size import settle_evaluation, settle_size
from command_line.parser import Parser
from command_line.reward_flags import add_reward_arguments
from command_line.rules import Needs, needs, refuse_idle
from command_line.shared_flags import (
    add_adapter_arguments,
    add_any_base,
    add_model_arguments,
    add_optimizer_arguments,
    add_run_arguments,
    at_least,
    check_epochs,
)
from command_line.worker_flags import add_worker_arguments, refuse_across_rows, refuse_uneven
from data_utils import Template, data_report, load_data, tokenise_prompts
from errors import UserError
from rl.ppo_config import PPOConfig
from run_folder.private import marked_above

DESCRIPTION = "PPO on a language model, against a ground-truth reward, a learned one, or your own."
# By kind of training: of models under 5 million weights, as measured on the digits task; of others.
SMALL_RATES = {"lora": 3e-3, "dora": 3e-3, "full": 3e-4, "prompt": 1e-1}
LARGE_RATES = {"lora": 1e-4, "dora": 1e-4, "full": 1e-6, "prompt": 1e-2}
MESSAGES = "my_messages"  # the folder of docs/imessage_bot.md
SHARED = ("seed", "learning_rate", "max_grad_norm")  # fields of PPOConfig with a flag elsewhere
HARMLESS = ("eval_every", "eval_prompts", "eval_samples", "samples_per_step", "preview")
NEEDS_OF_ROLLOUTS = (
    Needs("overlong_penalty", "overlong_buffer"),
    Needs("overlong_buffer", "overlong_penalty"),
    Needs("lora_dropout", met=lambda args: False, why="on rollouts, which are without dropout"),
    Needs("eval_samples eval_prompts", "eval_every"),
    Needs(
        "eval_every",
        met=lambda args: not args.eval_every or has_validation(args),
        why=NO_VALIDATION,
    ),
    Needs("eval_samples eval_prompts", met=has_validation, why=NO_VALIDATION),
    Needs(
        "stop missing_eos_penalty",
        met=lambda args: not args.ignore_eos,
        why="with --ignore-eos: responses end at their length alone",
    ),
)
NEEDS = (
    Needs("target", "adap_kl_ctrl"),
    Needs("kl_target", "use_dynamic_kl"),
    Needs(
        "horizon",
        met=lambda args: args.adap_kl_ctrl or args.use_dynamic_kl,
        why="without --adap-kl-ctrl or --use-dynamic-kl",
    ),
    # The coefficient is only ever multiplied.
    Needs("adap_kl_ctrl use_dynamic_kl", "init_kl_coef"),
    Needs("target_kl", "early_stopping"),
    *NEEDS_OF_ROLLOUTS,
)


# ------------------------------------------------------------------------------ arguments


def parse_arguments(words=None):
    """The parsed and checked command line."""
    parser = Parser(script="ppo_training.py", description=DESCRIPTION, harmless=HARMLESS)
    add_reward_arguments(parser)
    add_task_arguments(parser, save_file="ppo_weights.npz")
    add_dataclass_arguments(parser, PPOConfig, title="PPO", exclude=SHARED)
    add_revision_arguments(parser)
    add = parser.add_argument_group("looked at").add_argument
    text = "steps between comparisons of the mean score with the best so far, whose checkpoint is "
    text += "kept as the best; 0: that of the best evaluation"
    add("--compare-steps", type=int, default=0, help=text)
    text = "responses of the reference to a step's first prompts, scored and logged beside"
    add("--reference-samples", type=int, default=0, help=text)
    add_shared_arguments(
        parser,
        learning_rate_note="default for models below 5 million weights: lora 3e-3, full 3e-4, "
        "prompt 0.1, found on the digits task; else lora 1e-4, full 1e-6, prompt 1e-2",
    )
    parser.checks.append(lambda args: at_least(args, 0, "compare_steps", "reference_samples"))
    parser.checks += [check_arguments, needs(NEEDS), settle_arguments]
    return parser.parse_args(words)


def add_task_arguments(parser: Parser, *, save_file: str) -> None:
    """What is trained from what, and how often that is looked at: of all methods on rollouts."""
    add = parser.add_argument_group("task").add_argument
    add(
        "--use-peft",
        type=bool,
        default=None,
        help="train an adapter (the default), or with --no-use-peft every weight",
    )
    add("--save-file", default=save_file, help=".npz, .safetensors, or a folder to write")
    add("--resume-file", help="adapter to start from; the reference is the model without it")
    add(
        "--reference-quantize",
        type=int,
        choices=(4, 8),
        help="bits of the reference copy in full fine-tuning (default: as the policy)",
    )
    text = "answer messages: prompts of the folder that data/imessage.py wrote (--data, or "
    text += "my_messages)"
    add("--me-chatbot", type=bool, default=False, help=text)
    add("--epochs", type=float, help="passes over the prompts, in place of --num-steps")
    add("--prompt-words", type=int, default=2, help="of a plain text, how many words are a prompt")
    add_target_score(add)
    text = "run frozen blocks below the adapter in every pass, where otherwise what they give is "
    text += "kept for a step's epochs: slower, a little less memory"
    add("--recompute-frozen", type=bool, default=False, help=text)
    add("--stop", nargs="+", help="texts that end a response")
    add(
        "--ignore-eos",
        type=bool,
        default=False,
        help="EOS ends no response: each has the length that was drawn, or --max-new-tokens",
    )
    add("--eval-every", type=int, default=20, help="steps between evaluations; 0: none")
    add(
        "--eval-prompts",
        type=int,
        default=128,
        help="validation prompts to use; -1: all (default from 5 million weights on: as many as "
        "take a tenth of the work)",
    )
    add(
        "--eval-samples",
        type=int,
        default=4,
        help="sampled responses per validation prompt (default from 5 million weights on: 1)",
    )
    add("--samples-per-step", type=int, default=2, help="responses a step into samples.jsonl")
    add("--steps-per-report", type=int, default=5, help="steps between lines of metrics")
    add("--preview", type=bool, default=False, help="show prompts as they are given, and stop")
    parser.alternatives.append({"num_steps", "epochs"})
    parser.checks.append(settle_me_chatbot)


def add_shared_arguments(parser: Parser, *, learning_rate_note: str) -> None:
    """Data, model, adapter, optimizer and run, with the defaults of methods on rollouts."""
    add_curriculum_arguments(parser)
    add_data_arguments(parser, max_length=1024)
    add_model_arguments(parser)
    add_any_base(parser, "resume_file", "reward_model")
    add_adapter_arguments(parser, lora_scale=4.0)
    add_optimizer_arguments(
        parser,
        learning_rate=None,
        lr_schedule="linear",
        max_grad_norm=1.0,
        lr_end_factor=0.1,
        learning_rate_note=learning_rate_note,
    )
    add_run_arguments(parser)
    add_worker_arguments(parser)


def check_arguments(args) -> None:
    """Refuse what contradicts itself."""
    full = args.fine_tune_type == "full"
    if args.use_peft and full:
        raise UserError("--use-peft trains an adapter; leave out --fine-tune-type full")
    if args.use_peft is False and not full:
        given = {"prompt_tuning", "fine_tune_type", "lora_rank", "lora_layers", "lora_keys"}
        if given & args.changed:
            raise UserError("--use-peft False trains every weight; leave out the adapter's flags")
        full = True
    if args.reference_quantize and not full:
        raise UserError("--reference-quantize needs full fine-tuning: else there is no copy")
    if full and args.resume_file:
        raise UserError("--resume-file takes an adapter; fuse it first for full fine-tuning")
    if args.eval_prompts == 0 or args.eval_prompts < -1:
        raise UserError(
            "--eval-prompts: give a number above 0, or -1 for all; --eval-every 0 evaluates nothing"
        )
    if args.top_p <= 0:
        raise UserError(f"--top-p {args.top_p:g}: give a probability above 0; 1 leaves every token")
    if not all(args.stop or ()):
        raise UserError("--stop: an empty text would end every response at once; leave it out")
    if args.epochs is not None:
        if {"num_steps", "epochs"} <= args.explicit:
            raise UserError("--num-steps and --epochs both say how long to train; give one of them")
    check_epochs(args, "epochs")
    check_save_file(args.save_file)
    same = args.reward_model and args.save_file
    if same and Path(args.save_file).resolve() == Path(args.reward_model).resolve():
        raise UserError("--save-file: is the reward model of this run; give another name")
    at_least(args, 0, "eval_every", "samples_per_step", "top_k")
    at_least(args, 1, "eval_samples", "steps_per_report", "prompt_words")


def settle_for_model(args, weights: int) -> None:
    """Fill in what depends on the number of the model's weights."""
    settle_size(args, weights, SMALL_RATES, LARGE_RATES)
    dataclass_from_arguments(PPOConfig, args)


def settle_me_chatbot(args) -> None:
    """--me-chatbot: the prompts of one's own messages, where --data-base says no others."""
    if not args.me_chatbot:
        return
    if args.train_file or args.dataset:
        raise UserError(
            "--me-chatbot reads the folder --data; leave out --train-file and --dataset"
        )
    if "data" not in args.changed and not args.resume:
        args.data = MESSAGES
    if "data_base" not in args.changed:
        args.data_base = "prompts_"
    folder = Path(args.data)
    if marked_above(folder) is None or not (folder / f"{args.data_base}train.jsonl").is_file():
        raise UserError(
            f"--me-chatbot: {folder} is no folder of messages: "
            f"python data/imessage.py ... --output-dir {shlex.quote(str(folder))} makes it"
        )


def settle_arguments(args) -> None:
    """Fill in what follows from other flags, and make sure of PPO's own options."""
    settle_tuning(args)
    if args.resume_file is not None:
        refuse_other_head(args, args.resume_file)
    if args.use_dynamic_kl and "horizon" not in args.explicit:
        args.horizon = 2.0 * args.batch_size
    dataclass_from_arguments(PPOConfig, args)
    refuse_uneven(args)
    if args.use_self_critique:
        refuse_across_rows(args, "--use-self-critique", "weighs thirds of a minibatch")


def settle_tuning(args) -> None:
    """What is trained, by flags or by the adapter that training starts from; the rate comes later,
    by the model's size."""
    if args.use_peft is False:
        args.fine_tune_type = "full"
    file, rate = args.resume_file, args.learning_rate
    kind = settle_adapter(args, file, SMALL_RATES, ignore="lora_dropout")  # there is none
    args.learning_rate = rate
    if file is not None and kind == "full":
        raise UserError(
            f"--resume-file takes an adapter, and {file} holds every weight; fuse it "
            "first (fuse.py), and give the model with --model"
        )


# ------------------------------------------------------------------------------ data


def load_prompts(args, tokenizer, weights: int, per_step: int | None = None) -> dict:
    """Prompts to train on and, where there are any, to validate on; `weights`: of the model.

    With --epochs it sets ``args.num_steps`` to the steps of `per_step` prompts (default: a batch)
    that so many passes take; the last step goes into the next pass where they do not come out even.
    """
    settle_date(args, tokenizer)
    found, loaded = {}, load_data(splits=("train", "valid"), **data_sources(args))
    for records in loaded.values():
        warn_of_model(args, records, tokenizer)
    if not any("text" in records.kinds for records in loaded.values()):
        refuse_idle(args, "prompt_words", "on rows that have prompts of their own")
    for split, records in loaded.items():
        found[split] = tokenise_prompts(
            records,
            tokenizer,
            prompt_words=args.prompt_words,
            **tokenising(args),
        )
        print(data_report(f"{split} prompts", records, found[split]))
    if args.epochs is not None:
        count, each = len(found["train"]), per_step or args.batch_size
        args.num_steps = max(1, math.ceil(round(args.epochs * count / each, 9)))
        print(
            f"--epochs {args.epochs:g}: {args.num_steps} steps of {each} prompts, of {count} in all"
        )
    settle_evaluation(args, weights)
    return found


def ends(args, tokenizer) -> set[int]:
    """Token ids that end a response: none with --ignore-eos."""
    return set() if args.ignore_eos else own_ends(args, tokenizer)


def own_ends(args, tokenizer) -> set[int]:
    """The tokenizer's EOS, and its chat template's end of turn."""
    turn_end = Template(tokenizer, args.prompt_template, args.token_format).turn_end_id()
    return set(tokenizer.eos_token_ids) | ({turn_end} if turn_end is not None else set())


def validation_prompts(args, prompts) -> list:
    rows = prompts["valid"].rows if "valid" in prompts else []
    return rows if args.eval_prompts < 0 else rows[: args.eval_prompts]


def stop_at(stops, tokenizer):
    """Whether response tokens hold one of the texts `stops`; None without any."""
    if not stops:
        return None
    # A token may stand for less than a character, but not for less than a byte.
    reach = max(len(text.encode()) for text in stops) + 8
    return lambda tokens: any(text in tokenizer.decode(tokens[-reach:]) for text in stops)


def signal_options(args, loaded, tuning, reference, prompts) -> dict:
    """What of a run internal rewards are measured with (training/internal_signals.py)."""
    return {
        "loaded": loaded,
        "tuning": tuning,
        "reference": reference,
        "prompts": prompts["train"].rows,
        "eos_ids": ends(args, loaded.tokenizer),
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "should_stop": stop_at(args.stop, loaded.tokenizer),
    }
