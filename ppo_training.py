"""PPO on a language model, against a ground-truth reward, a learned one, or one of your own.

It departs from Ziegler et al. 2019 in nothing that matters; docs/ppo.md lists every choice. One
copy of the base weights serves as policy (adapter on), reference (adapter off) and, where the
reward model is an adapter, reward model.

Within a minute on a laptop, on the embedded model:
    python ppo_training.py --ground_truth_reward
A real one:
    python ppo_training.py --model ./my_sft_model --reward_model ./my_reward_model \\
        --data my_folder --data-base "" --max-new-tokens 128 --batch-size 32 --learning-rate 1e-4
"""

import fast_blas

import contextlib
import sys

from data_utils import data_report, load_data, tokenise_prompts
from errors import UserError
from rl.ppo_config import PPOConfig
from training.arguments import Parser, run_main
from training.data_flags import add_data_arguments, data_sources, tokenising
from training.dataclass_flags import add_dataclass_arguments, dataclass_from_arguments
from training.flag_groups import (
    adapter_description,
    add_adapter_arguments,
    add_model_arguments,
    add_optimizer_arguments,
    add_run_arguments,
    at_least,
    optimizer_options,
)

LEARNING_RATES = {"lora": 3e-3, "dora": 3e-3, "full": 3e-4, "prompt": 1e-1}
SHARED = ("seed", "learning_rate", "max_grad_norm")  # fields of PPOConfig with a flag elsewhere
HARMLESS = ("eval_every", "eval_prompts", "eval_samples", "samples_per_step")


# ------------------------------------------------------------------------------ arguments


def parse_arguments(words=None):
    parser = Parser(description=__doc__.splitlines()[0], harmless=HARMLESS)
    add = parser.add_argument_group("reward").add_argument
    add("--ground-truth-reward", type=bool, default=False, help="the digits task's true score")
    add("--reward-model", help="fused reward model, or an adapter with a reward head on --model")
    add("--reward-function", nargs="+", help="FILE.py:NAME, a function of your own; runs FILE")
    add("--reward-url", nargs="+", help="services that take prompts and responses as JSON")
    add("--reward-weights", type=float, nargs="+", help="of the rewards, in the order above")
    add("--reward-timeout", type=float, default=120.0, help="seconds for a batch's reward")
    add("--reward-retries", type=int, default=3, help="of a request to --reward-url")
    add("--true-score", type=bool, default=False, help="log the digits score, do not train on it")
    add("--increasing", type=bool, default=None, help="digits score: numbers rise (the default)")
    add("--decreasing", type=bool, default=None, help="digits score: numbers fall")
    add("--multiple-of", type=int, default=2, help="digits score: of this number")
    add("--min-length", type=int, default=5, help="digits score: fewer words count as this many")
    add = parser.add_argument_group("task").add_argument
    add("--use-peft", type=bool, default=None,
        help="train an adapter (the default), or with --no-use-peft every weight")  # fmt: skip
    add("--save-file", default="ppo_weights.npz", help=".npz, .safetensors, or a folder to write")
    add("--resume-file", help="adapter to start from; the reference is the model without it")
    add("--reference-quantize", type=int, choices=(4, 8),
        help="bits of the reference copy in full fine-tuning (default: as the policy)")  # fmt: skip
    add("--prompt-words", type=int, default=2, help="of a plain text, how many words are a prompt")
    add("--stop", nargs="+", help="texts that end a response")
    add("--eval-every", type=int, default=20, help="steps between evaluations; 0: none")
    add("--eval-prompts", type=int, default=128, help="validation prompts to use; -1: all")
    add("--eval-samples", type=int, default=4, help="sampled responses per validation prompt")
    add("--samples-per-step", type=int, default=2, help="responses a step into samples.jsonl")
    add("--steps-per-report", type=int, default=5, help="steps between lines of metrics")
    add_dataclass_arguments(parser, PPOConfig, title="PPO", exclude=SHARED)
    add_data_arguments(parser, max_length=1024)
    add_model_arguments(parser)
    add_adapter_arguments(parser, lora_scale=4.0)
    add_optimizer_arguments(
        parser, learning_rate=None, lr_schedule="linear", max_grad_norm=1.0, lr_end_factor=0.1,
        learning_rate_note="default: lora 3e-3, full 3e-4, prompt 0.1, found on the digits task",
    )  # fmt: skip
    add_run_arguments(parser)
    parser.checks += [check_arguments, settle_arguments]
    return parser.parse_args(words)


