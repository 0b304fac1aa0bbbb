"""The loss nodes in the real host: what they make of files, pictures and words, and that gradients pass."""

import pytest
import torch
from safetensors.torch import save_file

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def clip_file(pack):
    """A small whole CLIP in models/clip_vision, in a folder of its own as transformers writes it."""
    torch.manual_seed(0)
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**text, "num_hidden_layers": 2, "projection_dim": 12},
        vision_config={**vision, "num_hidden_layers": 2, "projection_dim": 12},
        projection_dim=12,
    )
    model = transformers.CLIPModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return put(pack, model, "small")


def put(pack, model, name, keep=lambda name: True):
    folder = pack.base / "models" / "clip_vision" / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().clone() for k, v in model.state_dict().items() if keep(k)}, folder / "model.safetensors")
    (folder / "config.json").write_text(model.config.to_json_string())
    return f"{name}/model.safetensors", model


@pytest.fixture
def clip(tools, clip_file):
    return lambda **options: tools.run("LookaheadCLIPLoss", clip_file[0], **options)


@pytest.fixture
def lpips(tools):
    pytest.importorskip("lpips")

    def call(image, **options):
        options = {"backbone": "squeeze", "weights": "random", "size": 32, **options}
        return tools.run("LookaheadLPIPSLoss", image, **options)

    return call


def as_preview(image):
    return image.movedim(-1, 1) * 2 - 1


def gradient(pack, value, preview, seed=1):
    """What a sampler does: load the networks, start the loss, differentiate it. Called in inference mode."""
    import comfy.model_management

    bind_rng = pack.module("lookahead.losses.base").bind_rng
    with torch.inference_mode(False), torch.enable_grad():
        comfy.model_management.load_models_gpu(list(value.patchers))
        loss = bind_rng(value.loss, torch.Generator().manual_seed(seed))
        leaf = preview.clone().requires_grad_(True)
        values, valid = loss(leaf)
        (slope,) = torch.autograd.grad(values[valid].sum(), leaf)
    return values.detach(), slope


@pytest.mark.contract
def test_every_loss_node_explains_itself(pack):
    schemas = [node.define_schema() for name, node in pack.nodes.items() if name.endswith(("Loss", "Losses"))]
    assert len(schemas) >= 5
    for schema in schemas:
        assert schema.description and all(p.tooltip and p.tooltip.endswith(".") for p in schema.inputs + schema.outputs)


def test_the_picture_loss_is_that_of_transformers_own_embeddings(pack, clip, clip_file, tools):
    references, drawn = tools.picture(1, n=2), tools.picture(2, n=2)
    images = pack.module("lookahead.vision.images")

    def own(image):
        size = 32
        small = torch.nn.functional.interpolate(image.movedim(-1, 1), (size, size), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (images.CLIP_MEAN, images.CLIP_STD))
        seen = clip_file[1].vision_model((small.clamp(0, 1) - mean) / std).pooler_output
        return torch.nn.functional.normalize(clip_file[1].visual_projection(seen), dim=-1)

    one_each = clip(image=references, several="one per picture").loss(as_preview(drawn))[0]
    assert torch.allclose(one_each, 1 - (own(drawn) * own(references)).sum(-1), atol=1e-5)
    average = clip(image=references).loss(as_preview(drawn))[0]
    mean = torch.nn.functional.normalize(own(references).mean(0), dim=-1)
    assert torch.allclose(average, 1 - own(drawn) @ mean, atol=1e-5)


def test_the_text_loss_is_that_of_transformers_own_tokens_and_embeddings(pack, clip, clip_file, tools):
    import comfy.sd1_clip

    tokenizer = comfy.sd1_clip.SDTokenizer().tokenizer
    drawn = as_preview(tools.picture(2))

    def own(text):
        pooled = clip_file[1].text_model(tokenizer([text], return_tensors="pt")["input_ids"]).pooler_output
        return torch.nn.functional.normalize(clip_file[1].text_projection(pooled), dim=-1)

    text, neutral = own("an oil painting of a man"), own("a photo of a face")
    plain = clip(text=" an oil painting of a man\n")
    directed = clip(text="an oil painting of a man", neutral="a photo of a face")
    assert torch.allclose(plain.loss.targets, text, atol=1e-5)
    way = torch.nn.functional.normalize(text - neutral, dim=-1)
    assert torch.allclose(directed.loss.targets, way, atol=1e-4)
    assert plain.name == "CLIP words" and not torch.allclose(plain.loss(drawn)[0], directed.loss(drawn)[0], atol=1e-3)


