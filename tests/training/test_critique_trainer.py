"""PPO on answers, critiques and revisions: who reads what, and each kind's share of the loss."""

import json

import mlx.optimizers as optim
import numpy as np
import pytest
from files import ROOT, without_times
from tiny import tiny_model
from tiny_ppo import EOS, SMALL, tuned, weights

import ppo_training
from data_utils import PromptRow
from mlx_critique_trainer import CritiqueTrainer, with_critiques
from models.actor_critic import ActorCritic, ValueHead
from models.trunk import hidden_size
from rewards.reward_set import Reward, RewardSet
from rl.ppo_config import PPOConfig
from training.critique_loop import CritiqueLoop


def make_trainer(weight: float, **config) -> CritiqueTrainer:
    model = tiny_model()
    policy = ActorCritic(model, ValueHead(hidden_size(model)), tuned(model, "lora"))
    options = {**SMALL, "batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 1, **config}
    return CritiqueTrainer(
        with_critiques(PPOConfig(**options)),
        policy,
        weight=weight,
        optimizer=optim.SGD(0.1),
        eos_ids=EOS,
    )


def batch(seed: int = 0):
    rng = np.random.default_rng(seed)
    queries = [rng.integers(2, 64, 3).tolist() for _ in range(12)]
    responses = [rng.integers(2, 64, 3 + i % 3).tolist() for i in range(12)]
    return queries, responses, rng.normal(size=12).tolist()


def movement(weight: float, **config) -> dict[str, np.ndarray]:
    trainer = make_trainer(weight, mini_batch_size=4, **config)
    before = weights(trainer)
    trainer.step(*batch())
    return {name: after - before[name] for name, after in weights(trainer).items()}


def test_rows_of_a_prompt_stand_in_one_minibatch():
    order = make_trainer(0.5).minibatch_order(0)
    assert sorted(order) == list(range(12))
    for start in (0, 6):
        part = order[start : start + 6]
        assert (part // 4).tolist() == [0, 0, 1, 1, 2, 2]  # kind after kind
        assert part[:2].tolist() == (part[2:4] - 4).tolist() == (part[4:] - 8).tolist()


def test_the_loss_is_shared_by_its_weight():
    """The gradient is linear in w, and at the ends that of one part alone."""
    none, half, whole = (movement(weight) for weight in (0.0, 0.5, 1.0))
    size = max(np.abs(none[name] - whole[name]).max() for name in none)
    assert size > 1e-5
    for name in none:
        middle = (none[name] + whole[name]) / 2
        np.testing.assert_allclose(half[name], middle, atol=1e-3 * size)


def test_advantages_are_whitened_kind_by_kind():
    trainer = make_trainer(0.5)
    queries, responses, scores = batch()
    scores = [s + 100 * (i // 4) for i, s in enumerate(scores)]  # kinds far apart
    rollout = trainer.prepare(trainer.as_rollout(queries, responses), scores)
    trainer.score_policy(rollout)
    trainer.score_reference(rollout)
    trainer.compute_rewards(rollout)
    trainer.compute_advantages(rollout)
    advantages, mask = np.array(rollout.advantages), np.array(rollout.mask) > 0
    for kind in range(3):
        rows = slice(4 * kind, 4 * kind + 4)
        assert abs(advantages[rows][mask[rows]].mean()) < 1e-4


class Words:
    """A tokenizer whose text of a token is its number."""

    def decode(self, ids, skip_special_tokens=True) -> str:
        return " ".join(map(str, ids))

    def encode(self, text: str) -> list[int]:
        return [int(word) % 64 for word in text.split() if word.isdigit()] or [2]


def make_loop() -> CritiqueLoop:
    prompts = [PromptRow([2 + i], str(2 + i), {}) for i in range(9)]
    reward = Reward("length", lambda prompts, responses: [len(r.split()) / 9 for r in responses])
    loop = CritiqueLoop(
        None,
        make_trainer(0.5),
        RewardSet([reward], unscored=True),
        Words(),
        prompts,
        [],
        {},
        None,
        backend=None,
    )
    loop.encode = Words().encode
    loop.critique_template = "11 {prompt} 12 {response} 13"
    loop.revision_template = "21 {prompt} 22 {response} 23 {critique} 24"
    return loop


def test_a_critique_reads_the_answer_and_a_revision_reads_both():
    loop = make_loop()
    made = loop.collect()
    count = len(made.rows)
    queries, responses = made.whole.queries, made.whole.responses
    assert loop.sampled == sum(map(len, responses)) and {"rollout", "reward"} == {*loop.seconds}
    assert count == 4 and len(queries) == 12
    for i, row in enumerate(made.rows):
        (prompt,), answer, critique = row.tokens, responses[i], responses[count + i]
        assert queries[i] == [prompt]
        assert queries[count + i] == [11, prompt, 12, *answer, 13]
        assert queries[2 * count + i] == [21, prompt, 22, *answer, 23, *critique, 24]
    scores = [len(r) / 9 for r in responses]
    gains = [scores[2 * count + i] - scores[i] for i in range(count)]
    np.testing.assert_allclose(made.every_score, scores[:count] + gains + scores[2 * count :])


def test_a_run_logs_gains_and_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = (
        f"--ground_truth_reward --data {ROOT}/data --use-self-critique --num-steps 2 "
        "--batch-size 4 --critique-template {prompt}{response}? "
        "--revision-template {prompt}{response}{critique}! "
        "--max-new-tokens 6 --eval-every 0 --output-dir"
    )
    ppo_training.main([*line.split(), "run"])
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert {"critique/gain", "critique/improved_share", "critique/revised_score"} <= row.keys()
    # At w 0 no critique is sampled, and all is as without.
    ppo_training.main([*line.split(), "none", "--critique-weight", "0"])
    plain = line.replace("--use-self-critique", "").split("--critique-template")[0]
    plain += "--max-new-tokens 6 --eval-every 0 --output-dir plain"
    ppo_training.main(plain.split())
    rows = [
        [
            without_times(json.loads(line))
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("none", "plain")
    ]
    assert rows[0] == rows[1]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_revisions_get_better(seed, tmp_path, monkeypatch):
    """At w 1, the revised score rises by 0.1 or more in 60 steps."""
    monkeypatch.chdir(tmp_path)
    ppo_training.main(
        f"--ground_truth_reward --data {ROOT}/data --use-self-critique --critique-weight 1 "
        "--critique-template {prompt}{response}? --revision-template {prompt}{response}{critique}! "
        f"--max-new-tokens 16 --num-steps 60 --batch-size 32 --eval-every 0 --seed {seed} "
        "--output-dir run".split()
    )
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = [row["critique/revised_score"] for row in rows]
    print(seed, np.mean(found[:5]), np.mean(found[-5:]))
    assert np.mean(found[-5:]) >= np.mean(found[:5]) + 0.1
