"""PyTorch baseline and MLX side from the same weights, batches and rollouts.

Differences are of float32: 1e-4 in logits, values and a PPO step, 1e-3 in 50 losses of a training.
"""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from baseline_setup import DIGITS, ROOT, close, losses, torch
from mlx.utils import tree_flatten
from pytorch_actor_critic import ActorCritic as TorchActorCritic
from pytorch_actor_critic import ValueHead as TorchValueHead
from pytorch_actor_critic import generate as torch_generate
from pytorch_actor_critic import pack as torch_pack
from pytorch_files import save_head, save_trained
from pytorch_models import Tuned
from pytorch_models import load_model as load_torch
from pytorch_optimizers import build_optimizer, trainable
from pytorch_ppo_trainer import PPOTrainer as TorchPPOTrainer
from pytorch_reward_model import RewardModel as TorchRewardModel
from pytorch_sft_trainer import RewardTrainer, SFTTrainer
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from data_utils import (
    BatchPlan,
    read_records,
    tokenise_preferences,
    tokenise_scalar,
    tokenise_sft,
)
from errors import UserError
from mlx_ppo_trainer import PPOConfig, PPOTrainer
from mlx_sft_trainer import LanguageModelTask, RewardModelTask, SupervisedTrainer
from models.actor_critic import ActorCritic, ValueHead
from models.adapter_files import load_adapter, read_head
from models.decoding import Sampling, generate
from models.load import load_model
from models.packing import pack
from models.reward_model import RewardModel, load_reward_head
from rewards.digits import digits_score
from training.optimizers import build_optimizer as build_mlx_optimizer

pytestmark = pytest.mark.torch
SIZES = dict(
    vocab_size=469,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
}
ROPE_THETA = 500000.0
LORA = {
    "fine_tune_type": "lora",
    "num_layers": -1,
    "lora_parameters": {"rank": 4, "scale": 4.0, "dropout": 0.0, "keys": None},
}
DORA = {**LORA, "fine_tune_type": "dora"}
PROMPT = {"fine_tune_type": "prompt", "num_prompt_tokens": 6}
FULL = {"fine_tune_type": "full"}
KINDS = {"lora": LORA, "dora": DORA, "prompt": PROMPT, "full": FULL}
QUERIES = [[1, 30, 40], [1, 50, 60, 70, 80], [1, 99]]
RESPONSES = [[31, 32, 2], [71, 2], [33, 34, 35, 36, 37, 38, 39, 40, 41, 2]]


@pytest.fixture(scope="module", params=["digits", *CONFIGS])
def folder(request, tmp_path_factory):
    """A model folder: the embedded one, or a tiny random one of another architecture."""
    return DIGITS if request.param == "digits" else make_folder(request.param, tmp_path_factory)


def make_folder(kind: str, tmp_path_factory):
    torch.manual_seed(0)
    path, config = tmp_path_factory.mktemp(kind), CONFIGS[kind]()
    config.rope_parameters = {"rope_type": "default", "rope_theta": ROPE_THETA}
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(path)
    stored = json.loads((path / "config.json").read_text())
    del stored["rope_parameters"]
    stored["rope_theta"] = ROPE_THETA  # where hub models have it, and where mlx-lm looks
    (path / "config.json").write_text(json.dumps(stored))
    for file in DIGITS.glob("*token*"):
        shutil.copyfile(file, path / file.name)
    return path


