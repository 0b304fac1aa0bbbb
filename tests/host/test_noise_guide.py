"""Noise guides in the host: their files, and the sampler's state that one moves in a pass."""

import logging
import shutil

import pytest
import torch

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

    def write(name, trained=True, start=0.12, end=0.2):
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


@pytest.fixture
def identity(pack, recogniser):
    """An identity loss of two people."""
    losses = pack.module("lookahead.losses.identity")
    people = torch.nn.functional.normalize(torch.randn(2, 12, generator=torch.Generator().manual_seed(4)), dim=-1)
    references = losses.FaceReferences(people, torch.zeros(2, 5, 2), torch.full((2, 2), 64))

    def make(recogniser=recogniser):
        return losses.IdentityLoss(recogniser, lambda pictures: [[] for _ in pictures], references)

    return make


@pytest.fixture(scope="module")
def vae(pack):
    """TAESD as it is made, as the host's VAE: previews are not decoded here."""
    import comfy.sd
    import comfy.taesd.taesd

    with torch.inference_mode():
        weights = comfy.taesd.taesd.TAESD().state_dict() | {"vae_scale": torch.tensor(0.13025)}
        return comfy.sd.VAE(sd=weights)


@pytest.fixture
def apply(pack, tools, mini, vae):
    """Moves a sampler's state at the noise level of a place in the sampling, inside of a run of the host; returns the
    state before and after."""

    def apply(guide, loss, place=0.15, mask=None):
        import comfy.samplers

        module, preview = pack.module("nodes.guidance.noise_guide"), pack.module("nodes.guidance.preview")
        shortcut = tools.run("LookaheadShortcut", tools.with_lora(mini.model), vae)
        sigma = float(mini.model.get_model_object("model_sampling").percent_to_sigma(place))
        x = sigma * torch.randn(LATENT, generator=torch.Generator().manual_seed(2))
        found = []

        def call_once(model_k, noise, sigmas, extra_args=None, callback=None, disable=None):
            previewer = preview.Previewer(shortcut, guider)
            previewer.load([guide.patcher], x, 1.0)
            call = preview.Call(model_k, sigmas[:1].expand(len(x)), extra_args)
            previewer.prepare(call)
            conds = previewer.conds(noise, None, call)
            found.append(module.apply_noise_guide(guide, previewer, x, call, conds, loss, mask))
            with previewer.installed():
                found.append(previewer.latent(x, call, conds, torch.ones(len(x)), grad=False))
            previewer.close()
            return noise

        guider = tools.guider(mini.model, mini.text(1), mini.text(2), 3.0)
        sampler = comfy.samplers.KSAMPLER(call_once)
        guider.sample(torch.zeros(LATENT), torch.zeros(LATENT), sampler, torch.tensor([sigma, 0.0]), seed=1)
        after, latent = found
        return x, after, latent, sigma

    return apply


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


def test_an_untrained_guide_leaves_the_sampler_s_state_to_the_bit(load, apply, identity):
    before, after, *_ = apply(load(trained=False), identity())
    assert torch.equal(after, before)


def test_the_state_moves_on_the_sphere_of_its_noise_towards_each_picture_s_person(pack, load, apply, identity):
    guide, loss = load(), identity()
    before, after, preview, sigma = apply(guide, loss)
    # In the host's scale x = z_0 + sigma e, so what is left beside the preview is the noise.
    noise, moved = ((x - preview).flatten(1) for x in (before, after))
    assert torch.allclose(moved.norm(dim=1), noise.norm(dim=1), rtol=1e-3)
    assert (after - before).flatten(1).norm(dim=1).min() > 1e-3 * sigma
    method = pack.module("lookahead.method.noise_guide")
    level = torch.tensor(1 / (sigma**2 + 1)).expand(2)
    z = before / (sigma**2 + 1) ** 0.5
    expected = method.guide_noise(guide.file.network, z, preview, level, loss.references.embeddings).z
    assert torch.allclose(after, expected * (sigma**2 + 1) ** 0.5, atol=1e-3 * sigma)


