"""What techniques.py reads off models that it trains: neighbours, texts for a score, critiques.

As in techniques_runs.py, each function takes (folder of a seed, seed) and returns figures.
"""

import json
import sys
from pathlib import Path

from techniques_runs import PROMPTS, REWARD, ROOT, curve, end, ppo, sft

sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402

from reports.plot_style import series  # noqa: E402
from reports.reward_report import pearson, spearman  # noqa: E402
from rewards.digits import PROMPT_NUMBERS, digits_score  # noqa: E402

SHORT = "--critique-template '{prompt} {response}?'"  # the model spells English letter by letter

# ------------------------------------------------------------------------------ contrastive


NEIGHBOURS = 5


def contrastive(place: Path, seed: int) -> dict:
    """Whether near answers have the same label, on held-out rows, and what it costs in loss."""
    found = {}
    for weight in ("0", "0.1", "1"):
        flags = f"--use-contrastive --contrastive-weight {weight}" if weight != "0" else ""
        rows = sft(
            place,
            seed,
            f"contrastive_{weight}",
            f"--data-base {REWARD} --iters 250 --batch-size 32 --steps-per-eval 250 {flags}",
        )
        accuracy, near = neighbours(place, f"contrastive_{weight}")
        found[weight] = {
            "accuracy": accuracy,
            "off_by": near,
            "loss": float(series(rows, "valid/loss")[1][-1]),
        }
    accuracy, near = neighbours(place, None)
    found["untrained"] = {"accuracy": accuracy, "off_by": near}
    return found


def neighbours(place: Path, name: str | None) -> tuple[float, float]:
    """(share of held-out rows whose nearest training rows vote for their label, mean error).

    The error is that of the neighbours' mean label, in quintiles.
    """
    import mlx.core as mx

    from data_loading.labels import label_edges, label_of
    from data_utils import make_batch, read_records, tokenise_sft
    from mlx_sft_trainer import ContrastiveTask
    from models.adapter_files import load_adapter
    from models.load import load_model
    from models.trunk import picked_hidden
    from models.tuning import Tuning
    from rl.contrastive import pooled

    loaded = load_model()
    if name is not None:
        load_adapter(loaded, str(place / f"{name}.npz"))
    loaded.model.eval()
    task = ContrastiveTask(loaded.model, Tuning(), temperature=1.0, contrastive_weight=0.0)
    kinds: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    edges = None
    for split in ("train", "valid"):
        records = list(read_records(place / "data" / f"{REWARD}{split}.jsonl"))
        edges = label_edges(records) if edges is None else edges
        rows = tokenise_sft(records, loaded.tokenizer).rows
        states = []
        for start in range(0, len(rows), 50):
            inputs, index, _, _, shares, _ = task.arrays(make_batch(rows[start : start + 50]))
            states.append(np.array(pooled(picked_hidden(loaded.model, inputs, index), shares)))
        mx.clear_cache()
        kinds[split] = np.concatenate(states), np.array([label_of(r, edges) for r in records])
    (known, labels), (z, truth) = kinds["train"], kinds["valid"]
    nearest = labels[np.argsort(-(z @ known.T), axis=1, kind="stable")[:, :NEIGHBOURS]]
    votes = np.array([np.bincount(row, minlength=5).argmax() for row in nearest])
    return float((votes == truth).mean()), float(np.abs(nearest.mean(axis=1) - truth).mean())


# ------------------------------------------------------------------------------ scores, critiques


WANTED = (0.2, 0.4, 0.6, 0.8, 1.0)


def texts_of(place: Path, name: str, prompts: list[str], **options) -> list[str]:
    """What the model with adapter NAME writes after each prompt."""
    import mlx.core as mx

    from models.adapter_files import load_adapter
    from models.decoding import generate
    from models.load import load_model

    loaded = load_model()
    load_adapter(loaded, str(place / f"{name}.npz"))
    loaded.model.eval()
    ids = [loaded.tokenizer.encode(prompt) for prompt in prompts]
    made = generate(loaded.model, ids, eos_ids=loaded.eos_ids, key=mx.random.key(0), **options)
    return [loaded.tokenizer.decode(r, skip_special_tokens=True) for r in made.responses]