def check_arguments(args) -> None:
    """Refuse what contradicts itself."""
    check_rewards(args)
    full = args.fine_tune_type == "full"
    if args.use_peft and full:
        raise UserError("--use-peft trains an adapter; leave out --fine-tune-type full")
    if args.use_peft is False and not full:
        given = {"prompt_tuning", "fine_tune_type", "lora_rank", "lora_layers", "lora_keys"}
        if given & args.explicit:
            raise UserError("--use-peft False trains every weight; leave out the adapter's flags")
        full = True
    if args.reference_quantize and not full:
        raise UserError("--reference-quantize needs full fine-tuning: else there is no copy")
    if full and args.resume_file:
        raise UserError("--resume-file takes an adapter; fuse it first for full fine-tuning")
    if args.true_score and args.ground_truth_reward:
        raise UserError("--true-score is logged anyway with --ground-truth-reward; leave it out")
    at_least(args, 0, "eval_every", "samples_per_step", "reward_retries")
    at_least(args, 1, "eval_samples", "steps_per_report", "prompt_words", "multiple_of",
             "min_length")  # fmt: skip


def check_rewards(args) -> None:
    """Refuse no reward, weights that do not fit, and rules of a score that is not used."""
    if args.increasing and args.decreasing:
        raise UserError("--increasing and --decreasing contradict each other; give one of them")
    if args.increasing is False and not args.decreasing:
        raise UserError("--increasing False needs --decreasing")
    for name in ("increasing", "decreasing", "multiple_of", "min_length"):
        if name in args.explicit and not (args.ground_truth_reward or args.true_score):
            raise UserError(f"--{name.replace('_', '-')} has no effect without "
                            "--ground-truth-reward or --true-score")  # fmt: skip
    count = args.ground_truth_reward + bool(args.reward_model)
    count += len(args.reward_function or ()) + len(args.reward_url or ())
    if not count:
        raise UserError("no reward: give --ground-truth-reward, --reward-model, --reward-function "
                        "or --reward-url")  # fmt: skip
    if args.reward_weights is not None and len(args.reward_weights) != count:
        raise UserError(f"--reward-weights: {len(args.reward_weights)} for {count} rewards")
    if args.reward_timeout <= 0:
        raise UserError("--reward-timeout: give seconds above 0")


def settle_arguments(args) -> None:
    """Fill in what follows from other flags, and make sure of PPO's own options."""
    if args.use_peft is False:
        args.fine_tune_type = "full"
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[adapter_description(args)["fine_tune_type"]]
    dataclass_from_arguments(PPOConfig, args)


# ------------------------------------------------------------------------------ data


def load_prompts(args, tokenizer) -> dict:
    """Prompts to train on and, where there are any, to validate on."""
    found = {}
    for split, records in load_data(splits=("train", "valid"), **data_sources(args)).items():
        found[split] = tokenise_prompts(
            records, tokenizer, prompt_words=args.prompt_words, **tokenising(args)
        )
        print(data_report(f"{split} prompts", records, found[split]))
    return found


# ------------------------------------------------------------------------------ model


