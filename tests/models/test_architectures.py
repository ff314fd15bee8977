"""Every architecture in docs/architectures.md, as a tiny random model: what the table says."""

import re
import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from tiny import ARCHITECTURES, OTHERS, flat, tiny_model, tiny_model_folder
from tiny_ppo import assert_close, make_trainer, movement, random_batch, shaken, weights

from data_utils import TextRow, make_batch
from errors import UserError
from mlx_sft_trainer import LanguageModelTask, SupervisedTrainer
from models.adapter_files import load_adapter, save_adapter
from models.load import load_model
from models.lora import LoraConfig, add_lora, linear_keys, path_in_block
from models.packing import pack
from models.reward_model import RewardModel
from models.trunk import hidden_states, token_logprobs

TABLE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
READS_PADDING = {"mamba"}  # prompts of different lengths are refused
PADDED = sorted({*ARCHITECTURES, *OTHERS} - READS_PADDING)
TOKENS = mx.array([[5, 9, 60, 3, 17, 33, 8, 2, 40, 41, 42]])  # longer than the windows of 8


# ------------------------------------------------------------------------------ a PPO step


def check_step(kind: str, model: nn.Module, queries=None) -> None:
    """Rollout = teacher forcing, the first ratio is 1, and one step moves what is trained alone."""
    base = {k: np.array(v) for k, v in flat(model.parameters()).items()}
    trainer = make_trainer(kind, model=model, head_std=0.2, optimizer=optim.SGD(1e-3))
    shaken(trainer, 0.05)
    queries = queries or random_batch()[0]
    rollout = trainer.generate(queries)
    responses = rollout.responses
    tuning = trainer.model.tuning
    logprobs, values = trainer.model(pack(queries, responses, prefix=tuning.prefix))
    for row, response in enumerate(responses):
        kept = rollout.sampled_logprobs[row], rollout.sampled_values[row]
        np.testing.assert_allclose(kept[0], logprobs[row, : len(response)], atol=1e-4)
        np.testing.assert_allclose(kept[1], values[row, : len(response)], atol=1e-4)
    before = weights(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = trainer.update(rollout, list(range(8)))
    assert stats["ppo/skipped"] == 0
    for name, array in weights(trainer).items():
        assert np.abs(array - before[name]).max() > 0, name
    assert set(before) == {f"value_head.{leaf}" for leaf in ("weight", "bias")} | {
        f"model.{name}" for name in flat(model.trainable_parameters())
    }
    tuning.deactivate()
    assert flat(model.parameters()).keys() == base.keys()
    for name, array in flat(model.parameters()).items():
        np.testing.assert_array_equal(array, base[name], err_msg=name)


@pytest.mark.parametrize("architecture", PADDED)
def test_a_ppo_step_with_lora(architecture):
    check_step("lora", tiny_model(architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_ppo_step_with_dora(architecture):
    check_step("dora", tiny_model(architecture))


@pytest.mark.parametrize("architecture", PADDED)
def test_a_ppo_step_with_a_soft_prompt(architecture):
    check_step("prompt", tiny_model(architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_ppo_step_on_4_bits(architecture):
    model = tiny_model(architecture)
    nn.quantize(model, 32, 4)
    check_step("lora", model)


@pytest.mark.parametrize("kind", ["lora", "prompt"])
@pytest.mark.parametrize("architecture", sorted(READS_PADDING))
def test_what_reads_padding_is_refused_unless_there_is_none(architecture, kind):
    with pytest.raises(UserError, match=f"{architecture}: reads the padding"):
        check_step(kind, tiny_model(architecture))
    check_step(kind, tiny_model(architecture), [[5 + i, 6, 7] for i in range(8)])


# ------------------------------------------------------------------------------ from a folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loading_and_lora_on_every_linear_layer(architecture, tmp_path):
    loaded = load_model(tiny_model_folder(tmp_path / "model", architecture=architecture))
    assert loaded.config["model_type"] == architecture
    assert not loaded.model.training and not flat(loaded.model.trainable_parameters())
    base = loaded.model(TOKENS)
    assert base.std().item() > 0.1  # the weights have arrived
    keys = linear_keys(loaded.model)
    adapter = add_lora(loaded.model, LoraConfig(rank=2))
    for layer in adapter.layers.values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.2
    assert {path_in_block(path) for path in adapter.layers} == set(keys)
    assert len(adapter.layers) == len(loaded.model.layers) * len(keys)
    adapted = loaded.model(TOKENS)
    save_adapter(tmp_path / "adapter", adapter, loaded)
    adapter.deactivate()
    np.testing.assert_array_equal(loaded.model(TOKENS), base)
    load_adapter(loaded, tmp_path / "adapter")
    np.testing.assert_array_equal(loaded.model(TOKENS), adapted)
    assert mx.abs(adapted - base).max().item() > 0.1


# ------------------------------------------------------------------------------ the rest


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS])
def test_scores_of_a_reward_model_do_not_depend_on_the_batch(architecture):
    texts = [[5, 9, 60, 3, 17], [8], [8, 2, 33], list(range(2, 14))]
    for pooling in ("mean", "last"):
        model = RewardModel(tiny_model(architecture), pooling=pooling)
        alone = [model.score([text])[0] for text in texts]
        np.testing.assert_allclose(model.score(texts), alone, atol=1e-4)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS])
def test_log_probabilities_are_those_of_the_models_logits(architecture):
    model = tiny_model(architecture)
    hidden = hidden_states(model, TOKENS[:, :-1])[0]
    logits = nn.log_softmax(model(TOKENS[:, :-1])[0], axis=-1)
    wanted = logits[mx.arange(10), TOKENS[0, 1:]]
    for chunk in (4, 10):
        (found,) = token_logprobs(model, hidden, TOKENS[0, 1:], chunk=chunk)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing_changes_nothing(architecture):
    moves = [
        movement(
            make_trainer(model=tiny_model(architecture), head_std=0.2, grad_checkpoint=on),
            *random_batch(),
        )
        for on in (False, True)
    ]
    assert_close(moves[1], moves[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_supervised_training_lowers_the_loss(architecture):
    model = tiny_model(architecture)
    adapter = add_lora(model, LoraConfig(rank=4))
    trainer = SupervisedTrainer(LanguageModelTask(model, adapter), optim.Adam(2e-2))
    batch = make_batch([TextRow([5, 6, 7, 8, 9, 10] * 2, [0] + [1] * 11)])
    losses = [trainer.step([batch])["loss"] for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]


def test_the_table_names_what_is_tested():
    rows = re.findall(r"^\| ([\w ]+) \| `(\w+)` \|", TABLE.read_text(encoding="utf-8"), re.M)
    assert sorted(kind for name, kind in rows if name != "architecture") == sorted(
        {*ARCHITECTURES, *OTHERS}
    )
