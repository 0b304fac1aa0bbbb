"""Scores: AUC and intervals agree with their definitions."""

import pytest
import torch
from lcm_lookahead.evaluation.stats import auc, bootstrap, identity_auc, own_and_other, proportion, share


def test_auc_is_the_chance_that_an_own_value_is_higher():
    numbers = torch.Generator().manual_seed(0)
    own, other = torch.randn(60, generator=numbers) + 0.7, torch.randn(80, generator=numbers)
    own[:5] = other[:5]  # ties
    pairs = (own[:, None] > other[None]).double() + 0.5 * (own[:, None] == other[None]).double()
    assert auc(own, other) == pytest.approx(pairs.mean().item(), abs=1e-12)


def test_auc_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 own and 3 other"):
        auc(torch.empty(0), torch.ones(3))


def test_own_and_other_never_compare_a_reference_with_itself_drawn_twice():
    similarity = torch.zeros(3, 2, 3)
    for r in range(3):
        similarity[r, :, r] = 1.0
    own, other = own_and_other(similarity, torch.tensor([0, 0, 2]))
    assert own.tolist() == [1.0] * 6
    assert len(other) == 8 and (other == 0).all()


def test_intervals_hold_the_figure_and_narrow_with_more_references():
    numbers = torch.Generator().manual_seed(1)
    hits = (torch.rand(400, 3, generator=numbers) < 0.6).float()
    few, many = share(hits[:25]), share(hits)
    assert few.low < few.value < few.high
    assert many.high - many.low < 0.5 * (few.high - few.low)
    assert many.value == pytest.approx(hits.mean().item())


def test_identity_auc_is_one_half_for_chance_and_one_for_perfect():
    numbers = torch.Generator().manual_seed(2)
    chance = identity_auc(torch.rand(40, 3, 40, generator=numbers), rounds=50)
    assert chance.low < 0.5 < chance.high
    perfect = torch.eye(40)[:, None].expand(40, 3, 40)
    assert identity_auc(perfect, rounds=5).value == 1.0


def test_bootstrap_is_the_same_for_the_same_seed():
    values = torch.arange(30.0)
    first, second = (bootstrap(lambda i: values[i].mean().item(), 30, rounds=50, seed=4) for _ in range(2))
    assert first == second


def test_the_quick_way_to_an_identity_auc_is_the_plain_one_draw_for_draw():
    similarity = torch.rand(12, 3, 12, generator=torch.Generator().manual_seed(3)).mul(20).round()  # with ties
    similarity[torch.arange(12), :, torch.arange(12)] += 4
    plain = bootstrap(lambda index: auc(*own_and_other(similarity, index)), 12, rounds=40, seed=5)
    assert identity_auc(similarity, rounds=40, seed=5) == pytest.approx(plain, abs=1e-12)


def test_a_share_of_all_pictures_is_not_certain():
    few, many = (proportion(torch.ones(n, dtype=torch.bool)) for n in (30, 300))
    assert few.value == few.high == 1 and 0.88 < few.low < 0.89 < many.low < 1
    half = proportion(torch.arange(100) < 50)
    assert half.low == pytest.approx(0.4038, abs=1e-3) and half.high == pytest.approx(0.5962, abs=1e-3)
