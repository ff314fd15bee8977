"""Encoders (BERT, DeBERTa, ...) trained as reward models on pairs: every weight, with a new head.

What is written is transformers' own *ForSequenceClassification, which models/encoder_reward.py
reads: a prompt and a response as a pair of texts, `tokenizer(prompt, response)`.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from pytorch_files import weights_folder
from pytorch_models import DTYPES, LoadedModel, Tuned, checked_config, loaded_from, pick_device
from pytorch_reward_model import NOTHING_TRAINED, RewardModel
from torch import Tensor, nn

from command_line.data_flags import cut_test_rows
from command_line.rules import flag_of
from command_line.sft_flags import LEARNING_RATES
from command_line.shared_flags import LORA_ONLY
from data_utils import PreferenceRow, Record, Tokenised, data_report, load_data
from errors import UserError
from models.adapter_description import is_single_file
from models.encoder_families import ENCODERS, longest_pair, read_pair
from rewards.texts import plain

REFUSED = (*LORA_ONLY, "pooling", "normalize_samples", "prompt_template", "token_format")


def is_encoder(args) -> bool:
    """Whether --model is one, as a base or a classifier."""
    return args.model is not None and checked_config(args.model)["model_type"] in ENCODERS


def settle(args) -> None:
    """Fill in what follows from an encoder; UserError for what one cannot do."""
    if not args.reward_model:
        raise UserError(f"{args.model}: an encoder writes no text; give --reward-model")
    if args.resume_adapter_file or args.prompt_tuning or args.fine_tune_type == "dora":
        raise UserError(f"{args.model}: of an encoder every weight is trained; it has no adapter")
    if wrong := [name for name in REFUSED if name in args.changed]:
        raise UserError(f"{flag_of(wrong[0])} has no effect on an encoder")
    if args.save_file is not None and is_single_file(args.save_file):
        raise UserError(f"--save-file {args.save_file}: an encoder is written as a folder")
    args.fine_tune_type = "full"
    if "learning_rate" not in args.explicit:
        args.learning_rate = LEARNING_RATES["full"]


class Encoder(RewardModel):
    """tokens (B, L) and lengths (B,) -> scores (B,), with transformers' head and its pooling."""

    def __init__(self, loaded: LoadedModel):
        nn.Module.__init__(self)
        self.set_up_scores()
        self.model, self.tokenizer = Tuned(loaded.model, NOTHING_TRAINED), loaded.tokenizer
        self.two_parts = getattr(loaded.model.config, "type_vocab_size", 0) > 1

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Right-padded tokens (B, L), lengths (B,) -> scores (B,)."""
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        tokens = torch.where(mask, tokens, self.tokenizer.pad_token_id)
        fed = {"input_ids": tokens, "attention_mask": mask.long()}
        if self.two_parts:  # what stands behind the first separator is the response
            ends = (tokens == self.tokenizer.sep_token_id).long()
            behind = (ends.cumsum(dim=1) - ends).clamp(max=1)
            fed["token_type_ids"] = behind * mask
        return self.model.base(**fed).logits[:, 0].float()


def load_encoder(args) -> LoadedModel:
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
    return LoadedModel(base.to(device), tokenizer, {}, args.model, device)


# ---- rows --------------------------------------------------------------------------------------


def load_rows(args, sources: dict, loaded: LoadedModel) -> dict[str, Tokenised]:
    """Pairs of texts as tokens by split: train and valid when training, test when testing."""
    splits = (["train", "valid"] if args.train or args.preview else []) + ["test"] * args.test
    longest = min(args.max_length, longest_pair(loaded.model.config, loaded.tokenizer))
    rows = {}
    for split, records in load_data(splits=splits, **sources).items():
        rows[split] = tokenised(records, loaded.tokenizer, longest)
        print(data_report(split, records, rows[split]))
    if args.test:
        cut_test_rows(args, rows["test"])
    return rows


def tokenised(records: Iterable[Record], tokenizer, longest: int) -> Tokenised:
    done: Tokenised[PreferenceRow] = Tokenised()
    for record in records:
        if record.kind != "preference":
            raise UserError(f"{record.where}: an encoder is trained on pairs, chosen and rejected")
        prompt = plain(record.prompt)
        pairs = [read_pair(tokenizer, prompt, plain(text), longest) for text in record.responses]
        done.cut += any(length > longest for _, length in pairs)
        responses = [row["input_ids"] for row, _ in pairs]
        done.rows.append(PreferenceRow(responses, record.ranks, record.margin, record.where))
    return done


# ---- writing -----------------------------------------------------------------------------------


def save_encoder(path: Path, loaded: LoadedModel) -> list[Path]:
    """Write a transformers folder, whole or not at all."""
    with weights_folder(path, loaded.model) as aside:
        loaded.tokenizer.save_pretrained(aside)
    return [path.resolve()]
