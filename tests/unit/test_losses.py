"""Lookahead losses, each against the package that defines it: values, gradients, rows, masks, cutouts."""

import json
import re

import pytest
import torch
from lcm_lookahead.lookahead.losses.base import UNLIKE, Combined, bind_rng
from lcm_lookahead.lookahead.losses.cutouts import Cutouts
from lcm_lookahead.lookahead.losses.embedding import EmbeddingLoss, embed
from lcm_lookahead.lookahead.losses.l1 import L1Loss
from lcm_lookahead.lookahead.losses.lpips import LPIPSLoss
from lcm_lookahead.lookahead.vision import clip, perceptual
from lcm_lookahead.lookahead.vision.images import CLIP_MEAN, CLIP_STD, cover
from safetensors.torch import save_file
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")
lpips = pytest.importorskip("lpips")

SIZE, END = 16, 49407


def smooth(seed, n=1, height=24, width=24, dtype=torch.float32):
    """Pictures [n, 3, h, w] inside [-0.9, 0.9]."""
    small = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return F.interpolate(small, (height, width), mode="bilinear") * 1.8 - 0.9


@pytest.fixture(scope="module")
def clip_model():
    """A small CLIPModel with the activation and the heads that nobody would guess."""
    torch.manual_seed(0)
    common = {"hidden_act": "gelu", "projection_dim": 12, "num_hidden_layers": 2}
    config = transformers.CLIPConfig(
        text_config={**common, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4},
        vision_config={**common, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3}
        | {"image_size": SIZE, "patch_size": 4},
        projection_dim=12,
    )
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():  # norms and biases too: ones and zeros would hide an exchanged one
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def write(model, folder, name="model.safetensors", half=False, configuration="config.json", keep=lambda name: True):
    tensors = {k: v.half() if half else v.clone() for k, v in model.state_dict().items() if keep(k)}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    if configuration:
        (folder / configuration).write_text(model.config.to_json_string())
    return folder / name