def test_pictures_and_words_count_the_same_over_one_network(clip, tools):
    image, drawn = tools.picture(1), as_preview(tools.picture(2, n=2))
    both, picture, words = clip(image=image, text="smiling"), clip(image=image), clip(text="smiling")
    expected = (picture.loss(drawn)[0] + words.loss(drawn)[0]) / 2
    assert torch.allclose(both.loss(drawn)[0], expected, atol=1e-6)
    assert len(both.patchers) == 1 and both.name == "CLIP picture and words"


@pytest.mark.parametrize("kind", ["picture", "words", "lpips"])
@pytest.mark.contract
def test_gradients_pass_through_networks_that_a_node_loaded_and_the_host_moved(pack, clip, lpips, tools, kind):
    """As it happens: loaded by a node, unloaded for another model by somebody in inference mode, loaded again."""
    import comfy.model_management

    image, drawn = tools.picture(1), as_preview(tools.picture(2, n=2))
    options = {"picture": {"image": image}, "words": {"text": "smiling"}}
    value = lpips(image) if kind == "lpips" else clip(**options[kind])
    assert torch.is_inference_mode_enabled()
    values, slope = gradient(pack, value, drawn)
    assert slope.flatten(1).abs().amax(1).min() > 0 and torch.isfinite(slope).all()
    comfy.model_management.unload_all_models()
    again, slope_again = gradient(pack, value, drawn)
    assert torch.equal(values, again) and torch.allclose(slope, slope_again, atol=1e-7)
    network = value.patchers[0].model
    tensors = [*network.parameters(), *network.buffers()]
    assert not any(t.is_inference() or t.requires_grad for t in tensors)


@pytest.mark.contract
def test_a_network_is_moved_outside_of_inference_mode_and_whole_whoever_asks(pack):
    import comfy.model_management

    seen = []

    class Watched(torch.nn.Linear):
        def to(self, *args, **kwargs):
            seen.append(torch.is_inference_mode_enabled())
            return super().to(*args, **kwargs)

    with torch.inference_mode(False):
        patcher = pack.module("nodes.losses.network").GradientPatcher(torch.nn.Sequential(Watched(4, 4), Watched(4, 4)))
    assert torch.is_inference_mode_enabled()
    comfy.model_management.load_models_gpu([patcher])
    loaded = next(m for m in comfy.model_management.current_loaded_models if m.model is patcher)
    assert patcher.loaded_size() == patcher.model_size()
    assert loaded.model_unload(memory_to_free=1), "asked for a part, all of it goes"
    assert patcher.loaded_size() == 0 and seen and not any(seen)
    comfy.model_management.current_loaded_models.remove(loaded)  # as the host does after unloading
    patcher.load(patcher.load_device, lowvram_model_memory=1)  # as with little memory
    assert patcher.loaded_size() == patcher.model_size()


@pytest.mark.contract
def test_networks_are_known_to_the_hosts_memory_management(clip, tools):
    import comfy.model_management

    comfy.model_management.unload_all_models()
    value = clip(image=tools.picture(1))
    assert value.patchers[0] in [m.model for m in comfy.model_management.current_loaded_models]


def test_a_seed_repeats_a_run_of_random_views(pack, clip, lpips, tools):
    drawn = as_preview(tools.picture(2))
    combined = tools.run(
        "LookaheadCombineLosses",
        loss_a=clip(text="smiling"),
        weight_a=1.0,
        loss_b=lpips(tools.picture(1)),
        weight_b=0.5,
    )
    first, again, other = (gradient(pack, combined, drawn, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_lpips_compares_place_by_place_and_the_own_picture_is_0(lpips, tools):
    image = tools.picture(1, n=2)
    value = lpips(image)
    assert torch.allclose(value.loss(as_preview(image))[0], torch.zeros(2), atol=1e-6)
    assert value.loss(as_preview(image.flip(0)))[0].min() > 1e-3
    assert value.loss(as_preview(image.flip(2)))[0].min() > 1e-3  # mirrored
    assert value.name == "LPIPS (random weights)"


def test_lpips_reads_torchvisions_file_and_says_what_to_get_without_it(pack, lpips, tools):
    import torchvision

    node = pack.nodes["LookaheadLPIPSLoss"]
    said = node.validate_inputs(backbone="alex", weights="from a file")
    assert (
        "download.pytorch.org/models/alexnet-owt-7be5be79.pth" in said and str(pack.base) in said and said.endswith(".")
    )
    assert node.validate_inputs(backbone="alex", weights="random") is True
    with pytest.raises(FileNotFoundError) as error:
        lpips(tools.picture(1), backbone="squeeze", weights="from a file")
    assert "squeezenet1_1-b8a52dc0.pth" in tools.one_sentence(error)
    folder = pack.base / "models" / "lookahead_losses"
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(False):
        torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), folder / "squeezenet1_1-b8a52dc0.pth")
    try:
        assert node.validate_inputs(backbone="squeeze", weights="from a file") is True
        value = lpips(tools.picture(1), weights="from a file")
        assert value.name == "LPIPS" and gradient(pack, value, as_preview(tools.picture(2)))[1].abs().max() > 0
    finally:
        (folder / "squeezenet1_1-b8a52dc0.pth").unlink()


