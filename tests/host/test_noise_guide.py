"""Noise guides in the host: their files, and what one moves in a pass."""

import logging
import shutil

import pytest
import torch
from damaged import check_that_nothing_is_kept_of_a_file_cut_short
from worlds import random_taesd

LATENT = (2, 4, 8, 8)


class Recogniser(torch.nn.Module):
    """Tells people apart by a fixed projection."""

    size = 16

    def __init__(self, name, seed=0):
        super().__init__()
        self.name = name
        self.weights = torch.randn(3 * 16 * 16, 12, generator=torch.Generator().manual_seed(seed))

    def forward(self, crops):
        return torch.nn.functional.normalize(crops.flatten(1) @ self.weights, dim=-1)


@pytest.fixture(scope="module")
def recogniser():
    return Recogniser("mine.onnx")


@pytest.fixture(scope="module")
def folder(pack):
    folder = pack.base / "models" / "lookahead"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def write(pack, folder, recogniser):
    """Writes a guide; `trained` ones move something."""
    method = pack.module("lookahead.method.noise_guide")
    files = pack.module("lookahead.files.noise_guide_file")

    def write(name, trained=True, start=0.4, end=0.45):
        with torch.inference_mode(False):
            torch.manual_seed(1)
            guide = method.NoiseGuide(method.NoiseGuideSizes(identity=12, width=8, hidden=16))
            if trained:
                torch.nn.init.normal_(guide.conv_out.weight, std=0.1)
            about = {"start": str(start), "end": str(end), "recogniser": "trained_with.pth", "base_model": "mini"}
            files.write(folder / name, guide, method.signature(recogniser, 16), about)
        return name

    return write


@pytest.fixture
def load(tools, write):
    def load(**options):
        return tools.run("LookaheadLoadNoiseGuide", write("guide.safetensors", **options))

    return load


def test_of_a_guide_that_was_cut_short_nothing_is_kept(tools, write, folder):
    name = write("cut.safetensors")
    check_that_nothing_is_kept_of_a_file_cut_short(folder / name, lambda: tools.run("LookaheadLoadNoiseGuide", name))


#: Where the landmarks of a small face are, in pictures of 64 pixels
POINTS = torch.tensor([[18.0, 20.0], [26.0, 20.0], [22.0, 24.0], [19.0, 28.0], [25.0, 28.0]])


@pytest.fixture
def identity(pack, recogniser):
    """An identity loss of two people, which finds no face and looks where the references have theirs."""
    losses = pack.module("lookahead.losses.identity")
    generator = torch.Generator().manual_seed(4)
    people = torch.nn.functional.normalize(torch.randn(2, 12, generator=generator), dim=-1)
    pictures = tuple(torch.rand(2, 3, 64, 64, generator=generator))
    references = losses.FaceReferences(people, POINTS.repeat(2, 1, 1), torch.full((2, 2), 64), pictures)

    def make(recogniser=recogniser):
        return losses.IdentityLoss(recogniser, lambda pictures: [[] for _ in pictures], references)

    return make


@pytest.fixture(scope="module")
def vae(pack):
    return random_taesd()


@pytest.fixture
def drawn(pack, tools, mini, vae, identity):
    """A run of two steps, of whose noise levels a guide is trained for the second, with a noise guide in the guidance
    sampler; `loss` in place of that by the guide's people."""

    def drawn(guide, loss=None, **inputs):
        import comfy.samplers

        losses = pack.module("nodes.losses.lookahead_loss")
        shortcut = tools.run("LookaheadShortcut", tools.with_lora(mini.model), vae)
        sampler = comfy.samplers.sampler_object("euler")
        if guide is not None or inputs:
            asked = losses.LookaheadLoss(loss or identity(), name="identity")
            inputs = {"start": 0.4, "iterations": 0, "noise_guide": guide, **inputs}
            sampler, _ = pack.nodes["LookaheadGuidanceSampler"].execute(sampler, shortcut, asked, **inputs).result
        levels = [float(mini.model.get_model_object("model_sampling").percent_to_sigma(place)) for place in (0.3, 0.42)]
        guider = tools.guider(mini.model, mini.text(1), mini.text(2), 3.0)
        noise = torch.randn(LATENT, generator=torch.Generator().manual_seed(2))
        return guider.sample(noise, torch.zeros(LATENT), sampler, torch.tensor([*levels, 0.0]), seed=1)

    return drawn


@pytest.fixture
def applied(pack, drawn, monkeypatch):
    """What a guided run gives to the guide and takes from it, in order."""
    module, seen = pack.module("nodes.guidance.guided_run"), []
    apply = module.apply_noise_guide

    def watched(*given):
        seen.append((given, apply(*given)))
        return seen[-1][1]

    monkeypatch.setattr(module, "apply_noise_guide", watched)
    return seen


