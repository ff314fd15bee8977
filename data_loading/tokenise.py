"""Token ids with loss masks for SFT, reward models and PPO prompts.

A mask is 1 on the tokens that are targets of the loss: mask[t] belongs to the prediction of
tokens[t] from the tokens before it, so mask[0] is always 0. A trainer that shifts uses
tokens[:, :-1] to predict tokens[:, 1:], weighted with mask[:, 1:].
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from data_loading.messages import BadRow
from data_loading.records import Record
from data_loading.templates import Piece, Template
from errors import UserError

TOO_LONG = ("cut", "refuse")


class Refused(Exception):
    """A good row that cannot be used with these settings; counted in `Tokenised.refused`."""


@dataclass
class TextRow:
    """A row for SFT: `mask[t]` is 1 where `tokens[t]` is a target. Same length."""

    tokens: list[int]
    mask: list[int]
    where: str = ""


@dataclass
class ScalarRow:
    """A row for reward regression."""

    tokens: list[int]
    reward: float
    where: str = ""


@dataclass
class PreferenceRow:
    """Two or more responses to one prompt, best first; equal ranks are ties."""

    responses: list[list[int]]  # each: the prompt's tokens, then the response's
    ranks: list[int]
    margin: float | None = None
    where: str = ""

    @property
    def chosen(self) -> list[int]:
        """The best response."""
        return self.responses[0]

    @property
    def rejected(self) -> list[int]:
        """The worst response."""
        return self.responses[-1]


@dataclass
class PromptRow:
    """A prompt for PPO, as tokens and as the text they stand for, and the row's other fields."""

    tokens: list[int]
    text: str
    columns: dict[str, Any]
    where: str = ""


Row = TypeVar("Row", TextRow, ScalarRow, PreferenceRow, PromptRow)


