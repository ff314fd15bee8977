"""Encoder classifiers (BERT, DeBERTa, ...) as reward models, run by transformers on PyTorch.

MLX has none of these architectures, and they share no weights or tokens with a policy. They read a
prompt and a response as a pair of texts, as public ones were trained (OpenAssistant's DeBERTa:
``tokenizer(question, answer)``). PyTorch is needed for them alone, so it is not in
requirements.txt.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path

from errors import UserError
from models.encoder_families import ENCODERS, ENDING, longest_pair, read_pair
from models.file_checks import check_folder, read_config

Pair = tuple[str, str]  # prompt and response


def is_encoder(folder: str | Path) -> bool:
    """Whether a model folder holds a sequence classifier on an encoder."""
    if not (Path(folder) / "config.json").is_file():
        return False
    config = read_config(Path(folder))
    names = config.get("architectures") or [""]
    return str(names[0]).endswith(ENDING) and config["model_type"] in ENCODERS


class EncoderReward:
    """Scores pairs of texts; stands where a `RewardModel` is used for scoring.

    Raises UserError where PyTorch is absent, for other than one label, and for weights that are
    missing.
    """

    reads_pairs = True

    def __init__(self, folder: str | Path, *, dtype: str = "auto", trust_remote_code: bool = False):
        self.folder = Path(folder)
        kind = read_config(self.folder)["model_type"]
        if dtype == "stored":  # what fuse.py asks for
            raise UserError(
                f"{folder}: an encoder ({kind}) gives rewards and nothing else; it is "
                "neither fused nor exported"
            )
        if importlib.util.find_spec("torch") is None:
            raise UserError(
                f"{folder}: an encoder ({kind}) is run by transformers on PyTorch, "
                "which is not installed: pip install torch"
            )
        check_folder(self.folder, str(folder), trust_remote_code)
        self.source = self.tokenizer = self  # as of a RewardModel
        self._warned = False
        self._load({"auto": "float32"}.get(dtype, dtype), trust_remote_code)

    def _load(self, dtype: str, trust_remote_code: bool) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        try:
            self._encode = AutoTokenizer.from_pretrained(self.folder, **options)
            self._model, info = AutoModelForSequenceClassification.from_pretrained(
                self.folder,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # transformers has dozens of kinds for a broken folder
            said = " ".join(str(error).split())[:300]
            raise UserError(f"{self.folder}: cannot be loaded: {said}") from error
        if missing := info["missing_keys"]:  # transformers would fill them with random numbers
            raise UserError(f"{self.folder}: lacks {len(missing)} arrays, such as {min(missing)}")
        self.check_labels(self._model.config.num_labels)
        on_mac = torch.backends.mps.is_available()
        device = "mps" if on_mac else "cuda" if torch.cuda.is_available() else "cpu"
        self._model.to(device).eval()

    def check_labels(self, labels: int) -> None:
        """Raise UserError unless the model gives what is asked of it."""
        if labels != 1:
            raise UserError(f"{self.folder}: has {labels} labels; a reward model has one")

    def scores_of(self, logits) -> list[float]:
        """Logits (B, labels) -> a number for each text."""
        return logits[:, 0].float().tolist()

    @property
    def max_tokens(self) -> int:
        """The longest pair it reads; longer ones lose the end of their longer text."""
        return longest_pair(self._model.config, self._encode)

    def score(self, pairs: Sequence[Pair], batch_size: int = 64) -> list[float]:
        """One number for each pair, in their order. A pair with an empty prompt is one text."""
        rows = [self._tokens(*pair) for pair in pairs]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            for i, score in zip(part, self._forward([rows[i] for i in part]), strict=True):
                scores[i] = score
        return scores

    def _tokens(self, prompt: str, response: str):
        row, length = read_pair(self._encode, prompt, response, self.max_tokens)
        if length > self.max_tokens and not self._warned:
            warnings.warn(
                f"{self.folder}: reads {self.max_tokens} tokens; longer texts are cut "
                f"(the first has {length})",
                stacklevel=2,
            )
            self._warned = True
        return row

    def _forward(self, rows: list) -> list[float]:
        import torch

        batch = self._encode.pad(rows, return_tensors="pt").to(self._model.device)
        with torch.no_grad():
            return self.scores_of(self._model(**batch).logits)