def make_policy(args, loaded):
    """(policy with a value head, reference model or None for "the policy without its adapter")."""
    from models.actor_critic import ActorCritic
    from models.adapter_files import attach, load_adapter, read_head
    from models.heads import ValueHead
    from models.load import load_model
    from models.trunk import hidden_size

    head = ValueHead(hidden_size(loaded.model), args.value_head_init_std)
    if args.resume_file is not None:
        tuning = load_adapter(loaded.model, args.resume_file)
        if (saved := read_head(args.resume_file, "value_head")) is not None:
            head.load_weights(list(saved[0].items()))
    else:
        tuning = attach(loaded.model, adapter_description(args))
    reference = None
    if tuning.kind == "full":
        reference = load_model(
            args.model,
            dtype=args.dtype,
            quantize=args.reference_quantize,
            trust_remote_code=args.trust_remote_code,
        ).model
    return ActorCritic(loaded.model, head, tuning), reference


def make_rewards(args, loaded, policy):
    """The weighted set of all rewards that were asked for."""
    from rl.http_reward import HTTPReward
    from rl.reward_functions import load_function
    from rl.reward_set import Reward, RewardSet
    from rl.reward_sources import digits_rewards

    rewards = []
    rule = {"increasing": args.increasing or not args.decreasing, "multiple_of": args.multiple_of,
            "min_length": args.min_length}  # fmt: skip
    if args.ground_truth_reward:
        rewards.append(digits_rewards(**rule)[0])
    if args.reward_model:
        rewards.append(make_learned_reward(args, loaded, policy))
    for spec in args.reward_function or ():
        name = spec.rpartition(":")[2]
        rewards.append(Reward(name, load_function(spec), timeout=args.reward_timeout))
    for url in args.reward_url or ():  # has a time limit of its own, for each request
        service = HTTPReward(url, timeout=args.reward_timeout, retries=args.reward_retries)
        rewards.append(Reward("service", service))
    for reward, weight in zip(rewards, args.reward_weights or (), strict=False):
        reward.weight = weight
    if args.ground_truth_reward or args.true_score:
        logged = digits_rewards(**rule, weight=0.0)
        rewards += logged if args.true_score else logged[1:]
    return RewardSet(rewards)


def make_learned_reward(args, loaded, policy):
    """A reward model as a reward; an adapter shares the policy's base unless that is trained."""
    from models.load import load_model
    from models.reward_model import load_reward_model, retokeniser
    from rl.reward_sources import learned_reward

    options = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    if policy.tuning.kind == "full":  # training moves the base, so an adapter needs one of its own
        base = load_model(args.model, quantize=args.quantize, **options)
        off = contextlib.nullcontext
    else:
        base, off = loaded, policy.tuning.disabled
    with off():
        reward_model = load_reward_model(args.reward_model, base, **options)

    def score(sequences: list[list[int]]) -> list[float]:
        with off():
            return reward_model.score(sequences, batch_size=args.batch_size)

    return learned_reward(score, retokeniser(loaded.tokenizer, reward_model.source.tokenizer))


# ------------------------------------------------------------------------------ loop


def main(words=None) -> int:
    args = parse_arguments(words)
    # MLX and what stands on it come after the command line: help and mistakes answer at once.
    from models.load import load_model
    from training.memory import peak_memory, set_memory_limit
    from training.seeds import seed_everything

    if notice := fast_blas.notice():
        print(notice, file=sys.stderr)
    seed_everything(args.seed)
    set_memory_limit(args.memory_limit)
    loaded = load_model(
        args.model,
        dtype=args.dtype,
        quantize=args.quantize,
        trust_remote_code=args.trust_remote_code,
    )
    prompts = load_prompts(args, loaded.tokenizer)
    policy, reference = make_policy(args, loaded)
    rewards = make_rewards(args, loaded, policy)
    train(args, loaded, policy, reference, rewards, prompts)
    print(f"peak memory {peak_memory():.2f} GB")
    return 0


