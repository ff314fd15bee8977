"""Token ids with loss masks for SFT, reward models and PPO prompts.

A mask is 1 on the tokens that are targets of the loss: mask[t] belongs to the prediction of
tokens[t] from the tokens before it, so mask[0] is always 0. A trainer that shifts uses
tokens[:, :-1] to predict tokens[:, 1:], weighted with mask[:, 1:].
"""

import re
import sys
from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from typing import Any

from data_loading.answer_spans import Rendered
from data_loading.encoding import Encoder, Refused
from data_loading.fields import REWARDS, given
from data_loading.messages import BadRow, is_trained
from data_loading.records import Record, Text
from data_loading.rows import PreferenceRow, PromptRow, Row, ScalarRow, TextRow, Tokenised
from data_loading.templates import Template
from errors import UserError
from waiting import watched

NO_PROMPT = (
    "the row has no prompt: one of the fields prompt, question, instruction, query, input, "
    "messages is needed"
)
UNTRAINED = "no turn of an answer is to be trained"


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
    chosen: bool = False,
) -> Tokenised[TextRow]:
    """Rows of text, prompt-completion and conversation kind as tokens with a loss mask.

    The tokens are those of the whole rendered text, its last blanks included.

    One BOS where the tokenizer writes one; EOS at the end, trained. With `mask_prompt` only
    answers are targets: completions, and in conversations every assistant turn without its
    header; a turn that the row says not to train never is. A row cut to `max_length` loses its
    end, EOS included. With `chosen` preference rows count as their prompt and best response.

    Raises:
        UserError: rows that are not for SFT (preference, unpaired, prompts alone), `mask_prompt`
            on plain text alone, a template that does not fit, no row left.
    """
    records = list(records)
    if mask_prompt and records and all(record.kind == "text" for record in records):
        raise UserError(f"{records[0].where}: --mask-prompt on plain text, which has no prompt")
    encoder = Encoder(Template(tokenizer, prompt_template, token_format), max_length, too_long)

    def convert(record: Record) -> tuple[TextRow, bool]:
        if chosen and record.kind == "preference":
            record = best_answer(record)
        if problem := not_for_sft(record.kind):
            raise BadRow(problem)
        rendered = encoder.template.record(record)
        if said := record.prefix.strip():
            start = rendered.text.find(said)
            if start < 0:
                raise BadRow("the chat template changes the score before the prompt")
            rendered.untrained.append((start, start + len(said)))
        ends = _ends_with_answer(record)
        tokens, mask = encoder.encode(rendered, ends, record.kind, whole=not mask_prompt)
        start = max(1, encoder.bos_length(tokens))
        mask[:start] = [0] * start
        if len(tokens) < 2:
            raise Refused("fewer than two tokens; there is nothing to predict")
        tokens, was_cut = encoder.fit(tokens)
        mask = mask[: len(tokens)]
        if not any(mask):
            raise Refused("no trained token is left" if was_cut else "no assistant turn to train")
        encoder.template.note(record, rendered)
        return TextRow(tokens, mask, record.where, record.reward), was_cut

    return each(records, convert, skip_bad_rows, encoder.template)


def tokenise_scalar(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    max_length: int = 2048,
    too_long: str = "refuse",
    prompt_template: str | None = None,
    token_format: str = "standard",
    add_eos: bool | None = None,
    skip_bad_rows: bool = False,
    marks: bool = False,
) -> Tokenised[ScalarRow]:
    """Rows with `reward` or `meta_eval_score` as tokens and a number.

    Unpaired rows count as 1 (label true) and 0. A row without a reward is a UserError. With
    `add_eos` EOS ends every text; by default, as in TRL's RewardTrainer, those that no chat
    template wrote. With `marks` a row whose answer is marked not to train is refused.
    """
    encoder = Encoder(Template(tokenizer, prompt_template, token_format), max_length, too_long)

    def convert(record: Record) -> tuple[ScalarRow, bool]:
        if record.kind in ("preference", "prompt"):
            raise BadRow(f"a row of kind {record.kind} has no text with a reward")
        reward = record.reward
        if reward is None and record.label is not None:
            reward = float(record.label)
        if reward is None:
            raise BadRow("no reward: the field reward or meta_eval_score is needed")
        if marks:
            refuse_untrained(record)
        tokens, rendered = answered_tokens(encoder, record, add_eos)
        tokens, was_cut = encoder.fit(tokens)
        encoder.template.note(record, rendered)
        return ScalarRow(tokens, reward, record.where), was_cut

    used = (*REWARDS, "label")
    return each(records, convert, skip_bad_rows, encoder.template, used)


