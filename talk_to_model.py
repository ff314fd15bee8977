"""Talk to a model in the terminal, from an argument or from a pipe.

    python talk_to_model.py                                  chat with the embedded digits model
    python talk_to_model.py "8 20 22"                        one reply
    echo "8 20" | python talk_to_model.py --model DIR        a reply to each line, and nothing else
    python talk_to_model.py --model DIR --resume-file adapters.npz --max-tokens 50 --temp 0.0

A model with a chat template holds a conversation; any other one continues the text it is given.
Replies go to standard output, everything else to standard error. docs/feedback.md shows how rated
replies become a reward model.
"""

import fast_blas

import signal
import sys
from collections.abc import Iterator

from chat.settings import Settings
from command_line.conditioning_flags import add_target_score
from command_line.dataclass_flags import add_dataclass_arguments, dataclass_from_arguments
from command_line.exits import complain, run_main
from command_line.parser import Parser
from command_line.rules import Needs, needs
from command_line.shared_flags import add_any_base, add_model_arguments
from data_utils import TOKEN_FORMATS
from errors import UserError

# ------------------------------------------------------------------------------ arguments

NEEDS = (
    Needs("ratings_file", "rate", valued=False),
    Needs(
        "blind",
        met=lambda args: args.compare and args.rate,
        why="without --compare OTHER and --rate",
    ),
    Needs(
        "top_p top_k min_p",
        met=lambda args: args.temp > 0,
        why="at --temp 0; add --temp 0.7, for example",
        valued=False,
    ),
    Needs(
        "length_penalty",
        met=lambda args: args.num_beams > 1,
        why="without --num-beams 2 or more",
        valued=False,
    ),
    Needs(
        "repetition_context_size",
        met=lambda args: args.repetition_penalty != 1,
        why="without --repetition-penalty",
        valued=False,
    ),
)


def parse_arguments(words: list[str] | None = None):
    """The options; `args.settings` holds the checked `Settings`."""
    parser = Parser(description=__doc__.splitlines()[0])
    text = "reply to this and leave; without it, prompts come from the terminal or a pipe"
    parser.add_argument("prompt", nargs="*", help=text)
    add_model_arguments(parser)
    add_any_base(parser, "resume_file", "compare", "reward_model")
    add = parser.add_argument_group("what is said").add_argument
    add("--resume-file", help="adapter or soft prompt to put on the model (a file or a folder)")
    add("--system-prompt", help="what the model is told before the conversation")
    add("--prompt-template", help='as in training, such as "Question: {prompt}\\n\\nAnswer:"')
    formats = "how turns are written, as in training"
    add("--token-format", choices=tuple(TOKEN_FORMATS), default="standard", help=formats)
    add_target_score(add)
    add_dataclass_arguments(parser, Settings, title="how replies are written")
    add = parser.add_argument_group("judging").add_argument
    add("--compare", metavar="OTHER", help="second model, or adapter on the same one; side by side")
    add("--reward-model", help="fused reward model, or its adapter: scores each reply")
    text = "a function of your own that scores each reply; may be given several times"
    add("--reward-function", action="append", metavar="FILE.py:NAME", help=text)
    add("--rate", type=bool, default=False, help="ask for a key press that rates each reply")
    text = "where ratings are added, as records that sft.py --reward-model reads"
    add("--ratings-file", default="ratings.jsonl", help=text)
    add("--blind", type=bool, default=False, help="with --compare and --rate: hide who is who")
    parser.checks += [check_arguments, needs(NEEDS)]
    return parser.parse_args(words)


def check_arguments(args) -> None:
    """Refuse what contradicts itself."""
    args.settings = dataclass_from_arguments(Settings, args)


# ------------------------------------------------------------------------------ set-up


