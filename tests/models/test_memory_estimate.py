"""Memory expected before the first step against MLX's own peak, and minibatches chosen from it."""

import gc
import json
import sys
from argparse import Namespace

import mlx.core as mx
import pytest
from files import ROOT
from tiny import ARCHITECTURES, OTHERS, tiny_model, tiny_model_folder

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory_estimate  # noqa: E402

import group_training  # noqa: E402
import ppo_training  # noqa: E402
import preference_training  # noqa: E402
import sft  # noqa: E402
from command_line import memory_fit  # noqa: E402
from command_line.memory_fit import largest_that_fits  # noqa: E402
from mlx_ppo_trainer import PPOConfig, PPOTrainer  # noqa: E402
from models.actor_critic import ActorCritic, ValueHead  # noqa: E402
from models.load import load_model, weight_bytes  # noqa: E402
from models.lora import LoraConfig, add_lora  # noqa: E402
from models.memory_estimate import Memory, kept_bytes, shape_of, trained_of  # noqa: E402

# D, I, blocks, heads, key heads, V
WIDE, DEEP = (256, 512, 4, 8, 2, 8192), (128, 512, 8, 2, 2, 512)
EVERY_LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


SFT = {"rows": 2, "length": 33}, {"rows": 8, "length": 97}
PPO = (
    {"batch": 8, "rows": 8, "prompt": 40, "response": 24},
    {"batch": 8, "rows": 2, "prompt": 150, "response": 3},
)


@pytest.mark.parametrize(
    "method, shape, case",
    [
        *(("SFT", shape, case) for shape in (WIDE, DEEP) for case in SFT),
        *(("PPO", WIDE, case) for case in PPO),
        *(pytest.param("PPO", DEEP, case, marks=pytest.mark.long) for case in PPO),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_within_a_fifth_of_the_peak(method, shape, case):
    expected, peak = memory_estimate.measure(method, shape, case)
    assert expected.total == pytest.approx(peak, rel=memory_estimate.ALLOWED)
    assert expected.terms["weights"] < 0.75 * peak  # or it would say little


@pytest.mark.parametrize(
    "options",
    [{"full": True}, {"keys": EVERY_LAYER}, {"blocks": 2}, {"checkpointed": True}],
    ids=str,
)
def test_other_ways_to_train(options):
    case = {"rows": 4, "length": 65}
    expected, peak = memory_estimate.measure("SFT", DEEP, case, **options)
    assert expected.total == pytest.approx(peak, rel=memory_estimate.ALLOWED)
    plain, _ = memory_estimate.measure("SFT", DEEP, case)
    assert expected.total != pytest.approx(plain.total, rel=0.05)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_kept_states_are_counted():
    case = {"batch": 8, "rows": 8, "prompt": 40, "response": 24}
    expected, peak = memory_estimate.measure("PPO", WIDE, case, blocks=1)
    assert expected.total == pytest.approx(peak, rel=memory_estimate.ALLOWED)
    assert expected.terms["frozen states"] == 2 * 8 * 63 * 256 * 4  # the minibatch is a copy


def test_kept_states_take_what_is_said():
    """Bytes that are held on to after the reference, against rows x length x width."""
    model, config = memory_estimate.llama(DEEP)
    tuning = add_lora(model, LoraConfig(rank=2, keys=["v_proj"], num_layers=1))
    policy = ActorCritic(model, ValueHead(128), tuning)
    trainer = PPOTrainer(PPOConfig(batch_size=8, mini_batch_size=4), policy, eos_ids={0})
    rollout = trainer.as_rollout(
        [[1 + n] * 90 for n in range(8)], [[2] * (3 + n) for n in range(8)]
    )
    trainer.prepare(rollout, [0.0] * 8)
    mx.eval(policy.parameters())
    gc.collect()
    before = mx.get_active_memory()
    trainer.score_policy(rollout)
    trainer.score_reference(rollout)
    mx.eval(rollout.ref_logprobs, rollout.kls)
    gc.collect()
    held = mx.get_active_memory() - before
    expected = kept_bytes(shape_of(model, config, tuning), 8, 90 + 10 - 1)
    assert held == pytest.approx(expected, rel=memory_estimate.ALLOWED)


@pytest.mark.parametrize("bits", [None, 8])
def test_sizes_are_those_of_the_model(tmp_path, bits):
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
    folder = tiny_model_folder(tmp_path, **sizes)
    loaded = load_model(folder, quantize=bits)
    held = weight_bytes(loaded.model.parameters())
    tuning = add_lora(loaded.model, LoraConfig(rank=2, keys=["v_proj", "down_proj"], num_layers=2))
    shape = shape_of(loaded.model, loaded.config, tuning)
    assert (shape.hidden, shape.mlp, shape.layers) == (64, 192, 3)
    assert (shape.heads, shape.vocabulary) == (
        loaded.config["num_attention_heads"],
        loaded.config["vocab_size"],
    )
    assert shape.weights == held
    trained = trained_of(loaded.model, tuning, "lion")
    assert (trained.layers, trained.inputs, trained.moments) == (2, 2 * 192, 1)
    assert trained.weights == weight_bytes(tuning.arrays())


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS])
def test_every_architecture_is_read(architecture):
    model = tiny_model(architecture)
    held = weight_bytes(model.parameters())
    tuning = add_lora(model, LoraConfig(rank=2, num_layers=1))
    shape, trained = shape_of(model, vars(model.args), tuning), trained_of(model, tuning, "adam")
    assert (shape.weights, shape.layers) == (held, len(model.layers))
    assert shape.hidden <= shape.mlp <= 4 * shape.hidden and trained.layers == 1
    assert 0 < trained.weights == weight_bytes(tuning.arrays())


