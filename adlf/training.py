"""Supervised fine-tuning on scored conversations, a reward model on the scores, PPO on both.

Each stage is a script of this project, run as a child process; its command is printed. The reward
of PPO is (1 - alpha) * the reward model + alpha * internal signals (docs/techniques.md).

Within minutes on a laptop, on the embedded model:
    python adlf/training.py --data_path data/conversations.jsonl --debug --sft_epochs 1
A real one:
    python adlf/training.py --data_path data/conversations.jsonl --model_name MODEL --run_sft \
        --sft_epochs 3 --sft_batch_size 8 --run_rlhf --ppo_epochs 1 --ppo_batch_size 4 \
        --adlf_alpha 0.3 --use_coherence_reward --use_length_penalty --output_dir my_run
"""

import sys
from pathlib import Path

# The package training/ of the project, not this file, is what `import training` has to find.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
import right_python  # noqa: F401  first
from adlf.checks import check_length_target
from adlf.pipeline import make_parser, run_pipeline
from command_line.adlf_flags import asked_for
from command_line.exits import run_main

DESCRIPTION = "Fine-tuning, a reward model and PPO with composite rewards, one after the other."


def main(words=None) -> int:
    args = parse_arguments(words)
    if args.run_rlhf and args.adlf_alpha and not asked_for(args):
        args.use_coherence_reward = args.use_length_penalty = True
        print("no internal reward is named: coherence and length it is")
    return run_pipeline(args, {"data": [], "sft": [], "reward": [], "ppo": []})


def parse_arguments(words=None):
    """The parsed and checked command line."""
    parser = make_parser(DESCRIPTION, components="coherence and length")
    parser.checks.append(check_length_target)
    return parser.parse_args(words)


if __name__ == "__main__":
    run_main(main)
