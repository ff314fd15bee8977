"""The arithmetic of composite rewards, against numbers worked out by hand."""

import numpy as np
import pytest

from rl import adlf


def test_alpha_is_the_share_of_the_weighted_mean():
    external, parts = [0.2, 1.0], {"a": [1.0, 0.0], "b": [0.5, 0.5]}
    totals = {alpha: adlf.compute_adlf_rewards(external, parts, alpha)[0] for alpha in (0, 0.5, 1)}
    np.testing.assert_allclose(totals[0], external)
    np.testing.assert_allclose(totals[1], [0.75, 0.25])
    np.testing.assert_allclose(totals[0.5], (totals[0] + totals[1]) / 2)
    weighted, internal = adlf.compute_adlf_rewards(external, parts, 0.25, {"a": 3, "b": 1})
    np.testing.assert_allclose(internal, [0.875, 0.125])
    np.testing.assert_allclose(weighted, [0.75 * 0.2 + 0.25 * 0.875, 0.75 + 0.25 * 0.125])


def test_only_ratios_of_weights_count():
    external, parts = np.linspace(0, 1, 7), {"a": np.linspace(1, 0, 7) ** 2}
    small = adlf.compute_adlf_rewards(external, parts, 0.4, {"a": 0.3, "external": 0.4})[0]
    large = adlf.compute_adlf_rewards(external, parts, 0.4, {"a": 3, "external": 4})[0]
    np.testing.assert_array_equal(small, large)
    # Quality alone is the external reward, as without an internal one.
    alone = adlf.compute_adlf_rewards(external, parts, 0.4, {"a": 0, "external": 1})[0]
    np.testing.assert_allclose(alone, external, atol=1e-15)


@pytest.mark.parametrize(
    "alpha, weights", [(-0.1, {"a": 1}), (1.1, {"a": 1}), (0.5, {"a": 0}), (0.5, {"a": -1})]
)
def test_what_is_no_mean_is_refused(alpha, weights):
    with pytest.raises(ValueError, match=r"alpha|weights"):
        adlf.compute_adlf_rewards([1.0], {"a": [1.0]}, alpha, weights)


def test_components_by_hand():
    assert adlf.length_score(25, 100) == 0.25 and adlf.length_score(300, 100) == 1
    assert adlf.fluency_score(np.log(30), np.log(30)) == 0.5
    assert adlf.fluency_score(np.log(90), np.log(30)) == pytest.approx(0.25)
    assert 0 <= adlf.fluency_score(1e9, 0) < 1e-9
    one, other = np.array([1.0, 0, 0]), np.array([0, 2.0, 0])
    assert adlf.likeness(one, other) == 0.5 and adlf.likeness(one, -3 * one) == 0
    assert adlf.likeness(one, 0 * one) == 0.5
    assert adlf.coherence_score(np.stack([one, one, other])) == pytest.approx(0.75)
    assert adlf.coherence_score(np.stack([one])) == adlf.ALONE


def test_the_guard_sees_repetition_and_copying():
    assert adlf.distinct_share([7] * 40) == pytest.approx(1 / 37)
    assert adlf.distinct_share(range(9)) == 1 and adlf.distinct_share([3, 3, 3]) == 1 / 3
    assert adlf.distinct_share([1, 2, 3, 4] * 2) == pytest.approx(4 / 5)
    prompt = list(range(10, 20))
    assert adlf.copied_share(prompt, prompt) == 1
    assert adlf.copied_share([*prompt[:5], 1, 2, 3], prompt) == pytest.approx(2 / 5)
    assert adlf.copied_share([12, 13], prompt) == 1 and adlf.copied_share([13, 12], prompt) == 0
    assert adlf.guard([], prompt) == 0 and adlf.guard(range(5), prompt) == 1
    assert adlf.guard([1, 1, 1, 1, 1, 1, 1], [1] * 9) == 0


def test_the_range_is_clipped_and_keeps_what_is_no_score():
    found = adlf.to_unit_range([-5, 0, 2.5, 5, 9, np.nan], 0, 5)
    np.testing.assert_array_equal(found, [0, 0, 0.5, 1, 1, np.nan])


def test_pareto_counts_what_none_beats_in_all():
    # The first beats the second in both; the third is best in one.
    assert adlf.pareto_share([[1, 0, 0], [1, 0.5, 2]]) == pytest.approx(2 / 3)
    assert adlf.pareto_share([[1, 1], [2, 2]]) == 1