# ------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize(
    "count, unit, usable, chosen",
    [(16, 1, 100, 8), (16, 1, 1000, 16), (12, 1, 65, 6), (12, 2, 35, 2), (16, 1, 1, 1)],
)
def test_the_largest_divisor_that_fits(count, unit, usable, chosen):
    def expected(rows):
        return Memory("logits", {"activations": 10.0 * rows})

    assert largest_that_fits(expected, count, unit, usable) == chosen


def test_a_batch_keeps_the_rows_it_needs():
    def expected(rows):
        return Memory("logits", {"activations": 10.0 * rows})

    assert largest_that_fits(expected, 8, 1, 5, least=2) == 2
    assert largest_that_fits(expected, 3, 1, 5, least=4) == 3


def test_no_smaller_minibatch_where_it_takes_as_much():
    def expected(rows):  # what does not depend on the minibatch is the most
        return Memory("sampling", {"KV cache": max(50.0, 10 * rows)})

    assert largest_that_fits(expected, 16, 1, 20) == 4


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [{"prompt": f"{n} {n + 2}", "completion": f" {n + 4}"} for n in range(2, 22, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (tmp_path / "own.py").write_text("def mine(prompts, responses):\n    return [0.0] * 16\n")
    return "--train-file rows.jsonl --preview "


ROLLOUTS = "--reward-function own.py:mine --eval-every 0 --batch-size 16 --max-new-tokens 40 "


def expected_in(out: str) -> str:
    """The memory expected, with its parts, as it was said."""
    (line,) = [line for line in out.splitlines() if line.startswith("memory expected")]
    return line.split(": ", 1)[1].split(" of ")[0]


@pytest.mark.parametrize("script", [ppo_training, group_training])
def test_a_minibatch_is_chosen_and_said(rows, capsys, script):
    words = (rows + ROLLOUTS).split()
    assert script.main(words) == 0
    out = capsys.readouterr().out
    assert "memory expected if responses take all --max-new-tokens 40: " in out
    assert "in a gradient of 16 rows" in out
    assert "weights 0.5 MB" in out and "logits " in out
    script.main([*words, "--memory-limit", "0.008"])
    out = capsys.readouterr().out
    assert "to fit the memory: --mini-batch-size 4 --gradient-accumulation-steps 4" in out
    assert "in a gradient of 4 rows" in out and "of 8.0 MB" in out
    chosen = expected_in(out)
    few = "--mini-batch-size 4 --gradient-accumulation-steps 4".split()
    script.main([*words, *few])  # what was asked for is what is said, with room to spare
    assert expected_in(capsys.readouterr().out) == chosen
    script.main([*words, *few[:2]])
    assert expected_in(capsys.readouterr().out) == chosen
    script.main([*words, "--memory-limit", "0.008", "--mini-batch-size", "16"])
    out = capsys.readouterr().out
    assert "in a gradient of 16 rows" in out and "warning: memory expected" in out
    assert "taken by --mini-batch-size 4 --gradient-accumulation-steps 4" in out


def test_frozen_states_are_kept_where_they_fit(rows, capsys):
    words = [*(rows + ROLLOUTS).split(), "--lora-layers", "1", "--ppo-epochs", "2"]
    ppo_training.main(words)
    out = capsys.readouterr().out
    assert "kept for the epochs: what 1 frozen blocks give, " in out
    ppo_training.main([*words, "--recompute-frozen"])
    assert "kept" not in capsys.readouterr().out
    ppo_training.main([*words, "--memory-limit", "0.0001"])
    out = capsys.readouterr().out
    assert "to fit the memory: --recompute-frozen" in out and "kept" not in out
    words = [*(rows + ROLLOUTS).split(), "--lora-layers", "1"]
    group_training.main([*words, "--beta", "0"])  # one pass over each row
    assert "kept" not in capsys.readouterr().out
    group_training.main([*words, "--beta", "0.1"])
    assert "kept" in capsys.readouterr().out


def test_rows_of_fine_tuning_are_chosen_and_said(rows, capsys):
    assert sft.main(rows.split()) == 0
    assert "memory expected: " in capsys.readouterr().out
    sft.main([*rows.split(), "--memory-limit", "0.00095"])
    out = capsys.readouterr().out
    assert "to fit the memory: --batch-size " in out and "--gradient-accumulation-steps" in out
    sft.main([*rows.split(), "--memory-limit", "0.0001", "--batch-size", "1"])
    out = capsys.readouterr().out
    assert "to fit" not in out and "less is taken by a lower --lora-rank" in out


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_preferences_say_what_they_take(rows, tmp_path, capsys, algorithm):
    sides = [{"prompt": f"{n} {n + 2}", "chosen": "6 8", "rejected": "7"} for n in range(2, 22, 2)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sides))
    words = f"--algorithm {algorithm} --train-file pairs.jsonl --preview --memory-limit "
    preference_training.main([*words.split(), "1"])
    assert "memory expected: " in capsys.readouterr().out
    preference_training.main([*words.split(), "0.0001"])
    out = capsys.readouterr().out
    least = {"dpo": 1, "kto": 2}[algorithm]
    assert f"--batch-size {least} --gradient-accumulation-steps {4 // least}" in out


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_chosen_minibatch_stays_that_of_a_resumed_run(rows, tmp_path, capsys, monkeypatch):
    line = ROLLOUTS + "--train-file rows.jsonl --save-file out.npz --output-dir run "
    words = [*line.replace("40", "24").split(), "--num-steps", "2", "--save-every", "1"]
    monkeypatch.setattr(memory_fit, "usable_memory", lambda limit: 6e6)
    ppo_training.main(words)
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    assert found["mini_batch_size"] < 16
    assert found["mini_batch_size"] * found["gradient_accumulation_steps"] == 16
    assert f"--mini-batch-size {found['mini_batch_size']}" in out
    monkeypatch.setattr(memory_fit, "usable_memory", lambda limit: 6e9)
    ppo_training.main(["--resume", "run/checkpoints/step-00000001"])
    out = capsys.readouterr().out
    assert "to fit" not in out and f"minibatches of {found['mini_batch_size']};" in out


# ------------------------------------------------------------------------------ the machine


def test_what_may_be_used(monkeypatch):
    import mlx.core as mx

    from models import file_checks

    assert memory_fit.usable_memory(3.5) == 3.5e9
    monkeypatch.setattr(file_checks, "machine_memory", lambda: 10e9)
    assert memory_fit.usable_memory(None) == pytest.approx(8e9)
    told = {"max_recommended_working_set_size": 5_000_000_000}  # as on Apple silicon
    monkeypatch.setattr(mx, "device_info", lambda: told, raising=False)
    assert memory_fit.usable_memory(None) == 5e9


def test_full_fine_tuning_counts_the_reference(tmp_path):
    loaded, other = (load_model(tiny_model_folder(tmp_path / name)) for name in "ab")
    tuning = add_lora(loaded.model, LoraConfig(rank=2, keys=["v_proj"]))
    args = Namespace(optimizer="adam", grad_checkpoint=False)
    alone, _ = memory_fit.described(args, loaded, tuning, (None,))
    both, _ = memory_fit.described(args, loaded, tuning, (None, other.model))
    assert both.weights == alone.weights + weight_bytes(other.model.parameters())
