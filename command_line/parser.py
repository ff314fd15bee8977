"""The command line of every script: one parser class and its value types.

Flags take dashes or underscores, unambiguous prefixes, and booleans in every usual form; a
``--config`` file or the run that is resumed gives defaults. All of it happens before argparse sees
the words, so argparse itself keeps its own plain rules. Importing this loads no MLX.
"""

import argparse
import contextlib
import difflib
import itertools
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from command_line.exits import complain, short_name
from command_line.option_files import (
    check_script,
    read_config,
    read_run_options,
    redacted_options,
    refuse_lost_paths,
)
from command_line.values import (
    LONGEST_SHOWN,
    HelpFormatter,
    Setting,
    boolean,
    number,
    shown,
    whole_number,
)
from errors import UserError
from run_folder.resuming import check_resume_options
from run_folder.run_config import run_folder_of

LARGEST = 2**31 - 1  # of a size or a count


# What --help shows of a script with many flags: what a first run needs, and what most runs change.
COMMON = frozenset(
    "help model data data_base "
    "train_file validation_file mask_prompt train test preview reward_model "
    "ground_truth_reward reward_function reward_url answer_reward algorithm loss_type beta "
    "num_generations iters epochs num_steps batch_size mini_batch_size max_new_tokens max_length "
    "learning_rate fine_tune_type prompt_tuning lora_rank init_kl_coef eval_every steps_per_eval "
    "steps_per_report save_file fused_dir output_dir seed config resume log_with adapter_file "
    "save_path upload_repo force input prompts samples output best_of prompt system_prompt temp "
    "max_tokens resume_file resume_adapter_file compare rate report against web aspects "
    "judge judge_url constitution debate revise soft_labels grow_steps samples_per_prompt "
    "thresholds quantiles start_from".split()
)
NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$|-inf$|-nan$", re.IGNORECASE)  # no flags
FEW = 30  # so many flags are shown whole


