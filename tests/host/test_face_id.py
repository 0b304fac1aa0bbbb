"""IP-Adapter FaceID Plus v2 in the host: against diffusers' own on a narrow random file in the public layout."""

import shutil
from pathlib import Path

import pytest
import torch
from tensors import relative

SIGMA_STEP, RANK = 601, 3
MINI_PACK = Path(__file__).resolve().parents[2] / "mini/weights/insightface/models/mini"


def make_weights(pack, world, tools, face_width=512, seed=6):
    """The two halves of a file for a world, as the public one nests them."""
    sizes = pack.module("lookahead.method.face_id").FaceIDSizes(
        4, world.context, face_width, 2 * face_width, world.clip_vision.model.config_hidden, 4, world.context // 64, 256
    )
    g = torch.Generator().manual_seed(seed)
    halves = {"image_proj": {}, "ip_adapter": {}}
    for name, shape in sizes.shapes().items():
        norm = name.endswith("weight") and len(shape) == 1
        halves["image_proj"][name] = norm + torch.randn(shape, generator=g) * shape[-1] ** -0.5
    for n, width in enumerate(tools.widths(world)):
        for x in "kv":
            halves["ip_adapter"][f"{2 * n + 1}.to_{x}_ip.weight"] = torch.randn(width, world.context, generator=g) / 8
        for number in (2 * n, 2 * n + 1):
            for to in ("to_q", "to_k", "to_v", "to_out"):
                width_in = world.context if number % 2 and to in ("to_k", "to_v") else width
                down, up = torch.randn(RANK, width_in, generator=g), torch.randn(width, RANK, generator=g)
                halves["ip_adapter"][f"{number}.{to}_lora.down.weight"] = down * width_in**-0.5
                halves["ip_adapter"][f"{number}.{to}_lora.up.weight"] = up * 0.3
    return halves


@pytest.fixture
def world(worlds):
    """SDXL's layout, narrow; CLIP features as wide as the tests' image encoder gives them."""
    world = worlds("sdxl")
    image = torch.zeros(1, 3, world.clip_vision.image_size, world.clip_vision.image_size)
    features = world.clip_vision.model(pixel_values=image, intermediate_output=-2)[1]
    world.clip_vision.model.config_hidden = features.shape[-1]
    return world


@pytest.fixture
def load(pack, tmp_path):
    """load(halves) -> the encoder of a file with these weights, by the loader's own way."""

    def run(halves):
        torch.save(halves, tmp_path / "faceid.bin")
        return pack.module("nodes.reference.face_id_encoder").load(tmp_path / "faceid.bin")[0]

    return run


@pytest.fixture
def read(pack, world):
    """read(encoder) -> the reference of a face with this embedding and picture, without finding it."""

    def run(encoder, face, pixels):
        encode, nodes = (pack.module(f"nodes.reference.{name}") for name in ("encode_reference", "encoder"))
        subject = pack.module("nodes.reference.subject")
        features = encode.image_features(encoder, world.clip_vision, pixels)
        tokens = encode.arranged(encoder.face_tokens(torch.cat([0 * face, face]), features), "average")
        keys_values = nodes.keys_values_of(encoder, *tokens)
        return subject.Reference((subject.Subject(encoder, None, None, *keys_values, tokens=tokens[0]),))

    return run


@pytest.fixture
def face():
    return torch.nn.functional.normalize(torch.randn(1, 512, generator=torch.Generator().manual_seed(4)), dim=-1)


@pytest.fixture
def pixels(world):
    size = world.clip_vision.image_size
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def in_host(world, tools):
    text, sigma = world.text(11, width=64, height=64), sigma_of(world)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return lambda model: (x * sigma - tools.denoised(model, text, text, x * sigma, sigma)) / sigma


def sigma_of(world):
    return float(world.model.get_model_object("model_sampling").sigmas[SIGMA_STEP])


