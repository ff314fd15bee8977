"""Soft prompts: trainable virtual tokens in front of every sequence (Lester et al. 2021).

Virtual tokens have the ids V .. V+n-1, just past the vocabulary, and the embedding is wrapped so
that these ids pick trainable rows. That works in every architecture that embeds tokens, with a
cache or without, and needs no other change to the model.
"""

import mlx.core as mx
import mlx.nn as nn

from errors import UserError
from models.trunk import find_trunk
from models.tuning import Tuning, check_arrays

EMBEDDING_NAMES = ("embed_tokens", "wte", "tok_embeddings", "embed_in", "embeddings")


class SoftPromptEmbedding(nn.Module):
    """ids (…,) -> rows (…, D): the wrapped embedding below V, `prompt` (n, D) from V on."""

    def __init__(self, embedding: nn.Module, vocabulary: int, prompt: mx.array):
        super().__init__()
        self.embedding = embedding
        self.prompt = prompt
        self._vocabulary = vocabulary

    def __call__(self, ids: mx.array) -> mx.array:
        virtual = ids >= self._vocabulary
        real = self.embedding(mx.where(virtual, 0, ids))
        rows = self.prompt[mx.where(virtual, ids - self._vocabulary, 0)]
        return mx.where(virtual[..., None], rows.astype(real.dtype), real)

    def as_linear(self, hidden: mx.array) -> mx.array:
        return self.embedding.as_linear(hidden)


class SoftPrompt(Tuning):
    """n virtual tokens in front of every sequence."""

    kind = "prompt"

    def __init__(self, model: nn.Module, num_tokens: int):
        self._trunk, self._name, embedding = find_embedding(model)
        vocabulary = embedding.weight.shape[0]
        # Rows of the vocabulary start better than noise (Lester et al. 2021, section 3.2).
        ids = mx.random.randint(0, vocabulary, (num_tokens,))
        rows = embedding(ids).astype(mx.float32)
        mx.eval(rows)
        self.num_tokens = num_tokens
        self._base = embedding
        self._adapted = SoftPromptEmbedding(embedding, vocabulary, rows)
        self._ids = tuple(range(vocabulary, vocabulary + num_tokens))
        model.freeze()
        self.activate()
        self._adapted.unfreeze(recurse=False, keys=["prompt"])

    @property
    def prefix(self) -> tuple[int, ...]:
        """The virtual ids that go in front of a sequence while the soft prompt is active."""
        return self._ids if self.active else ()

    def activate(self) -> None:
        self._trunk[self._name] = self._adapted
        self.active = True

    def deactivate(self) -> None:
        self._trunk[self._name] = self._base
        self.active = False

    def arrays(self) -> dict[str, mx.array]:
        return {"soft_prompt": self._adapted.prompt}

    def load_arrays(self, arrays: dict[str, mx.array], source: str = "soft prompt") -> None:
        check_arrays(arrays, self.arrays(), source)
        self._adapted.prompt = arrays["soft_prompt"].astype(mx.float32)

    def description(self, num_blocks: int) -> dict:
        return {"fine_tune_type": "prompt", "num_prompt_tokens": self.num_tokens}


def find_embedding(model: nn.Module) -> tuple[nn.Module, str, nn.Module]:
    """(trunk, name, token embedding). Raises UserError where there is none to be found."""
    owner, trunk_name = find_trunk(model)
    trunk = owner[trunk_name]
    for name in EMBEDDING_NAMES:
        if isinstance(trunk.get(name), nn.Module):
            return trunk, name, trunk[name]
    kind = getattr(model, "model_type", type(model).__name__)
    raise UserError(f"model type {kind}: no token embedding found, so soft prompts cannot be used")
