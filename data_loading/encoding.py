"""Pieces of text to token ids: one BOS, one end, and the joint between prompt and answer."""

from os.path import commonprefix

from data_loading.templates import Piece, Template
from errors import UserError

TOO_LONG = ("cut", "refuse")


class Refused(Exception):
    """A good row that cannot be used with these settings; counted in `Tokenised.refused`."""


class Encoder:
    """Pieces of text to token ids: one BOS, one end, joints that a prompt alone would have."""

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
        self, pieces: list[Piece], ends: bool, kind: str, joined: bool = False
    ) -> tuple[list[int], list[int]]:
        """Tokens and answer mask; with `ends` the last piece ends with EOS, part of the answer.

        `joined`: the tokens are those of the whole text, as TRL's preference trainers have them; an
        answer begins where these part from the tokens of what stands before it.
        """
        chat = self.template.uses_chat_template and kind != "text"
        end_ids = self.turn_end_ids if chat else self.eos_ids
        texts = [text for text, _ in pieces]
        parts = self._joined_parts(texts) if joined else self._parts(texts)
        tokens: list[int] = []
        mask: list[int] = []
        for i, (part, (_, answer)) in enumerate(zip(parts, pieces, strict=True)):
            last = i == len(parts) - 1
            end = self._turn_end(part, end_ids)
            if last and ends:
                part = part[:end] if end else part
                if not part or part[-1] not in self.eos_ids:
                    part = [*part, self.eos_id]
                end = len(part)
            trained = (end or len(part)) if answer else 0
            tokens += part
            mask += [1] * trained + [0] * (len(part) - trained)
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

    def _joined_parts(self, texts: list[str]) -> list[list[int]]:
        """Tokens of the whole text, cut where they part from the tokens of each beginning."""
        whole, at, parts = self._ids("".join(texts)), 0, []
        for count in range(1, len(texts)):
            before = self._ids("".join(texts[:count]))
            upto = max(at, len(commonprefix([before, whole])))
            parts.append(whole[at:upto])
            at = upto
        return [*parts, whole[at:]]

    def _opening(self) -> list[int]:
        """What the tokenizer writes before a text."""
        written, bare = list(self.tokenizer.encode("a")), self._ids("a")
        for start in range(len(written) - len(bare) + 1):
            if written[start : start + len(bare)] == bare:
                return written[:start]
        return []

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _turn_end(self, part: list[int], end_ids: set[int]) -> int:
        """Where the end-of-turn token that ends a piece stands, plus one; 0 if there is none."""
        end = len(part)
        while end and part[end - 1] not in end_ids:
            if self.tokenizer.decode(part[end - 1 : end]).strip():
                return 0
            end -= 1
        return end
