"""The few-step LoRAs: what each stage trains, and how spread is measured."""

import functools
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderTiny
from lcm_lookahead.mini.report import measure_few_step
from lcm_lookahead.mini.stages import base, collapsed, lcm, stage, style_lora, vae
from lcm_lookahead.mini.stages.networks import EvaluationRecogniser, StyleScorer
from lcm_lookahead.mini.stages.text import TextEncoders
from lcm_lookahead.sdxl import lora
from tensors import randn


@pytest.fixture(scope="module")
def narrow_autoencoder():
    """Its layout in few channels: pictures of random weights show nothing, and decoding them took half of the time."""
    widths = {f"{half}_block_out_channels": (8,) * 4 for half in ("encoder", "decoder")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "build", lambda: AutoencoderTiny(**widths))
        yield


@pytest.fixture(scope="module")
def trained_before(tmp_path_factory, narrow_autoencoder):
    """A folder with a base and an autoencoder of random weights."""
    folder = tmp_path_factory.mktemp("mini")
    torch.manual_seed(0)
    models = {"unet": base.build_unet(), "text": TextEncoders()}
    stage.write_tensors(
        folder / "base.safetensors", {f"{n}.{k}": v for n, m in models.items() for k, v in m.state_dict().items()}
    )
    stage.write_tensors(folder / "vae.safetensors", vae.build().state_dict())
    return folder


@pytest.fixture
def folder(trained_before, tmp_path, monkeypatch):
    for file in trained_before.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.setattr(lcm, "BATCH", 2)
    monkeypatch.setattr(collapsed, "BATCH", 2)
    monkeypatch.setattr(style_lora, "BATCH", 4)
    return tmp_path


class Few:
    """Six captions stand for the pictures; their latents are noise."""

    long = short = ["a photo of a face"] * 6
    latents = randn(6, 4, 16, 16)

    def __len__(self):
        return 6


PLAN = SimpleNamespace(seed=1, lcm_lora_steps=3, collapsed_steps=1, style_lora_steps=2)


def test_the_distillation_goes_on_to_the_same_bits_after_a_stop(folder, monkeypatch):
    lcm.train(folder, Few(), Few.latents, PLAN)
    whole = stage.read_tensors(folder / "lcm_lora.safetensors")
    assert any(v.abs().sum() > 0 for k, v in whole.items() if "lora_up" in k)
    (folder / "lcm_lora.safetensors").unlink()
    monkeypatch.setattr(stage, "SAVE_SECONDS", 0.0)
    real, calls = base.classifier_free, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(base, "classifier_free", stops)
    with pytest.raises(KeyboardInterrupt):
        lcm.train(folder, Few(), Few.latents, PLAN)
    monkeypatch.setattr(base, "classifier_free", real)
    lcm.train(folder, Few(), Few.latents, PLAN)
    resumed = stage.read_tensors(folder / "lcm_lora.safetensors")
    assert all(torch.equal(resumed[k], v) for k, v in whole.items())


def some_lcm_lora(folder):
    unet, _ = base.load(folder)
    torch.manual_seed(1)
    made = lora.build(unet, 2)
    for branch in made.branches:
        torch.nn.init.normal_(branch.lora_up.weight, std=0.02)
    stage.write_tensors(folder / "lcm_lora.safetensors", lora.public_tensors(made))


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_score_distillation_stands_still_where_both_scores_agree(folder, monkeypatch, guidance):
    """Unguided base and a fresh second LoRA are the same network: there is no direction to follow."""
    some_lcm_lora(folder)
    monkeypatch.setattr(collapsed, "GUIDANCE", guidance)
    collapsed.train(folder, Few(), PLAN)
    before = stage.read_tensors(folder / "lcm_lora.safetensors")
    after = stage.read_tensors(folder / "collapsed.safetensors")
    moved = max((after[k] - v).abs().max().item() for k, v in before.items())
    assert (moved > 1e-8) == (guidance > 1)