def test_the_colour_loss_needs_nothing_and_passes_gradients(pack, tools):
    image = tools.picture(1, n=2)
    value = tools.run("LookaheadL1Loss", image, size=16)
    values, slope = gradient(pack, value, as_preview(image.flip(0)))
    assert values.min() > 0.01 and slope.flatten(1).abs().amax(1).min() > 0
    assert torch.allclose(value.loss(as_preview(image))[0], torch.zeros(2), atol=1e-6)
    assert value.patchers == () and value.name == "L1"


def test_combined_weighs_names_and_loads_each_network_once(pack, clip, lpips, tools):
    words, likeness = clip(text="smiling"), lpips(tools.picture(1))
    drawn = as_preview(tools.picture(2))

    def combine(**inputs):
        return tools.run("LookaheadCombineLosses", **inputs)

    both = combine(loss_a=words, weight_a=3.0, loss_b=likeness, weight_b=1.0, weight_c=5.0)
    expected = (3 * words.loss(drawn)[0] + likeness.loss(drawn)[0]) / 4
    assert torch.allclose(both.loss(drawn)[0], expected, atol=1e-6)
    assert both.name == "3 CLIP words + 1 LPIPS (random weights)"
    assert both.patchers == (*words.patchers, *likeness.patchers)
    assert len(combine(loss_a=words, weight_a=1.0, loss_b=words, weight_b=1.0).patchers) == 1
    alone = combine(loss_a=words, weight_a=0.0, loss_b=likeness, weight_b=1.0)
    assert alone.patchers == likeness.patchers and torch.equal(alone.loss(drawn)[0], likeness.loss(drawn)[0])
    with pytest.raises(ValueError) as error:
        combine(loss_a=words, weight_a=0.0)
    assert "above 0" in tools.one_sentence(error)


def test_what_says_nothing_is_refused(clip, tools):
    with pytest.raises(ValueError) as error:
        clip(text="  ")
    assert "connect image" in tools.one_sentence(error)
    with pytest.raises(ValueError) as error:
        clip(image=tools.picture(1), neutral="a face")
    assert "clear neutral" in tools.one_sentence(error)
    with pytest.raises(ValueError) as error:
        clip(text="a face", neutral="a face")
    assert "say the same" in tools.one_sentence(error)


def test_a_picture_half_alone_serves_pictures_and_is_refused_for_words(pack, clip_file, tools):
    name, _ = put(pack, clip_file[1], "half", keep=lambda name: name.startswith("vis"))
    assert tools.run("LookaheadCLIPLoss", name, image=tools.picture(1)).name == "CLIP picture"
    with pytest.raises(ValueError) as error:
        tools.run("LookaheadCLIPLoss", name, text="smiling")
    assert "whole CLIP" in tools.one_sentence(error)


def test_a_missing_file_is_said_with_where_it_was_looked_for(pack):
    said = pack.nodes["LookaheadCLIPLoss"].validate_inputs(clip_name="none.safetensors")
    assert "none.safetensors" in said and "clip_vision" in said and said.endswith(".")


@pytest.mark.contract
def test_a_file_that_was_replaced_is_read_again(pack, clip_file):
    def known():
        return pack.nodes["LookaheadCLIPLoss"].fingerprint_inputs(clip_name=clip_file[0], text="a", views=4)

    before = known()
    assert before == known()
    path = pack.base / "models" / "clip_vision" / clip_file[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert known() != before
    path.write_bytes(content)


def test_transparency_grey_and_half_precision_are_read(clip, tools):
    image = tools.picture(1, channels=4)
    over_white = image[..., :3] * image[..., 3:] + (1 - image[..., 3:])
    assert torch.equal(clip(image=image).loss.targets, clip(image=over_white).loss.targets)
    plain = clip(image=image[..., :3])
    half = clip(image=image[..., :3].half())
    assert torch.allclose(half.loss.targets, plain.loss.targets, atol=1e-2)
