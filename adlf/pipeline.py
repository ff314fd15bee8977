"""Flags of the two scripts in this folder, and the stages that they ask for."""

from pathlib import Path

from adlf.checks import NEEDS, check_arguments
from adlf.stages import Stage, found, run_stages, with_tokenizer
from command_line.parser import Parser
from command_line.rules import needs
from command_line.shared_flags import SCHEDULES
from data_utils import TOKEN_FORMATS, read_records
from errors import UserError

DEBUG_ROWS = 100
VALIDATION = 10  # per cent of the rows
LONGEST_RESPONSE = 128  # tokens


# ------------------------------------------------------------------------------ arguments


def make_parser(description: str, *, components: str) -> Parser:
    """The flags that both scripts have; `components`: what --adlf_alpha shares without a name."""
    parser = Parser(description=description)
    add = parser.add_argument_group("task").add_argument
    add("--data-path", required=True, help="conversations with meta_eval_score, JSON lines")
    add("--model-name", help="local folder or hub name (default: the embedded digits model)")
    add("--tokenizer-name", help="folder of another tokenizer for a local model")
    add("--output-dir", default="adlf_run", help="folder for stages and the fused model")
    add("--run-sft", type=bool, default=False, help="fine-tune (neither --run flag: both)")
    add("--run-rlhf", type=bool, default=False, help="reward model on the scores, then PPO")
    add("--sft-checkpoint", help="adapter or model folder that RLHF starts from, without --run-sft")
    add("--debug", type=bool, default=False, help=f"the first {DEBUG_ROWS} rows alone")
    add("--seed", type=int, default=0, help="seed of everything random")
    add = parser.add_argument_group("training").add_argument
    add("--sft-epochs", type=float, default=3, help="passes over the data")
    add("--sft-batch-size", type=int, default=8, help="rows per gradient")
    add("--sft-learning-rate", type=float, help="(default: that of sft.py)")
    add("--ppo-epochs", type=float, default=1, help="passes over the prompts")
    add("--ppo-batch-size", type=int, default=4, help="responses per step")
    add("--ppo-learning-rate", type=float, help="(default: that of ppo_training.py)")
    add("--gradient-accumulation-steps", type=int, default=1, help="of fine-tuning and scores")
    add("--max-seq-length", type=int, default=1024, help="longest row, in tokens")
    add("--warmup-steps", type=int, default=0, help="updates that climb to the peak rate")
    add(
        "--scheduler", choices=SCHEDULES, help="course of the learning rate (default: the script's)"
    )
    add("--logging-steps", type=int, default=10, help="steps between lines of metrics")
    add("--eval-steps", type=int, default=100, help="steps between validations; 0: none")
    add("--save-steps", type=int, default=100, help="steps between checkpoints")
    add("--fp16", type=bool, default=False, help="base weights in float16")
    add("--use-wandb", type=bool, default=False, help="send metrics to W&B")
    add("--wandb-project", help="with --use-wandb")
    add("--wandb-run-name", help="with --use-wandb; the stage's name follows")
    add = parser.add_argument_group("reward").add_argument
    add("--adlf-alpha", type=float, default=0.2, help="share of the internal reward")
    add(
        "--use-coherence-reward",
        type=bool,
        default=False,
        help=f"an internal reward (without any: {components})",
    )
    add("--use-length-penalty", type=bool, default=False, help="an internal reward: long enough")
    add("--length-target", type=int, default=100, help="tokens at which an answer is long enough")
    parser.checks += [check_arguments, needs(NEEDS)]
    return parser


# ------------------------------------------------------------------------------ stages


def run_pipeline(args, extra) -> int:
    """Make the stages and run them; `extra` maps "sft", "reward", "data", "ppo" to more words."""
    args.data_path, args.model_name = found(args.data_path), found(args.model_name)
    args.sft_checkpoint = found(args.sft_checkpoint)
    folder = Path(args.output_dir).resolve()
    scores = score_range(args) if args.run_rlhf else None
    if args.tokenizer_name is not None:
        folder.mkdir(parents=True, exist_ok=True)
        args.model_name = with_tokenizer(args.model_name, found(args.tokenizer_name), folder)
    stages, model = [], args.model_name
    if args.run_sft:
        model = str(folder / ("sft_model" if args.run_rlhf else "model"))
        stages += sft_stages(args, folder, extra, Path(model))
    elif args.sft_checkpoint is not None:
        model = args.sft_checkpoint
        if not (Path(model) / "config.json").exists():
            model = str(folder / "sft_model")
            stages.append(fuse(args, args.model_name, args.sft_checkpoint, Path(model), "fuse sft"))
    if args.run_rlhf:
        stages += rlhf_stages(args, folder, extra, model, scores)
    run_stages(folder, stages)
    print(f"\nthe model: {folder / 'model'}")
    print(f"talk to it: python talk_to_model.py --model {folder / 'model'}")
    return 0


def score_range(args) -> tuple[float, float]:
    """The lowest and the highest score of the data."""
    records = read_records(args.data_path, max_rows=DEBUG_ROWS if args.debug else None)
    for record in records:
        if record.reward is None:
            raise UserError(f"{record.where}: no score: the field meta_eval_score is needed")
    scores = [record.reward for record in records]
    low, high = min(scores), max(scores)
    if low == high:
        raise UserError(f"{args.data_path}: every score is {low:g}; nothing says what is better")
    return low, high


