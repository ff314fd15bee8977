"""Reinforcement learning without a critic: GRPO, RLOO, REINFORCE++ or online DPO.

Each prompt gets several responses, and each response is compared with the others. It departs from
TRL 1.16's GRPOTrainer and RLOOTrainer where docs/group.md says so. One copy of the base weights
serves as policy (adapter on), reference (adapter off) and, where the reward model is an adapter,
reward model; without a KL (--beta 0, GRPO's default) no reference is run.

Within a minute on a laptop, on the embedded model:
    python group_training.py --ground_truth_reward
A real one, rewards that can be checked:
    python group_training.py --model ./my_sft_model --train-file problems.jsonl \\
        --answer_reward answer --format_reward '<answer>.*</answer>' --max-new-tokens 512 \\
        --num-generations 8 --batch-size 64 --mini-batch-size 8 --gradient-accumulation-steps 8
"""

import fast_blas

import sys

from command_line.group_flags import config_of, default_learning_rate, parse_arguments
from command_line.parser import run_main
from command_line.ppo_flags import ends, load_prompts, stop_at, validation_prompts
from command_line.reward_flags import make_rewards
from command_line.shared_flags import adapter_description, optimizer_options

# ------------------------------------------------------------------------------ main


def main(words=None) -> int:
    args = parse_arguments(words)
    # MLX and what stands on it come after the command line: help and mistakes answer at once.
    from data_utils import columns_of
    from models.load import load_model
    from training.memory import peak_memory, set_memory_limit
    from training.streams import seed_everything

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
    learned = make_learned_reward(args, loaded, policy) if args.reward_model else None
    rewards = make_rewards(args, learned, unscored=True)
    rewards.check_columns([*columns_of(prompts["train"].rows), "group_ids"])
    train(args, loaded, policy, reference, rewards, prompts)
    print(f"peak memory {peak_memory():.2f} GB")
    return 0