class HelpAll(argparse.Action):
    """--help-all: every flag."""

    def __init__(self, option_strings, dest, help=None):
        super().__init__(option_strings, "help", nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        parser.short_help = False
        parser.print_help()
        parser.exit()


class Parser(argparse.ArgumentParser):
    """argparse with this project's rules; declare booleans with ``type=bool``, flags with dashes.

    ``parse_args`` returns a namespace with extra names: ``explicit``, the set of names that
    the user gave, on the command line or in the ``--config`` file, and ``changed``, those of them
    with another value than the default; and a third, ``typed``: of ``changed`` those on the command
    line. ``checks`` are functions of the namespace that run last;
    they raise ``UserError`` for flags that contradict each other and may fill in what follows from
    other flags. ``alternatives`` are sets of names that say the same in different ways: one on the
    command line replaces another of the ``--config`` file or of the run that is resumed, and one of
    the file another of the run.
    """

    def __init__(
        self, *, script: str | None = None, harmless: Iterable[str] = (), **options: Any
    ) -> None:
        """``script``: its file, which made the runs that ``--resume`` takes (None: any run).

        ``harmless``: names of this script's own options that ``--resume`` may change.
        """
        options.setdefault("formatter_class", HelpFormatter)
        super().__init__(allow_abbrev=False, **options)
        self.checks: list[Callable[[argparse.Namespace], None]] = []
        self.alternatives: list[set[str]] = []
        self.script, self.harmless = script, tuple(harmless)
        self.short_help = True
        self._negative_number_matcher = NEGATIVE
        if self.add_help:
            self.add_argument("--help-all", action=HelpAll, help="show every flag, and exit")
        for kind, convert in ((bool, boolean), (int, whole_number), (float, number)):
            self.register("type", kind, convert)

    def error(self, message: str) -> None:
        sys.stdout.flush()
        raise SystemExit(complain(re.sub(r"^argument (--\S+?)(/-\S+)*: ", r"\1: ", message)))

    def format_help(self) -> str:
        # The list of all flags stands below anyway; twenty lines of usage say no more.
        names = [a.metavar or a.dest.upper() for a in self._actions if not a.option_strings]
        self.usage = " ".join(["%(prog)s [flags]", *names])
        named = [a for a in self._actions if a.option_strings and a.help != argparse.SUPPRESS]
        if not self.short_help or len(named) <= FEW:
            return super().format_help()
        hidden = {a: a.help for a in named if a.dest not in COMMON}
        try:
            for action in hidden:
                action.help = argparse.SUPPRESS
            text = super().format_help()
        finally:
            for action, said in hidden.items():
                action.help = said
        return f"{text}\n{len(hidden)} flags more: --help-all\n"

    # ----------------------------------------------------------------- names of flags

    def _flags(self) -> dict[str, argparse.Action]:
        """Every name that a flag can be written as, ``--no-x`` included, to its action."""
        found = {}
        for action in self._actions:
            for name in action.option_strings:
                found[name] = action
                if action.type is bool and name.startswith("--"):
                    found.setdefault(f"--no-{name[2:]}", action)
        return found

    def _find(self, written: str) -> tuple[str, argparse.Action]:
        """The full name and the action of a flag as the user wrote it; exits when none fits."""
        flags = self._flags()
        name = written.replace("_", "-")
        if name in flags:
            return name, flags[name]
        fits = [full for full in flags if full.startswith(name)]
        # A bare "--n" must not stumble over every "--no-x" there is.
        positive = [full for full in fits if full in flags[full].option_strings] or fits
        if len({id(flags[full]) for full in positive}) == 1:
            return positive[0], flags[positive[0]]
        if positive:
            self.error(f"{written} could be {', '.join(sorted(positive))}: write more of it")
        self.error(f"unknown flag {written}{nearest(name, flags)}")

    # ----------------------------------------------------------------- the words of the user

    def _spell_out(self, words: list[str]) -> tuple[list[str], set[str]]:
        """Words with every flag in full and every boolean as ``--flag=value``; names given."""
        out: list[str] = []
        given: set[str] = set()
        said: dict[str, dict[str, list[str]]] = {}  # of each flag, by the names it was given as
        position = 0
        while position < len(words):
            typed = words[position]
            position += 1
            word = self._in_full(typed)
            if word == "--":
                return out + words[position - 1 :], given
            if not word.startswith("--"):
                out.append(word)
                continue
            written, equals, value = word.partition("=")
            name, action = self._find(written)
            given.add(action.dest)
            names = said.setdefault(action.dest, {})
            if action.type is bool:
                following = words[position] if position < len(words) else "-"
                if not equals and self._is_value(following):
                    value, equals, position = following, "=", position + 1
                word = self._boolean_word(name, action, value if equals else "true")
            else:  # the first of its names: what is looked for before argparse has run
                word = action.option_strings[0] + equals + value
                spelt = name if typed.startswith("--") else typed[:2]
                names[spelt] = [value] if equals else self._values(action, words[position:])
                self._refuse_two_values(action, names)
            out.append(word)
        return out, given

    def _values(self, action: argparse.Action, words: list[str]) -> list[str]:
        """The words that a flag with these words behind it takes."""
        count = 1 if action.nargs is None else action.nargs
        words = list(itertools.takewhile(lambda w: not self._in_full(w).startswith("--"), words))
        return words[:count] if isinstance(count, int) else words

    def _refuse_two_values(self, action: argparse.Action, names: dict[str, list[str]]) -> None:
        """Exit where two names of one flag say different things; of one name given twice the last
        counts, as everywhere.
        """
        with contextlib.suppress(argparse.ArgumentError, ValueError):  # argparse says what is wrong
            converted = [self._get_values(action, values) for values in names.values()]
            if any(value != converted[0] for value in converted):
                both = " and ".join(" ".join([name, *values]) for name, values in names.items())
                self.error(f"{both} are one flag and say different things; remove one")

    def _in_full(self, word: str) -> str:
        """``-m 5``, ``-m5`` or ``-m=5`` with the flag's long name; any other word as it is."""
        short, value = word[:2], word[2:].removeprefix("=")
        action = self._flags().get(short)
        if action is None or word.startswith("--") or action.dest == "help":
            return word
        return action.option_strings[0] + (f"={value}" if value else "")

    def _is_value(self, word: str) -> bool:
        """Whether the word after a boolean flag is its value and not a positional argument."""
        if any(not action.option_strings for action in self._actions):
            return word.lower() in ("true", "false")
        return not word.startswith("-")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as wrong:
            if len(arg_string) > LONGEST_SHOWN:
                wrong.message = wrong.message.replace(repr(arg_string), shown(arg_string))
            raise

    def _boolean_word(self, name: str, action: argparse.Action, value: str) -> str:
        try:
            truth = boolean(value)
        except argparse.ArgumentTypeError as wrong:
            self.error(f"{name}: {wrong}")
        if name not in action.option_strings:
            truth = not truth
        return f"{action.option_strings[0]}={truth}"

    # ----------------------------------------------------------------- parsing

    def parse_args(self, words=None, namespace=None):  # type: ignore[override]
        words, given = self._spell_out(list(sys.argv[1:] if words is None else words))
        try:
            return self._parse(words, given, namespace or argparse.Namespace())
        except UserError as wrong:
            self.error(str(wrong))
        except OSError as wrong:  # a name that no file can have, a folder that may not be read
            if wrong.filename is None:
                raise
            self.error(f"{short_name(wrong.filename)}: {wrong.strerror}")

    def _parse(self, words: list[str], given: set[str], args: argparse.Namespace):
        has_resume = any(action.dest == "resume" for action in self._actions)
        resumed = last_value(words, "--resume") if has_resume else None
        if resumed and self.script:
            check_script(resumed, self.script)
        config = last_value(words, "--config") if "--config" in self._flags() else None
        old = self._take(args, read_run_options(resumed)) if resumed else {}
        settings = read_config(Path(config), self._flags(), given) if config else []
        from_file = self._take(args, settings)
        self._replace_alternatives(args, set(from_file))
        self._replace_alternatives(args, given)
        explicit = given | {name for name in from_file if hasattr(args, name)}
        args, unknown = self.parse_known_args(words, args)
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        args.explicit = explicit
        args.changed = {n for n in explicit if getattr(args, n) != self.get_default(n)}
        args.typed = args.changed & given
        args.defaults = {action.dest: self.get_default(action.dest) for action in self._actions}
        args.may_change = self.harmless
        if resumed:
            self._settle_resume(args, old)
        self._check_values(args)
        for check in self.checks:
            check(args)
        return args

    def _check_values(self, args: argparse.Namespace) -> None:
        """Refuse what no option can be: a text with NUL, a number that MLX cannot take."""
        for action in self._actions:
            value = getattr(args, action.dest, None)
            name = action.option_strings[0] if action.option_strings else action.dest
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str) and "\0" in item:
                    raise UserError(f"{name}: {shown(item)} has a NUL character in it")
                if isinstance(item, int) and action.dest != "seed" and abs(item) > LARGEST:
                    raise UserError(f"{name}: {item} is too large: {LARGEST} is the most")

    def _replace_alternatives(self, args: argparse.Namespace, chosen: set[str]) -> None:
        """Take back to its default what ``chosen`` options say in another way."""
        for group in self.alternatives:
            for name in group - chosen if group & chosen else ():
                if hasattr(args, name):
                    delattr(args, name)

    def _settle_resume(self, args: argparse.Namespace, old: dict[str, Any]) -> None:
        folder = str(run_folder_of(args.resume))
        if "output_dir" in args.explicit and Path(args.output_dir) != Path(folder):
            raise UserError("--output-dir: a resumed run stays in its own folder; leave it out")
        args.output_dir = folder
        for name in sorted(redacted_options(folder) & set(vars(args)) - args.explicit):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: it held a secret, which no file keeps; give it once more")
        refuse_lost_paths(folder, {n: v for n, v in old.items() if n not in args.explicit})
        check_resume_options(
            old, vars(args), harmless=self.harmless, force=getattr(args, "force_resume", False)
        )

    def _take(self, args: argparse.Namespace, settings: list[Setting]) -> dict[str, Any]:
        """Put settings from a file into the namespace as defaults; return them by name."""
        taken: dict[str, Any] = {}
        flags, keys = self._flags(), {}
        for setting in settings:
            name = "--" + setting.key.replace("_", "-")
            action = flags.get(name)
            if action is None or name not in action.option_strings or action.dest == "help":
                if setting.optional:
                    continue
                raise UserError(
                    f"{setting.where}: unknown key {setting.key!r}{nearest(name, flags)}"
                )
            if action.dest in ("config", "resume"):
                raise UserError(f"{setting.where}: {setting.key!r} belongs on the command line")
            value = self._convert(action, setting)
            if taken.get(action.dest, value) != value:
                other = keys[action.dest]
                raise UserError(
                    f"{setting.where}: {setting.key!r} and {other!r} are one flag and say "
                    "different things; remove one"
                )
            taken[action.dest], keys[action.dest] = value, setting.key
            action.required = False
            setattr(args, action.dest, taken[action.dest])
        return taken

    def _convert(self, action: argparse.Action, setting: Setting) -> Any:
        """One value of a file, checked and converted as if it stood on the command line."""
        value = setting.value
        if value is None and (action.default is None or setting.optional):
            return None
        exact = action.nargs if isinstance(action.nargs, int) else None
        many = isinstance(value, list) and (action.nargs in ("+", "*") or exact is not None)
        if exact is not None and not (many and len(value) == exact):
            raise UserError(f"{setting.where}: {setting.key}: a list of {exact} values is needed")
        words = [plain_word(item, action, setting) for item in (value if many else [value])]
        try:
            return self._get_values(action, words)
        except argparse.ArgumentError as wrong:
            raise UserError(f"{setting.where}: {setting.key}: {wrong.message}") from None


def plain_word(value: Any, action: argparse.Action, setting: Setting) -> str:
    """A value of a file as the word that a user would have typed; raises ``UserError``."""
    fits = isinstance(value, str | int | float) or (value is None and action.type is not bool)
    if not fits or (isinstance(value, bool) and action.type in (int, float)):
        said = shown(str(value))
        raise UserError(f"{setting.where}: {setting.key}: {said} is no value for this option")
    return "none" if value is None else str(value)


def nearest(name: str, flags: Iterable[str]) -> str:
    """``; did you mean --x?`` for the flag spelt most like ``name``, or an empty string."""
    bare = {flag.lstrip("-"): flag for flag in flags}
    close = difflib.get_close_matches(name.lstrip("-"), bare, n=1, cutoff=0.7)
    return f"; did you mean {bare[close[0]]}?" if close else "; --help-all lists the flags"


def last_value(words: list[str], flag: str) -> str | None:
    """The value of the last ``flag`` in spelt-out words, or None."""
    found = None
    for position, word in enumerate(words):
        if word == "--":
            break
        if word.startswith(flag + "="):
            found = word.partition("=")[2]
        elif word == flag and position + 1 < len(words):
            found = words[position + 1]
    return found
