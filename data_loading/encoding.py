"""Rendered rows to token ids: those of the whole text, with one BOS and one end."""

import numpy as np

from data_loading.answer_spans import Note, Rendered, Span
from data_loading.messages import BadRow
from data_loading.templates import Template
from data_loading.values import shorten
from errors import UserError

TOO_LONG = ("cut", "refuse")
JOINT = (
    "a token of the row spans the end of the prompt and the beginning of the answer, so that the "
    "prompt alone has other tokens"
)


class Refused(Exception):
    """A good row that cannot be used with these settings; counted in `Tokenised.refused`."""


class Encoder:
    """Texts to token ids with masks. Which token is whose is found by offsets, never by cutting."""

    def __init__(self, template: Template, max_length: int, too_long: str) -> None:
        if too_long not in TOO_LONG:
            raise UserError(f"too_long {too_long}: use one of {', '.join(TOO_LONG)}")
        if max_length < 2:
            raise UserError(f"max_length {max_length}: must be at least 2")
        self.template, self.max_length, self.too_long = template, max_length, too_long
        self.tokenizer = tokenizer = template.tokenizer
        # mlx-lm's wrapper has a set; Hugging Face's own makes one number or None of the name.
        several = getattr(tokenizer, "eos_token_ids", None)
        several = several if isinstance(several, (set, list, tuple)) else ()
        self.eos_ids = {*several, tokenizer.eos_token_id} - {None}
        if not self.eos_ids:
            raise UserError("the tokenizer has no EOS token, so no answer could ever end; name one")
        self.eos_id = tokenizer.eos_token_id
        if self.eos_id is None:
            self.eos_id = min(self.eos_ids)
        # A chat template may end turns with another special token than EOS (<|eot_id|>).
        added = tokenizer.added_tokens_decoder.items()
        special = set(tokenizer.all_special_ids) | {i for i, token in added if token.special}
        others = {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id}
        self.bos_id = tokenizer.bos_token_id
        opening = self._opening()
        self.adds_bos = self.bos_id is not None and opening[-1:] == [self.bos_id]
        # A soft prompt that was fused into the vocabulary stands in front of BOS.
        self.prefix = opening[: len(opening) - self.adds_bos]
        self.turn_end_ids = (special - others - set(self.prefix)) | self.eos_ids

    def encode(
        self,
        rendered: Rendered,
        ends: bool,
        kind: str,
        *,
        whole: bool = False,
        bare_end: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Tokens, and a mask that is 1 on answers: on each token with a character of one.

        Args:
            ends: EOS follows where the text does not end in one, part of the answer.
            whole: the mask is 1 on everything but turns that are not to be trained.
            bare_end: blanks behind the end of the last turn are left out.

        Raises:
            Refused: there are no tokens.
        """
        tokens, offsets = self._tokens(rendered.text)
        skipped = within(offsets, rendered.untrained)
        wanted = np.ones_like(skipped) if whole else within(offsets, rendered.answers)
        mask = (wanted & ~skipped).astype(int).tolist()
        rendered.notes += self._joints(rendered, offsets)
        if ends:
            chat = self.template.uses_chat_template and kind != "text"
            last = self._unblanked(tokens)
            if (
                bare_end
                and last
                and tokens[last - 1] in (self.turn_end_ids if chat else self.eos_ids)
            ):
                tokens, mask = tokens[:last], mask[:last]
            if not last or tokens[last - 1] not in self.eos_ids:
                final = (len(rendered.text) - 1, len(rendered.text))
                open_end = any(span[1] >= final[1] for span in rendered.untrained)
                answered = whole or any(span[1] >= final[1] for span in rendered.answers)
                tokens, mask = [*tokens, self.eos_id], [*mask, int(answered and not open_end)]
        start = self.bos_length(tokens)
        has_bos = self.adds_bos or self.bos_id in tokens[:start]
        head = [*self.prefix, self.bos_id] if has_bos else self.prefix
        tokens, mask = [*head, *tokens[start:]], [0] * len(head) + mask[start:]
        if len(tokens) == len(self.prefix):
            raise Refused("the tokenizer makes no tokens of it")
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
        """How many tokens stand before the text: those of a fused soft prompt, and BOS."""
        count = len(self.prefix) if tokens[: len(self.prefix)] == self.prefix else 0
        while self.bos_id is not None and tokens[count : count + 1] == [self.bos_id]:
            count += 1
        return count

    def _refuse_long(self, tokens: list[int]) -> None:
        if self.too_long == "refuse":
            raise Refused(f"longer than {self.max_length} tokens")

    def _opening(self) -> list[int]:
        """What the tokenizer writes before a text."""
        written, bare = list(self.tokenizer.encode("a")), self._ids("a")
        for start in range(len(written) - len(bare) + 1):
            if written[start : start + len(bare)] == bare:
                return written[:start]
        return []

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _tokens(self, text: str) -> tuple[list[int], np.ndarray]:
        """The tokens of a text, and for each the characters it stands for, (T, 2)."""
        # mlx-lm's wrapper cannot be called; what it wraps can.
        call = self.tokenizer if callable(self.tokenizer) else self.tokenizer._tokenizer
        if getattr(call, "is_fast", False):
            made = call(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, offsets = made["input_ids"], made["offset_mapping"]
        else:
            ids = self._ids(text)
            offsets = self._offsets_by_decoding(ids, text)
        return list(ids), np.array(offsets, dtype=np.int64).reshape(-1, 2)

    def _joints(self, rendered: Rendered, offsets: np.ndarray) -> list[Note]:
        """Notes on tokens that hold the end of a prompt and the beginning of its answer."""
        notes = []
        for at, _ in rendered.answers:
            over = (offsets[:, 0] < at) & (at < offsets[:, 1])
            for start, end in offsets[over].tolist():
                notes.append((JOINT, shorten(rendered.text[start:end])))
        return notes

    def _offsets_by_decoding(self, ids: list[int], text: str) -> list[Span]:
        """For tokenizers in Python: where each token's characters stand in the decoded text."""
        if self._decoded(ids) != text:
            raise BadRow(
                "the tokenizer does not say which characters a token stands for, and its tokens "
                "do not give the text back; use one with a tokenizer.json"
            )
        ends = [len(self._decoded(ids[:count])) for count in range(len(ids) + 1)]
        return list(zip(ends[:-1], ends[1:], strict=True))

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _unblanked(self, tokens: list[int]) -> int:
        """How many tokens there are up to the last that is not blank."""
        end = len(tokens)
        while end and not self.tokenizer.decode(tokens[end - 1 : end]).strip():
            end -= 1
        return end


def within(offsets: np.ndarray, spans: list[Span]) -> np.ndarray:
    """Which tokens (T,) have a character in one of the spans; `offsets` (T, 2), from and up to."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    found = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        found |= (starts < end) & (ends > start)
        # Tokens of blanks alone may have no width, behind the blanks they stand for.
        found |= (starts == ends) & (start < starts) & (starts <= end)
    return found
