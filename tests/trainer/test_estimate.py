"""What a run will cost, counted on the meta device: SDXL's known figures, and every shipped configuration."""

import pytest
import torch
from lcm_lookahead.cli import main
from lcm_lookahead.sdxl import configs
from lcm_lookahead.trainer.config import CONFIGS, ConfigError
from lcm_lookahead.trainer.ledger import Ledger
from lcm_lookahead.trainer.lookahead.config import load
from lcm_lookahead.trainer.lookahead.estimate import describe, estimate, savings, unet_forward
from torch import nn


@pytest.fixture
def shallow(monkeypatch):
    """SDXL's UNet with few transformer blocks, for what does not depend on their number."""
    monkeypatch.setitem(configs.UNET, "transformer_layers_per_block", [1, 1, 2])


def test_sdxl_s_unet_has_its_known_size_work_and_activations():
    unet = configs.unet().eval()
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    work, kept = unet_forward(unet)
    assert work == pytest.approx(6.761e12, rel=1e-3)
    assert kept == pytest.approx(5.34e9, rel=1e-3)


def test_the_paper_s_run_costs_what_was_derived_by_hand():
    """From the products of every layer, 65.3 TFLOP a sample without checkpointing and 87.1 with blocks."""
    cost = estimate(load(CONFIGS / "sdxl_paper.yaml"))
    assert cost.parameters == {"Resampler": 82_961_664, "image prompt K, V": 340_787_200, "KV encoder": 7_085_056}
    assert sum(cost.work.values()) / 8 == pytest.approx(87.1e12, rel=0.02)
    assert cost.memory["frozen UNet"] == pytest.approx(5.135, abs=1e-3)
    assert cost.memory["few-step LoRA"] == pytest.approx(0.3935, abs=1e-3)
    assert "It fits into 141 GB" in describe(cost, "h200")


def test_mini_fits_anywhere(capsys):
    main.main(["estimate", str(CONFIGS / "mini.yaml"), "--card", "8"])
    assert "It fits into 8 GB" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_dry_runs(path, shallow, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main.main(["train", str(path), "--dry-run"])
    text = capsys.readouterr().out
    for title in ("Trained parameters", "Memory of a process", "Work of a step", "Expected time", "Files, GB"):
        assert title in text
    assert not list(tmp_path.iterdir())  # nothing is written


def test_memory_grows_with_the_samples_at_a_time_and_work_with_the_batch(shallow):
    one, two, four = (estimate(load(CONFIGS / "sdxl_paper.yaml", [f"batch={n}"])) for n in (1, 2, 4))
    assert four.peak - two.peak == pytest.approx(2 * (two.peak - one.peak))
    assert sum(four.work.values()) == pytest.approx(4 * sum(one.work.values()))
    shared = estimate(load(CONFIGS / "sdxl_paper.yaml", ["batch=4"]), processes=2)
    assert sum(shared.work.values()) == pytest.approx(2 * sum(one.work.values()))
    with pytest.raises(ConfigError, match="cannot share evenly"):
        estimate(load(CONFIGS / "sdxl_paper.yaml", ["batch=3"]), processes=2)


def test_what_is_saved_is_said_and_is_saved(shallow):
    config = load(CONFIGS / "sdxl_paper.yaml", ["batch=1", "checkpointing=none"])
    cost = estimate(config)
    saved = savings(cost)
    assert f"{cost.peak - 8.59:.1f} are missing" in describe(cost, "8")
    assert saved["checkpointing=all"] > saved["checkpointing=blocks"] > 0
    less = estimate(load(CONFIGS / "sdxl_paper.yaml", ["batch=1", "checkpointing=all", "norms_every=0"]))
    assert cost.peak - less.peak == pytest.approx(saved["checkpointing=all"] + saved["norms_every=0"])


def test_the_arms_cost_what_they_compute(shallow):
    arms = {arm: estimate(load(CONFIGS / "sdxl_paper.yaml", [f"lookahead.arm={arm}"])) for arm in ("none", "x0")}
    assert "lookahead" not in arms["none"].work and arms["none"].peak < arms["x0"].peak
    without = estimate(load(CONFIGS / "sdxl_paper.yaml", ["model.kv=false"]))
    assert "KV encoder" not in without.parameters
    assert without.work["diffusion"] < 0.6 * estimate(load(CONFIGS / "sdxl_paper.yaml")).work["diffusion"]


def test_a_card_that_is_unknown_is_said():
    with pytest.raises(SystemExit, match="The card 'big' is not known: give its memory in GB, or one of"):
        main.main(["estimate", str(CONFIGS / "mini.yaml"), "--card", "big"])


def test_no_process_at_all_is_said():
    with pytest.raises(SystemExit, match="processes is 0: give at least 1"):
        main.main(["estimate", str(CONFIGS / "mini.yaml"), "--processes", "0"])


def test_the_ledger_counts_what_is_alive():
    x = torch.empty(1000, 100, device="meta")
    layer = nn.Linear(100, 50, bias=False, device="meta")
    with Ledger([x, layer.weight]) as ledger, torch.no_grad():
        y = layer(x)  # 200 kB, made of views of what was there
        assert ledger.live == ledger.peak == 4 * 1000 * 50
        y = y + 1
        assert (ledger.live, ledger.peak) == (200_000, 400_000)
    assert ledger.work == 2 * 1000 * 100 * 50
