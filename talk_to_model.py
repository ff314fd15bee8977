"""Talk to a model in the terminal, from an argument or from a pipe.

    python talk_to_model.py                                  chat with the embedded digits model
    python talk_to_model.py "8 20 22"                        one reply
    echo "8 20" | python talk_to_model.py --model DIR        a reply to each line, and nothing else
    python talk_to_model.py --model DIR --resume-file adapters.npz --max-tokens 50 --temp 0.0

A model with a chat template holds a conversation; any other one continues the text it is given.
Replies go to standard output, everything else to standard error.
"""

import fast_blas  # noqa: F401  before anything imports mlx.core

import sys
from dataclasses import fields

from chat.settings import Settings
from data_utils import TOKEN_FORMATS
from errors import UserError
from training.arguments import Parser, run_main
from training.dataclass_flags import add_dataclass_arguments, dataclass_from_arguments
from training.flag_groups import add_model_arguments


def parse(words: list[str] | None = None):
    parser = Parser(description=__doc__)
    parser.add_argument("prompt", nargs="?", help="reply to this and leave")
    add_model_arguments(parser)
    add = parser.add_argument_group("what is said").add_argument
    add("--resume-file", help="adapter or soft prompt to put on the model (file or folder)")
    add("--system-prompt", help="what a model with a chat template is told first")
    add("--token-format", choices=TOKEN_FORMATS, default="standard", help="as in training")
    add("--prompt-template", help='as in training, such as "Question: {prompt}\\n\\nAnswer:"')
    add_dataclass_arguments(parser, Settings, title="how replies are written", exclude=("temp",))
    temp = next(field for field in fields(Settings) if field.name == "temp")
    add("--temp", "--temperature", type=float, default=temp.default, help=temp.metadata["help"])
    return parser.parse_args(words)


def load_speaker(args):
    from chat.prompting import Prompting
    from chat.speaker import Speaker
    from models.adapter_files import load_adapter
    from models.load import load_model

    loaded = load_model(
        args.model,
        dtype=args.dtype,
        quantize=args.quantize,
        trust_remote_code=args.trust_remote_code,
    )
    loaded.model.eval()
    prompting = Prompting(loaded.tokenizer, args.token_format, args.prompt_template)
    tuning = load_adapter(loaded.model, args.resume_file) if args.resume_file else None
    return Speaker(loaded.path.name, loaded, prompting, tuning)


def main() -> None:
    args = parse()
    settings = dataclass_from_arguments(Settings, args)
    settings.check_flags(args.explicit)
    speaker = load_speaker(args)
    if settings.seed is not None:
        import mlx.core as mx

        mx.random.seed(settings.seed)
    if args.prompt is not None:
        prompts = [args.prompt]
    elif sys.stdin.isatty():
        prompts = iter(lambda: input("> "), None)
    else:
        prompts = (line.rstrip("\n") for line in sys.stdin)
    for prompt in prompts:
        if prompt.strip():
            reply = speaker.reply([{"role": "user", "content": prompt}], settings)
            print(reply.text.strip(), flush=True)


if __name__ == "__main__":
    run_main(main)