def test_the_personal_lora_learns_under_its_name_and_fits_its_size(folder):
    style_lora.train(folder, Few(), Few.latents, PLAN)
    path = folder / "style_lora.safetensors"
    stage.write_tensors(folder / "shipped.safetensors", stage.half(stage.read_tensors(path)))
    assert (folder / "shipped.safetensors").stat().st_size < 700_000
    pictures, captions = style_lora.shots()
    assert len(pictures) == len(captions) == 20 and all(f"a {style_lora.NAME} face" in c for c in captions)


def test_the_few_step_loras_fit_their_size(folder):
    unet, _ = base.load(folder)
    made = lora.build(unet, lcm.RANK, conv_rank=lcm.CONV_RANK)
    stage.write_tensors(folder / "shipped.safetensors", stage.half(lora.public_tensors(made)))
    assert (folder / "shipped.safetensors").stat().st_size < 2_800_000


def test_everything_is_measured_and_drawn(folder, monkeypatch):
    """On random weights: every figure is there with its interval, LoRAs are switched off again, pictures are drawn."""
    torch.manual_seed(2)
    some_lcm_lora(folder)
    for name in ("collapsed", "style_lora"):
        (folder / f"{name}.safetensors").symlink_to(folder / "lcm_lora.safetensors")
    stage.write_tensors(folder / "recogniser.safetensors", EvaluationRecogniser().state_dict())
    stage.write_tensors(folder / "style_scorer.safetensors", StyleScorer().state_dict())
    monkeypatch.setattr(measure_few_step, "DDIM_STEPS", 2)
    monkeypatch.setattr(measure_few_step, "SHARES", (0.0, 0.5))
    monkeypatch.setattr(measure_few_step, "spread", functools.partial(measure_few_step.spread, seeds=2))
    open_world, opened = measure_few_step.open_world, []
    monkeypatch.setattr(measure_few_step, "open_world", lambda *of: opened.append(open_world(*of)) or opened[0])
    plan = SimpleNamespace(held_out_people=2, styles=("photo", "comic"))
    figures = measure_few_step.measure(folder, plan, n=2)
    assert set(figures) == {"previews", "few steps", "spread", "person", "previews of one person"}
    assert len(figures["previews"]) == 2 * (3 * 2 + 2 * 2)
    everything = [f for part in figures.values() for f in part.values()]
    assert all(f.low <= f.value <= f.high for f in everything)
    assert (folder / "previews.png").exists() and (folder / "previews_of_one_person.png").exists()
    (world,) = opened  # that of all these figures
    run = measure_few_step.run_with_previews(world, ["a photo of a face"], seed=1)
    assert not torch.equal(run.foreseen["LCM-LoRA"][0], run.foreseen["x0"][0])
    assert all(each.scale == 0 for each in world.loras.values())


def test_spread_tells_a_collapsed_generator_from_a_diverse_one(monkeypatch):
    """One that draws the same for every seed has cosine 1 and distance 0."""

    def same(prompts, numbers):
        return torch.ones(len(prompts), 4, 2, 2)

    def diverse(prompts, numbers):
        return torch.randn(len(prompts), 4, 2, 2, generator=numbers)

    class FakeWorld:
        held_out = SimpleNamespace(long=["a", "b", "c", "d"], labels={"style": torch.zeros(4, dtype=torch.long)})
        __len__ = None

        def picture(self, z):
            return z[:, :3]

        def who(self, x):
            return torch.nn.functional.normalize(x.flatten(1), dim=1)

        def style(self, x):
            return torch.zeros(len(x), dtype=torch.long)

    monkeypatch.setattr(measure_few_step, "drawers", lambda world: {"same": same, "diverse": diverse})
    monkeypatch.setattr(measure_few_step, "_chosen", lambda world, n, seed: torch.arange(n))
    figures = measure_few_step.spread(FakeWorld(), prompts=4, seeds=5)
    assert figures["same: identity cosine between seeds"].value == pytest.approx(1)
    assert figures["same: pixel distance between seeds"].value == pytest.approx(0, abs=1e-3)
    assert figures["diverse: identity cosine between seeds"].value < 0.5
    assert figures["diverse: latent distance between seeds"].value > 1
