"""A score before the prompt: which tokens, which are trained, and who finds it again."""

import json

import numpy as np
import pytest
from files import ROOT

import fuse
import ppo_training
import sft
from chat.speaker import Loader
from data_loading.conditioning import KEY
from data_utils import Conditioning, Record, check_template, conditioned, put_before, tokenise_sft
from errors import UserError
from models.adapter_description import read_description
from models.load import load_model

SCORES = Conditioning("[Target Score: {score:.1f}] ", 5.0)
BASE = "reward_function_increasing_mult_2_"


def test_a_row_s_tokens_and_mask_by_hand():
    tokenizer = load_model(None).tokenizer
    row = Record("text", "row", {}, text="8 20 22", reward=0.6)
    made = tokenise_sft([conditioned(row, SCORES)], tokenizer).rows[0]
    said = tokenizer.encode("[Target Score: 0.6] 8 20 22")
    assert made.tokens == [*said, 2]
    prefix = len(tokenizer.encode("[Target Score: 0.6]"))
    assert made.mask == [0] * prefix + [1] * 4  # 8, 20, 22 and the end
    assert row.text == "8 20 22"


def test_a_prompt_that_is_masked_stays_so_and_one_that_is_not_is_trained_but_for_the_score():
    tokenizer = load_model(None).tokenizer
    row = Record("prompt_completion", "row", {}, prompt="8", completion=" 20", reward=5)
    for mask_prompt, trained in ((True, [20]), (False, [8, 20])):
        made = tokenise_sft([conditioned(row, SCORES)], tokenizer, mask_prompt=mask_prompt).rows[0]
        words = [
            tokenizer.decode([t]).strip() for t, m in zip(made.tokens, made.mask, strict=True) if m
        ]
        assert [w for w in words if w.isdigit()] == [str(n) for n in trained]


def test_the_first_user_turn_says_it():
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
    ]
    made = put_before(turns, "[5] ")
    assert [turn["content"] for turn in made] == ["s", "[5] u", "a", "v"]
    with pytest.raises(UserError, match="no|none"):
        put_before(turns[:1], "[5] ")


@pytest.mark.parametrize(
    "template",
    [
        "",
        "no score",
        "{score} {other}",
        "{score:q}",
        "{",
        "{}",
        "{score:20000}",
        "{score:9999999999999}",
    ],
)
def test_templates_that_do_not_say_it(template):
    with pytest.raises(UserError, match="score-template"):
        check_template(template)


def test_rows_without_a_score():
    with pytest.raises(UserError, match="row 7: --use-decision-transformer: the row has no score"):
        conditioned(Record("text", "row 7", {}, text="8"), SCORES)


def test_it_is_found_again(tmp_path, monkeypatch, capsys):
    """In the adapter, in the fused folder, by PPO and by the chat."""
    monkeypatch.chdir(tmp_path)
    data = f"--data {ROOT}/data --data-base {BASE}"
    line = f"--train {data} --iters 2 --batch-size 8 --steps-per-eval 0 --max-rows 40"
    sft.main([*f"{line} --use-decision-transformer --output-dir s --save-file a.npz".split()])
    described = read_description("a.npz")[KEY]
    assert described["template"] == SCORES.template and 0.5 < described["target"] <= 1
    fuse.main("--adapter-file a.npz --save-path model".split())
    assert json.loads((tmp_path / "model/config.json").read_text())[KEY] == described

    rollout = f"--ground_truth_reward {data} --num-steps 1 --batch-size 4 --max-new-tokens 4"
    rollout += " --eval-every 0 --max-rows 20"
    for number, words in enumerate(("--resume_file a.npz", "--model model --target-score 0.3")):
        queries = []
        monkeypatch.setattr("mlx_ppo_trainer.PPOTrainer.generate", recording(queries), raising=True)
        ppo_training.main([*rollout.split(), *words.split(), "--output-dir", f"p{number}"])
        tokenizer = load_model(None).tokenizer
        texts = [tokenizer.decode(query, skip_special_tokens=True) for query in queries]
        target = 0.3 if number else described["target"]
        assert texts and all(t.startswith(f"[Target Score: {target:.1f}]") for t in texts)
        sample = json.loads((tmp_path / f"p{number}/samples.jsonl").read_text().splitlines()[0])
        assert "Target" not in json.dumps(sample)
        assert "asked for the score" in capsys.readouterr().out

    options = {"token_format": "standard", "prompt_template": None}
    for model, adapter in ((None, "a.npz"), ("model", None)):
        speaker = Loader(**options, target_score=0.7).speaker(model, adapter)
        ids, _ = speaker.prompting.tokens([{"role": "user", "content": "8 20"}])
        assert tokenizer.decode(ids, skip_special_tokens=True) == "[Target Score: 0.7] 8 20"
    with pytest.raises(UserError, match="was not trained on scores"):
        Loader(**options, target_score=0.7).speaker(None)


def recording(queries: list):
    from mlx_ppo_trainer import PPOTrainer

    generate = PPOTrainer.generate

    def recorded(self, given, **options):
        queries.extend(given)
        return generate(self, given, **options)

    return recorded


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_who_asks_for_more_gets_more(seed, tmp_path, monkeypatch):
    """Rank correlation of target and mean true score >= 0.9, the ends at least 0.2 apart."""
    from reports.reward_report import spearman

    monkeypatch.chdir(tmp_path)
    data = f"--data {ROOT}/data --data-base {BASE}"
    sft.main(
        f"--train {data} --use-decision-transformer --iters 250 --batch-size 32 --lora-layers -1 "
        f"--learning-rate 3e-3 --steps-per-eval 0 --seed {seed} --output-dir s "
        "--save-file a.npz".split()
    )
    targets, found = [0.2, 0.4, 0.6, 0.8, 1.0], []
    for target in targets:
        ppo_training.main(
            f"--ground_truth_reward {data} --resume_file a.npz --target-score {target} "
            f"--num-steps 1 --batch-size 64 --learning-rate 0 --eval-every 0 --seed {seed} "
            f"--output-dir p{target}".split()
        )
        (row,) = [json.loads(line) for line in open(f"p{target}/metrics.jsonl")]
        found.append(row["env/ground_truth_mean"])
    print(seed, np.round(found, 3))
    assert spearman(np.array(targets), np.array(found)) >= 0.9 and found[-1] - found[0] >= 0.2
