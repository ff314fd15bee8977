"""A worker that is not like worker 0 is seen: at the start, at a checkpoint, in the metrics."""

import pytest
from together import ended, largest_difference, ran, rows, started

from distributed.local import free_ports

LINE = (
    "--train --data DATA --output-dir run --save-file out.npz --lora-rank 2 --lora-layers 2 "
    "--iters 4 --batch-size 4 --steps-per-eval 0 --save-every 2"
)


def odd(folder, mode: str):
    """Two workers of which the second is odd."""
    ports = free_ports(2)
    file = folder / "hosts.json"
    file.write_text(f'[["127.0.0.1:{ports[0]}"], ["127.0.0.1:{ports[1]}"]]', encoding="utf-8")
    script = "tests/helpers/odd_worker.py"
    env = {"MLX_HOSTFILE": str(file), "ODD": mode}
    processes = [started(folder, script, LINE, MLX_RANK=str(rank), **env) for rank in (0, 1)]
    return [ended(process) for process in processes]


SEEN = {
    "seed": "worker 1 differs from worker 0 in the weights that are trained",
    "version": "worker 1 has mlx 0.0.1, and worker 0 ",
}


@pytest.mark.long
@pytest.mark.parametrize("mode", SEEN)
def test_own_seeds_and_other_versions_are_seen_at_the_start(mode, tmp_path):
    first, second = odd(tmp_path, mode)
    assert (first.code, second.code) == (2, 2)
    assert first.error.startswith(f"error: {SEEN[mode]}") and second.err == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_slow_worker_shows(tmp_path):
    """Worker 1 takes half a second longer an update, for which worker 0 waits."""
    assert [found.code for found in odd(tmp_path, "slow")] == [0, 0]
    shares = [row["distributed/wait_share"] for row in rows(tmp_path) if "train/loss" in row]
    assert len(shares) == 4 and min(shares[1:]) > 0.5


@pytest.mark.long
def test_weights_that_come_apart_are_evened_out_and_said(tmp_path):
    (tmp_path / "odd").mkdir()
    assert [found.code for found in odd(tmp_path / "odd", "drift")] == [0, 0]
    drift = [
        row["distributed/drift"] for row in rows(tmp_path / "odd") if "distributed/drift" in row
    ]
    assert len(drift) == 2 and all(0 < value < 0.01 for value in drift)
    ran(tmp_path / "one", "sft.py", LINE)
    other = tmp_path / "odd" / "out.npz"
    assert largest_difference(tmp_path / "one" / "out.npz", other) < 1e-3
