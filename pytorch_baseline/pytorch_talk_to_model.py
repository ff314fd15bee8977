"""talk_to_model.py in PyTorch: a conversation in the terminal, or a reply to each line of a pipe.

The prompts are those of talk_to_model.py, the model is transformers'.

    python pytorch_baseline/pytorch_talk_to_model.py --model sft_model --temp 0.7
    echo "8 20 22" | python pytorch_baseline/pytorch_talk_to_model.py
"""

import sys
from collections.abc import Iterator

import project_root  # noqa: F401
from pytorch_actor_critic import generate
from pytorch_files import load_adapter
from pytorch_models import Tuned, load_model, pick_device
from pytorch_reward_model import NOTHING_TRAINED

from chat.conversation import Conversation, Prompting
from chat.settings import Settings
from command_line.exits import run_main
from command_line.parser import Parser
from command_line.shared_flags import add_any_base, add_model_arguments, at_least
from data_utils import Template
from errors import UserError
from run_folder.output import printable

LEAVE = ("/quit", "/exit", "/bye")


def parse_arguments(words=None):
    """The checked command line; names and meanings as in talk_to_model.py."""
    parser = Parser(description="Talk to a model of transformers, in PyTorch.")
    add_model_arguments(parser)
    add_any_base(parser, "resume_file")
    add = parser.add_argument_group("what is said").add_argument
    add("--resume-file", help="adapter or soft prompt to put on the model (a file or a folder)")
    add("--device", choices=("cpu", "mps", "cuda"), default="cpu", help="where it runs")
    own = Settings()
    add("--max-tokens", "-m", type=int, default=own.max_tokens, help="longest reply, in tokens")
    text = "tokens of the conversation that are read; the oldest go first (default: all)"
    add("--max-context", "-c", type=int, help=text)
    text = "sampling temperature; 0 takes the likeliest token"
    add("--temp", "--temperature", type=float, default=own.temp, help=text)
    add("--seed", type=int, default=0, help="makes sampled replies repeatable")

    def check(args) -> None:
        at_least(args, 1, "max_tokens", "max_context")
        at_least(args, 0, "temp", "seed")
        if args.quantize:
            raise UserError("--quantize: PyTorch has no counterpart that gives the same numbers")

    parser.checks.append(check)
    return parser.parse_args(words)


def prompts(person: bool) -> Iterator[str]:
    """What is typed, until Ctrl-D or /quit; or the lines of a pipe that are not blank."""
    while True:
        try:
            line = input("> " if person else "")
        except EOFError:
            return
        if person and line.strip() in LEAVE:
            return
        if line.strip():
            yield line


def main(words=None) -> None:
    args = parse_arguments(words)
    loaded = load_model(
        args.model,
        tokenizer=args.tokenizer,
        device=pick_device(args.device),
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )
    if args.resume_file is not None:
        model = load_adapter(loaded, args.resume_file, any_base=args.any_base)
    else:
        model = Tuned(loaded.model, NOTHING_TRAINED)
    model.eval()
    prompting, said = Prompting(loaded.tokenizer), Conversation()
    turn_end = Template(loaded.tokenizer, None, "standard").turn_end_id()
    ends = loaded.eos_ids | ({turn_end} if turn_end is not None else set())
    person = sys.stdin.isatty()
    for number, prompt in enumerate(prompts(person)):
        tokens, _ = prompting.recent(said.messages(prompt), None, args.max_context)
        made = generate(
            model,
            [tokens],
            max_tokens=args.max_tokens,
            eos_ids=ends,
            temperature=args.temp,
            seed=args.seed + number,
        )
        reply = loaded.tokenizer.decode(made.responses[0], skip_special_tokens=True).strip()
        print(printable(reply) if person else reply, flush=True)
        if person and prompting.has_turns:
            said.add(prompt, reply)


if __name__ == "__main__":
    run_main(main)
