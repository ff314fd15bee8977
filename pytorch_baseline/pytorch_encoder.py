"""Encoders (BERT, DeBERTa, ...) trained as reward models on pairs: every weight, with a new head.

What is written is transformers' own *ForSequenceClassification, which models/encoder_reward.py
reads: a prompt and a response as a pair of texts, `tokenizer(prompt, response)`.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pytorch_files import asking_the_disk
from pytorch_models import DTYPES, loaded_from, pick_device, read_config
from torch import Tensor, nn

from command_line.data_flags import cut_test_rows
from command_line.rules import flag_of
from command_line.sft_flags import LEARNING_RATES
from command_line.shared_flags import LORA_ONLY
from data_utils import PreferenceRow, Record, Tokenised, data_report, load_data
from errors import UserError
from models.encoder_families import ENCODERS, SHIFTED_POSITIONS
from rewards.texts import plain
from safe_files import put_folder_in_place, sweep, sync_tree, temporary_name
from waiting import watched

REFUSED = (*LORA_ONLY, "pooling", "normalize_samples", "prompt_template", "token_format")


def is_encoder(args) -> bool:
    """Whether --model is one, as a base or a classifier."""
    return args.model is not None and read_config(args.model)["model_type"] in ENCODERS


def settle(args) -> None:
    """Fill in what follows from an encoder; UserError for what one cannot do."""
    if not args.reward_model:
        raise UserError(f"{args.model}: an encoder writes no text; give --reward-model")
    if args.resume_adapter_file or args.prompt_tuning or args.fine_tune_type == "dora":
        raise UserError(f"{args.model}: of an encoder every weight is trained; it has no adapter")
    if wrong := [name for name in REFUSED if name in args.changed]:
        raise UserError(f"{flag_of(wrong[0])} has no effect on an encoder")
    if args.save_file is not None and Path(args.save_file).suffix in (".npz", ".safetensors"):
        raise UserError(f"--save-file {args.save_file}: an encoder is written as a folder")
    args.fine_tune_type = "full"
    if "learning_rate" not in args.explicit:
        args.learning_rate = LEARNING_RATES["full"]


@dataclass
class LoadedEncoder:
    """What the script reads of a loaded model."""

    model: "Encoder"
    tokenizer: object
    device: torch.device
    fingerprint: None = None  # no adapter will ask for it


class Encoder(nn.Module):
    """tokens (B, L) and lengths (B,) -> scores (B,), where a RewardModel is trained."""

    kind, gain, offset = "full", 1.0, 0.0

    def __init__(self, base: nn.Module, tokenizer):
        super().__init__()
        self.base, self._encode = base, tokenizer
        self.two_parts = getattr(base.config, "type_vocab_size", 0) > 1

    @property
    def model(self) -> "Encoder":
        """As of a RewardModel: the part that is trained."""
        return self

    @property
    def max_tokens(self) -> int:
        config = self.base.config
        longest = getattr(config, "max_position_embeddings", None) or sys.maxsize
        if config.model_type in SHIFTED_POSITIONS:
            longest -= (config.pad_token_id or 0) + 1
        return min(longest, self._encode.model_max_length)

    def arrays(self) -> dict[str, Tensor]:
        return dict(self.base.named_parameters())

    def checkpoint_blocks(self) -> None:
        self.base.gradient_checkpointing_enable()

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Right-padded tokens (B, L), lengths (B,) -> scores (B,)."""
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        tokens = torch.where(mask, tokens, self._encode.pad_token_id)
        fed = {"input_ids": tokens, "attention_mask": mask.long()}
        if self.two_parts:  # what stands behind the first separator is the response
            ends = (tokens == self._encode.sep_token_id).long()
            behind = (ends.cumsum(dim=1) - ends).clamp(max=1)
            fed["token_type_ids"] = behind * mask
        return self.base(**fed).logits[:, 0].float()

    @torch.no_grad()
    def score(
        self,
        sequences: Sequence[Sequence[int]],
        batch_size: int = 64,
        watched_as: str | None = None,
    ) -> list[float]:
        """Scores of whole pairs (token ids), in their order; dropout off."""
        was_training = self.training
        self.eval()
        found: list[float] = []
        starts = range(0, len(sequences), batch_size)
        for start in starts if watched_as is None else watched(starts, watched_as):
            part = sequences[start : start + batch_size]
            lengths = torch.tensor([len(row) for row in part], device=self.base.device)
            tokens = torch.zeros(len(part), int(lengths.max()), dtype=torch.long)
            for place, row in enumerate(part):
                tokens[place, : len(row)] = torch.tensor(row)
            found += self(tokens.to(self.base.device), lengths).tolist()
        self.train(was_training)
        return found

    def pair(self, prompt: str, response: str, longest: int) -> tuple[list[int], bool]:
        """(token ids, whether they were cut at `longest`)."""
        texts = (prompt, response) if prompt.strip() else (response,)
        whole = self._encode(*texts)["input_ids"]
        if len(whole) <= longest:
            return whole, False
        return self._encode(*texts, truncation=True, max_length=longest)["input_ids"], True