def train(args, loaded, policy, reference, rewards, prompts) -> None:
    """The loop, and what is left behind at its end."""
    from mlx_ppo_trainer import PPOTrainer
    from training.checkpoints import latest_checkpoint
    from training.loop import Group
    from training.metrics import Run
    from training.optimizers import build_optimizer
    from training.ppo_loop import PPOLoop, PPOSchedule
    from training.resume import checkpoint_asked_for
    from training.signals import GracefulStop

    config = dataclass_from_arguments(PPOConfig, args)
    updates = config.num_steps * config.updates_per_step
    optimizer = build_optimizer(**optimizer_options(args), steps=updates)
    trainer = PPOTrainer(
        config, policy, reference, loaded.tokenizer, optimizer, grad_checkpoint=args.grad_checkpoint
    )
    schedule = PPOSchedule(
        steps=config.num_steps,
        report_every=args.steps_per_report,
        eval_every=args.eval_every,
        save_every=args.save_every,
        eval_samples=args.eval_samples,
        samples_per_step=args.samples_per_step,
        keep_checkpoints=args.keep_checkpoints,
        max_bad_steps=args.max_bad_steps,
        memory_limit=args.memory_limit,
    )
    tuning, head = policy.tuning, policy.value_head
    groups = {
        "adapters": Group(tuning.arrays, lambda a: tuning.load_arrays(a, "checkpoint")),
        "value_head": Group(head.arrays, lambda a: head.load_weights(list(a.items()))),
    }
    with (
        Run(
            "ppo", vars(args), output_dir=args.output_dir, resume=args.resume is not None,
            overwrite=args.overwrite, log_with=args.log_with, blas=fast_blas.NAME,
        ) as run,
        GracefulStop() as stop,
    ):  # fmt: skip
        loop = PPOLoop(
            run, trainer, rewards, loaded.tokenizer, prompts["train"].rows,
            validation_prompts(args, prompts), groups, schedule,
            stop_at(args.stop, loaded.tokenizer),
        )  # fmt: skip
        if args.resume is not None:
            loop.resume(checkpoint_asked_for(args.resume) or latest_checkpoint(run.checkpoints))
        print(
            f"{run.folder}: {config.num_steps} steps of {config.batch_size} responses, "
            f"{config.ppo_epochs} epochs of minibatches of {config.mini_batch_size}; "
            f"{sum(a.size for a in tuning.arrays().values()):,} weights trained; rewards: "
            + ", ".join(f"{w:g} x {n}" for n, w in zip(rewards.names, rewards.weights, strict=True))
        )
        loop.run(stop)
        if not stop.requested:
            finish(args, loaded, policy, run, loop)
    stop.exit_if_requested("ppo_training.py", run.folder)


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


# ------------------------------------------------------------------------------ save


def finish(args, loaded, policy, run, loop) -> None:
    """Write the trained weights, plots and a summary; say where everything lies."""
    from models.adapter_files import save_adapter, save_head
    from rl.reward_sources import GROUND_TRUTH, LEARNED
    from training.metrics import read_rows
    from training.plots import plot_learned_and_true, plot_ppo

    written = save_adapter(args.save_file, policy.tuning, loaded.model, loaded.name)
    written.append(save_head(args.save_file, "value_head", policy.value_head.arrays(), {}))
    rows = read_rows(run.folder)
    target = args.target if args.adap_kl_ctrl else None
    written.append(plot_ppo(rows, run.plots / "ppo.png", kl_target=target))
    if args.reward_model and args.true_score:
        written.append(
            plot_learned_and_true(
                rows,
                run.plots / "learned_and_true.png",
                learned=f"env/{LEARNED}_mean",
                true=f"env/{GROUND_TRUTH}_mean",
            )  # fmt: skip
        )
    last_rows = [row for row in rows if "objective/kl" in row][-10:]
    kl = sum(row["objective/kl"] for row in last_rows) / len(last_rows)
    evaluations = {"first": loop.evaluations[:1], "last": loop.evaluations[-1:]}
    run.finish({"steps": loop.step, "kl": kl, "evaluation": evaluations})
    print("wrote " + "\n      ".join(map(str, [*written, run.folder / "metrics.jsonl"])))
    model = f" --model {args.model}" if args.model else ""
    if policy.tuning.kind != "prompt":
        print(f"next: python fuse.py{model} --adapter-file {args.save_file} --save-path my_model/")
    print(f"      python talk_to_model.py{model} --resume-file {args.save_file}")


if __name__ == "__main__":
    run_main(main)
