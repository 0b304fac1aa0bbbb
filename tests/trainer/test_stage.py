"""The mini world's training loop: stopping and going on changes nothing, and files are whole or not there."""

import json
import os

import pytest
import torch
from lcm_lookahead.lookahead.files.tensors import EncoderFileError
from lcm_lookahead.mini.stages import stage
from torch import nn


def little_run(folder, steps, monkeypatch, stop_after=None, ema=0.9):
    torch.manual_seed(0)
    net = nn.Linear(4, 4)

    def loss(step):
        if step == stop_after:
            raise KeyboardInterrupt
        x = torch.randn(8, 4, generator=stage.numbers_of_step(3, step))
        return (net(x) - x.flip(1)).square().mean()

    monkeypatch.setattr(stage, "SAVE_SECONDS", 0.0)
    stage.train("little", folder, {"net": net}, loss, steps=steps, rate=1e-2, ema=ema)
    return net.weight.detach().clone()


@pytest.mark.parametrize("stop", [1, 7, 19, 20])
def test_a_stopped_stage_goes_on_to_the_same_bits(tmp_path, monkeypatch, stop):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = little_run(tmp_path / "whole", 20, monkeypatch)
    if stop < 20:
        with pytest.raises(KeyboardInterrupt):
            little_run(tmp_path / "cut", 20, monkeypatch, stop_after=stop)
    else:  # all steps done, stopped before the stage wrote its result
        little_run(tmp_path / "cut", 20, monkeypatch)
    assert torch.equal(little_run(tmp_path / "cut", 20, monkeypatch), whole)


def test_training_lowers_the_loss_and_logs_it(tmp_path, monkeypatch):
    little_run(tmp_path, 200, monkeypatch)
    lines = [json.loads(line) for line in (tmp_path / "little.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 100, 150, 200]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    stage.write_tensors(path, {"a": torch.ones(2)})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(EncoderFileError, match="weights.safetensors cannot be written .disk full."):
        stage.write_tensors(path, {"a": torch.zeros(2)})
    assert torch.equal(stage.read_tensors(path)["a"], torch.ones(2))


def test_random_numbers_depend_on_seed_and_step_alone():
    first = torch.rand(3, generator=stage.numbers_of_step(1, 5))
    assert torch.equal(first, torch.rand(3, generator=stage.numbers_of_step(1, 5)))
    assert not torch.equal(first, torch.rand(3, generator=stage.numbers_of_step(1, 6)))
    assert not torch.equal(first, torch.rand(3, generator=stage.numbers_of_step(2, 5)))
