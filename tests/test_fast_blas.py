"""Kernels where OpenBLAS does not know the processor, threads by the model, both kept by a run."""

import fast_blas
from fast_blas import AVX2, AVX512, better_kernels

import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from files import ROOT

import sft

OPENBLAS = pytest.mark.skipif(fast_blas.kernels() is None, reason="no OpenBLAS")


@pytest.fixture(autouse=True)
def as_it_was():
    """Kernels and threads belong to the whole process."""
    kernels, threads = fast_blas.kernels(), fast_blas.threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(fast_blas.CORETYPE, kernels or "")
        yield
        if kernels is not None:
            fast_blas.use_threads(threads)
            assert fast_blas.use_kernels(kernels)


# ------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize(
    "current, flags, wanted",
    [
        ("Prescott", AVX512, "SkylakeX"),
        ("Nehalem", AVX2 | {"avx512f"}, "Haswell"),  # not all of AVX-512
        ("Sandybridge", {"avx", "fma"}, None),
        ("Cooperlake", AVX512, None),  # it knows the processor
        ("Zen", AVX512, None),
        ("Barcelona", AVX2, "Haswell"),
    ],
)
def test_better_kernels(current, flags, wanted):
    assert better_kernels(current, flags) == wanted


def test_flags_of_the_processor(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nflags\t\t: fpu avx2 fma\nprocessor : 1\nflags : sse\n")
    assert {"avx2", "fma"} <= fast_blas.processor_flags(file) and "sse" not in (
        fast_blas.processor_flags(file)
    )
    assert fast_blas.processor_flags(tmp_path / "none") == set()


@OPENBLAS
@pytest.mark.skipif(not fast_blas.X86, reason="kernels of x86")
def test_kernels_change_and_products_stay_right():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((70, 333), (333, 129)))
    right = a.astype(np.float64) @ b.astype(np.float64)
    for name in ("Prescott", "Nehalem"):  # any x86 has them
        assert fast_blas.use_kernels(name) and fast_blas.kernels() == name
        assert np.abs(np.array(mx.array(a) @ mx.array(b)) - right).max() < 1e-4


def told(code: str, **env: str) -> list[str]:
    """What a new process prints that imports fast_blas with these variables."""
    import os

    names = (*fast_blas.THREADS, fast_blas.CORETYPE)
    kept = {k: v for k, v in os.environ.items() if k not in names}
    line = [sys.executable, "-c", f"import fast_blas; {code}"]
    done = subprocess.run(
        line, env=kept | env, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@OPENBLAS
@pytest.mark.skipif(not fast_blas.X86, reason="kernels of x86")
def test_the_environment_has_the_last_word():
    code = "print(fast_blas.kernels(), fast_blas.threads())"
    assert told(code, OPENBLAS_CORETYPE="Prescott") == ["Prescott", "1"]
    assert told(code, OPENBLAS_NUM_THREADS="2")[1] == "2"
    assert told(code, OMP_NUM_THREADS="2")[1] == "2"


@OPENBLAS
def test_a_library_that_is_older_than_the_processor(monkeypatch):
    """As if it had taken Prescott's kernels: better ones are chosen where the flags allow them."""
    wanted = better_kernels("Prescott", fast_blas.processor_flags())
    if not fast_blas.X86 or wanted is None:
        pytest.skip("a processor without AVX2")
    fast_blas.use_kernels("Prescott")
    monkeypatch.delenv(fast_blas.CORETYPE)
    fast_blas.pick_kernels()
    assert fast_blas.kernels() == wanted
    fast_blas.use_kernels("Prescott")  # which leaves it in the environment
    fast_blas.pick_kernels()
    assert fast_blas.kernels() == "Prescott"


# ------------------------------------------------------------------------------ threads

LARGE = fast_blas.SMALL


@OPENBLAS
@pytest.mark.parametrize(
    "weights, asked, alone, count",
    [
        (LARGE, False, True, 3),
        (LARGE - 1, False, True, 1),
        (LARGE, True, True, 1),
        (LARGE, False, False, 1),  # the other workers have the other processors
    ],
)
def test_threads_by_the_model(monkeypatch, weights, asked, alone, count):
    monkeypatch.setattr(fast_blas, "available_processors", lambda: 3)
    monkeypatch.setattr(fast_blas, "THREADS_ASKED_FOR", asked)
    fast_blas.use_threads(1)
    fast_blas.settle(weights, alone=alone)
    assert fast_blas.threads() == count


@OPENBLAS
def test_a_resumed_run_has_its_kernels_and_threads(monkeypatch, capsys):
    monkeypatch.setattr(fast_blas, "THREADS_ASKED_FOR", False)
    own = fast_blas.kernels()
    fast_blas.settle(LARGE, {"threads": 2, "kernels": own})
    assert (fast_blas.threads(), fast_blas.kernels()) == (2, own)
    fast_blas.settle(LARGE, {"blas": "libopenblas.so.0"})  # from before they were recorded
    assert fast_blas.threads() == 1 and "note" not in capsys.readouterr().err
    if fast_blas.X86:
        fast_blas.settle(LARGE, {"threads": 1, "kernels": "Nehalem"})
        assert fast_blas.kernels() == "Nehalem"
        monkeypatch.setattr(fast_blas, "processor_flags", set)
        fast_blas.settle(LARGE, {"threads": 1, "kernels": "SapphireRapids"})
        assert fast_blas.kernels() == "Nehalem"
        assert "kernels for SapphireRapids; here they are those for Nehalem" in (
            capsys.readouterr().err
        )


@OPENBLAS
def test_a_run_tells_and_records_them(tmp_path, monkeypatch, capsys):
    data = str(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    words = f"--train --iters 2 --data {data} --steps-per-eval 0 --save-every 1 --output-dir run"
    sft.main(words.split())
    told = f"; OpenBLAS for {fast_blas.kernels()}, {fast_blas.threads()} thread"
    assert told in capsys.readouterr().out
    file = tmp_path / "run" / "config.json"
    machine = json.loads(file.read_text())["machine"]
    assert machine["kernels"] == fast_blas.kernels() and machine["threads"] == 1
    seen = []
    monkeypatch.setattr(fast_blas, "settle", lambda *given, **options: seen.append(given))
    sft.main(["--resume", "run/checkpoints/step-00000001"])
    assert seen[0][1] == machine