@pytest.fixture(scope="module")
def clip_file(clip_model, tmp_path_factory):
    return clip.read(write(clip_model, tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def pictures_encoder(clip_file):
    return clip.CLIPPictures(clip_file)


@pytest.fixture(scope="module")
def lpips_small():
    return perceptual.lpips_network("squeeze", seed=3)


def token_ids(*lengths):
    g = torch.Generator().manual_seed(1)
    ids = torch.full((len(lengths), max(lengths)), END)
    for row, length in zip(ids, lengths, strict=True):
        row[: length - 1] = torch.randint(1000, (length - 1,), generator=g)
    return ids


def slope(loss, preview, seed=4, step=1e-4):
    """A directional derivative by finite differences and by the gradient; everything in float64."""
    direction = torch.randn(preview.shape, generator=torch.Generator().manual_seed(seed), dtype=preview.dtype)
    leaf = preview.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(leaf)[0].sum(), leaf)
    up, down = (loss(preview + sign * step * direction)[0].sum() for sign in (1, -1))
    return (gradient * direction).sum(), (up - down) / (2 * step)


# CLIP


def test_picture_vectors_are_those_of_transformers_with_its_own_preprocessing(clip_model, pictures_encoder):
    pixels = torch.randint(256, (1, 3, 24, 36), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    seen = processor(images=[pixels[0].movedim(0, -1).numpy()], return_tensors="pt")["pixel_values"]
    own = clip_model.visual_projection(clip_model.vision_model(seen).pooler_output)
    ours = embed(pictures_encoder, pixels / 127.5 - 1)
    assert F.cosine_similarity(ours, own).item() > 0.9999  # the package rounds to 8 bit in between
    squares = cover(pixels / 255, SIZE, SIZE).clamp(0, 1)
    exact = (squares - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    exact = clip_model.visual_projection(clip_model.vision_model(exact).pooler_output)
    assert torch.allclose(ours, F.normalize(exact, dim=-1), atol=1e-6)


def test_text_vectors_are_those_of_transformers(clip_model, clip_file):
    ids = token_ids(4, 9)
    own = clip_model.text_projection(clip_model.text_model(ids).pooler_output)
    assert torch.allclose(clip.embed_texts(clip_file, ids), F.normalize(own, dim=-1), atol=1e-6)


def test_a_file_in_half_precision_is_computed_in_full(clip_model, clip_file, pictures_encoder, tmp_path):
    half = clip.CLIPPictures(clip.read(write(clip_model, tmp_path / "half", half=True)))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    picture = smooth(1)
    assert torch.allclose(embed(half, picture), embed(pictures_encoder, picture), atol=5e-3)


def test_the_configuration_beside_a_file_is_read_under_both_names(clip_model, clip_file, tmp_path):
    named = write(clip_model, tmp_path / "a", "my_clip.safetensors", configuration="my_clip_config.json")
    other = write(clip_model, tmp_path / "b", "my_clip.safetensors", configuration="config.json")
    assert clip.read(named).configuration == clip_file.configuration
    assert clip.read(other).configuration == {}  # a folder of many models has no configuration of one


@pytest.mark.parametrize(
    ("width", "text_width", "activation", "heads", "text_heads"),
    [(768, 512, "quick_gelu", 12, 8), (1024, 768, "quick_gelu", 16, 12), (1280, 1024, "gelu", 16, 16)],
)
def test_public_models_are_known_without_a_configuration(width, text_width, activation, heads, text_heads):
    """ViT-B and ViT-L of OpenAI, ViT-H of OpenCLIP; only two layers of each here."""
    text = {"hidden_size": text_width, "num_attention_heads": text_heads}
    vision = {"hidden_size": width, "num_attention_heads": heads, "patch_size": 112}
    sizes = {"num_hidden_layers": 2, "intermediate_size": 96}
    public = transformers.CLIPConfig(text_config=text | sizes, vision_config=vision | sizes, projection_dim=8)
    with torch.device("meta"):
        file = clip.CLIPFile("public", transformers.CLIPModel(public).state_dict(), {})
    vision, text = clip.picture_config(file), clip.text_config(file)
    assert (vision.hidden_act, vision.num_attention_heads) == (activation, heads)
    assert (text.hidden_act, text.num_attention_heads) == (activation, text_heads)
    assert (vision.image_size, vision.patch_size, vision.num_hidden_layers, vision.projection_dim) == (224, 112, 2, 8)
    assert (text.vocab_size, text.max_position_embeddings, text.projection_dim) == (49408, 77, 8)


def test_an_unknown_size_without_a_configuration_is_not_guessed(clip_model, tmp_path):
    file = clip.read(write(clip_model, tmp_path / "unknown", "tiny.safetensors", configuration=None))
    with pytest.raises(ValueError, match="24 wide.*tiny_config.json"):
        clip.CLIPPictures(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("visual_projection.weight"), "not a CLIP in the transformers layout"),
        (lambda t: t.update({"visual.conv1.weight": torch.zeros(1)}), "OpenCLIP's own layout"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_to_use(clip_model, tmp_path, change, said):
    tensors = {k: v.clone() for k, v in clip_model.state_dict().items()}
    change(tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=said):
        clip.read(tmp_path / "other.safetensors")


def test_weights_that_are_missing_or_misshapen_are_named(clip_model, tmp_path):
    name = "vision_model.encoder.layers.1.self_attn.q_proj.weight"
    file = clip.read(write(clip_model, tmp_path / "cut", keep=lambda k: k != name))
    with pytest.raises(ValueError, match=re.escape(name)):
        clip.CLIPPictures(file)


def test_the_picture_half_alone_reads_pictures_and_says_that_it_reads_no_text(clip_model, pictures_encoder, tmp_path):
    path = write(clip_model, tmp_path / "vision", configuration=None, keep=lambda k: k.startswith("vis"))
    (path.parent / "config.json").write_text(json.dumps(clip_model.config.vision_config.to_dict()))
    file = clip.read(path)
    assert torch.allclose(embed(clip.CLIPPictures(file), smooth(1)), embed(pictures_encoder, smooth(1)), atol=1e-6)
    with pytest.raises(ValueError, match="picture half alone"):
        clip.embed_texts(file, token_ids(4))


def test_the_loss_is_one_minus_cosine_and_0_for_the_reference_itself(pictures_encoder):
    pictures = smooth(5, n=2)
    targets = embed(pictures_encoder, pictures)
    values, valid = EmbeddingLoss(pictures_encoder, targets)(pictures)
    assert torch.allclose(values, torch.zeros(2), atol=1e-6) and valid.all() and values.dtype == torch.float32
    other, _ = EmbeddingLoss(pictures_encoder, targets.flip(0))(pictures)
    assert torch.allclose(other, (1 - (targets[0] @ targets[1])).expand(2), atol=1e-6)


def test_a_direction_rewards_what_the_text_says_beyond_the_neutral_one(clip_file):
    text, neutral = clip.embed_texts(clip_file, token_ids(5, 7))
    way = clip.directions(text[None], neutral)
    assert torch.allclose(way[0], (text - neutral) / (text - neutral).norm(), atol=1e-6)
    with pytest.raises(ValueError, match="say the same"):
        clip.directions(text[None], text)


def test_the_gradient_of_clip_is_that_of_finite_differences(clip_file):
    encoder = clip.CLIPPictures(clip_file).double()
    target = clip.embed_texts(clip_file, token_ids(6)).double()
    for cutouts in (None, Cutouts(count=3)):

        def loss(preview, cutouts=cutouts):
            return bind_rng(EmbeddingLoss(encoder, target, cutouts), torch.Generator().manual_seed(1))(preview)

        by_gradient, by_differences = slope(loss, smooth(1, n=2, dtype=torch.float64))
        assert by_gradient.item() == pytest.approx(by_differences.item(), rel=1e-5) and by_gradient != 0


# LPIPS


@pytest.mark.parametrize("backbone", list(perceptual.BACKBONES))
def test_lpips_is_the_packages_own_with_torchvisions_weights(backbone, tmp_path):
    torch.manual_seed(1)
    package = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False)
    for parameter in package.net.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    file = {f"features.{k.split('.', 1)[1]}": v for k, v in package.net.state_dict().items()}
    torch.save(file | {"classifier.1.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    ours = perceptual.lpips_network(backbone, tmp_path / "weights.pth")
    a, b = smooth(1, n=2, height=64, width=64), smooth(2, n=2, height=64, width=64)
    values, valid = LPIPSLoss(ours, b)(a)
    assert torch.equal(values, package(a, b).flatten()) and values.min() > 0 and valid.all()


def test_random_lpips_repeats_for_a_seed_and_differs_for_another(lpips_small):
    a, b = smooth(1, height=64, width=64), smooth(2, height=64, width=64)
    again, other = perceptual.lpips_network("squeeze", seed=3), perceptual.lpips_network("squeeze", seed=4)
    state = torch.random.get_rng_state()
    assert torch.equal(lpips_small(a, b), again(a, b)) and not torch.allclose(lpips_small(a, b), other(a, b))
    assert torch.equal(state, torch.random.get_rng_state())


def test_weights_of_another_backbone_are_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg16-x.pth")
    with pytest.raises(ValueError, match="alexnet-owt-7be5be79.pth"):
        perceptual.lpips_network("alex", tmp_path / "vgg16-x.pth")


def test_the_gradient_of_lpips_is_that_of_finite_differences():
    network = perceptual.lpips_network("squeeze", seed=3).double()
    references = smooth(2, n=2, height=70, width=60, dtype=torch.float64)
    for cutouts in (None, Cutouts(count=2)):

        def loss(preview, cutouts=cutouts):
            return bind_rng(LPIPSLoss(network, references, 48, cutouts), torch.Generator().manual_seed(1))(preview)

        # ReLUs and maxima have edges: a small step keeps nearly all of them on one side
        by_gradient, by_differences = slope(loss, smooth(1, n=2, height=64, width=64, dtype=torch.float64), step=1e-7)
        assert by_gradient.item() == pytest.approx(by_differences.item(), rel=1e-3) and by_gradient != 0


def test_lpips_looks_at_its_size_and_never_enlarges(lpips_small):
    shapes = []

    def distance(a, b):
        shapes.append((tuple(a.shape), tuple(b.shape)))
        return lpips_small(a, b)

    references = smooth(2, height=64, width=64)
    for size in (48, 0, 512):
        LPIPSLoss(distance, references, size)(smooth(1, height=80, width=60))
    expected = [(1, 3, 64, 48), (1, 3, 80, 60), (1, 3, 80, 60)]
    assert shapes == [(shape, shape) for shape in expected]


# L1


def test_l1_is_the_mean_difference_and_pooled_sees_layout_alone():
    a, b = smooth(1, n=2), smooth(2, n=2)
    assert torch.allclose(L1Loss(b)(a)[0], (a - b).abs().mean((1, 2, 3)))
    stripes = torch.tensor([0.9, -0.9]).repeat(16).expand(1, 3, 32, 32)
    assert L1Loss(torch.zeros(1, 3, 32, 32))(stripes)[0] == pytest.approx(0.9)
    assert L1Loss(torch.zeros(1, 3, 32, 32), size=8)(stripes)[0] < 0.1


def test_what_saving_a_picture_cuts_off_costs_nothing():
    white = torch.ones(1, 3, 8, 8)
    preview = (1.5 * white).requires_grad_(True)
    value, _ = L1Loss(white)(preview)
    assert value == 0 and torch.autograd.grad(value.sum(), preview)[0].abs().max() == 0


# all of them


def losses_of_three(pictures_encoder, lpips_small):
    pictures = smooth(7, n=3, height=64, width=64)
    return [
        EmbeddingLoss(pictures_encoder, embed(pictures_encoder, pictures)),
        LPIPSLoss(lpips_small, pictures, size=32),
        L1Loss(pictures),
    ], pictures


def test_rows_name_the_reference_and_go_round(pictures_encoder, lpips_small):
    losses, pictures = losses_of_three(pictures_encoder, lpips_small)
    for loss in losses:
        rows = torch.tensor([2, 0, 4])
        assert torch.allclose(loss(pictures[rows % 3], rows)[0], torch.zeros(3), atol=1e-5)
        assert torch.allclose(loss(pictures.repeat(2, 1, 1, 1))[0], torch.zeros(6), atol=1e-5)
        assert loss(pictures, torch.tensor([1, 2, 0]))[0].min() > 1e-3
        with pytest.raises(ValueError, match="one row for each"):
            loss(pictures, torch.tensor([1, 2]))


def test_each_preview_has_its_own_value_and_gradient(pictures_encoder, lpips_small):
    losses, _ = losses_of_three(pictures_encoder, lpips_small)
    preview = smooth(9, n=3, height=64, width=64)
    for loss in losses:
        together = preview.clone().requires_grad_(True)
        values, _ = loss(together)
        (gradient,) = torch.autograd.grad(values[1], together)
        assert gradient[1].abs().max() > 0 and gradient[[0, 2]].abs().max() == 0
        alone, _ = loss(preview[1:2], torch.tensor([1]))
        assert torch.allclose(alone, values[1:2], atol=1e-5)


def test_a_preview_that_is_no_picture_is_refused(pictures_encoder, lpips_small):
    losses, _ = losses_of_three(pictures_encoder, lpips_small)
    for loss in losses:
        with pytest.raises(ValueError, match="decode the latent"):
            loss(torch.zeros(1, 4, 64, 64))


# cutouts


def test_a_seed_gives_the_same_run_and_another_seed_another(pictures_encoder):
    loss = EmbeddingLoss(pictures_encoder, embed(pictures_encoder, smooth(1)), Cutouts())
    preview = smooth(2)

    def run(seed):
        mine = bind_rng(loss, torch.Generator().manual_seed(seed))
        return [mine(preview)[0].item() for _ in range(3)]

    assert run(1) == run(1) and len(set(run(1))) == 3 and run(1) != run(2)
    assert loss(preview)[0] == loss(preview)[0]  # not bind_rng: the whole picture alone


def test_views_cut_pictures_alike_and_stay_in_range():
    a = (smooth(1, n=2, height=40, width=30) + 1) / 2
    cutouts = Cutouts(count=5, colour=0.3)
    first, second = cutouts.cut(16, torch.Generator().manual_seed(1), a, a)
    assert first.shape == (10, 3, 16, 16) and torch.equal(first, second)
    assert first.min() >= 0 and first.max() <= 1
    marked = torch.zeros_like(a)
    marked[1] = 1
    (rows,) = Cutouts(count=3, colour=0).cut(8, torch.Generator().manual_seed(1), marked)
    assert rows.mean((1, 2, 3)).round().tolist() == [0, 1] * 3


def test_without_any_change_a_view_is_the_square_of_the_whole_picture():
    a = (smooth(1, height=24, width=24) + 1) / 2
    (view,) = Cutouts(count=1, smallest=1, flip=False, colour=0).cut(16, torch.Generator().manual_seed(1), a)
    assert torch.allclose(view, cover(a, 16, 16).clamp(0, 1))


@pytest.mark.parametrize("settings", [{"count": -1}, {"smallest": 0}, {"smallest": 1.5}, {"colour": 1}])
def test_views_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="Random views"):
        Cutouts(**settings)


# combined


def part(values, valid):
    """A loss with known values, whose gradient is 2 for each pixel's mean."""

    def loss(preview, rows=None):
        slope = 2 * (preview.mean((1, 2, 3)) - preview.mean((1, 2, 3)).detach())
        return torch.tensor(values) + slope, torch.tensor(valid)

    return loss


def test_combined_is_the_weighed_mean_and_a_sample_counts_when_any_part_does():
    first, second = part([0.2, 0.4, 0.6], [True, True, False]), part([0.8, 0.0, 0.5], [True, False, False])
    loss = Combined(((3.0, first), (1.0, second)))
    values, valid = loss(torch.zeros(3, 3, 4, 4))
    assert torch.allclose(values, torch.tensor([0.35, 0.3 + UNLIKE / 4, UNLIKE]))
    assert valid.tolist() == [True, True, False]


def test_a_part_that_does_not_count_has_no_gradient_and_leaves_the_others_theirs():
    loss = Combined(((3.0, part([0.2, 0.4], [True, False])), (1.0, part([0.8, 0.1], [True, True]))))
    preview = torch.zeros(2, 3, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(preview)[0].sum(), preview)
    assert torch.allclose(gradient.sum((1, 2, 3)), torch.tensor([2.0, 0.5]))


def test_losing_the_face_is_never_a_gain():
    """However bad the likeness was, short of the opposite of the face."""
    with_face = Combined(((1.0, part([0.95], [True])), (1.0, part([0.3], [True]))))
    without = Combined(((1.0, part([0.0], [False])), (1.0, part([0.3], [True]))))
    preview = torch.zeros(1, 3, 4, 4)
    assert with_face(preview)[0] < without(preview)[0]


def test_a_part_of_weight_0_is_not_evaluated_and_does_not_count():
    def never(preview, rows=None):
        raise AssertionError

    loss = Combined(((0.0, never), (2.0, part([0.5], [False]))))
    assert loss(torch.zeros(1, 3, 4, 4))[1].tolist() == [False]


def test_a_combined_loss_starts_its_parts_and_hands_rows_on(pictures_encoder):
    targets = embed(pictures_encoder, smooth(1, n=2))
    one = EmbeddingLoss(pictures_encoder, targets, Cutouts(count=2))
    both = bind_rng(Combined(((1.0, one), (1.0, L1Loss(smooth(1, n=2))))), torch.Generator().manual_seed(3))
    alone = bind_rng(one, torch.Generator().manual_seed(3))
    preview, rows = smooth(2, n=2), torch.tensor([1, 1])
    expected = (alone(preview, rows)[0] + L1Loss(smooth(1, n=2))(preview, rows)[0]) / 2
    assert torch.allclose(both(preview, rows)[0], expected, atol=1e-6)


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (1.0, -1.0)])
def test_weights_that_say_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="weights of the losses"):
        Combined(tuple((weight, part([0.5], [True])) for weight in weights))


# packages that are not there


@pytest.mark.parametrize("package", ["lpips", "dreamsim"])
def test_a_missing_package_is_said_with_what_to_install(package, monkeypatch, tmp_path):
    find = perceptual.importlib.util.find_spec
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ImportError, match=f"pip install {package}"):
        perceptual.lpips_network("vgg") if package == "lpips" else perceptual.DreamSimPictures(tmp_path)


def test_dreamsim_without_its_files_says_which_and_downloads_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(FileNotFoundError, match="open_clip_vitb32_pretrain.pth.tar"):
        perceptual.DreamSimPictures(tmp_path, "open_clip_vitb32")
