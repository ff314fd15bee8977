"""models/packing.py, actor_critic.py and decoding.py in PyTorch.

Legend: B batch, L padded length, P prompt, R longest response, D width, V vocabulary, N response
tokens picked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pytorch_models import Tuned
from torch import Tensor, nn
from transformers import GenerationConfig

from padding import lay_out
from rl.rollouts import Rollout

# ---- one forward pass --------------------------------------------------------------------------


@dataclass
class Packed:
    """Queries with responses. Tensors that come back from them are (B, R): the counted response
    tokens of each row, moved together to the left.
    """

    tokens: Tensor  # (B, L) right-padded
    counted: Tensor  # (B, L) bool, True on the response tokens that count
    mask: Tensor  # (B, R) float32, 1 where a token belongs

    @property
    def targets(self) -> Tensor:
        """The counted tokens (N,), row by row."""
        return self.tokens[self.counted]

    def pick(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, L - 1, D) -> those that predict the counted tokens (N, D).

        This is the one place where logits[t] is matched with token t+1.
        """
        return hidden[self.counted[:, 1:]]

    def spread(self, column: Tensor) -> Tensor:
        """(N,) -> (B, R) with 0 at padded places."""
        out = column.new_zeros(self.mask.shape)
        out[self.mask > 0] = column
        return out


def pack(
    queries: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    masks: Sequence[Sequence[int]] | None = None,
    pad_to_multiple: int = 1,
    device: torch.device | str = "cpu",
) -> Packed:
    """Lay out `query + response` for each row; `masks` marks the tokens that count."""
    rows = [[*q, *r] for q, r in zip(queries, responses, strict=True)]
    tokens, counted, mask = lay_out(rows, responses, masks, pad_to_multiple)
    arrays = (tokens.astype(np.int64), counted, mask.astype(np.float32))
    return Packed(*(torch.from_numpy(a).to(device) for a in arrays))


class ValueHead(nn.Module):
    """Hidden states (..., D) -> values (...,), float32; starts at 0, or at normal(0, init_std)."""

    def __init__(self, width: int, init_std: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, width) * init_std)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden.float() @ self.weight.T).squeeze(-1) + self.bias


class ActorCritic(nn.Module):
    """A language model with what is trained on it, and a value head on the same hidden states."""

    def __init__(self, model: Tuned, value_head: ValueHead):
        super().__init__()
        self.model, self.value_head = model, value_head.to(model.device)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(
        self, packed: Packed, *, temperature: float = 1.0, with_entropy: bool = False
    ) -> tuple[Tensor, ...]:
        """-> logprobs (B, R), values (B, R) and, if asked, entropy (B, R); 0 where nothing is."""
        hidden = picked_hidden(self.model, packed)  # (N, D)
        scored = token_logprobs(
            self.model.logits(hidden), packed.targets, temperature, with_entropy
        )
        columns = (scored[0], self.value_head(hidden), *scored[1:])
        return tuple(packed.spread(column) for column in columns)


def picked_hidden(model: Tuned, packed: Packed) -> Tensor:
    """The hidden states that predict the counted tokens, (N, D)."""
    return packed.pick(model.hidden_states(packed.tokens[:, :-1]))


def picked_logits(model: Tuned, packed: Packed, temperature: float = 1.0) -> Tensor:
    """All logits of the counted tokens, (N, V) float32; for the "full" KL only."""
    return model.logits(picked_hidden(model, packed)) / temperature


