"""The targets of benchmarks/memory.py on a model small enough for every run of the tests."""

import gc
import sys

import mlx.core as mx
import pytest
from files import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory  # noqa: E402

SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 1024}


@pytest.fixture
def small(monkeypatch):
    """Runs a case here, on a small model; its peak is counted from what is held already."""
    monkeypatch.setattr(memory, "SIZES", memory.SIZES | SMALL)
    monkeypatch.setattr(memory, "RESPONSE", 16)

    def run(case: str) -> dict:
        gc.collect()  # arrays in cycles, of other tests too, would be freed in between
        mx.clear_cache()
        start = mx.get_active_memory()
        mx.reset_peak_memory()
        found = memory.run_case(case)
        return found | {"peak": found["peak"] - start}

    return run


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ppo_with_a_reward_adapter_needs_hardly_more_than_sft(small):
    sft, ppo = small("sft_lora"), small("ppo_reward")
    base = sft["roles"]["base"]
    assert base == 4 * (2 * 1024 * 128 + 4 * (4 * 128**2 + 3 * 128 * 512 + 2 * 128) + 128)
    assert ppo["roles"]["base"] == base and "reference" not in ppo["roles"]
    assert ppo["weights"] <= memory.TARGETS["weights"] * base
    assert ppo["peak"] <= memory.TARGETS["peak"] * sft["peak"]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_full_fine_tuning_holds_a_reference_which_may_be_quantised(small):
    plain, quantised = small("ppo_full"), small("ppo_full_4bit")
    base = plain["roles"]["base"]
    assert plain["roles"]["reference"] == base
    assert quantised["roles"]["reference"] < 0.2 * base
    assert plain["peak"] - quantised["peak"] > 0.5 * base
