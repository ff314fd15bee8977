"""A training script that the tests of kills and faults do not know is no script of this project."""

import fast_blas  # noqa: F401  isort: skip

import pytest
from script_table import RUNS, SHORT, training_scripts


@pytest.mark.parametrize(
    "table", [{script for script, _ in RUNS.values()}, {short.script for short in SHORT.values()}]
)
def test_every_training_script_is_in_the_table(table):
    there = training_scripts()
    assert {"sft.py", "ppo_training.py"} <= {*there}
    missing = {*there} - table
    assert not missing, f"add a run of {missing} to RUNS and SHORT (tests/helpers/script_table.py)"
