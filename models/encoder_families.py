"""Encoders that transformers runs: which models are, and how they read a pair of texts.

Holds no MLX: the PyTorch baseline, which trains them, asks too.
"""

import sys
from typing import Any

ENDING = "ForSequenceClassification"
ENCODERS = frozenset(
    "albert bert big_bird camembert convbert deberta deberta-v2 distilbert electra ernie "
    "eurobert longformer modernbert mpnet nystromformer rembert roberta roberta-prelayernorm "
    "roformer squeezebert xlm-roberta xlm-roberta-xl xlnet".split()
)
# Their position ids begin behind the padding token's id.
SHIFTED_POSITIONS = ("camembert", "longformer", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl")


def longest_pair(config: Any, tokenizer: Any) -> int:
    """The most tokens that a model of this configuration reads."""
    longest = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if config.model_type in SHIFTED_POSITIONS:
        longest -= (config.pad_token_id or 0) + 1
    return min(longest, tokenizer.model_max_length)


def read_pair(tokenizer: Any, prompt: str, response: str, longest: int) -> tuple[Any, int]:
    """(what the tokenizer makes of a pair, cut at `longest` tokens; how many it had before).

    A blank prompt leaves one text; a cut takes the end of the longer one.
    """
    texts = (prompt, response) if prompt.strip() else (response,)
    row = tokenizer(*texts)
    length = len(row["input_ids"])
    if length > longest:
        row = tokenizer(*texts, truncation=True, max_length=longest)
    return row, length