def test_under_a_mask_the_rest_of_the_state_keeps_its_bits(load, apply, identity):
    mask = torch.zeros(2, 1, *LATENT[2:])
    mask[..., :3] = 1.0
    before, after, *_ = apply(load(), identity(), mask=mask)
    assert torch.equal(after[..., 3:], before[..., 3:]) and not torch.equal(after[..., :3], before[..., :3])


def test_the_identity_may_be_one_of_several_losses_but_must_be_there(pack, tools, load, apply, identity):
    base = pack.module("lookahead.losses.base")

    def colour(picture, rows=None):
        return picture.mean((1, 2, 3)), torch.ones(len(picture), dtype=torch.bool)

    guide, alone = load(), apply(load(), identity())[1]
    assert torch.equal(apply(guide, base.Combined(((0.5, colour), (1.0, identity()))))[1], alone)
    for loss in (colour, base.Combined(((1.0, colour), (0.0, identity())))):
        with pytest.raises(ValueError, match="the loss names none") as error:
            apply(guide, loss)
        tools.one_sentence(error)


def test_another_recogniser_is_refused_and_the_same_by_another_name_is_not(tools, load, apply, identity):
    guide = load()
    apply(guide, identity(Recogniser("renamed.onnx")))
    with pytest.raises(ValueError, match="and other.pth tells people apart in another way") as error:
        apply(guide, identity(Recogniser("other.pth", seed=5)))
    tools.one_sentence(error)


@pytest.mark.parametrize(("place", "warned"), [(0.12, False), (0.2, False), (0.5, True), (0.02, True)])
def test_a_step_for_which_the_guide_was_not_trained_is_told(load, apply, identity, caplog, place, warned):
    with caplog.at_level(logging.WARNING):
        apply(load(), identity(), place)
    assert ("was trained to act from 0.12 to 0.2" in caplog.text) == warned


@pytest.fixture
def drawn(pack, tools, mini, vae, identity):
    """A run of two steps with a noise guide in the guidance sampler; `loss` in place of that by the guide's people."""

    def drawn(guide, loss=None, **inputs):
        import comfy.samplers

        losses = pack.module("nodes.losses.lookahead_loss")
        shortcut = tools.run("LookaheadShortcut", tools.with_lora(mini.model), vae)
        sampler = comfy.samplers.sampler_object("euler")
        if guide is not None or inputs:
            asked = losses.LookaheadLoss(loss or identity(), name="identity")
            inputs = {"start": 0.12, "noise_guide": guide, **inputs}
            sampler, _ = pack.nodes["LookaheadGuidanceSampler"].execute(sampler, shortcut, asked, **inputs).result
        levels = [
            float(mini.model.get_model_object("model_sampling").percent_to_sigma(place)) for place in (0.13, 0.18)
        ]
        guider = tools.guider(mini.model, mini.text(1), mini.text(2), 3.0)
        noise = torch.randn(LATENT, generator=torch.Generator().manual_seed(2))
        return guider.sample(noise, torch.zeros(LATENT), sampler, torch.tensor([*levels, 0.0]), seed=1)

    return drawn


@pytest.mark.parametrize("inputs", [{"iterations": 0}, {"preset": "off"}], ids=["no iterations", "off"])
def test_the_guidance_sampler_lets_a_guide_act_alone(load, drawn, inputs):
    plain = drawn(None)
    assert torch.equal(drawn(load(trained=False), **inputs), plain)
    moved = drawn(load(), **inputs)
    assert not torch.equal(moved, plain) and torch.equal(drawn(load(), **inputs), moved)


def test_a_guide_acts_once_a_run(pack, load, drawn, monkeypatch):
    module, acted = pack.module("nodes.guidance.guided_run"), []
    apply = module.apply_noise_guide
    monkeypatch.setattr(module, "apply_noise_guide", lambda *given: acted.append(1) or apply(*given))
    drawn(load(), iterations=0, guided_steps=2)
    assert acted == [1]


def test_the_guidance_sampler_without_a_guide_or_iterations_leaves_the_run_alone(drawn):
    assert torch.equal(drawn(None, iterations=0), drawn(None))
