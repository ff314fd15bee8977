"""models/packing.py, actor_critic.py, heads.py and decoding.py in PyTorch.

Legend: B batch, L padded length, P prompt, R longest response, D width, V vocabulary, N response
tokens picked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pytorch_models import Tuned
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

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
    length = 1 + round_up(max(map(len, rows)) - 1, pad_to_multiple)
    tokens = np.zeros((len(rows), length), dtype=np.int64)
    counted = np.zeros((len(rows), length), dtype=bool)
    for i, (row, response) in enumerate(zip(rows, responses, strict=True)):
        tokens[i, : len(row)] = row
        counted[i, len(row) - len(response) : len(row)] = True if masks is None else masks[i]
    counts = counted.sum(axis=1)
    mask = np.arange(round_up(int(counts.max()), pad_to_multiple)) < counts[:, None]  # (B, R)
    arrays = (tokens, counted, mask.astype(np.float32))
    return Packed(*(torch.from_numpy(a).to(device) for a in arrays))


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


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

    def trainable(self) -> dict[str, nn.Parameter]:
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


@dataclass
class Sampling:
    """How tokens are picked. PPO's KL is an estimate of the true one only at the defaults."""

    temperature: float = 1.0  # 0 picks the most likely token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off


@dataclass
class Generation:
    """One batch of responses; row i of every list belongs to prompt i."""

    responses: list[list[int]]  # EOS included where it was written
    logprobs: list[np.ndarray]  # (len,) float32, of the tempered, unfiltered distribution
    values: list[np.ndarray] | None  # (len,) float32, where a value head was given
    finished: list[bool]  # ended by EOS or a stop string, not by the length limit


class RowLimits(StoppingCriteria):
    """Ends each row at its own limit, or where `should_stop(tokens)` says so."""

    def __init__(self, start: int, limits: Sequence[int], should_stop: Callable | None):
        self.start, self.limits, self.should_stop = start, limits, should_stop

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        written = input_ids[:, self.start :]
        done = [written.shape[1] >= limit for limit in self.limits]
        if self.should_stop is not None:
            stopped = map(self.should_stop, written.tolist())
            done = [limit or stop for limit, stop in zip(done, stopped, strict=True)]
        return torch.tensor(done, device=input_ids.device)


class LastHidden:
    """Collects the hidden state that each sampled token came from, while it is registered."""

    def __init__(self):
        self.steps: list[Tensor] = []  # (B, D) each

    def __call__(self, module, inputs, output) -> None:
        self.steps.append(output.last_hidden_state[:, -1])


@torch.no_grad()
def generate(
    model: Tuned,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    eos_ids: set[int],
    sampling: Sampling | None = None,
    seed: int | None = None,
    value_head: nn.Module | None = None,
    should_stop: Callable[[list[int]], bool] | None = None,
) -> Generation:
    """Sample a response to each prompt (lists of token ids) with transformers' own `generate`.

    `max_tokens` is a limit for all rows or one for each. `seed` leaves torch's global random state
    as it was; None goes on with it.
    """
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    if not prompts or any(not p for p in prompts) or min(limits) < 1:
        raise ValueError("every prompt needs a token, and every row a limit of at least 1")
    sampling = sampling or Sampling()
    fed, start = left_padded(model, prompts)
    collect = LastHidden()
    hook = model.trunk.register_forward_hook(collect)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            made = model.base.generate(
                **fed,
                generation_config=generation_config(sampling, max(limits), eos_ids),
                stopping_criteria=StoppingCriteriaList([RowLimits(start, limits, should_stop)]),
            )
    finally:
        hook.remove()
    tokens = made.sequences[:, start:]  # (B, R)
    hidden = torch.stack(collect.steps, dim=1)  # (B, R, D)
    logits = torch.stack(made.logits, dim=1)  # (B, R, V), before any filter
    (logprobs,) = token_logprobs(logits, tokens, sampling.temperature or 1.0)
    values = value_head(hidden) if value_head is not None else None
    return cut(tokens, logprobs, values, limits, eos_ids, should_stop)


def generation_config(sampling: Sampling, longest: int, eos_ids: set[int]) -> GenerationConfig:
    greedy = sampling.temperature == 0
    chosen = (
        {}
        if greedy
        else {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p if sampling.top_p > 0 else 1.0,
            "min_p": sampling.min_p or None,
        }
    )
    return GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=longest,
        eos_token_id=sorted(eos_ids) or None,
        pad_token_id=min(eos_ids, default=0),
        return_dict_in_generate=True,
        output_logits=True,
        remove_invalid_values=True,  # for the draw alone: NaN is found in the update, and skipped
        **chosen,
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


def cut(tokens, logprobs, values, limits, eos_ids, should_stop) -> Generation:
    """Rows up to their end: EOS, a stop, or the limit."""
    result = Generation([], [], [] if values is not None else None, [])
    for row, written in enumerate(tokens.tolist()):
        length, finished = 0, False
        while not finished and length < limits[row]:
            length += 1
            finished = written[length - 1] in eos_ids or (
                should_stop is not None and should_stop(written[:length])
            )
        result.responses.append(written[:length])
        result.logprobs.append(logprobs[row, :length].float().cpu().numpy())
        if values is not None:
            result.values.append(values[row, :length].float().cpu().numpy())
        result.finished.append(finished)
    return result
