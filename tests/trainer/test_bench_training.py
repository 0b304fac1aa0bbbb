"""The benchmark of training compares arrangements that compute the same losses and gradients."""

from dataclasses import replace

import pytest
import torch
from lcm_lookahead.tools import bench_training


@pytest.fixture
def questions(monkeypatch):
    monkeypatch.setattr(bench_training, "BATCH", 2)
    step, batch, draws, config = bench_training._mini(torch.device("cpu"))
    # As the paper's arrangement has it, where the LoRA is part of the weights.
    return step, batch, replace(draws, strength=torch.full((2,), 0.5)), config


def test_separate_unets_compute_the_losses_of_the_one(questions):
    step, batch, draws, config = questions
    with torch.no_grad():
        ours = [step(part, batch, draws).loss for part in ("diffusion", "lookahead")]
        bench_training._papers(step, batch, draws, config)
        separate = step.roles
        plain, fast = separate.encoding.unet, separate.fast.unet
        assert len({id(plain), id(separate.decoding.unet), id(fast)}) == 3
        bench_training._reload(config, plain, fast, fast, 0.5)
        theirs = [step(part, batch, draws).loss for part in ("diffusion", "lookahead")]
    assert torch.allclose(torch.stack(ours), torch.stack(theirs), rtol=1e-3)


def test_memory_is_counted_until_it_is_freed():
    cost = bench_training.ArmCost()
    with bench_training._peak(torch.device("cpu"), cost):
        for _ in range(3):  # one at a time
            x = torch.ones(1000)
            y = x.view(10, 100)
            del x, y
        z = torch.ones(500) * 2
    assert cost.peak == 4000 and z.sum() == 1000