def in_diffusers(world, tools, halves, face, pixels, weight, lora_weight):
    """diffusers' own projection and image prompt; the LoRA merged into the weights."""
    text, sigma = world.text(11), sigma_of(world)
    unet = tools.diffusers_unet(world)
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    for number, name in enumerate(names):
        attention = unet.get_submodule(name)
        for to in ("to_q", "to_k", "to_v", "to_out"):
            down, up = (halves["ip_adapter"][f"{number}.{to}_lora.{half}.weight"] for half in ("down", "up"))
            layer = attention.to_out[0] if to == "to_out" else getattr(attention, to)
            layer.weight.add_(lora_weight * up @ down)
    with torch.inference_mode(False):
        unet._load_ip_adapter_weights([halves], low_cpu_mem_usage=False)
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [weight]
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    features = world.clip_vision.model(pixel_values=pixels, intermediate_output=-2)[1]
    projection.shortcut, projection.clip_embeds = True, features[None].expand(2, -1, -1, -1)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * sigma / (sigma**2 + 1) ** 0.5
    added = {"text_embeds": text[0][1]["pooled_output"].expand(2, -1), "image_embeds": [face[None].expand(2, -1, -1)]}
    added["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(2, -1)
    return unet(x, SIGMA_STEP, encoder_hidden_states=text[0][0].expand(2, -1, -1), added_cond_kwargs=added).sample


@pytest.mark.parametrize(("weight", "lora_weight"), [(1.0, 1.0), (0.6, 0.5)])
def test_it_agrees_with_diffusers(pack, world, tools, load, read, face, pixels, in_host, weight, lora_weight):
    halves = make_weights(pack, world, tools)
    reference = read(load(halves), face, pixels)
    found = in_host(tools.apply(world.model, reference, weight=weight, lora_weight=lora_weight))
    expected = in_diffusers(world, tools, halves, face, pixels, weight, lora_weight)
    print("relative rms difference", relative(found, expected))
    assert relative(found, expected) < 1e-4
    # Each part does something here, so that the comparison could fail.
    without_lora = in_host(tools.apply(world.model, reference, weight=weight, lora_weight=0.0))
    nobody = in_host(tools.apply(world.model, read(load(halves), 0 * face, 0 * pixels), weight=weight))
    for other in (without_lora, nobody, in_host(world.model)):
        assert relative(other, expected) > 1e-3


def test_at_weight_0_and_outside_of_its_part_the_model_is_untouched(
    pack, world, tools, load, read, face, pixels, in_host
):
    reference, plain = read(load(make_weights(pack, world, tools)), face, pixels), in_host(world.model)
    for options in ({"weight": 0.0}, {"start": 0.99}):
        assert torch.equal(in_host(tools.apply(world.model, reference, **options)), plain)
    in_host(tools.apply(world.model, reference))
    assert torch.equal(in_host(world.model), plain)


def test_two_people_share_one_lora_and_kv_injection_stays_within(pack, world, tools, load, read, face, pixels, in_host):
    encoder = load(make_weights(pack, world, tools))
    one, two = read(encoder, face, pixels), read(encoder, face.flip(-1), pixels)
    both = tools.apply(tools.apply(world.model, one, weight=0.5), two, weight=0.5)
    again = tools.apply(tools.apply(world.model, one, weight=0.5), two, weight=0.5, lora_weight=0.0)
    assert relative(in_host(both), in_host(again)) < 1e-6  # the second brings the same LoRA, which acts once
    thing = tools.kv_reference(world, tools.picture(1))
    order = [tools.inject(tools.apply(world.model, one), thing), tools.apply(tools.inject(world.model, thing), one)]
    first, second = map(in_host, order)
    assert torch.equal(first, second) and relative(first, in_host(tools.apply(world.model, one))) > 1e-3


def test_another_node_s_replacement_is_called_with_the_changed_projections(
    pack, world, tools, load, read, face, pixels, in_host
):
    model, seen = world.model.clone(), []

    def replacement(q, k, v, extra):
        seen.append(q)
        return q

    model.set_model_attn1_replace(replacement, "middle", 0, 3)
    in_host(tools.apply(model, read(load(make_weights(pack, world, tools)), face, pixels)))
    in_host(model)
    assert len(seen) == 2 and relative(seen[0], seen[1]) > 1e-3


def test_gradients_flow_through_its_lora(pack, world, tools, load, read, face, pixels):
    """As the guidance sampler needs them: networks are loaded in inference mode, and differentiated outside of it."""
    encoder = load(make_weights(pack, world, tools))
    model = tools.apply(world.model, read(encoder, face, pixels))
    autograd = pack.module("nodes.guidance.autograd")
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = autograd.pytorch_attention
    networks = [patcher.model for patcher in model.get_additional_models_with_key("lookahead")]
    assert networks == [encoder.lora_patcher.model]
    text, sigma, found = world.text(11), sigma_of(world), []

    def once(model_k, noise, sigmas, extra_args=None, callback=None, disable=None):
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
            with autograd.differentiable([model.model.diffusion_model, *networks]):
                level = torch.full((1,), sigma)
                value = model_k(sigma * x, level, **extra_args).square().sum()
                (gradient,) = torch.autograd.grad(value, x)
                direction = gradient / gradient.norm()
                ahead, behind = (
                    model_k(sigma * (x + step * direction), level, **extra_args).square().sum()
                    for step in (1e-2, -1e-2)
                )
            found.append((((ahead - behind) / 2e-2).item(), gradient.norm().item()))
        return noise

    import comfy.samplers

    guider, zeros = tools.guider(model, text, text, 1.0), torch.zeros(1, 4, 8, 8)
    guider.sample(zeros, zeros, comfy.samplers.KSAMPLER(once), torch.tensor([sigma, 0.0]), seed=1)
    slope, norm = found[0]
    assert slope == pytest.approx(norm, rel=2e-2)


def test_nodes_for_the_other_kind_of_encoder_say_which_is_right(pack, world, tools, load):
    face_id, plus = load(make_weights(pack, world, tools)), tools.encoder(world.encoder)
    with pytest.raises(ValueError) as error:
        tools.run("LookaheadEncodeReference", face_id, world.clip_vision, tools.picture(1))
    assert "Encode Lookahead Face" in tools.one_sentence(error)
    with pytest.raises(ValueError) as error:
        tools.run("LookaheadEncodeFace", plus, world.clip_vision, None, tools.picture(1))
    assert "Encode Lookahead Reference" in tools.one_sentence(error)


@pytest.fixture
def analysis(pack):
    """The mini face pack, by the real insightface."""
    pytest.importorskip("insightface")
    pytest.importorskip("onnxruntime")
    folder = pack.base / "models/insightface/models"
    shutil.copytree(MINI_PACK, folder / "mini")
    yield pack.nodes["LookaheadLoadFaceAnalysis"].execute("mini").result[0]
    shutil.rmtree(folder.parent)


def test_the_largest_face_of_each_picture_is_read_and_can_be_saved(pack, world, tools, load, analysis, in_host):
    faces = pack.module("mini.world.faces")
    g = torch.Generator().manual_seed(77)
    identity, nuisance = faces.sample_identities(2, g), faces.sample_nuisance(2, g, style=torch.zeros(2).long())
    pictures = faces.render(faces.Faces(identity, nuisance), 128).movedim(1, -1)
    width = analysis.embed(pictures[:1].movedim(-1, 1))[0][0][1].shape[-1]
    encoder = load(make_weights(pack, world, tools, face_width=width))
    node = pack.nodes["LookaheadEncodeFace"]
    reference, crops = node.execute(encoder, world.clip_vision, analysis, pictures, "one per picture").result
    (subject,) = reference.subjects
    assert crops.shape == (2, 224, 224, 3) and subject.tokens.shape == (2, 4, world.context)
    assert torch.allclose(subject.face.norm(dim=-1), torch.ones(2), atol=1e-4) and subject.recogniser.endswith(".onnx")
    average = tools.run("LookaheadEncodeFace", encoder, world.clip_vision, analysis, pictures).subjects[0]
    assert torch.allclose(average.tokens, subject.tokens.mean(0, keepdim=True), atol=1e-5)
    saved = pack.module("nodes.reference.reference_files")
    again = saved.restored([saved.saved(average, True)], encoder, "anna")
    assert torch.equal(again.subjects[0].face, average.face)
    drawn = [in_host(tools.apply(world.model, pack.module("nodes.reference.subject").Reference((s,))))
             for s in (average, again.subjects[0])]  # fmt: skip
    assert torch.equal(*drawn)
    with pytest.raises(ValueError) as error:
        node.execute(encoder, world.clip_vision, analysis, torch.full((1, 128, 128, 3), 0.5))
    assert "No face" in tools.one_sentence(error)
    with pytest.raises(ValueError) as error:  # at the smallest detection size nothing is left of it
        node.execute(encoder, world.clip_vision, analysis, torch.full((1, 32, 8000, 3), 0.5))
    assert "No face" in tools.one_sentence(error)
    with pytest.raises(ValueError) as error:
        other = load(make_weights(pack, world, tools, face_width=width + 1))
        node.execute(other, world.clip_vision, analysis, pictures)
    assert str(width + 1) in tools.one_sentence(error)
