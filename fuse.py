"""Make a model of its own out of a base model and what was trained on it.

LoRA, DoRA and fully fine-tuned adapters, for policies and for reward models, become a folder in
Hugging Face format that mlx-lm, transformers and every script here load. The result is loaded
again and compared with the unfused model before it gets its name.

    python fuse.py --adapter-file lora_weights.npz --save-path ./sft_fine_tune/
"""

import fast_blas  # noqa: F401

from pathlib import Path

from errors import UserError
from training.arguments import Parser, run_main

SCRIPTS_NEXT = """next:
  python talk_to_model.py --model {path}
  python ppo_training.py --model {path} --ground_truth_reward"""
SCRIPTS_NEXT_REWARD = """next:
  python ppo_training.py --model MODEL --reward_model {path}"""


# ------------------------------------------------------------------------------ arguments


def parse_arguments(words=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("fuse").add_argument
    add("--model", help="base: local folder or hub name (default: the one the adapter names)")
    add("--adapter-file", nargs="+", required=True, help="adapter: .npz, .safetensors or folder")
    add("--adapter-weights", nargs="+", type=float, help="factor of each adapter (default: 1)")
    add("--save-path", required=True, help="folder to write")
    add("--force", type=bool, default=False, help="replace the model folder at --save-path")
    add("--dequantize", type=bool, default=False, help="leave no quantised weight in the result")
    add(
        "--dtype",
        choices=("stored", "float32", "bfloat16", "float16"),
        default="stored",
        help="of the fused weights; stored: as the base has it",
    )
    add("--trust-remote-code", type=bool, default=False, help="run code that the model brings")
    parser.checks.append(check_arguments)
    return parser.parse_args(words)


def check_arguments(args):
    count = len(args.adapter_file)
    if args.adapter_weights is None:
        args.adapter_weights = [1.0] * count
    if len(args.adapter_weights) != count:
        raise UserError(f"--adapter-weights: give {count}, one for each --adapter-file")


# ------------------------------------------------------------------------------ main


def main():
    args = parse_arguments()
    from models.model_folders import check_free, new_folder

    check_free(Path(args.save_path).expanduser().absolute(), args.force)
    base, reward_model, adapters = load_parts(args)

    # What the unfused model computes, then the fused one.
    from models.comparing import check_sequences
    from models.trunk import vocabulary_size

    sequences = check_sequences(base.tokenizer, vocabulary_size(base.model))
    expected = unfused_outputs(base, reward_model, adapters, args.adapter_weights, sequences)
    fuse_parts(base, adapters, args)

    with new_folder(args.save_path, force=args.force) as folder:
        write(folder, base, reward_model)
        print(check(folder, reward_model, sequences, expected))
    print(f"wrote {args.save_path}")
    template = SCRIPTS_NEXT if reward_model is None else SCRIPTS_NEXT_REWARD
    print(template.format(path=args.save_path))


def load_parts(args):
    """The base, the reward model on it (or None) and the adapters, switched off."""
    from models.adapter_files import load_adapter, read_adapter, read_head
    from models.load import load_model
    from models.reward_model import HEAD, load_reward_model

    name = args.model or recorded_base(read_adapter(args.adapter_file[0])[1], args.adapter_file[0])
    base = load_model(name, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    if read_head(args.adapter_file[0], HEAD) is not None:
        if len(args.adapter_file) > 1:
            raise UserError("a reward model is fused from one adapter: its head fits no other")
        reward_model = load_reward_model(args.adapter_file[0], base)
        return base, reward_model, [reward_model.tuning]
    adapters = []
    for path in args.adapter_file:
        adapter = load_adapter(base.model, path)
        if adapter.kind != "full":
            adapter.deactivate()
        adapters.append(adapter)
        if read_head(path, "value_head") is not None:
            print(f"note: the value head beside {path} stays behind; it serves training alone")
    return base, None, adapters


def recorded_base(config, path):
    """The base model that an adapter's description names."""
    name = config.get("model")
    if not isinstance(name, str):
        raise UserError(f"{path}: does not say which model it belongs to; give --model")
    return name


def unfused_outputs(base, reward_model, adapters, weights, sequences):
    """Scores of a reward model, logits of a language model, before anything is fused."""
    from models.comparing import all_logits
    from models.fusing import blended

    if reward_model is not None:
        return reward_model.score(sequences)
    if adapters[0].kind == "full":
        return all_logits(base.model, sequences)
    with blended(base.model, adapters, weights):
        return all_logits(base.model, sequences)


def fuse_parts(base, adapters, args):
    from models.fusing import fuse_adapters

    kinds = {adapter.kind for adapter in adapters}
    if "full" in kinds:
        if len(adapters) > 1 or args.adapter_weights != [1.0]:
            raise UserError("a full fine-tune is a model of its own: fuse it alone, with weight 1")
        return
    count = fuse_adapters(base.model, adapters, args.adapter_weights, dequantize=args.dequantize)
    if args.dequantize:
        base.config.pop("quantization", None)
        base.config.pop("quantization_config", None)
    print(f"fused {len(adapters)} adapter(s) into {count} layers of {base.name}")


def write(folder, base, reward_model):
    from models.adapter_files import save_head
    from models.model_folders import write_model
    from models.reward_model import HEAD

    write_model(folder, base)
    if reward_model is not None:
        save_head(folder, HEAD, reward_model.head_arrays(), reward_model.description())


def check(folder, reward_model, sequences, expected):
    """Load what was written and say how far it is from the unfused model."""
    from models.comparing import all_logits, compare_logits, compare_scores
    from models.load import load_model
    from models.reward_model import load_reward_model

    if reward_model is not None:
        scores = load_reward_model(folder, dtype="stored").score(sequences)
        difference, what = compare_scores(expected, scores), "scores"
    else:
        loaded = load_model(folder, dtype="stored")
        difference, what = compare_logits(expected, all_logits(loaded.model, sequences)), "logits"
    return f"largest difference in {what}, fused against unfused: {difference}"


if __name__ == "__main__":
    run_main(main)
