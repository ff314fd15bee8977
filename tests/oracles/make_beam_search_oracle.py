"""Writes tests/oracles/beam_search.json: transformers' beam search on two tiny models.

Needs torch; the file was made with torch 2.13.0 and transformers 5.23.0, float32 on a CPU.
"""

import itertools
import json
from pathlib import Path

MODELS = ("tests/oracles/ppo_step_model", "tests/oracles/ppo_step_reference")
ROOT = Path(__file__).resolve().parents[2]


def cases() -> list[dict]:
    """Options as `models.beam_search.beam_search` names them, and the prompt's token ids."""
    made = []
    prompts = {MODELS[0]: [[1, 40, 41], [7]], MODELS[1]: [[1, 5, 9, 60, 33]]}
    penalties, repetition = (1.0, 0.0, -1.5, 2.0), (1.0, 1.3)
    for model in MODELS:
        for beams, length_penalty, penalty in itertools.product((2, 3, 5), penalties, repetition):
            for prompt in prompts[model]:
                made.append(
                    {
                        "model": model,
                        "prompt": prompt,
                        "num_beams": beams,
                        "length_penalty": length_penalty,
                        "repetition_penalty": penalty,
                        "max_tokens": 6 + 4 * beams,
                        "eos_ids": [2],
                    }
                )
    several = [dict(case, eos_ids=[2, 30, 31, 44, 45, 50, 51]) for case in made[::3]]
    # So many that fewer candidates than (1 + their number) x beams would change what is found.
    eos = [4, 6, 7, 10, 11, 13, 14, 18, 20, 27, 32, 36, 41, 44, 45, 50, 52, 54, 58, 62]
    most = [
        {
            "model": MODELS[0],
            "prompt": prompts[MODELS[0]][0],
            "num_beams": beams,
            "length_penalty": 2.0,
            "repetition_penalty": 1.0,
            "max_tokens": 8,
            "eos_ids": eos,
        }
        for beams in (2, 3, 4)
    ]
    return made + several + most


def run(model, case: dict) -> dict:
    import torch

    prompt = torch.tensor([case["prompt"]])
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        num_beams=case["num_beams"],
        num_return_sequences=case["num_beams"],
        do_sample=False,
        max_new_tokens=case["max_tokens"],
        length_penalty=case["length_penalty"],
        repetition_penalty=case["repetition_penalty"],
        eos_token_id=case["eos_ids"],
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    replies = []
    for row in found.sequences[:, prompt.shape[1] :].tolist():
        ends = [i for i, token in enumerate(row) if token in case["eos_ids"]]
        replies.append(row[: ends[0] + 1] if ends else row)
    return {**case, "replies": replies, "scores": found.sequences_scores.tolist()}


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    done = []
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(ROOT / name).eval()
        done += [run(model, case) for case in cases() if case["model"] == name]
    lines = ",\n".join(json.dumps(case) for case in done)
    (ROOT / "tests/oracles/beam_search.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(len(done), "cases")
