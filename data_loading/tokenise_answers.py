"""Answers that people prefer or not, as token ids that know where the prompt ends.

Prompt and answer are tokenised together and cut where they part, as TRL's preference trainers do;
EOS ends an answer. A row that is too long loses its end; one whose prompt leaves no answer is
dropped and counted.
"""

from collections.abc import Iterable
from dataclasses import replace
from os.path import commonprefix
from typing import Any

from data_loading.encoding import Encoder, Refused
from data_loading.fields import REWARDS, given, label_of
from data_loading.messages import BadRow, is_trained
from data_loading.records import Record, Text
from data_loading.rows import PreferenceRow, Tokenised, UnpairedRow
from data_loading.templates import Template
from data_loading.tokenise import UNTRAINED, each, preference_row


def tokenise_pairs(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    too_long: str = "cut",
    prompt_template: str | None = None,
    token_format: str = "standard",
    skip_bad_rows: bool = False,
) -> Tokenised[PreferenceRow]:
    """Preference rows, ranked lists too, as the tokens of every response after the same prompt.

    Of a row without a prompt, the words that all responses begin with are the prompt (TRL's
    `extract_prompt`).

    Raises:
        UserError: rows of another kind, rows without a prompt, equal sides, no row left.
    """
    encoder = Encoder(Template(tokenizer, prompt_template, token_format), max_length, too_long)

    def convert(record: Record) -> tuple[PreferenceRow, bool]:
        if record.kind != "preference":
            raise BadRow(f"a row of kind {record.kind} where chosen and rejected are needed")
        refuse_equal(record)
        if prompt_template is None:
            record = with_prompt(record)
        responses, masks, was_cut = answers(encoder, record)
        return preference_row(record, responses, masks, was_cut), was_cut

    return each(records, convert, skip_bad_rows, encoder.template)


def tokenise_unpaired(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    desirable_from: float | None = None,
    max_length: int = 1024,
    too_long: str = "cut",
    prompt_template: str | None = None,
    token_format: str = "standard",
    skip_bad_rows: bool = False,
) -> Tokenised[UnpairedRow]:
    """Rows with a label as single answers, each wanted or not.

    A preference row becomes two or more: its best responses are wanted, all others are not. Of a
    conversation what follows the last user or tool turn is the answer. A row with a reward is
    wanted from `desirable_from` on.

    Raises:
        UserError: rows without a label (or a reward and `desirable_from`), no row left.
    """
    encoder = Encoder(Template(tokenizer, prompt_template, token_format), max_length, too_long)

    def convert(record: Record) -> tuple[UnpairedRow, bool]:
        if record.kind == "preference":
            with_prompt(record)  # says why it could not be split
        if record.kind in ("text", "prompt"):
            raise BadRow(f"a row of kind {record.kind}, which has no prompt and answer")
        label = wanted(record, desirable_from)
        if record.kind == "conversation":
            record = last_answer(record)
        (tokens, mask), was_cut = answer_tokens(encoder, record, record.completion)
        return UnpairedRow(tokens, mask, label, record.where, max_length), was_cut

    singles = [single for record in records for single in split_ranks(record)]
    used = ("label",) if desirable_from is None else ("label", *REWARDS)
    return each(singles, convert, skip_bad_rows, encoder.template, used)


def wanted(record: Record, desirable_from: float | None) -> bool:
    """Whether the answer of a row is a good one. BadRow where nothing says so."""
    if record.label is not None:
        return record.label
    if given(record.fields, "label"):
        label_of(record.fields["label"])  # says what is wrong with it
    if record.reward is None:
        raise BadRow(f"a row of kind {record.kind} without a label: true or false is needed")
    if desirable_from is None:
        raise BadRow(
            "the row has a reward and no label: --desirable-from says which reward is good"
        )
    return record.reward >= desirable_from


def last_answer(record: Record) -> Record:
    """A conversation as a prompt and the turns that answer it."""
    turns = record.messages
    asks = max((i for i, turn in enumerate(turns) if turn["role"] in ("user", "tool")), default=-1)
    if asks < 0 or asks == len(turns) - 1:
        raise BadRow("the conversation does not end with an answer to a user turn")
    prompt, answer = turns[: asks + 1], turns[asks + 1 :]
    return replace(record, kind="prompt_completion", prompt=prompt, completion=answer)


def split_ranks(record: Record) -> list[Record]:
    """A preference record as labelled ones; any other as it is, and one without a prompt, too."""
    try:
        record = with_prompt(record) if record.kind == "preference" else record
    except BadRow:
        return [record]
    if record.kind != "preference":
        return [record]
    return [
        replace(record, kind="unpaired", completion=response, label=rank == 0)
        for response, rank in zip(record.responses, record.ranks, strict=True)
    ]


def with_prompt(record: Record) -> Record:
    """A preference record whose prompt is known. BadRow where responses begin differently."""
    if record.prompt or not all(isinstance(response, str) for response in record.responses):
        return record
    shared = commonprefix(record.responses)
    # Whole words, where TRL cuts at a letter; the space before a word belongs to the answer.
    start = max(shared.rfind(space) for space in " \n\t")
    start += shared[start : start + 1] in ("\n", "\t")
    start = max(start, 0)
    prompt, rests = record.responses[0][:start], [text[start:] for text in record.responses]
    if not prompt.strip() or not all(rest.strip() for rest in rests):
        raise BadRow(
            "the row has no prompt, and its responses do not begin with one and go on "
            "differently; give it a field prompt"
        )
    return replace(record, prompt=prompt, responses=rests)


def refuse_equal(record: Record) -> None:
    """BadRow where a response is the same text as a better one."""
    best = record.responses[0]
    for response, rank in zip(record.responses, record.ranks, strict=True):
        if rank > 0 and response == best:
            raise BadRow(
                "chosen and rejected are the same, so nothing is preferred; "
                "--skip-bad-rows leaves such rows out"
            )


def answers(encoder: Encoder, record: Record) -> tuple[list[list[int]], list[list[int]], bool]:
    """(tokens, masks, whether one was cut) of all responses of a record.

    All begin where the first of them does: a token that spans the end of the prompt and the start
    of one response is no token of the prompt for the others either. One that begins with a turn
    that the row says not to train begins later.
    """
    done = [answer_tokens(encoder, record, response) for response in record.responses]
    responses, masks = map(list, zip(*(made for made, _ in done), strict=True))
    first = min(mask.index(1) for mask in masks)
    for response, mask in zip(record.responses, masks, strict=True):
        if isinstance(response, str) or is_trained(response[0]):
            mask[first : mask.index(1)] = [1] * (mask.index(1) - first)
    return responses, masks, any(was_cut for _, was_cut in done)


def answer_tokens(
    encoder: Encoder, record: Record, answer: Text
) -> tuple[tuple[list[int], list[int]], bool]:
    """((tokens, mask), whether they were cut) of a prompt and an answer, which ends with EOS."""
    template = encoder.template
    rendered = template.answered(record, answer)
    tokens, mask = encoder.encode(rendered, True, record.kind)
    template.note(record, rendered)
    tokens, was_cut = encoder.fit(tokens)
    mask = [0, *mask[1 : len(tokens)]]
    if not any(mask) and not was_cut:
        raise Refused(UNTRAINED)
    if not any(mask):
        raise Refused(f"the prompt fills the {encoder.max_length} tokens of --max-length")
    return (tokens, mask), was_cut
