"""How a reply is written: the options of the command line that ``/set`` changes while chatting."""

from argparse import ArgumentTypeError
from dataclasses import dataclass, field, fields, replace

from command_line.values import number, whole_number
from errors import UserError


def option(default, text: str, *aliases: str):
    return field(default=default, metadata={"help": text, "aliases": aliases})


@dataclass(frozen=True)
class Settings:
    """Checked values; each field is a flag of talk_to_model.py and a name for ``/set``."""

    max_tokens: int = option(256, "longest reply, in tokens", "-m")
    max_context: int | None = option(
        None, "tokens of the conversation that are read; the oldest go first (default: all)", "-c"
    )
    temp: float = option(0.0, "sampling temperature; 0 takes the likeliest token", "--temperature")
    top_p: float = option(1.0, "sample from the likeliest tokens that make up this probability")
    top_k: int = option(0, "sample from this many likeliest tokens; 0: all")
    min_p: float = option(0.0, "drop tokens less likely than this share of the likeliest")
    repetition_penalty: float = option(1.0, "above 1: makes tokens that occurred less likely")
    repetition_context_size: int = option(20, "how many tokens back the penalty looks")
    num_beams: int = option(1, "beams of a beam search, sampled where --temp is above 0; 1: none")
    length_penalty: float = option(1.0, "beam search: above 0 favours long replies, below short")
    seed: int | None = option(None, "makes sampled replies repeatable (default: a new one)")

    def __post_init__(self):
        for name, fits, wanted in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("max_context", self.max_context is None or self.max_context >= 1, "at least 1"),
            ("temp", self.temp >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("repetition_context_size", self.repetition_context_size >= 1, "at least 1"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
        ):
            if not fits:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag}: {getattr(self, name):g} is not {wanted}")

    @staticmethod
    def full_name(name: str) -> str:
        """`name` as a field is called, from what a person may write: top-p, temperature."""
        name = name.lstrip("-").replace("-", "_").lower()
        return {"temperature": "temp"}.get(name, name)

    def changed(self, name: str, text: str) -> "Settings":
        """A copy with one value replaced, as ``/set NAME TEXT`` asks. Raises UserError."""
        kinds = {f.name: f.type for f in fields(self)}
        if name not in kinds:
            raise UserError(f"/set {name}: no such setting; there are {', '.join(kinds)}")
        if kinds[name] == int | None and text.lower() == "none":
            return replace(self, **{name: None})
        convert = number if kinds[name] is float else whole_number
        try:
            return replace(self, **{name: convert(text)})
        except ArgumentTypeError as wrong:
            raise UserError(f"/set {name}: {wrong}") from None

    def describe(self) -> str:
        """Every setting with its value and meaning, a line each."""
        values = [f"{f.name} {getattr(self, f.name)}" for f in fields(self)]
        width = max(map(len, values))
        helps = (f.metadata["help"] for f in fields(self))
        return "\n".join(f"{v:{width}}  {h}" for v, h in zip(values, helps, strict=True))
