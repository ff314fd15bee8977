"""training.py, with a curriculum, several objectives and a KL coefficient that adapts.

Each stage is a script of this project, run as a child process; its command is printed. What each
technique is, and what it did on our tasks, is in docs/techniques.md.

Within minutes on a laptop, on the embedded model:
    python adlf/Advanced_training.py --data_path data/conversations.jsonl --debug --use_curriculum
A real one:
    python adlf/Advanced_training.py --data_path data/conversations.jsonl --model_name MODEL \
        --run_sft --sft_epochs 2 --run_rlhf --ppo_epochs 1 --use_curriculum --use_multi_objective \
        --use_dynamic_kl --kl_target 0.05 --token_format role_markers --output_dir my_run
"""

import sys
from pathlib import Path

# The package training/ of the project, not a file here, is what `import training` has to find.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
import right_python  # noqa: F401  first
from adlf.checks import ADVANCED_NEEDS, check_techniques
from adlf.pipeline import add_token_format, make_parser, run_pipeline
from command_line.conditioning_flags import TEMPLATE
from command_line.exits import run_main
from command_line.rules import needs

DESCRIPTION = "Fine-tuning, a reward model and PPO, with more techniques than training.py."


def main(words=None) -> int:
    args = parse_arguments(words)
    return run_pipeline(args, extra_words(args))


def parse_arguments(words=None):
    """The parsed and checked command line."""
    parser = make_parser(DESCRIPTION, components="fluency and faithfulness")
    add_token_format(parser)
    add = parser.add_argument_group("techniques").add_argument
    add("--use-curriculum", type=bool, default=False, help="short rows and prompts first")
    add("--use-multi-objective", type=bool, default=False, help="internal reward of three parts")
    add("--fluency-weight", type=float, default=0.3, help="with --use_multi_objective")
    add("--faithfulness-weight", type=float, default=0.3, help="with --use_multi_objective")
    add("--quality-weight", type=float, default=0.4, help="with --use_multi_objective")
    add("--use-dynamic-kl", type=bool, default=False, help="adapt the KL coefficient")
    add("--kl-target", type=float, default=0.1, help="KL per token, with --use_dynamic_kl")
    add("--use-contrastive", type=bool, default=False, help="contrastive loss in fine-tuning")
    add("--contrastive-temp", type=float, default=0.07, help="with --use_contrastive")
    add("--contrastive-weight", type=float, default=0.1, help="with --use_contrastive")
    add("--use-decision-transformer", type=bool, default=False, help="scores before prompts")
    add("--score-template", default=TEMPLATE, help="with --use_decision_transformer")
    add("--target-score", type=float, help="what PPO asks for (default: the highest of the data)")
    add("--use-self-critique", type=bool, default=False, help="critiques in fine-tuning and PPO")
    add("--critique-weight", type=float, default=0.5, help="with --use_self_critique")
    add("--cosine-cycles", type=int, default=1, help="of --scheduler cosine_with_restarts")
    parser.checks += [needs(ADVANCED_NEEDS), check_techniques]
    return parser.parse_args(words)


def extra_words(args) -> dict[str, list[str]]:
    """More words for each stage; "data" for all that read rows."""
    order = ["--use-curriculum"] * args.use_curriculum
    ppo = list(order)
    if args.use_dynamic_kl:
        ppo += ["--use-dynamic-kl", "--kl-target", f"{args.kl_target:g}"]
    if args.use_multi_objective:
        ppo.append("--use-multi-objective")
        for name in ("fluency_weight", "faithfulness_weight", "quality_weight"):
            ppo += [f"--{name.replace('_', '-')}", f"{getattr(args, name):g}"]
    elif args.run_rlhf and args.adlf_alpha:
        if not (args.use_coherence_reward or args.use_length_penalty):
            print("no internal reward is named: fluency and faithfulness it is")
            ppo += ["--use-fluency-reward", "--use-faithfulness-reward"]
    sft = [*order, *of_fine_tuning(args)]
    if args.use_self_critique:
        ppo += ["--use-self-critique", "--critique-weight", f"{args.critique_weight:g}"]
    data = ["--token-format", args.token_format] if args.token_format != "standard" else []
    return {"data": data, "sft": sft, "reward": order, "ppo": ppo}


def of_fine_tuning(args) -> list[str]:
    """What fine-tuning alone is told."""
    words = []
    if args.use_contrastive:
        words += ["--use-contrastive", "--contrastive-temp", f"{args.contrastive_temp:g}"]
        words += ["--contrastive-weight", f"{args.contrastive_weight:g}"]
    if args.use_decision_transformer:
        words += ["--use-decision-transformer", "--score-template", args.score_template]
        if args.target_score is not None:
            words += ["--target-score", f"{args.target_score:g}"]
    if args.use_self_critique:
        words += ["--use-self-critique", "--critique-weight", f"{args.critique_weight:g}"]
    return words


if __name__ == "__main__":
    run_main(main)