def test_a_file_is_loaded_with_what_it_says_about_itself(pack, tools, write, load):
    guide = load()
    assert guide.file.network.sizes.identity == 12
    _, text = pack.nodes["LookaheadLoadNoiseGuide"].execute(write("guide.safetensors")).result
    assert "guide.safetensors: noise guide" in text and "trained_with.pth" in text
    assert pack.nodes["LookaheadLoadNoiseGuide"].validate_inputs("guide.safetensors") is True


def test_a_file_that_is_none_is_refused_in_a_sentence(tools, folder):
    (folder / "broken.safetensors").write_bytes(b"no file")
    with pytest.raises(ValueError, match=r"broken\.safetensors is neither") as error:
        tools.run("LookaheadLoadNoiseGuide", "broken.safetensors")
    tools.one_sentence(error)


def test_an_untrained_guide_draws_what_a_whole_lean_draws_to_the_bit(load, drawn):
    leaned = drawn(None, lean=1.0)
    assert torch.equal(drawn(load(trained=False)), leaned) and not torch.equal(leaned, drawn(None))


def test_the_latents_move_as_the_library_has_it_each_towards_its_person(pack, load, drawn, identity, applied):
    guide, loss = load(), identity()
    drawn(guide, loss)
    (((_, _, z, preview, goal, place, alpha_bar), moved),) = applied
    method = pack.module("lookahead.method.noise_guide")
    with torch.inference_mode():
        expected = method.guide_noise(
            guide.file.network, z, preview, goal, place, alpha_bar, loss.references.embeddings
        ).z
    assert torch.equal(moved, expected) and (moved - z).flatten(1).abs().amax(1).min() > 1e-2
    outside = (place == 0).expand_as(z)
    assert outside.any() and (~outside).any() and torch.equal(moved[outside], z[outside])


def test_under_a_mask_the_rest_keeps_its_bits(load, drawn, applied):
    mask = torch.zeros(1, 8, 8)
    mask[..., :4] = 1.0
    drawn(load(), mask=mask)
    ((_, _, z, *_), moved) = applied[0]
    assert torch.equal(moved[..., 4:], z[..., 4:]) and not torch.equal(moved[..., :4], z[..., :4])


def test_the_identity_may_be_one_of_several_losses_but_must_be_there(pack, tools, load, drawn, identity):
    base = pack.module("lookahead.losses.base")

    def colour(picture, rows=None):
        return picture.mean((1, 2, 3)), torch.ones(len(picture), dtype=torch.bool)

    guide, alone = load(), drawn(load(), identity())
    assert torch.equal(drawn(guide, base.Combined(((0.5, colour), (1.0, identity())))), alone)
    for loss in (colour, base.Combined(((1.0, colour), (0.0, identity())))):
        with pytest.raises(ValueError, match="the loss names none") as error:
            drawn(guide, loss)
        tools.one_sentence(error)


def test_another_recogniser_is_refused_and_the_same_by_another_name_is_not(tools, load, drawn, identity):
    guide = load()
    drawn(guide, identity(Recogniser("renamed.onnx")))
    with pytest.raises(ValueError, match="and other.pth tells people apart in another way") as error:
        drawn(guide, identity(Recogniser("other.pth", seed=5)))
    tools.one_sentence(error)


@pytest.mark.parametrize(("start", "warned"), [(0.4, False), (0.2, True)])
def test_a_step_for_which_the_guide_was_not_trained_is_told(load, drawn, caplog, start, warned):
    with caplog.at_level(logging.WARNING):
        drawn(load(), start=start)
    assert ("was trained to act from 0.4 to 0.45" in caplog.text) == warned


def test_alone_a_guide_acts_where_it_was_trained_to_whatever_the_node_s_numbers_are(load, drawn, caplog):
    with caplog.at_level(logging.WARNING):
        alone = drawn(load(), preset="off", start=0.0)
    assert torch.equal(alone, drawn(load())) and "was trained to act" not in caplog.text


def test_a_guide_acts_once_a_run_and_in_the_place_of_a_lean(load, drawn, applied):
    once = drawn(load(), guided_steps=2, start=0.2)
    assert len(applied) == 1
    assert torch.equal(drawn(load(), guided_steps=2, start=0.2, lean=0.5), once)


def test_iterations_go_on_from_what_the_guide_has_moved(load, drawn, applied):
    alone, more = drawn(load()), drawn(load(), iterations=2)
    assert torch.equal(applied[0][1], applied[1][1]) and not torch.equal(alone, more)
    assert not torch.equal(more, drawn(None, iterations=2))


def test_the_guidance_sampler_without_a_guide_or_iterations_leaves_the_run_alone(drawn):
    assert torch.equal(drawn(None, iterations=0), drawn(None))