@dataclass
class Tokenised(Generic[Row]):
    """Rows ready for batches, how many were cut, and which were refused: [(where, why), ...]."""

    rows: list[Row] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    cut: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row; of a preference row, those of its longest response."""
        return [
            max(map(len, r.responses)) if isinstance(r, PreferenceRow) else len(r.tokens)
            for r in self.rows
        ]


def tokenise_sft(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    max_length: int = 2048,
    too_long: str = "cut",
    mask_prompt: bool = False,
    prompt_template: str | None = None,
    token_format: str = "standard",
    skip_bad_rows: bool = False,
) -> Tokenised[TextRow]:
    """Rows of text, prompt-completion and conversation kind as tokens with a loss mask.

    One BOS where the tokenizer writes one; EOS at the end, trained. With `mask_prompt` only
    answers are targets: completions, and in conversations every assistant turn without its
    header. A row cut to `max_length` loses its end, EOS included.

    Raises:
        UserError: rows that are not for SFT (preference, unpaired, prompts alone), `mask_prompt`
            on plain text alone, a template that does not fit, no row left.
    """
    records = list(records)
    if mask_prompt and records and all(record.kind == "text" for record in records):
        raise UserError(f"{records[0].where}: --mask-prompt on plain text, which has no prompt")
    encoder = _Encoder(Template(tokenizer, prompt_template, token_format), max_length, too_long)

    def convert(record: Record) -> tuple[TextRow, bool]:
        _refuse_other_kinds(record)
        pieces = encoder.template.record(record)
        tokens, mask = encoder.encode(pieces, ends=_ends_with_answer(record))
        if not (mask_prompt and record.kind != "text"):
            mask = [1] * len(mask)
        mask[0] = 0
        if len(tokens) < 2:
            raise Refused("one token alone; there is nothing to predict")
        tokens, was_cut = encoder.fit(tokens)
        mask = mask[: len(tokens)]
        if not any(mask):
            raise Refused("no trained token is left" if was_cut else "no assistant turn to train")
        return TextRow(tokens, mask, record.where), was_cut

    return _each(records, convert, skip_bad_rows)


def tokenise_scalar(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    max_length: int = 2048,
    too_long: str = "refuse",
    prompt_template: str | None = None,
    token_format: str = "standard",
    add_eos: bool = True,
    skip_bad_rows: bool = False,
) -> Tokenised[ScalarRow]:
    """Rows with `reward` or `meta_eval_score` as tokens and a number.

    Unpaired rows count as 1 (label true) and 0. A row without a reward is a UserError.
    """
    encoder = _Encoder(Template(tokenizer, prompt_template, token_format), max_length, too_long)

    def convert(record: Record) -> tuple[ScalarRow, bool]:
        if record.kind in ("preference", "prompt"):
            raise BadRow(f"a row of kind {record.kind} has no text with a reward")
        reward = record.reward
        if reward is None and record.label is not None:
            reward = float(record.label)
        if reward is None:
            raise BadRow("no reward: the field reward or meta_eval_score is needed")
        tokens, _ = encoder.encode(
            encoder.template.record(record), ends=add_eos and _ends_with_answer(record)
        )
        tokens, was_cut = encoder.fit(tokens)
        return ScalarRow(tokens, reward, record.where), was_cut

    return _each(records, convert, skip_bad_rows)


def tokenise_preferences(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    max_length: int = 2048,
    too_long: str = "refuse",
    prompt_template: str | None = None,
    token_format: str = "standard",
    add_eos: bool = True,
    skip_bad_rows: bool = False,
) -> Tokenised[PreferenceRow]:
    """Preference rows as the tokens of every response, each after the same prompt.

    Rows whose responses are the same (after a cut, too) are refused: they prefer nothing.
    """
    encoder = _Encoder(Template(tokenizer, prompt_template, token_format), max_length, too_long)

    def convert(record: Record) -> tuple[PreferenceRow, bool]:
        if record.kind != "preference":
            raise BadRow(f"a row of kind {record.kind} where chosen and rejected are needed")
        responses, was_cut = [], False
        for answer in record.responses:
            tokens, _ = encoder.encode(encoder.template.answered(record, answer), ends=add_eos)
            tokens, one_cut = encoder.fit(tokens)
            responses.append(tokens)
            was_cut |= one_cut
        best, others = responses[0], zip(responses, record.ranks, strict=True)
        if any(tokens == best and rank > 0 for tokens, rank in others):
            raise Refused("chosen and rejected are the same" + " after the cut" * was_cut)
        return PreferenceRow(responses, record.ranks, record.margin, record.where), was_cut

    return _each(records, convert, skip_bad_rows)


def tokenise_prompts(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    too_long: str = "refuse",
    prompt_words: int | None = None,
    prompt_template: str | None = None,
    token_format: str = "standard",
    skip_bad_rows: bool = False,
) -> Tokenised[PromptRow]:
    """Prompts for PPO from every kind of row that has one.

    A conversation gives everything up to its last user turn. Plain text gives its first
    `prompt_words` words, which must leave at least one word to write. A prompt longer than
    `max_length` tokens is refused, or cut on the left (BOS kept) with `too_long="cut"`.

    Raises:
        UserError: plain text without `prompt_words`, a row without a prompt, no row left.
    """
    template = Template(tokenizer, prompt_template, token_format)
    encoder = _Encoder(template, max_length, too_long)

    def convert(record: Record) -> tuple[PromptRow, bool]:
        if record.kind == "text":
            text = first_words(record.text, prompt_words)
        else:
            text = template.prompt(record)
        if not text:
            raise BadRow("the row has no prompt")
        tokens, _ = encoder.encode([(text, False)], ends=False)
        tokens, was_cut = encoder.fit_left(tokens)
        if was_cut:
            text = tokenizer.decode(tokens[encoder.bos_length(tokens) :])
        elif tokenizer.bos_token:
            text = text.removeprefix(tokenizer.bos_token)
        return PromptRow(tokens, text, record.columns, record.where), was_cut

    return _each(records, convert, skip_bad_rows)


def columns_of(rows: Iterable[PromptRow]) -> dict[str, list[Any]]:
    """The other fields of the rows as lists, for a reward function; None where a row has none."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row.columns)
    return {name: [row.columns.get(name) for row in rows] for name in names}


def first_words(text: str, count: int | None) -> str:
    """The first `count` words of a text, their spacing kept."""
    if count is None:
        raise BadRow("plain text has no prompt; say how many of its words are one: --prompt-words")
    if count < 1:
        raise UserError(f"--prompt-words {count}: must be at least 1")
    words = list(re.finditer(r"\S+", text))
    if len(words) <= count:
        raise Refused(f"not more than {count} words, the length of a prompt")
    return text[: words[count - 1].end()]


# One row ------------------------------------------------------------------------------------


def _each(
    records: Iterable[Record],
    convert: Callable[[Record], tuple[Row, bool]],
    skip_bad_rows: bool,
) -> Tokenised[Row]:
    done: Tokenised[Row] = Tokenised()
    for record in records:
        try:
            row, was_cut = convert(record)
        except Refused as why:
            done.refused.append((record.where, str(why)))
        except BadRow as why:
            if not skip_bad_rows:
                raise UserError(f"{record.where}: {why}") from why
            done.refused.append((record.where, str(why)))
        else:
            done.rows.append(row)
            done.cut += was_cut
    if not done.rows:
        if not done.refused:
            raise UserError("there are no rows to tokenise")
        where, why = done.refused[0]
        raise UserError(
            f"{where}: no row is left; of {len(done.refused)} refused, the first: {why}"
        )
    return done