def sft_stages(args, folder: Path, extra, model: Path) -> list[Stage]:
    """Fine-tuning on the answers, and the model it makes."""
    run, adapter = folder / "sft", folder / "sft" / "adapter.safetensors"
    words = [
        *supervised(args, run, adapter, args.model_name, "sft"),
        "--mask-prompt",
        *extra["data"],
        *extra["sft"],
    ]
    trained = Stage("sft", "sft.py", words, adapter, run)
    return [trained, fuse(args, args.model_name, str(adapter), model, "fuse sft")]


def rlhf_stages(args, folder: Path, extra, model: str | None, scores) -> list[Stage]:
    """The reward model on the scores, PPO against it, and the model that comes of it."""
    run, reward = folder / "reward", folder / "reward" / "adapter.safetensors"
    words = [
        *supervised(args, run, reward, model, "reward"),
        "--reward-model",
        *("--too-long", "cut"),
        *extra["data"],
        *extra["reward"],
    ]
    scored = Stage("reward", "sft.py", words, reward, run)
    run, policy = folder / "ppo", folder / "ppo" / "adapter.safetensors"
    words = [
        *of_model(model),
        *("--reward-model", str(reward)),
        *("--train-file", args.data_path),
        *("--validation-split-percentage", str(VALIDATION)),
        *("--output-dir", str(run), "--save-file", str(policy)),
        *("--epochs", f"{args.ppo_epochs:g}", "--batch-size", str(args.ppo_batch_size)),
        *("--max-length", str(args.max_seq_length)),
        *("--max-new-tokens", str(min(LONGEST_RESPONSE, args.max_seq_length // 2))),
        *("--eval-every", str(args.eval_steps)),
        *rate(args, args.ppo_learning_rate),
        *shared(args, "ppo"),
        *rewards(args, scores),
        *extra["data"],
        *extra["ppo"],
    ]
    tuned = Stage("ppo", "ppo_training.py", words, policy, run)
    return [scored, tuned, fuse(args, model, str(policy), folder / "model", "fuse ppo")]


def supervised(args, run: Path, adapter: Path, model: str | None, name: str) -> list[str]:
    """What fine-tuning and the reward model have in common."""
    return [
        *("--train", *of_model(model)),
        *("--train-file", args.data_path),
        *("--validation-split-percentage", str(VALIDATION)),
        *("--output-dir", str(run), "--save-file", str(adapter)),
        *("--epochs", f"{args.sft_epochs:g}", "--batch-size", str(args.sft_batch_size)),
        *("--gradient-accumulation-steps", str(args.gradient_accumulation_steps)),
        *("--max-length", str(args.max_seq_length)),
        *("--steps-per-eval", str(args.eval_steps)),
        *rate(args, args.sft_learning_rate),
        *shared(args, name),
    ]


def shared(args, name: str) -> list[str]:
    """What every stage that trains is told."""
    words = ["--seed", str(args.seed), "--save-every", str(args.save_steps)]
    words += ["--steps-per-report", str(args.logging_steps)]
    words += ["--max-rows", str(DEBUG_ROWS)] * args.debug + ["--fp16"] * args.fp16
    if args.use_wandb:
        words += ["--log-with", "wandb"]
        words += ["--wandb-project", args.wandb_project] if args.wandb_project else []
        words += ["--wandb-run-name", f"{args.wandb_run_name} {name}"] * bool(args.wandb_run_name)
    return words


def rate(args, learning_rate: float | None) -> list[str]:
    """How the learning rate goes."""
    words = ["--warmup-steps", str(args.warmup_steps)] * bool(args.warmup_steps)
    words += [] if learning_rate is None else ["--learning-rate", f"{learning_rate:g}"]
    cycles = getattr(args, "cosine_cycles", 1)
    words += ["--lr-schedule", args.scheduler] if args.scheduler else []
    return words + ["--num-cycles", str(cycles)] * (cycles != 1)


def rewards(args, scores: tuple[float, float]) -> list[str]:
    """Shares, range and components of the reward that are named; none at alpha 0."""
    if not args.adlf_alpha:
        return []
    words = ["--adlf-alpha", f"{args.adlf_alpha:g}", "--score-range", *(f"{s:g}" for s in scores)]
    words += ["--use-coherence-reward"] * args.use_coherence_reward
    if args.use_length_penalty:
        words += ["--use-length-penalty", "--length-target", str(args.length_target)]
    return words


def of_model(model: str | None) -> list[str]:
    return [] if model is None else ["--model", model]


def fuse(args, model: str | None, adapter: str, made: Path, name: str) -> Stage:
    words = [*of_model(model), "--adapter-file", adapter, "--save-path", str(made)]
    return Stage(name, "fuse.py", words, made / "config.json", extras=["--force"])


def add_token_format(parser: Parser) -> None:
    parser.add_argument_group("format").add_argument(
        "--token-format",
        choices=tuple(TOKEN_FORMATS),
        default="standard",
        help="how turns are written where the tokenizer has no chat template",
    )
