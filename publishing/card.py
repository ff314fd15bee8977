"""The model card (README.md) of what fuse.py writes: what it is, how it came about, how to load it.

The header is the hub's metadata (https://huggingface.co/docs/hub/model-cards#model-card-metadata).
"""

import importlib.metadata
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.load import DEFAULT_NAME
from publishing.run_facts import RunFacts, copy_plots, plot_name
from run_folder.run_config import MADE_BY
from safe_files import write_atomically

LIBRARIES = ("mlx", "mlx-lm", "transformers", "huggingface-hub")
PPO = ("PPO", ["reinforcement-learning", "rlhf", "ppo"])
METHODS = {  # by what config.json calls a run
    "ppo": PPO,
    "pytorch_ppo": PPO,
    "sft": ("supervised fine-tuning", ["sft"]),
    "pytorch_sft": ("supervised fine-tuning", ["sft"]),
    "reward_model": ("reward-model training", []),
    "pytorch_reward_model": ("reward-model training", []),
    "preference": ("preference training", ["preference"]),
    "group": ("group reinforcement learning", ["reinforcement-learning", "rlhf"]),
    "rest": ("ReST", ["sft", "rlhf"]),
}
MARK = "<!-- written by mlx-rlhf: fuse.py replaces this file -->"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TASKS = {"reward": "text-classification", "classifier": "text-classification"}


@dataclass
class Facts:
    """What a card is written from. `kind`: model, reward, classifier, adapter, peft or gguf."""

    kind: str
    name: str  # USER/NAME, or that of the local folder
    base: str | None  # hub name or folder of the base model
    license: str | None = None
    adapters: list[dict] = field(default_factory=list)  # their descriptions
    weights: list[float] = field(default_factory=list)
    run: RunFacts | None = None
    quantized: bool = False
    pooling: str | None = None  # of a reward model
    scoring: str | None = None  # of a classifier: code that makes `inputs` of a text
    constant: float = 0.0  # of a classifier: what its own scores lack
    difference: str | None = None  # of the fused model from the unfused one


def write_card(folder: Path, facts: Facts) -> Path:
    """Write README.md, and the run's plots, into a model `folder`."""
    plots = copy_plots(facts.run, folder) if facts.run else []
    file = folder / "README.md"
    write_atomically(file, model_card(facts, plots))
    return file


def planned_files(facts: Facts) -> dict[str, int]:
    """Name -> bytes of what `write_card` would write."""
    plots = {
        plot_name(plot): plot.stat().st_size for plot in (facts.run.plots if facts.run else [])
    }
    return {"README.md": len(model_card(facts, [*plots]).encode("utf-8")), **plots}


def model_card(facts: Facts, plots: list[str]) -> str:
    """The whole card, header included."""
    parts = [
        f"---\n{header(facts)}\n---\n\n{MARK}\n",
        f"# {facts.name.split('/')[-1]}\n",
        summary(facts),
        "## How to use it\n\n" + usage(facts),
        "## How it was made\n\n" + making(facts),
        results(facts, plots),
        "## Licence\n\n" + licence(facts),
        "## Versions\n\n" + versions(facts),
    ]
    return "\n".join(part for part in parts if part) + "\n"


def header(facts: Facts) -> str:
    """YAML metadata, without the rules around it."""
    from huggingface_hub import ModelCardData

    library = {"classifier": "transformers", "peft": "peft"}.get(facts.kind, "mlx")
    tags = ["mlx", "mlx-rlhf", *method(facts)[1]]
    tags += ["reward-model"] if facts.kind in TASKS else []
    tags += ["lora"] if facts.kind in ("adapter", "peft") else []
    metadata: dict[str, Any] = {
        "license": facts.license or "other",
        "library_name": library,
        "pipeline_tag": TASKS.get(facts.kind, "text-generation"),
        "tags": tags,
    }
    if on_hub(facts.base):
        metadata["base_model"] = facts.base
        adapter = facts.kind in ("adapter", "peft")
        metadata["base_model_relation"] = "adapter" if adapter else "finetune"
    if datasets := _hub_datasets(facts):
        metadata["datasets"] = datasets
    if found := held_out(facts):
        metadata |= {"model_name": facts.name.split("/")[-1], "eval_results": found}
    return ModelCardData(**metadata).to_yaml().strip()


