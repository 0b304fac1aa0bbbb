"""Intervals over people: that they cover what they say, that a gain is found as large as it is, and curves."""

import numpy as np
import pytest
from lcm_lookahead.evaluation import paired

SETS = 600  # simulated evaluations; the share that covers has a deviation of 0.9 %


def coverage(draw, truth, interval, sets=SETS):
    numbers = np.random.default_rng(5)
    found = [interval(draw(numbers)) for _ in range(sets)]
    return np.mean([one.low <= truth <= one.high for one in found]), np.mean([one.high - one.low for one in found])


def mean(values):
    return paired.mean(values, rounds=400)


def test_an_interval_of_95_percent_covers_the_truth_as_often_of_few_people():
    """People differ, and each has six pictures that differ too, as in an evaluation."""
    people = 10

    def scores(numbers):
        own = numbers.normal(0.4, 0.12, people)
        return (own[:, None] + numbers.normal(0, 0.2, (people, 6))).mean(1)

    assert 0.93 <= coverage(scores, 0.4, mean)[0] <= 0.97


def test_it_covers_a_share_of_hits_too():
    def hits(numbers):
        return numbers.binomial(6, numbers.beta(8, 2, 24)) / 6

    assert 0.93 <= coverage(hits, 0.8, mean)[0] <= 0.97


def test_the_plain_bootstrap_would_not_cover_of_few_people():
    """Why the interval is expanded: without it, that of ten people covers in 90 %."""
    from scipy.stats import bootstrap

    def plain(values):
        ends = bootstrap((values,), np.mean, n_resamples=400, method="percentile", rng=1).confidence_interval
        return paired.Interval(values.mean(), ends.low, ends.high)

    assert coverage(lambda numbers: numbers.normal(0.4, 0.1, 10), 0.4, plain, 300)[0] < 0.93


def test_a_paired_interval_covers_a_known_gain_and_is_narrower_than_an_unpaired_one():
    people, gain = 24, 0.05

    def both(numbers):
        own = numbers.normal(0.4, 0.15, people)  # people are easy or hard for both methods
        return own + gain + numbers.normal(0, 0.05, people), own + numbers.normal(0, 0.05, people)

    covers, width = coverage(both, gain, lambda pair: paired.difference(*pair, rounds=400))
    assert 0.93 <= covers <= 0.97
    _, alone = coverage(lambda numbers: both(numbers)[0], 0.45, mean, 50)
    assert width < 0.5 * alone
    numbers = np.random.default_rng(2)
    with pytest.raises(ValueError, match="the same people, got 24 and 23"):
        paired.difference(both(numbers)[0], both(numbers)[1][1:])


def test_a_person_without_a_score_does_not_count_and_one_person_has_no_interval():
    values = paired.column([[0.5, None], [None, None], [0.1, 0.3]])
    assert values[0] == 0.5 and np.isnan(values[1]) and values[2] == pytest.approx(0.2)
    assert paired.mean(values).value == pytest.approx(0.35)
    alone = paired.mean(values[:2])
    assert alone.value == 0.5 and alone.low == -np.inf and alone.high == np.inf
    assert np.isnan(paired.mean(values[1:2]).value)


def test_a_curve_is_read_at_a_level_between_its_points_and_not_beyond_them():
    xs, ys = np.array([0.9, 0.7, 0.5]), np.array([0.2, 0.4, 0.7])
    assert paired.at_level(xs, ys, 0.8) == pytest.approx(0.3)
    assert paired.at_level(xs, ys, 0.5) == pytest.approx(0.7)
    assert np.isnan(paired.at_level(xs, ys, 0.95))
    bent = np.array([0.9, 0.7, 0.9])  # where it comes there twice, the better counts
    assert paired.at_level(bent, ys, 0.8) == pytest.approx(0.55)
    both = paired.at_level(np.stack([xs, bent]), np.stack([ys, ys]), np.array([0.8, 0.8]))
    assert both == pytest.approx([0.3, 0.55])