def answered_tokens(
    encoder: Encoder, record: Record, add_eos: bool | None = None
) -> tuple[list[int], Rendered]:
    """Tokens of a row with its answer as a reward model's row has them, and the text of them."""
    ends = _ends_in_eos(encoder.template, record, add_eos) and _ends_with_answer(record)
    rendered = encoder.template.record(record)
    return encoder.encode(rendered, ends, record.kind, bare_end=True)[0], rendered


def answer_encoder(
    tokenizer: Any,
    *,
    prompt_template: str | None = None,
    token_format: str = "standard",
    add_eos: bool | None = None,
) -> Callable[[Record], list[int]]:
    """A function from a row to the tokens that `tokenise_scalar` makes of it, of any length.

    It raises UserError where `tokenise_scalar` would refuse the row.
    """
    encoder = Encoder(Template(tokenizer, prompt_template, token_format), sys.maxsize, "refuse")

    def encode(record: Record) -> list[int]:
        try:
            return answered_tokens(encoder, record, add_eos)[0]
        except (BadRow, Refused) as why:
            raise UserError(f"{record.where}: {why}") from why

    return encode


def tokenise_preferences(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    max_length: int = 2048,
    too_long: str = "refuse",
    prompt_template: str | None = None,
    token_format: str = "standard",
    add_eos: bool | None = None,
    skip_bad_rows: bool = False,
) -> Tokenised[PreferenceRow]:
    """Preference rows as the tokens of every response, each after the same prompt.

    Rows whose responses are the same (after a cut, too) are refused: they prefer nothing; and rows
    with an answer that is marked not to train. `add_eos` as in `tokenise_scalar`.
    """
    encoder = Encoder(Template(tokenizer, prompt_template, token_format), max_length, too_long)

    def convert(record: Record) -> tuple[PreferenceRow, bool]:
        if record.kind != "preference":
            raise BadRow(f"a row of kind {record.kind} where chosen and rejected are needed")
        if not record.prompt and prompt_template is None:
            raise BadRow(NO_PROMPT)
        refuse_untrained(record)
        responses, masks, was_cut = [], [], False
        ends = _ends_in_eos(encoder.template, record, add_eos)
        for answer in record.responses:
            rendered = encoder.template.answered(record, answer)
            tokens, mask = encoder.encode(rendered, ends, record.kind, bare_end=True)
            encoder.template.note(record, rendered)
            tokens, one_cut = encoder.fit(tokens)
            responses.append(tokens)
            masks.append([0, *mask[1 : len(tokens)]])
            was_cut |= one_cut
        return preference_row(record, responses, masks, was_cut), was_cut

    return each(records, convert, skip_bad_rows, encoder.template)


def refuse_untrained(record: Record) -> None:
    """Refused where all turns of an answer are marked not to train."""
    answers = [record.completion, *record.responses]
    if record.kind == "conversation":
        answers.append(record.messages[-1:])
    for answer in answers:
        turns = answer if isinstance(answer, list) else []
        own = [turn for turn in turns if turn["role"] == "assistant"]
        if own and not any(map(is_trained, own)):
            raise Refused(UNTRAINED)