def moved(model: Tuned, size: float = 0.1) -> Tuned:
    """The model with its trained tensors pushed away from where they start (LoRA's B is 0)."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.arrays().values():
            weight.add_(torch.randn_like(weight) * size)
    return model


def both_models(folder, description: dict, tmp_path, size: float = 0.1):
    """(torch's, (mlx's model, its tuning)) with the same trained arrays, by way of a file."""
    loaded = load_torch(str(folder))
    model = moved(Tuned(loaded.model, description), size)
    path = str(tmp_path / "adapter.safetensors")
    save_trained(path, model, loaded, None)
    base = load_model(folder, dtype="float32")
    return model.eval(), (base.model, load_adapter(base, path))


# ---- one forward pass --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_values(folder, kind, tmp_path):
    size = 0.02 if kind == "full" else 0.1
    theirs, (model, tuning) = both_models(folder, KINDS[kind], tmp_path, size)
    head = TorchValueHead(theirs.base.config.hidden_size, init_std=0.2)
    ours = ValueHead(theirs.base.config.hidden_size)
    ours.weight, ours.bias = mx.array(head.weight.detach().numpy()), mx.array([0.0])
    actor, critic = ActorCritic(model, ours, tuning), TorchActorCritic(theirs, head)
    packed = pack(QUERIES, RESPONSES, prefix=tuning.prefix)
    found = actor(packed, with_entropy=True)
    wanted = critic(torch_pack(QUERIES, RESPONSES), with_entropy=True)
    for name, a, b in zip(("logprobs", "values", "entropy"), found, wanted, strict=True):
        close(a, b, name, relative=1e-4)
    rows = [[1, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130]]
    tokens = mx.array([[*tuning.prefix, *rows[0]]])
    logits = theirs.logits(theirs.hidden_states(torch.tensor(rows)))
    close(model(tokens)[:, len(tuning.prefix) :], logits, "logits", relative=1e-4)


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_reference_is_the_base(kind, tmp_path):
    theirs, (model, tuning) = both_models(DIGITS, KINDS[kind], tmp_path)
    base = load_torch(str(DIGITS)).model
    tokens = torch.tensor([[1, 30, 40, 50]])
    with theirs.disabled():
        logits = theirs.logits(theirs.hidden_states(tokens))
    close(logits, base(tokens).logits, relative=1e-6)
    with tuning.disabled():
        close(model(mx.array(tokens.numpy())), logits, relative=1e-4)
    assert (theirs.logits(theirs.hidden_states(tokens)) - logits).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_texts_and_sampled_logprobs(folder, kind, tmp_path):
    size = 0.02 if kind == "full" else 0.1
    theirs, (model, tuning) = both_models(folder, KINDS[kind], tmp_path, size)
    limits, options = [9, 4, 7], {"eos_ids": {2}}
    prompts = [[*tuning.prefix, *query] for query in QUERIES]
    greedy = generate(
        model, prompts, max_tokens=limits, sampling=Sampling(temperature=0), **options
    )
    same = torch_generate(theirs, QUERIES, max_tokens=limits, temperature=0.0, **options)
    assert greedy.responses == same.responses and greedy.finished == same.ended
    head = TorchValueHead(theirs.base.config.hidden_size, init_std=0.2)
    made = torch_generate(theirs, QUERIES, max_tokens=limits, seed=3, value_head=head, **options)
    assert [len(r) <= limit for r, limit in zip(made.responses, limits, strict=True)]
    # Left-padded sampling with a cache, and the right-padded forward pass of the update.
    packed = torch_pack(QUERIES, made.responses)
    logprobs, values = TorchActorCritic(theirs, head)(packed)
    for row, response in enumerate(made.responses):
        close(made.sampled_logprobs[row], logprobs[row, : len(response)], "logprobs", relative=1e-4)
        close(made.sampled_values[row], values[row, : len(response)], "values", relative=1e-4)


# ---- supervised training -----------------------------------------------------------------------


def rows_of(kind: str, tokenizer):
    name = {"text": "", "scalar": "reward_function_", "preference": "preference_"}[kind]
    records = read_records(ROOT / "data" / f"{name}increasing_mult_2_train.jsonl")
    make = {"text": tokenise_sft, "scalar": tokenise_scalar, "preference": tokenise_preferences}
    return make[kind](records, tokenizer)


def plan_of(rows) -> BatchPlan:
    return BatchPlan(rows.lengths, 16, seed=0)


RATES = {"lora": 3e-3, "dora": 3e-3, "full": 3e-4, "prompt": 3e-2}


@pytest.mark.parametrize("kind", ["lora", "prompt", "full"])
def test_sft_losses(kind, tmp_path):
    theirs, (model, tuning) = both_models(DIGITS, KINDS[kind], tmp_path, size=1e-3)
    tokenizer = load_torch(str(DIGITS)).tokenizer
    rows = rows_of("text", tokenizer)
    ours = SupervisedTrainer(
        LanguageModelTask(model, tuning),
        build_mlx_optimizer("adam", RATES[kind], schedule="cosine", steps=50, warmup=5),
        max_grad_norm=1.0,
    )
    cosine = {"schedule": "cosine", "steps": 50, "warmup": 5}
    trainer = SFTTrainer(
        theirs,
        tokenizer,
        optimizer=build_optimizer(trainable(theirs), "adam", RATES[kind], **cosine),
        max_grad_norm=1.0,
    )
    found, wanted = (losses(each, rows.rows, plan_of(rows), 50) for each in (ours, trainer))
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert np.mean(found[-5:]) < np.mean(found[:5]) - 0.1  # and it is a training


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize(
    "kind, data", [("lora", "scalar"), ("lora", "preference"), ("prompt", "scalar")]
)
def test_reward_model_losses(kind, data, pooling, tmp_path):
    theirs, (model, tuning) = both_models(DIGITS, KINDS[kind], tmp_path, size=1e-3)
    torch_model = TorchRewardModel(theirs, pooling=pooling)
    torch_model.save_head(str(tmp_path / "adapter.safetensors"))
    reward_model = RewardModel(model, pooling=pooling, tuning=tuning)
    load_reward_head(reward_model, tmp_path / "adapter.safetensors")
    tokenizer = load_torch(str(DIGITS)).tokenizer
    rows = rows_of(data, tokenizer)
    ours = SupervisedTrainer(
        RewardModelTask(reward_model, centering=0.01), build_mlx_optimizer("adam", 1e-3)
    )
    steps, accumulation = (50, 1) if (kind, pooling) == ("lora", "mean") else (10, 2)
    trainer = RewardTrainer(
        torch_model,
        tokenizer,
        optimizer=build_optimizer(trainable(torch_model), "adam", 1e-3),
        centering=0.01,
    )
    asked = rows.rows, plan_of(rows), steps, accumulation
    found, wanted = losses(ours, *asked), losses(trainer, *asked)
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    texts = [getattr(row, "tokens", None) or row.chosen for row in rows.rows[:20]]
    close(reward_model.score(texts), torch_model.score(texts), "scores", relative=2e-3)


# ---- a PPO step --------------------------------------------------------------------------------

VARIANTS = {
    "lora": (LORA, {}),
    "lora, two minibatches": (
        LORA,
        dict(mini_batch_size=8, kl_penalty="full", whiten_rewards=True),
    ),
    "lora, temperature": (
        LORA,
        dict(
            temperature=0.7,
            adap_kl_ctrl=True,
            kl_penalty="k3",
            cliprange_high=0.3,
            dual_clip=1.01,
            pad_to_multiple=4,
        ),
    ),
    "prompt": (
        PROMPT,
        dict(
            gradient_accumulation_steps=2,
            mini_batch_size=8,
            use_score_scaling=True,
            missing_eos_penalty=0.5,
        ),
    ),
    "full": (FULL, dict(gamma=0.98, score_clip=0.5, overlong_buffer=4)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ppo_step(variant, tmp_path):
    description, options = VARIANTS[variant]
    config = PPOConfig(
        **dict(
            batch_size=16,
            ppo_epochs=2,
            init_kl_coef=0.1,
            learning_rate=1e-3,
            max_new_tokens=16,
            rollout_logprobs=False,
        )
        | options
    )
    theirs, (model, tuning) = both_models(DIGITS, description, tmp_path, size=0.01)
    reference = torch_reference = None
    if tuning.kind == "full":
        reference = load_model(DIGITS, dtype="float32").model
        torch_reference = Tuned(load_torch(str(DIGITS)).model, FULL).requires_grad_(False)
    head, saved = ValueHead(64), TorchValueHead(64, init_std=0.02)
    head.load_weights([(n, mx.array(p.detach().numpy())) for n, p in saved.named_parameters()])
    ours = PPOTrainer(config, ActorCritic(model, head, tuning), reference, eos_ids={2})
    critic = TorchActorCritic(theirs, saved)
    trainer = TorchPPOTrainer(config, critic, torch_reference, eos_ids={2})
    queries = [[1, 30 + 2 * i, 40 + i] for i in range(16)]
    for _ in range(2):  # by the second one policy and reference differ by what was learned
        responses = ours.generate(queries).responses
        rng = np.random.default_rng(0)
        masks = [[1, *rng.integers(0, 2, len(r) - 1).tolist()] for r in responses]
        scores = rng.random(16).tolist()
        check_stages(ours, trainer, (queries, responses, scores, masks))
        found = ours.step(queries, responses, scores, masks)
        wanted = trainer.step(queries, responses, scores, masks)
        check_statistics(found, wanted)
    close(ours.kl_controller.value, trainer.kl_controller.value, "KL coefficient")
    check_weights(ours.model, trainer.model)


BAD_ARGUMENTS = {
    "an id beyond the vocabulary": ([[1, 469]], [[30, 2]], [0.5], None),
    "a negative id": ([[1, 30]], [[-1, 2]], [0.5], None),
    "an empty response": ([[1, 30]], [[]], [0.5], None),
    "no number": ([[1, 30]], [[30, 2]], [None], None),
    "a score that is not finite": ([[1, 30]], [[30, 2]], [float("nan")], None),
    "a mask of another length": ([[1, 30]], [[30, 2]], [0.5], [[1]]),
    "two rows for one": ([[1, 30]] * 2, [[30, 2]], [0.5], None),
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_what_cannot_be_learned_from_is_refused_alike(arguments, tmp_path):
    theirs, (model, tuning) = both_models(DIGITS, LORA, tmp_path)
    config, said = PPOConfig(batch_size=1), []
    critics = (
        ActorCritic(model, ValueHead(64), tuning),
        TorchActorCritic(theirs, TorchValueHead(64)),
    )
    for kind, critic in zip((PPOTrainer, TorchPPOTrainer), critics, strict=True):
        with pytest.raises(UserError) as error:
            kind(config, critic, eos_ids={2}).step(*arguments)
        said.append(str(error.value))
    assert said[0] == said[1]


def check_stages(ours, trainer, arguments) -> None:
    # Copies of the running moments: looking must not count as a step.
    states = ours.running.state_dict(), trainer.running.state_dict()
    queries, responses, *rest = arguments
    rollouts = [t.prepare(t.as_rollout(queries, responses), *rest) for t in (ours, trainer)]
    ours.running.load_state_dict(states[0])
    trainer.running.load_state_dict(states[1])
    for t, rollout in zip((ours, trainer), rollouts, strict=True):
        t.score_policy(rollout)
        t.score_reference(rollout)
        t.compute_rewards(rollout)
        t.compute_advantages(rollout)
    for name in (
        "scores",
        "mask",
        "logprobs",
        "ref_logprobs",
        "values",
        "kls",
        "rewards",
        "advantages",
        "returns",
    ):
        found, wanted = (getattr(rollout, name) for rollout in rollouts)
        close(found, wanted, name, relative=1e-4, absolute=1e-5)


def check_statistics(found: dict, wanted: dict) -> None:
    timeless = {name for name in found if not name.startswith("time/")}
    assert timeless == {name for name in wanted if not name.startswith("time/")}
    for name in timeless:
        close(found[name], wanted[name], name, relative=1e-4, absolute=1e-5)


def check_weights(ours: ActorCritic, theirs: TorchActorCritic) -> None:
    found = dict(tree_flatten(ours.trainable_parameters()))
    arrays = {
        **theirs.model.arrays(),
        "value_head.weight": theirs.value_head.weight,
        "value_head.bias": theirs.value_head.bias,
    }
    mine = {
        **ours.tuning.arrays(),
        "value_head.weight": ours.value_head.weight,
        "value_head.bias": ours.value_head.bias,
    }
    assert len(found) == len(mine) == len(arrays)
    for name, wanted in arrays.items():
        wanted = wanted.T if name.endswith((".lora_a", ".lora_b")) else wanted
        close(mine[name], wanted, name, relative=1e-4, absolute=1e-4)


def test_ppo_learns_the_same_thing(tmp_path):
    """Rollouts of their own: other random numbers, but the same direction."""
    config = PPOConfig(batch_size=32, init_kl_coef=0.0, max_new_tokens=16, learning_rate=3e-3)
    theirs, _ = both_models(DIGITS, LORA, tmp_path, size=0.0)
    loaded = load_torch(str(DIGITS))
    critic = TorchActorCritic(theirs, TorchValueHead(64))
    trainer = TorchPPOTrainer(config, critic, eos_ids={2})
    queries = [loaded.tokenizer.encode(f"{2 * i} {2 * i + 4}") for i in range(32)]
    means = []
    for _ in range(6):
        rollout = trainer.generate(queries)
        texts = [
            loaded.tokenizer.decode([*q, *r], skip_special_tokens=True)
            for q, r in zip(queries, rollout.responses, strict=True)
        ]
        scores = [digits_score(text) for text in texts]
        stats = trainer.update(rollout, scores)
        means.append(np.mean(scores))
        if len(means) == 1:  # kept log-probabilities are those of the policy
            assert abs(stats["ppo/policy/ratio"] - 1) < 0.2
    assert means[-1] > means[0] + 0.05


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_merged_folder(folder, kind, tmp_path):
    """The saved transformers folder gives the same logits in both, rope_theta included."""
    loaded = load_torch(str(folder))
    model = moved(Tuned(loaded.model, KINDS[kind]), 0.05).eval()
    tokens = torch.tensor([[1, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130]])
    before = model.logits(model.hidden_states(tokens))
    save_trained(str(tmp_path / "merged"), model, loaded, None)
    after = load_torch(str(tmp_path / "merged"))
    close(after.model(tokens).logits, before, "transformers", relative=1e-5)
    merged = load_model(tmp_path / "merged", dtype="float32")
    close(merged.model(mx.array(tokens.numpy())), before, "mlx", relative=1e-4)
    assert merged.eos_ids == after.eos_ids == {2}
    # The base's own: what transformers 5 would write has no rope_theta where mlx-lm looks for it.
    configs = [json.loads((at / "config.json").read_text()) for at in (folder, tmp_path / "merged")]
    kept, written = ({k: v for k, v in c.items() if k != "dtype"} for c in configs)
    assert kept == written
    close(model.logits(model.hidden_states(tokens)), before, "unharmed", relative=1e-7)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_adapter_files_of_the_mlx_side(suffix, tmp_path):
    from pytorch_files import load_adapter as load_torch_adapter

    from models.adapter_files import attach, save_adapter

    for kind, description in KINDS.items():
        path = tmp_path / f"{kind}{suffix}"
        base = load_model(DIGITS, dtype="float32")
        tuning = attach(base.model, description)
        mx.random.seed(0)
        arrays = {k: a + 0.05 * mx.random.normal(a.shape) for k, a in tuning.arrays().items()}
        tuning.load_arrays(arrays, "test")
        save_adapter(path, tuning, base)
        model = load_torch_adapter(load_torch(str(DIGITS)), str(path)).eval()
        tokens = np.array([[1, 30, 40, 50, 60]])
        front = np.array([[*tuning.prefix]], dtype=np.int64).reshape(1, -1)
        logits = base.model(mx.array(np.concatenate([front, tokens], axis=1)))
        theirs = model.logits(model.hidden_states(torch.from_numpy(tokens)))
        close(logits[:, front.shape[1] :], theirs, kind, relative=1e-4)


def test_value_head_file(tmp_path):
    head = TorchValueHead(64, init_std=0.3)
    save_head(tmp_path / "adapter.npz", "value_head", head.state_dict(), {})
    arrays, _ = read_head(tmp_path / "adapter.npz", "value_head")
    ours = ValueHead(64)
    ours.load_weights(list(arrays.items()))
    close(ours.weight, head.weight, relative=0)