def conditioning(place: Path, seed: int) -> dict:
    """True score of 128 responses for each score that is asked for."""
    from data_utils import Conditioning

    sft(
        place,
        seed,
        "conditioning",
        f"--data-base {REWARD} --use-decision-transformer --iters 250 --batch-size 32 "
        "--lora-layers -1 --steps-per-eval 0",
    )
    lines = (place / "data" / f"{PROMPTS}test.jsonl").read_text("utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines][:128]
    template = Conditioning("[Target Score: {score:.1f}] ", 1.0)
    scores = []
    for wanted in WANTED:
        asked = [template.prefix(wanted) + prompt for prompt in prompts]
        texts = texts_of(place, "conditioning", asked, max_tokens=32)
        scores.append(
            float(np.mean([digits_score(p + t) for p, t in zip(prompts, texts, strict=True)]))
        )
    rank = spearman(np.array(WANTED), np.array(scores))
    return {"scores": scores, "rank_correlation": rank, "prompts": len(prompts)}


def critique_rows(place: Path) -> None:
    """Rows of the reward data with an answer, as prompts, answers and reasons: "7 of 9 fit"."""
    for split in ("train", "valid", "test"):
        made = []
        for line in (place / "data" / f"{REWARD}{split}.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            words, score = row["text"].split(), float(row["reward"])
            if len(words) <= PROMPT_NUMBERS:
                continue
            fits = round(score * max(len(words), 5))  # rewards/digits.py
            made.append(
                {
                    "prompt": " ".join(words[:PROMPT_NUMBERS]),
                    "completion": " " + " ".join(words[PROMPT_NUMBERS:]),
                    "reward": round(score, 2),
                    "score_reason": f"{fits} of {len(words)} fit.",
                }
            )
        text = "".join(json.dumps(row) + "\n" for row in made)
        (place / "data" / f"critiques_{split}.jsonl").write_text(text, encoding="utf-8")


def critique_sft(place: Path, seed: int) -> dict:
    """How well scores that are read from greedy critiques of held-out answers fit the true ones."""
    critique_rows(place)
    base = "--data-base critiques_ --batch-size 32 --mask-prompt --lora-layers -1 --iters 800"
    rows = sft(
        place,
        seed,
        "critique_sft_with",
        f"{base} --steps-per-eval 0 --use-self-critique {SHORT}",
    )
    lines = (place / "data" / "critiques_test.jsonl").read_text("utf-8").splitlines()
    held_out = [json.loads(line) for line in lines]
    truth = np.array([row["reward"] for row in held_out])
    asked = [f"{row['prompt']} {row['completion'].strip()}?" for row in held_out]
    from models.decoding import Sampling

    texts = texts_of(place, "critique_sft_with", asked, max_tokens=40, sampling=Sampling(0.0))
    said = [read_score(text) for text in texts]
    there = np.array([score is not None for score in said])
    told = np.array([score for score in said if score is not None])
    return {
        "critiques": {
            "correlation": pearson(told, truth[there]),
            "readable": float(there.mean()),
            "train_loss": end(rows, "train/loss"),
            "pairs": np.stack([truth[there], told], axis=1).tolist(),
        }
    }


def read_score(critique: str) -> float | None:
    try:
        return float(critique.split("Score:")[1].split()[0])
    except (IndexError, ValueError):
        return None


MORE = "plain, three times the responses"


def critique_ppo(place: Path, seed: int) -> dict:
    """Scores of answers and of revisions, against PPO that samples as many responses."""
    templates = f"{SHORT} --revision-template '{{prompt}} {{response}} {{critique}}!'"
    kinds = {
        "w 1": f"--use-self-critique --critique-weight 1 {templates}",
        MORE: "",
    }
    found = {}
    for name, flags in kinds.items():
        rows = ppo(
            place,
            seed,
            f"critique_ppo_{name.replace(' ', '_').replace(',', '')}",
            f"{flags} --max-new-tokens 16",
            steps=60 if name != MORE else 40,
            batch=96 if name == MORE else 32,
        )
        found[name] = {
            "answer": end(rows, "env/ground_truth_mean"),
            "curve": curve(rows, "env/ground_truth_mean"),
        }
        if "critique" in flags:
            first = series(rows, "critique/revised_score")[1][:5]
            found[name] |= {
                "revised_first": float(np.mean(first)),
                "revised": end(rows, "critique/revised_score"),
                "improved_share": end(rows, "critique/improved_share"),
                "revised_curve": curve(rows, "critique/revised_score"),
            }
    return found
