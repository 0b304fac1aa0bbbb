"""The loop that all stages of the mini world's build train by."""

import pytest
import torch
from lcm_lookahead.mini.stages import stage
from torch import nn


def points(step):
    return torch.randn(8, 3, generator=stage.numbers_of_step(0, step))


def run(folder, net, steps, cycles=1, shift=0, stop=None):
    """Trains a layer towards the sum of its inputs; shift: number of the first step."""

    def loss(step):
        if step == stop:
            raise KeyboardInterrupt
        x = points(step + shift)
        return (net(x)[:, 0] - x.sum(1)).square().mean()

    folder.mkdir(exist_ok=True)
    stage.train("line", folder, {"net": net}, loss, steps=steps, rate=0.05, ema=0.5, cycles=cycles)
    stage.finish("line", folder)
    return net.state_dict()


def layer():
    torch.manual_seed(1)
    return nn.Linear(3, 1)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_cycle_begins_as_a_training_of_its_own_where_the_one_before_ended(tmp_path):
    in_turn = layer()
    run(tmp_path / "first", in_turn, 4)
    run(tmp_path / "second", in_turn, 4, shift=4)
    assert same(run(tmp_path / "both", layer(), 8, cycles=2), in_turn.state_dict())
    assert not same(run(tmp_path / "one", layer(), 8), in_turn.state_dict())


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_stop_before_at_or_after_a_new_cycle_changes_no_bit(tmp_path, monkeypatch, stop):
    monkeypatch.setattr(stage, "SAVE_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", layer(), 8, cycles=2, stop=stop)
    torch.manual_seed(9)  # of weights that the state takes the place of
    again = run(tmp_path / "stopped", nn.Linear(3, 1), 8, cycles=2)
    assert same(again, run(tmp_path / "whole", layer(), 8, cycles=2))
