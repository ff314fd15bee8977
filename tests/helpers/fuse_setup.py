"""What the tests of fusing and exporting share: the script, adapters with random arrays, logits."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from files import ROOT

import fuse as fuse_script
from command_line.exits import run_main
from models.adapter_files import save_adapter
from models.decoding import Sampling, generate
from models.load import load_model
from models.lora import LoraConfig, add_lora
from models.soft_prompt import SoftPrompt
from models.tuning import FullTuning, Tuning

PROMPTS = ("2 4 6", "10 8", "", "0 1 2 3 5 8 13")


def fuse_process(folder: Path, *words, status: int = 0, env: dict | None = None) -> str:
    """fuse.py as a person runs it; standard output, or the error where a failure is expected."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "fuse.py"), *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
    )
    return said(done.returncode, done.stdout, done.stderr, status)


def fuse(folder: Path, *words, status: int = 0) -> str:
    """The same in this process, which saves the second that a start takes."""
    out, err = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with contextlib.chdir(folder), streams[0], streams[1], pytest.raises(SystemExit) as end:
        run_main(lambda: fuse_script.main([str(word) for word in words]))
    return said(end.value.code, out.getvalue(), err.getvalue(), status)


def said(code: int, out: str, err: str, status: int) -> str:
    assert code == status, out + err
    assert "Traceback" not in err
    if status == 0:
        return out
    assert err.splitlines()[-1].startswith("error: ")
    return err


def make_tuning(loaded, kind: str, *, seed: int = 0, **options) -> Tuning:
    """A `Tuning` of that kind on `loaded`, with random arrays that change the logits a good deal.

    `options` go to LoraConfig (lora, dora) or are `num_tokens` (prompt).
    """
    mx.random.seed(seed)
    if kind == "full":
        tuning = FullTuning(loaded.model)
    elif kind == "prompt":
        tuning = SoftPrompt(loaded.model, options.get("num_tokens", 3))
    else:
        settings = {"rank": 4, "scale": 2.0, **options}
        tuning = add_lora(loaded.model, LoraConfig(use_dora=kind == "dora", **settings))
    arrays = {}
    for name, array in tuning.arrays().items():
        noise = mx.random.normal(array.shape)
        if name.endswith(".m"):
            arrays[name] = array * (1 + 0.2 * noise)
        elif kind == "full":
            arrays[name] = array + 0.02 * noise.astype(array.dtype)
        else:
            arrays[name] = array + (0.3 if kind == "prompt" else 0.1) * noise
    tuning.load_arrays(arrays, "test")
    mx.eval(tuning.arrays())
    return tuning


def make_adapter(path: Path, kind: str, model=None, **options) -> tuple[object, Tuning]:
    """Save an adapter with random arrays at `path`; returns the model and the tuning on it."""
    loaded = load_model(model, dtype="stored")
    tuning = make_tuning(loaded, kind, **options)
    save_adapter(path, tuning, loaded)
    return loaded, tuning


def logits(model, tokenizer, prefix=(), prompts=PROMPTS) -> list[np.ndarray]:
    """Logits (T, V) float32 of every prompt, those of the prefix left out."""
    model.eval()
    found = []
    for text in prompts:
        ids = [*prefix, *tokenizer.encode(text)]
        out = model(mx.array([ids]))[0, len(prefix) :].astype(mx.float32)
        found.append(np.array(out))
    return found


def greedy(loaded, prefix=(), prompts=PROMPTS, max_tokens: int = 12) -> list[list[int]]:
    """The likeliest continuation of every prompt."""
    rows = [[*prefix, *loaded.tokenizer.encode(text)] for text in prompts]
    made = generate(
        loaded.model,
        rows,
        max_tokens=max_tokens,
        eos_ids=loaded.eos_ids,
        sampling=Sampling(temperature=0),
    )
    return made.responses


def largest(ours, theirs) -> float:
    """The largest difference; an empty prompt without BOS has no logits to differ."""
    assert all(a.shape == b.shape for a, b in zip(ours, theirs, strict=True))
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True) if a.size)