def preference_row(
    record: Record, responses: list[list[int]], masks: list[list[int]], was_cut: bool
) -> PreferenceRow:
    """A row of all responses. Refused where one has the tokens of a better one."""
    best, others = responses[0], zip(responses, record.ranks, strict=True)
    if any(tokens == best and rank > 0 for tokens, rank in others):
        raise Refused("chosen and rejected are the same" + " after the cut" * was_cut)
    return PreferenceRow(responses, record.ranks, record.margin, record.where, masks)


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
    encoder = Encoder(template, max_length, too_long)

    def convert(record: Record) -> tuple[PromptRow, bool]:
        if record.kind == "text":
            rendered = Rendered(first_words(record.text, prompt_words), [])
        else:
            rendered = template.prompt(record)
        if not (text := rendered.text):
            raise BadRow(NO_PROMPT)
        tokens, _ = encoder.encode(rendered, False, record.kind)
        tokens, was_cut = encoder.fit_left(tokens)
        if was_cut:
            text = tokenizer.decode(tokens[encoder.bos_length(tokens) :])
        template.note(record, rendered)
        written = record.asked() or text
        row = PromptRow(tokens, text, record.columns, record.where, written, record.reward)
        return row, was_cut

    return each(records, convert, skip_bad_rows, template)


def encode_prompt(
    prompt: Text,
    tokenizer: Any,
    *,
    prompt_template: str | None = None,
    token_format: str = "standard",
    extras: dict[str, Any] | None = None,
    behind: str = "",
) -> list[int]:
    """Tokens of one prompt, text or messages, exactly as in training: one BOS, template, header.

    `extras`: tools and documents, for a chat template. `behind`: a text that follows the header.
    """
    template = Template(tokenizer, prompt_template, token_format)
    asked = {"prompt": prompt} if isinstance(prompt, str) else {}
    try:
        record = Record("prompt", "the prompt", asked, prompt=prompt, extras=extras or {})
        made = template.prompt(record)
        made.text += behind
        return Encoder(template, sys.maxsize, "refuse").encode(made, False, "prompt")[0]
    except (BadRow, Refused) as why:
        raise UserError(f"the prompt: {why}") from why


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


def each(
    records: Iterable[Record],
    convert: Callable[[Record], tuple[Row, bool]],
    skip_bad_rows: bool,
    template: Template | None = None,
    used: Container[str] = (),
) -> Tokenised[Row]:
    """The rows that `convert` makes of records, with what it refused.

    `template` counts the fields that no row's text is made of, less those in `used`, and hands
    over what it noted of rows.
    """
    done: Tokenised[Row] = Tokenised()
    for record in watched(records, "tokenising"):
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
            if template is not None:
                known = template.fields(record)
                done.unused.update(
                    name
                    for name in record.fields
                    if name not in known and name not in used and given(record.fields, name)
                )
    done.notes = template.notes if template is not None else []
    if not done.rows:
        if not done.refused:
            raise UserError("there are no rows to tokenise")
        where, why = done.refused[0]
        raise UserError(
            f"{where}: no row is left; of {len(done.refused)} refused, the first: {why}"
        )
    return done


def not_for_sft(kind: str, chosen: bool = False) -> str | None:
    """Why rows of a kind cannot be trained on as they are; None where they can."""
    if kind not in ("preference", "unpaired", "prompt") or (chosen and kind == "preference"):
        return None
    hint = ""
    if kind == "preference":
        hint = "; --chosen trains their best answers, --reward-model a reward model"
    return (
        f"a row of kind {kind} is not for supervised fine-tuning, which needs text, "
        f"prompt and completion, or messages{hint}"
    )


def best_answer(record: Record) -> Record:
    """A preference row as a prompt and its best response."""
    if not record.prompt:
        raise BadRow(NO_PROMPT)
    return replace(record, kind="prompt_completion", completion=record.responses[0])


def _ends_with_answer(record: Record) -> bool:
    """Whether the row ends where the model should stop."""
    return record.kind != "conversation" or record.messages[-1]["role"] == "assistant"


def _ends_in_eos(template: Template, record: Record, add_eos: bool | None) -> bool:
    """Whether EOS is put behind the text of a reward model's row."""
    return not template.writes(record) if add_eos is None else add_eos
