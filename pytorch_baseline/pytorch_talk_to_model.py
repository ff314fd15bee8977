"""talk_to_model.py in PyTorch: a conversation in the terminal, or a reply to each line of a pipe.

The prompts are those of talk_to_model.py, the model is transformers'.

    python pytorch_baseline/pytorch_talk_to_model.py --model sft_model --temp 0.7
    echo "8 20 22" | python pytorch_baseline/pytorch_talk_to_model.py
"""

import sys
from collections.abc import Iterator

import project_root  # noqa: F401
import torch
from pytorch_actor_critic import generate
from pytorch_files import load_adapter
from pytorch_models import Tuned
from pytorch_reward_model import NOTHING_TRAINED
from pytorch_runs import load_base

from chat.conversation import Conversation, Prompting
from chat.settings import Settings
from command_line.dataclass_flags import add_dataclass_arguments, dataclass_from_arguments
from command_line.exits import run_main
from command_line.parser import Parser
from command_line.shared_flags import add_any_base, add_model_arguments
from data_utils import Template
from errors import UserError
from run_folder.output import printable

LEAVE = ("/quit", "/exit", "/bye")
# How transformers picks tokens here; nothing here repeats beams and penalties of the MLX side.
SAMPLING = ("top_k", "top_p", "min_p")
LEFT_OUT = ("repetition_penalty", "repetition_context_size", "num_beams", "length_penalty")


def parse_arguments(words=None):
    """The checked command line; names and meanings as in talk_to_model.py."""
    parser = Parser(description="Talk to a model of transformers, in PyTorch.")
    add_model_arguments(parser)
    add_any_base(parser, "resume_file")
    add = parser.add_argument_group("what is said").add_argument
    add("--resume-file", help="adapter or soft prompt to put on the model (a file or a folder)")
    add("--device", choices=("cpu", "mps", "cuda"), default="cpu", help="where it runs")
    add_dataclass_arguments(parser, Settings, title="how replies are written", exclude=LEFT_OUT)

    def check(args) -> None:
        args.settings = dataclass_from_arguments(Settings, args)
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
    settings, loaded = args.settings, load_base(args)
    if args.resume_file is not None:
        model = load_adapter(loaded, args.resume_file, any_base=args.any_base)
    else:
        model = Tuned(loaded.model, NOTHING_TRAINED)
    model.eval()
    prompting, said = Prompting(loaded.tokenizer), Conversation()
    turn_end = Template(loaded.tokenizer, None, "standard").turn_end_id()
    ends = loaded.eos_ids | ({turn_end} if turn_end is not None else set())
    sampling = {name: getattr(settings, name) for name in SAMPLING}
    sampling |= {"max_tokens": settings.max_tokens, "temperature": settings.temp}
    torch.seed() if settings.seed is None else torch.manual_seed(settings.seed)
    person = sys.stdin.isatty()
    for prompt in prompts(person):
        tokens, _ = prompting.recent(said.messages(prompt), None, settings.max_context)
        made = generate(model, [tokens], eos_ids=ends, **sampling)
        reply = loaded.tokenizer.decode(made.responses[0], skip_special_tokens=True).strip()
        print(printable(reply) if person else reply, flush=True)
        if person and prompting.has_turns:
            said.add(prompt, reply)


if __name__ == "__main__":
    run_main(main)