def make_session(args):
    """Models, rewards and ratings as the options ask."""
    import mlx.core as mx

    from chat.keyboard import Keys
    from chat.rating import Ratings
    from chat.scoring import Scorer
    from chat.screen import Screen
    from chat.session import Session, check_system_prompt, distinct_names
    from chat.speaker import Loader

    if mx.default_device().type == mx.DeviceType.cpu:
        mx.disable_compile()  # else mlx-lm's samplers run g++, which need not be there
    keys = Keys() if args.rate else None
    kind = "preference" if args.compare else "unpaired"
    ratings = Ratings(args.ratings_file, kind) if args.rate else None
    loader = Loader(
        target_score=args.target_score,
        dtype=args.dtype,
        quantize=args.quantize,
        tokenizer=args.tokenizer,
        trust_remote_code=args.trust_remote_code,
        token_format=args.token_format,
        prompt_template=args.prompt_template,
        any_base=args.any_base,
    )
    speakers = [loader.speaker(args.model, args.resume_file)]
    if args.compare:
        speakers.append(loader.other(args.compare, args.model))
    distinct_names(speakers)
    scorer = Scorer(
        speakers,
        args.reward_model,
        args.reward_function or (),
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        any_base=args.any_base,
    )
    session = Session(
        speakers,
        args.settings,
        Screen(),
        system=args.system_prompt,
        scorer=scorer,
        ratings=ratings,
        keys=keys,
        blind=args.blind,
    )
    if args.system_prompt is not None:
        check_system_prompt(session)
    return session


# ------------------------------------------------------------------------------ prompts


def answer_each(session, prompts: Iterator[str]) -> None:
    """Reply to prompts that have nothing to do with each other."""
    from chat.conversation import Conversation

    for prompt in prompts:
        if session.screen.nobody_reads:
            break
        session.start_over(Conversation(session.conversation.system))
        session.ask(prompt, stoppable=False)


def rate_each(session, prompts: list[str]) -> None:
    """Reply to such prompts and have each reply rated; the key u goes back to the one before."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    shown, numbers, at = [], [], 0  # numbers: of the ratings before `at`
    while at < len(prompts):
        if at == len(shown):
            session.screen.note(f"> {prompts[at]}")
            shown.append(session.reply_to(prompts[at]))
        else:
            session.show_again(shown[at])
        undo = any(map(session.can_rate, shown[:at]))
        hint = f" ({'u: the one before, ' * undo}{at} of {len(prompts)} done)"
        rated = session.rate(shown[at], stoppable=False, hint=hint, undo=undo)
        if rated != "undo":
            numbers.append(rated[1] if rated else None)
            at += 1
            continue
        while rated == "undo":  # past those that were not asked about
            at -= 1
            session.take_back(numbers.pop())
            rated = None if session.can_rate(shown[at]) else "undo"


def piped_lines() -> Iterator[str]:
    """The lines of standard input that are not blank."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input, line {number}: not UTF-8: {error.reason}") from None
        if text.strip():
            yield text


def chat(session) -> None:
    """Prompts and commands from the keyboard, until Ctrl-D or /quit."""
    from chat import commands
    from chat.keyboard import LineEditor, is_command

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job may ignore it
    editor = LineEditor(commands.completions)
    names = " and ".join(speaker.name for speaker in session.speakers)
    how = "conversation" if session.has_turns else "type a text for it to continue"
    session.screen.note(f"{names}: {how}; /help lists commands, Ctrl-D leaves")
    while True:
        try:
            line = editor.read()
            if is_command(line) and not line.startswith("//"):
                commands.run(session, line)
            elif line.strip():
                session.ask(line[1:] if is_command(line) else line, stoppable=True)
        except UserError as wrong:
            complain(str(wrong))
        except KeyboardInterrupt:
            session.screen.note("")
        except (EOFError, commands.Leave) as reason:
            session.screen.note("" if isinstance(reason, EOFError) else "bye")
            break
    editor.save_history()


# ------------------------------------------------------------------------------ main


def main(words: list[str] | None = None) -> int:
    args = parse_arguments(words)
    fast_blas.tell_of_slowness()
    session = make_session(args)
    try:
        if not args.prompt and sys.stdin.isatty():
            chat(session)
        else:
            prompts = iter([" ".join(args.prompt)]) if args.prompt else piped_lines()
            if session.ratings is not None:
                rate_each(session, list(prompts))
            else:
                answer_each(session, prompts)
            if not session.replies_given:
                session.screen.note("note: standard input held no prompts")
    except KeyboardInterrupt:  # replies are printed and ratings written one by one: nothing is lost
        session.screen.progress("")
        count = session.replies_given
        session.screen.note(f"stopped after {count} {'reply' if count == 1 else 'replies'}")
        return 128 + signal.SIGINT
    finally:
        if session.ratings is not None:
            session.screen.note(session.ratings.summary())
    return 0


if __name__ == "__main__":
    run_main(main)