def _refuse_other_kinds(record: Record) -> None:
    if record.kind in ("preference", "unpaired", "prompt"):
        raise BadRow(
            f"a row of kind {record.kind} is not for supervised fine-tuning, which needs text, "
            "prompt and completion, or messages"
        )


def _ends_with_answer(record: Record) -> bool:
    """Whether the row ends where the model should stop."""
    return record.kind != "conversation" or record.messages[-1]["role"] == "assistant"


class _Encoder:
    """Pieces of text to token ids: one BOS, one end, joints that a prompt alone would have."""

    def __init__(self, template: Template, max_length: int, too_long: str) -> None:
        if too_long not in TOO_LONG:
            raise UserError(f"too_long {too_long}: use one of {', '.join(TOO_LONG)}")
        if max_length < 2:
            raise UserError(f"max_length {max_length}: must be at least 2")
        self.template, self.max_length, self.too_long = template, max_length, too_long
        self.tokenizer = tokenizer = template.tokenizer
        eos_ids = getattr(tokenizer, "eos_token_ids", None) or []
        self.eos_ids = {*eos_ids, tokenizer.eos_token_id} - {None}
        if not self.eos_ids:
            raise UserError("the tokenizer has no EOS token, so no answer could ever end; name one")
        self.eos_id = tokenizer.eos_token_id
        if self.eos_id is None:
            self.eos_id = min(self.eos_ids)
        self.special_ids = self.eos_ids | set(tokenizer.all_special_ids)
        self.bos_id = tokenizer.bos_token_id
        written = tokenizer.encode("a")[:1]
        self.adds_bos = self.bos_id is not None and list(written) == [self.bos_id]

    def encode(self, pieces: list[Piece], ends: bool) -> tuple[list[int], list[int]]:
        """Tokens and answer mask; with `ends` the last piece ends with an end-of-turn token."""
        parts = self._parts([text for text, _ in pieces])
        tokens: list[int] = []
        mask: list[int] = []
        for i, (part, (_, answer)) in enumerate(zip(parts, pieces, strict=True)):
            last = i == len(parts) - 1
            end = self._turn_end(part)
            if last and ends:
                part = part[:end] if end else [*part, self.eos_id]
                end = len(part)
            trained = (end or len(part)) if answer else 0
            tokens += part
            mask += [1] * trained + [0] * (len(part) - trained)
        start = self.bos_length(tokens)
        if start != 1 and (start or self.adds_bos):
            tokens, mask = [self.bos_id, *tokens[start:]], [0, *mask[start:]]
        return tokens, mask

    def fit(self, tokens: list[int]) -> tuple[list[int], bool]:
        """At most max_length tokens from the left."""
        if len(tokens) <= self.max_length:
            return tokens, False
        self._refuse_long(tokens)
        return tokens[: self.max_length], True

    def fit_left(self, tokens: list[int]) -> tuple[list[int], bool]:
        """At most max_length tokens from the right, the BOS kept."""
        if len(tokens) <= self.max_length:
            return tokens, False
        self._refuse_long(tokens)
        bos = tokens[: self.bos_length(tokens)]
        return bos + tokens[len(tokens) - self.max_length + len(bos) :], True

    def bos_length(self, tokens: list[int]) -> int:
        """How many BOS stand at the beginning."""
        count = 0
        while self.bos_id is not None and tokens[count : count + 1] == [self.bos_id]:
            count += 1
        return count

    def _refuse_long(self, tokens: list[int]) -> None:
        if self.too_long == "refuse":
            raise Refused(f"longer than {self.max_length} tokens")

    def _parts(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text, so that a prompt has the tokens it has when it stands alone."""
        parts = [self._ids(text) for text in texts]
        if len(texts) == 1 or self._ids("".join(texts)) == sum(parts, []):
            return parts
        parts, done, text = [], [], ""
        for piece in texts:
            text += piece
            whole = self._ids(text)
            joined = whole[: len(done)] == done
            parts.append(whole[len(done) :] if joined else self._ids(piece))
            done = done + parts[-1]
        return parts

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _turn_end(self, part: list[int]) -> int:
        """Where the end-of-turn token that ends a piece stands, plus one; 0 if there is none."""
        end = len(part)
        while end and part[end - 1] not in self.special_ids:
            if self.tokenizer.decode(part[end - 1 : end]).strip():
                return 0
            end -= 1
        return end
