"""What a line that begins with ``/`` does in a chat."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from chat.conversation import Conversation
from chat.keyboard import write_in_editor
from chat.session import Session, check_system_prompt
from chat.settings import Settings
from errors import UserError


class Leave(Exception):
    """The chat is over."""


@dataclass
class Command:
    function: Callable[[Session, str], None]
    usage: str
    help: str


def run(session: Session, line: str) -> None:
    """Do what ``/name rest of the line`` asks for. Raises UserError, or Leave at the end."""
    name, _, rest = line[1:].partition(" ")
    name = name.lower()
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:
        raise UserError(f"/{name}: no such command; /help lists them, //{name} sends it as text")
    command.function(session, rest.strip())


def completions(line: str) -> list[str]:
    """What the tab key may complete the next word of `line` to."""
    if not line:
        return [f"/{name}" for name in (*COMMANDS, *ALIASES)]
    return [field.name for field in fields(Settings)] if line == "/set " else []


def show_help(session: Session, _: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        session.screen.note(f"{command.usage:{width}}  {command.help}")
    kind = (
        "Replies answer the whole conversation."
        if session.has_turns
        else ("The model has no chat template: it continues each text by itself.")
    )
    session.screen.note(
        f'{kind} Pasted lines are one prompt; so is what stands between two """, or behind a line '
        "that ends with \\. Ctrl-C stops a reply, Ctrl-D leaves."
    )


def reset(session: Session, _: str) -> None:
    said = session.conversation
    session.start_over(Conversation(said.system, extras=said.extras, system_keys=said.system_keys))
    session.screen.note("the conversation is empty")


def undo(session: Session, _: str) -> None:
    prompt = session.undo()
    if prompt is None:
        raise UserError("/undo: nothing has been said yet")
    session.screen.note(f"taken back: {prompt}")


def retry(session: Session, _: str) -> None:
    prompt = session.drop_last()
    if prompt is None:
        raise UserError("/retry: nothing has been said yet")
    if session.settings.temp == 0:
        session.screen.note("at temp 0 the reply stays the same; /set temp 0.7 samples another")
    session.ask(prompt, stoppable=True)


def edit(session: Session, rest: str) -> None:
    prompt = write_in_editor(rest)
    if not prompt.strip():
        session.screen.note("nothing was written")
        return
    session.screen.note(f"> {prompt}")
    session.ask(prompt, stoppable=True)


def save(session: Session, rest: str) -> None:
    name, _, force = rest.rpartition(" ") if rest.endswith(" force") else (rest, "", "")
    path = Path(_needed(name, "save")).expanduser()
    if path.exists() and not force:
        raise UserError(f"{path}: is there already; /save {name} force replaces it")
    session.conversation.save(path)
    count = len(session.conversation.exchanges)
    session.screen.note(f"saved {count} exchange{'s' * (count != 1)} as {path}")


def load(session: Session, rest: str) -> None:
    path = Path(_needed(rest, "load")).expanduser()
    conversation = Conversation.load(path)
    if conversation.system:
        check_system_prompt(session)
    session.start_over(conversation)
    for exchange in conversation.exchanges:
        session.screen.note(f"> {exchange.prompt}")
        session.screen.note(exchange.reply.strip())


def change_setting(session: Session, rest: str) -> None:
    name, _, value = rest.replace("=", " ").partition(" ")
    if not name:
        session.screen.note(session.settings.describe())
        return
    if not value.strip():
        raise UserError("/set: a name and a value are needed, as in /set temp 0.7")
    name = Settings.full_name(name)
    settings = session.settings.changed(name, value.strip())
    session.settings = settings
    if name == "seed":
        session.use_seed()
    session.screen.note(f"{name} {getattr(settings, name)}")


def change_system(session: Session, rest: str) -> None:
    check_system_prompt(session)
    if rest:
        session.conversation.system = None if rest == "off" else rest
    session.screen.note(f"system prompt: {session.conversation.system or 'none'}")


def leave(session: Session, _: str) -> None:
    raise Leave


def _needed(name: str, command: str) -> str:
    if not name:
        raise UserError(f"/{command}: the name of a file is needed, as in /{command} chat.json")
    return name


COMMANDS = {
    "help": Command(show_help, "/help", "this list"),
    "reset": Command(reset, "/reset", "forget what was said; settings and system prompt stay"),
    "undo": Command(undo, "/undo", "take back the last prompt, its reply and its rating"),
    "retry": Command(retry, "/retry", "another reply to the last prompt; its rating stays"),
    "edit": Command(edit, "/edit TEXT", "write a prompt in $EDITOR, beginning with TEXT"),
    "save": Command(save, "/save FILE", "write the conversation as one line of JSON"),
    "load": Command(load, "/load FILE", "go on with a saved conversation"),
    "set": Command(change_setting, "/set NAME VALUE", "as in /set temp 0.7; /set alone: all"),
    "system": Command(change_system, "/system TEXT", "the system prompt; off: none; alone: show"),
    "quit": Command(leave, "/quit", "leave; so do /exit and /bye"),
}
ALIASES = {"exit": "quit", "bye": "quit"}