HELD_OUT = {  # metric -> its kind, and what it is
    "eval/greedy/score": ("reward", "mean reward, greedy responses"),
    "eval/sampled/score": ("reward", "mean reward, sampled responses"),
    "valid/loss": ("loss", "loss"),
    "valid/perplexity": ("perplexity", "perplexity"),
    "valid/accuracy": ("accuracy", "accuracy"),
    "valid/rewards/accuracies": ("accuracy", "share of pairs in the right order"),
}


def held_out(facts: Facts) -> list[Any]:
    """What the run measured on held-out rows, for the header's model-index."""
    from huggingface_hub import EvalResult

    if facts.run is None:
        return []
    options, datasets = facts.run.options, _hub_datasets(facts)
    data = ", ".join(named(options, "validation_file")) or data_of(options) or "data"
    task = TASKS.get(facts.kind, "text-generation")
    return [
        EvalResult(
            task_type=task,
            dataset_type=datasets[0] if len(datasets) == 1 else "local",
            dataset_name=f"held-out rows of {data}",
            metric_type=kind,
            metric_name=text,
            metric_value=facts.run.metrics[name],
        )
        for name, (kind, text) in HELD_OUT.items()
        if name in facts.run.metrics
    ]


def data_of(options: Mapping[str, Any]) -> str:
    """The rows that were trained on: a dataset, files in place of a folder's, or that folder."""
    names = named(options, "dataset") or named(options, "train_file") or named(options, "data")
    return ", ".join(names)


def named(options: Mapping[str, Any], option: str) -> list[str]:
    """What an option of a run names, one or several."""
    given = options.get(option) or []
    return [given] if isinstance(given, str) else [str(name) for name in given]


def _hub_datasets(facts: Facts) -> list[str]:
    names = named(facts.run.options, "dataset") if facts.run else []
    return [name for name in names if HUB_NAME.fullmatch(name)]


def method(facts: Facts) -> tuple[str, list[str]]:
    """(name, tags) of what the training did, as far as the run tells."""
    if facts.run is None:
        return "", []
    name, tags = METHODS.get(facts.run.script, (facts.run.script, []))
    if facts.run.options.get("reward_model") is True:  # sft.py --reward-model
        return "reward-model training", []
    if algorithm := facts.run.options.get("algorithm"):  # preference_training.py
        return f"preference training ({algorithm})", [str(algorithm)]
    return name, tags


def summary(facts: Facts) -> str:
    what = {
        "model": "A language model",
        "reward": "A reward model: it gives one number to a text",
        "classifier": "A reward model in the form of a sequence classifier with one label",
        "adapter": "An adapter for a language model, in mlx-lm's form",
        "peft": "An adapter for a language model, in PEFT's form",
        "gguf": "A language model as a GGUF file for llama.cpp",
    }[facts.kind]
    source = f", made from {_shown(facts.base)}" if facts.base else ""
    if on_hub(facts.base):
        source = f", made from [{facts.base}](https://huggingface.co/{facts.base})"
    how = f", trained by {method(facts)[0]}" if method(facts)[0] else ""
    return (
        f"{what}{source}{how} with mlx-rlhf, reinforcement learning from human "
        "feedback on Apple's MLX.\n"
    )