def reference_logprobs(model: Tuned, packed: Packed, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the counted tokens under `model`, (B, R)."""
    (logprobs,) = token_logprobs(picked_logits(model, packed), packed.targets, temperature)
    return packed.spread(logprobs)


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, ...]:
    """logits (..., V), targets (...) -> (log p of the targets, [entropy]), (...) float32 nats."""
    logp = (logits.float() / temperature).log_softmax(-1)
    picked = logp.gather(-1, targets[..., None]).squeeze(-1)
    if not with_entropy:
        return (picked,)
    possible = logp > -torch.inf
    return picked, -torch.where(possible, logp.exp() * logp, 0.0).sum(-1)


# ---- sampling ----------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: Tuned,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    eos_ids: set[int],
    seed: int | None = None,
    value_head: nn.Module | None = None,
    should_stop: Callable[[list[int]], bool] | None = None,
    **sampling: float,
) -> Rollout:
    """Sample a response to each prompt (lists of token ids) with transformers' own `generate`.

    `max_tokens` is a limit for all rows or one for each. `seed` leaves torch's global random state
    as it was; None goes on with it. `sampling` is `generation_config`'s. Log-probabilities are of
    the tempered, unfiltered distribution.
    """
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    if not prompts or any(not p for p in prompts) or min(limits) < 1:
        raise ValueError("every prompt needs a token, and every row a limit of at least 1")
    fed, start = left_padded(model, prompts)
    config = generation_config(max(limits), eos_ids, **sampling)
    config.output_hidden_states = value_head is not None
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        made = model.base.generate(**fed, generation_config=config)
    tokens = made.sequences[:, start:]  # (B, R)
    logits = torch.stack(made.logits, dim=1)  # (B, R, V), before any filter
    columns = list(token_logprobs(logits, tokens, sampling.get("temperature") or 1.0))
    if value_head is not None:  # on what each token was sampled from, (B, R, D)
        hidden = [layers[-1][:, -1] for layers in made.hidden_states]
        columns.append(value_head(torch.stack(hidden, dim=1)))
    return cut(prompts, tokens, columns, limits, eos_ids, should_stop)


def generation_config(
    longest: int,
    eos_ids: set[int],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> GenerationConfig:
    """How tokens are picked: 0 and 1 switch a filter off, temperature 0 picks the likeliest."""
    chosen = {"temperature": temperature, "top_k": top_k}
    chosen |= {"top_p": top_p if top_p > 0 else 1.0, "min_p": min_p or None}
    return GenerationConfig(
        do_sample=temperature > 0,
        max_new_tokens=longest,
        eos_token_id=sorted(eos_ids) or None,
        pad_token_id=min(eos_ids, default=0),
        return_dict_in_generate=True,
        output_logits=True,
        remove_invalid_values=True,  # for the draw alone: NaN is found in the update, and skipped
        **(chosen if temperature > 0 else {}),
    )


def left_padded(model: Tuned, prompts: Sequence[Sequence[int]]) -> tuple[dict, int]:
    """What `generate` is fed, and where the tokens that it returns stop being the prompt's.

    With a soft prompt these are embeddings, and `generate` returns new tokens alone.
    """
    longest = max(map(len, prompts))
    padding = [longest - len(p) for p in prompts]
    rows = [[0] * pad + list(p) for pad, p in zip(padding, prompts, strict=True)]
    tokens = torch.tensor(rows, device=model.device)  # (B, P)
    count = model.prompt_length
    places = torch.arange(longest + count, device=model.device)
    attention = (places >= torch.tensor(padding, device=model.device)[:, None]).long()
    if count:
        return {"inputs_embeds": model.embed(tokens, padding), "attention_mask": attention}, 0
    return {"input_ids": tokens, "attention_mask": attention}, longest


def cut(prompts, tokens, columns, limits, eos_ids, should_stop) -> Rollout:
    """Rows up to their end: EOS, a stop, or the limit; columns (B, R): logprobs and any values."""
    responses, ended = [], []
    for limit, written in zip(limits, tokens.tolist(), strict=True):
        length, finished = 0, False
        while not finished and length < limit:
            length += 1
            finished = written[length - 1] in eos_ids or (
                should_stop is not None and should_stop(written[:length])
            )
        responses.append(written[:length])
        ended.append(finished)
    kept = [
        [row[: len(r)].numpy() for row, r in zip(column.float().cpu(), responses, strict=True)]
        for column in columns
    ]
    return Rollout([*prompts], responses, ended, *kept)