def load_encoder(args) -> LoadedEncoder:
    """The encoder with a head for one number, new where it has none, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    device = pick_device(args.device)
    options = {"trust_remote_code": args.trust_remote_code}
    tokenizer = loaded_from(args.tokenizer or args.model, AutoTokenizer, **options)
    dtype = "float32" if args.dtype == "auto" else args.dtype
    base, info = loaded_from(
        args.model,
        AutoModelForSequenceClassification,
        dtype=DTYPES[dtype],
        num_labels=1,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    if new := sorted(info["missing_keys"]):
        print(f"note: {args.model} has no {', '.join(new)}: these begin at random")
    if tokenizer.padding_side != "right" or tokenizer.pad_token_id is None:
        raise UserError(f"{args.model}: its tokenizer does not pad on the right")
    base.config.pad_token_id = tokenizer.pad_token_id
    return LoadedEncoder(Encoder(base.to(device), tokenizer), tokenizer, device)


# ---- rows --------------------------------------------------------------------------------------


def load_rows(args, sources: dict, model: Encoder) -> dict[str, Tokenised]:
    """Pairs of texts as tokens by split: train and valid when training, test when testing."""
    splits = (["train", "valid"] if args.train or args.preview else []) + ["test"] * args.test
    longest = min(args.max_length, model.max_tokens)
    rows = {}
    for split, records in load_data(splits=splits, **sources).items():
        rows[split] = tokenised(records, model, longest)
        print(data_report(split, records, rows[split]))
    if args.test:
        cut_test_rows(args, rows["test"])
    return rows


def tokenised(records: Iterable[Record], model: Encoder, longest: int) -> Tokenised:
    done: Tokenised[PreferenceRow] = Tokenised()
    for record in records:
        if record.kind != "preference":
            raise UserError(f"{record.where}: an encoder is trained on pairs, chosen and rejected")
        prompt = plain(record.prompt)
        sides = [model.pair(prompt, plain(text), longest) for text in record.responses]
        done.cut += any(cut for _, cut in sides)
        responses = [tokens for tokens, _ in sides]
        done.rows.append(PreferenceRow(responses, record.ranks, record.margin, record.where))
    return done


# ---- writing -----------------------------------------------------------------------------------


def save_encoder(path: Path, loaded: LoadedEncoder) -> list[Path]:
    """Write a transformers folder, whole or not at all."""
    path = path.resolve()
    sweep(path)
    aside = temporary_name(path)
    with asking_the_disk(path.parent):
        loaded.model.base.save_pretrained(aside)
    loaded.tokenizer.save_pretrained(aside)
    sync_tree(aside)
    put_folder_in_place(aside, path)
    return [path]