def usage(facts: Facts) -> str:
    """Code that loads the model, for each program that can."""
    name, base = facts.name, facts.base or "BASE"
    constant = " + model.config.reward_offset" if facts.constant else ""
    mlx = f"""With [mlx-lm](https://github.com/ml-explore/mlx-lm):

```python
from mlx_lm import generate, load

model, tokenizer = load("{name}")
print(generate(model, tokenizer, prompt="Hello", max_tokens=100))
```
"""
    transformers = f"""With transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("Hello", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```
"""
    blocks = {
        "model": mlx + ("" if facts.quantized else "\n" + transformers),
        "reward": f"""As the reward in PPO, from a checkout of mlx-rlhf:

```
python ppo_training.py --model MODEL --reward-model {name}
```

or in Python:

```python
from models.reward_model import load_reward_model
from rewards.learned import score_texts

reward_model = load_reward_model("{name}")
print(score_texts(reward_model, ["What is 2 + 2?"], ["4"]))
```
""",
        "classifier": f"""With transformers:

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForSequenceClassification.from_pretrained("{name}")
{facts.scoring}
with torch.no_grad():
    print(model(**inputs).logits[0, 0].item(){constant})
```

As the reward in PPO: `python ppo_training.py --model MODEL --reward-model {name}`.
""",
        "adapter": f"""With [mlx-lm](https://github.com/ml-explore/mlx-lm), after downloading it:

```
hf download {name} --local-dir adapter
mlx_lm.generate --model {base} --adapter-path adapter --prompt "Hello"
```
""",
        "peft": f"""With transformers and PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{base}")
model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "{name}")
```
""",
        "gguf": "With [llama.cpp](https://github.com/ggml-org/llama.cpp): "
        "`llama-cli -m model.gguf -p Hello`.\n",
    }
    return blocks[facts.kind]


def making(facts: Facts) -> str:
    lines = [f"- Base model: {_shown(facts.base)}"] if facts.base else []
    for description, weight in zip(facts.adapters, facts.weights, strict=True):
        lines.append("- " + describe_adapter(description, weight))
    if facts.pooling:
        lines.append(f"- Score: a linear head on the hidden states, pooling: {facts.pooling}")
    if facts.run:
        run = facts.run
        steps = f", {run.steps} steps" if run.steps else ""
        lines.append(
            f"- Method: {method(facts)[0]} (`{MADE_BY.get(run.script, f'{run.script}.py')}`{steps})"
        )
        if data := data_of(run.options):
            lines.append(f"- Data: {data}")
        shown = run.options
        if run.differing is not None:
            shown = {name: value for name, value in shown.items() if name in run.differing}
        lines += ["", "Options" + " that differ from the defaults" * (shown != run.options) + ":"]
        lines += ["", "```", *(f"{name}: {value}" for name, value in shown.items()), "```"]
    if facts.difference:
        lines += ["", f"Largest difference from the unfused model: {facts.difference}."]
    return "\n".join(lines) + "\n"


def on_hub(name: str | None) -> bool:
    """Whether a base model's name is one that others can look up on the hub."""
    if name is None or name == DEFAULT_NAME or Path(name).exists():
        return False
    return HUB_NAME.fullmatch(name) is not None


def _shown(base: str) -> str:
    return base if on_hub(base) else Path(base).name


def describe_adapter(description: dict, weight: float) -> str:
    """One line on an adapter."""
    kind = description.get("fine_tune_type", "lora")
    factor = "" if weight == 1 else f", with weight {weight:g}"
    if kind == "full":
        return "Adapter: none, every weight was trained"
    if kind == "prompt":
        return f"Soft prompt: {description.get('num_prompt_tokens', '?')} virtual tokens"
    settings = description.get("lora_parameters") or {}
    name = {"lora": "LoRA", "dora": "DoRA"}.get(kind, kind)
    if not settings:
        return f"Adapter: {name}{factor}"
    keys = ", ".join(settings.get("keys") or ["every linear layer"])
    return (
        f"Adapter: {name} of rank {settings.get('rank')}, scale {settings.get('scale')}, "
        f"on {keys}{factor}"
    )


def results(facts: Facts, plots: list[str]) -> str:
    if facts.run is None or not (facts.run.metrics or plots):
        return ""
    lines = ["## Results", ""]
    if facts.run.metrics:
        lines += ["At the end of training:", "", "| metric | value |", "|---|---|"]
        lines += [f"| `{name}` | {value:.5g} |" for name, value in facts.run.metrics.items()]
        lines.append("")
    lines += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    return "\n".join(lines) + "\n"


def licence(facts: Facts) -> str:
    if facts.license:
        return f"{facts.license}, as given for this model or its base.\n"
    return "Not stated here. What the base model and the training data allow applies.\n"


def versions(facts: Facts) -> str:
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    fused = ", ".join(f"{name} {version}" for name, version in found.items())
    text = f"Written with {fused}.\n"
    if facts.run and facts.run.versions:
        trained = ", ".join(f"{name} {version}" for name, version in facts.run.versions.items())
        text += f"Trained with {trained}.\n"
    return text
