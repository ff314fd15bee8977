"""Hidden states, the model's own head on them, and log-probabilities without all logits at once."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from tiny import flat, tiny_model

from errors import UserError
from models.actor_critic import reference_logprobs
from models.lora import LoraConfig, add_lora
from models.packing import pack
from models.trunk import (
    find_trunk,
    hidden_size,
    hidden_states,
    logits_from_hidden,
    picked_hidden,
    token_logprobs,
    vocabulary_size,
)
from training.update import checkpointed_blocks

TOKENS = mx.array([[5, 9, 60, 3, 17], [8, 8, 2, 33, 40]])


def plain(model, hidden, targets, temperature=1.0) -> tuple[mx.array, mx.array, mx.array]:
    """The obvious way: log-softmax of all logits -> log-probabilities, entropies, top1."""
    logits = logits_from_hidden(model, hidden).astype(mx.float32) / temperature
    logprobs = nn.log_softmax(logits, axis=-1)  # (N, V)
    picked = mx.take_along_axis(logprobs, targets[:, None], axis=-1).squeeze(-1)
    entropy = -(mx.exp(logprobs) * logprobs).sum(axis=-1)
    return picked, entropy, (logits.argmax(axis=-1) == targets).astype(mx.float32)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mamba"])
def test_picked_states_are_those_of_their_positions(architecture):
    model, index = tiny_model(architecture), mx.array([1, 4, 5, 8])
    hidden = hidden_states(model, TOKENS)
    picked = picked_hidden(model, TOKENS, index)
    np.testing.assert_array_equal(picked, [hidden[i // 5, i % 5] for i in index.tolist()])


def test_picked_states_have_one_gradient_checkpointed_or_not():
    model = tiny_model()
    add_lora(model, LoraConfig(rank=2))

    def loss():
        return mx.sin(picked_hidden(model, TOKENS, mx.array([1, 4, 5, 8]))).sum()

    _, plain = nn.value_and_grad(model, loss)()
    with checkpointed_blocks(model):
        _, checkpointed = nn.value_and_grad(model, loss)()
    assert flat(plain)
    for (name, a), (_, b) in zip(tree_flatten(plain), tree_flatten(checkpointed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gemma3", "mixtral"])
def test_the_head_on_hidden_states_gives_the_models_logits(architecture):
    model = tiny_model(architecture)
    hidden = hidden_states(model, TOKENS)
    assert hidden.shape == (2, 5, 32) and hidden_size(model) == 32 and vocabulary_size(model) == 64
    expected = model(TOKENS)
    np.testing.assert_allclose(logits_from_hidden(model, hidden), expected, atol=1e-6)
    # Any leading shape, and the module's tree is as it was.
    one = logits_from_hidden(model, hidden[1, 3])
    np.testing.assert_allclose(one, expected[1, 3], atol=1e-5)
    owner, name = find_trunk(model)
    assert isinstance(getattr(owner, name), nn.Module)
    np.testing.assert_array_equal(model(TOKENS), expected)


def test_gemma_2_caps_its_logits():
    model = tiny_model("gemma2", final_logit_softcapping=0.5)
    logits = logits_from_hidden(model, 1000 * hidden_states(model, TOKENS))
    assert 0.49 < mx.abs(logits).max().item() <= 0.5


def test_a_model_without_a_trunk_is_refused_with_its_type():
    class Odd(nn.Module):
        model_type = "oddity"

    with pytest.raises(UserError, match="model type oddity: its hidden states cannot be reached"):
        find_trunk(Odd())


# The head's arrays: frozen or trained, of its own or the embedding's, capped or not.
HEADS = [
    pytest.param("llama", False, id="frozen"),
    pytest.param("llama", True, id="trained"),
    pytest.param("qwen2", False, id="frozen-tied"),
    pytest.param("qwen2", True, id="trained-tied"),
    pytest.param("gemma2", False, id="frozen-tied-capped"),
    pytest.param("gemma2", True, id="trained-tied-capped"),
    pytest.param("gpt2", True, id="trained-tied-wte"),
    pytest.param("gemma3", True, id="trained-inside-a-language-model"),
]


@pytest.mark.parametrize("architecture, full", HEADS)
@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_chunks_give_the_values_and_gradients_of_the_plain_way(architecture, full, chunk):
    model = tiny_model(architecture)
    if full:
        model.unfreeze()
    else:
        add_lora(model, LoraConfig(rank=2))
        model.load_weights(
            [
                (k, mx.random.normal(v.shape, key=mx.random.key(1)) * 0.1)
                for k, v in tree_flatten(model.trainable_parameters())
            ],
            strict=False,
        )
    targets = mx.array([9, 60, 3, 17, 1, 8, 2, 33, 40, 1])
    weights = mx.random.normal((3, 10), key=mx.random.key(2))  # each output has its own gradient

    def loss(parameters, score):
        model.update(tree_unflatten(list(parameters.items())))
        hidden = hidden_states(model, TOKENS).reshape(10, -1)
        return sum((w * s).sum() for w, s in zip(weights, score(hidden), strict=True))

    def chunked(hidden):
        return token_logprobs(
            model, hidden, targets, temperature=0.7, chunk=chunk, extras=("entropy", "top1")
        )

    parameters = flat(model.trainable_parameters())
    hidden = hidden_states(model, TOKENS).reshape(10, -1)
    for ours, theirs in zip(chunked(hidden), plain(model, hidden, targets, 0.7), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    wanted = mx.grad(lambda p: loss(p, lambda h: plain(model, h, targets, 0.7)))(parameters)
    found = mx.grad(lambda p: loss(p, chunked))(parameters)
    assert set(found) == set(wanted)
    largest = max(mx.abs(g).max().item() for g in wanted.values())
    for name, gradient in wanted.items():
        np.testing.assert_allclose(found[name], gradient, atol=1e-5 * largest, err_msg=name)
    if full:  # the gradient reaches the output matrix through the head, not only as an embedding
        endings = ("lm_head.weight", "wte.weight", "embed_tokens.weight")
        head = min((k for k in wanted if k.endswith(endings)), key=lambda k: "lm_head" not in k)
        assert mx.abs(found[head][61]).max().item() > 0  # 61: neither an input nor a target


def test_chunks_work_on_a_quantised_head():
    model = tiny_model()
    nn.quantize(model, 32, 4)
    adapter = add_lora(model, LoraConfig(rank=2))
    for layer in adapter.layers.values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(3)) * 0.1
    targets = TOKENS.reshape(-1)

    def loss(model, chunk):
        hidden = hidden_states(model, TOKENS).reshape(10, -1)
        return token_logprobs(model, hidden, targets, chunk=chunk)[0].sum()

    wanted = flat(nn.value_and_grad(model, lambda: loss(model, 10))()[1])
    found = flat(nn.value_and_grad(model, lambda: loss(model, 4))()[1])
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "architecture, full, chunk, compiled",
    [
        pytest.param(*head.values, chunk, False, id=f"{head.id}-{chunk}")
        for head in HEADS
        for chunk in (4, 10)
    ]
    # One compiled case: on Linux g++ takes seconds for each shape.
    + [pytest.param("llama", False, 4, True, id="frozen-4-compiled")],
)
def test_gradients_made_in_the_forward_pass_are_those_of_the_plain_way(
    architecture, full, chunk, compiled
):
    model = tiny_model(architecture)
    if full:
        model.unfreeze()
    else:
        adapter = add_lora(model, LoraConfig(rank=2))
        for layer in adapter.layers.values():
            layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(3)) * 0.1
    targets = mx.array([9, 60, 3, 17, 1, 8, 2, 33, 40, 1])
    weights = mx.random.normal((10,), key=mx.random.key(2))

    def gradient(score):
        def loss():
            logprobs, *rest = score(hidden_states(model, TOKENS).reshape(10, -1))
            return (logprobs * weights).sum(), rest

        step = nn.value_and_grad(model, loss)
        return mx.compile(step, inputs=[model.state])() if compiled else step()

    def beside(hidden):
        return token_logprobs(
            model,
            hidden,
            targets,
            temperature=0.7,
            extras=("entropy", "top1"),
            chunk=chunk,
            gradient=True,
        )

    def whole(hidden):
        return plain(model, hidden, targets, 0.7)

    trained = model.trainable_parameters()
    (value, (entropy, top1)), found = gradient(beside)
    model.update(trained)
    (wanted_value, (wanted_entropy, wanted_top1)), wanted = gradient(whole)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    np.testing.assert_allclose(entropy, wanted_entropy, rtol=1e-5)
    np.testing.assert_array_equal(top1, wanted_top1)
    found, wanted = flat(found), flat(wanted)
    largest = max(mx.abs(g).max().item() for g in wanted.values())
    assert set(found) == set(wanted) and largest > 0
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-5 * largest, err_msg=name)


def test_a_frozen_head_makes_each_logit_once_for_a_gradient(monkeypatch):
    """Made again in the backward pass, they would be seen twice."""
    import models.trunk

    model, counts = tiny_model(), []
    real = models.trunk._score

    def counting(logits, *rest):
        counts.append(len(logits))
        return real(logits, *rest)

    monkeypatch.setattr(models.trunk, "_score", counting)
    targets = mx.zeros(10, dtype=mx.int32)

    def total(hidden, gradient):
        return token_logprobs(model, hidden, targets, chunk=4, gradient=gradient)[0].sum()

    for gradient, seen in ((True, [4, 4, 2]), (False, [4, 4, 2, 2, 4, 4])):
        counts.clear()
        mx.eval(mx.grad(total)(mx.ones((10, 32)), gradient))
        assert counts == seen


def test_a_logit_of_minus_infinity_has_no_part_in_the_entropy():
    model = tiny_model()
    model.lm_head = nn.Linear(32, 64)
    model.lm_head.weight = mx.zeros((64, 32))
    model.lm_head.bias = mx.where(mx.arange(64) < 4, 0.0, -mx.inf)
    logprobs, entropy = token_logprobs(
        model, mx.ones((2, 32)), mx.array([0, 3]), extras=("entropy",)
    )
    np.testing.assert_allclose(logprobs, -np.log(4), atol=1e-6)
    np.testing.assert_allclose(entropy, np.log(4), atol=1e-6)


def test_no_positions_give_no_log_probabilities():
    logprobs, top1 = token_logprobs(
        tiny_model(), mx.zeros((0, 32)), mx.array([], dtype=mx.int32), extras=("top1",)
    )
    assert logprobs.shape == top1.shape == (0,)


def test_an_unknown_extra_is_refused():
    with pytest.raises(ValueError, match="'top5' is none of entropy, top1"):
        token_logprobs(tiny_model(), mx.zeros((1, 32)), mx.array([1]), extras=("top5",))


def test_temperature_divides_the_logits():
    model = tiny_model()
    packed = pack([[5, 9]], [[60, 3]])
    logits = model(mx.array([[5, 9, 60]]))[0, 1:]
    for temperature in (0.5, 1.0, 2.0):
        wanted = nn.log_softmax(logits / temperature)[mx.arange(2), mx.array([60, 3])]
        found = reference_logprobs(model, packed, temperature)[0]
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_chunks_need_a_fraction_of_the_plain_ways_memory():
    """Forward and backward through a frozen head with 32,064 tokens, 512 positions of width 64.

    benchmarks/memory.py does the same at V = 128,256 with 8 rows of 256 tokens.
    """
    model = tiny_model(hidden_size=64, vocab_size=32064)
    hidden = mx.random.normal((512, 64), key=mx.random.key(0))
    targets = mx.random.randint(0, 32064, (512,), key=mx.random.key(1))
    peaks = {}
    results = {}
    for name, score in (
        ("plain", lambda h: plain(model, h, targets)[0]),
        ("chunked", lambda h: token_logprobs(model, h, targets, chunk=32)[0]),
        ("beside", lambda h: token_logprobs(model, h, targets, chunk=32, gradient=True)[0]),
    ):
        step = mx.value_and_grad(lambda h, score=score: (score(h) * mx.arange(512)).sum())
        mx.eval(hidden, targets)
        mx.clear_cache()
        start = mx.get_active_memory()
        mx.reset_peak_memory()
        results[name] = step(hidden)
        mx.eval(results[name])
        peaks[name] = mx.get_peak_memory() - start
    for name in ("chunked", "beside"):
        assert peaks[name] < peaks["plain"] / 4, peaks
        for ours, theirs in zip(results[name], results["plain"], strict=True):
            largest = mx.abs(theirs).max().item()
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * largest)


def test_by_default_a_chunk_has_as_many_positions_as_the_limit_allows(monkeypatch):
    import models.trunk

    model = tiny_model()
    counts = []
    real = models.trunk._score

    def counting(logits, *rest):
        counts.append(logits.shape)
        return real(logits, *rest)

    monkeypatch.setattr(models.trunk, "_score", counting)
    monkeypatch.setattr(models.trunk, "MAX_CHUNK_ELEMENTS", 64 * 4)
    mx.eval(token_logprobs(model, mx.zeros((10, 32)), mx.zeros(10, dtype=mx.int32)))
    assert counts == [(4, 64), (4, 64), (2, 64)]
