"""Encode Lookahead Reference: what it makes of pictures and masks, and what it refuses."""

import pytest
import torch
from PIL import Image


@pytest.fixture
def encoder(mini, tools):
    return tools.encoder(mini.encoder)


@pytest.fixture
def encode(mini, tools, encoder):
    def call(image, clip_vision=None, **options):
        clip_vision = mini.clip_vision if clip_vision is None else clip_vision
        return tools.run("LookaheadEncodeReference", encoder, clip_vision, image, **{"size": 64, **options}).subjects[0]

    return call


@pytest.mark.contract
def test_networks_are_known_to_the_hosts_memory_management(encoder, mini, encode, tools):
    import comfy.model_management
    import comfy.model_patcher

    comfy.model_management.unload_all_models()
    encode(tools.picture(1))
    loaded = [m.model for m in comfy.model_management.current_loaded_models]
    assert encoder.patcher in loaded and isinstance(encoder.patcher, comfy.model_patcher.ModelPatcher)
    stored = sum(v.numel() * v.element_size() for v in mini.encoder.values())
    assert encoder.patcher.model_size() == stored


def test_null_tokens_are_those_of_an_input_of_zeros_not_of_a_black_picture(encode, encoder, mini, tools):
    clip = mini.clip_vision
    features = clip.model(pixel_values=torch.zeros(1, 3, clip.image_size, clip.image_size), intermediate_output=-2)[1]
    expected = encoder.keys_values(encoder.tokens(features))
    subject = encode(tools.picture(1))
    assert torch.allclose(subject.null_keys_values, expected, atol=1e-5)
    assert not torch.allclose(encode(torch.zeros(1, 64, 64, 3)).keys_values, expected, atol=1e-2)


def test_a_reference_mask_of_ones_changes_nothing_and_outside_a_mask_is_the_null_input(encode, tools):
    image = tools.picture(1, height=80, width=60)
    plain = encode(image)
    assert torch.allclose(encode(image, mask=torch.ones(1, 80, 60)).keys_values, plain.keys_values, atol=1e-5)
    faint = encode(image, mask=torch.full((1, 80, 60), 1e-6))
    assert torch.allclose(faint.keys_values, faint.null_keys_values, atol=1e-4)
    assert not torch.allclose(plain.keys_values, plain.null_keys_values, atol=1e-2)


@pytest.mark.parametrize("several", ["together", "average", "one per picture"])
def test_a_mask_that_leaves_nothing_of_a_picture_is_refused(encode, tools, several):
    """Load Image gives such a mask (64x64) with every opaque picture."""
    images = tools.picture(4, n=2)
    one_empty = torch.stack([torch.ones(64, 64), torch.zeros(64, 64)])
    for mask in (torch.zeros(1, 64, 64), one_empty):
        with pytest.raises(ValueError) as error:
            encode(images, mask=mask, several=several)
        assert "invert" in tools.one_sentence(error)
    with pytest.raises(ValueError) as error:
        encode(torch.cat([images, torch.zeros(2, 96, 96, 1)], dim=-1), several=several)
    assert "invert" in tools.one_sentence(error)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_in_half_precision_are_read_like_those_in_full(encode, tools, channels):
    """As hosts with --fp16-intermediates hand them on, also on a CPU."""
    image, mask = tools.picture(1, height=80, width=60, channels=channels), tools.picture(2, channels=1)[..., 0]
    full, half = encode(image, mask=mask), encode(image.half(), mask=mask.half())
    assert half.pixels.dtype == half.mask.dtype == torch.float32
    assert torch.allclose(half.pixels, full.pixels, atol=1e-3)
    assert torch.allclose(half.keys_values, full.keys_values, atol=2e-2)


def test_transparency_is_masked_out(encode, tools):
    image, mask = tools.picture(1), (tools.picture(2)[..., 0] > 0.5).float()
    with_alpha = encode(torch.cat([image, mask.unsqueeze(-1)], dim=-1))
    over_white = torch.where(mask.unsqueeze(-1) > 0, image, 1.0)
    assert torch.allclose(with_alpha.keys_values, encode(over_white, mask=mask).keys_values, atol=1e-5)
    assert with_alpha.pixels.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_colours_that_a_cut_out_hides_change_nothing(encode, pack, tools, channels):
    """Neither of tokens and latents, nor of crops and losses, which read pictures by the same function."""
    image, alpha = tools.picture(1, channels=channels), tools.picture(2, channels=1).round()
    other = torch.where(alpha > 0, image, tools.picture(3, channels=channels))
    seen = [torch.cat([colours, alpha], dim=-1) for colours in (image, other)]
    assert not torch.equal(*seen)
    subjects = [encode(one) for one in seen]
    assert torch.equal(*(s.keys_values for s in subjects)) and torch.equal(*(s.pixels for s in subjects))
    assert torch.equal(*(pack.module("nodes.losses.network").pictures_of(one) for one in seen))


def test_an_encoder_whose_tokens_are_not_finite_is_refused(mini, tools):
    """Weights that are numbers each, and overflow together."""
    weights = {
        **mini.encoder,
        "image_proj.proj_out.weight": torch.full_like(mini.encoder["image_proj.proj_out.weight"], 1e18),
    }
    weights |= {k: torch.full_like(v, 1e18) for k, v in weights.items() if "norm_out" in k}
    weights |= {k: torch.full_like(v, 1e18) for k, v in weights.items() if "to_v_ip" in k}
    with pytest.raises(ValueError, match="not finite") as error:
        tools.run("LookaheadEncodeReference", tools.encoder(weights), mini.clip_vision, tools.picture(1), size=64)
    assert "test.safetensors" in str(error.value) and str(error.value).endswith(".")


def test_an_image_prompt_that_the_model_s_precision_cannot_hold_is_refused(worlds, mini, tools):
    weights = mini.encoder | {k: 1e6 * v for k, v in mini.encoder.items() if "to_v_ip" in k}
    reference = tools.run(
        "LookaheadEncodeReference", tools.encoder(weights), mini.clip_vision, tools.picture(1), size=64
    )
    half = worlds("mini", dtype=torch.float16)
    latent, texts = torch.zeros(1, 4, 8, 8), (mini.text(1), mini.text(2))
    with pytest.raises(ValueError, match="that float16 cannot"):
        tools.sample(tools.apply(half.model, reference), *texts, latent, steps=1)
    assert tools.sample(tools.apply(mini.model, reference), *texts, latent, steps=1).isfinite().all()


def test_one_channel_is_grey(encode, tools):
    grey = tools.picture(1, channels=1)
    assert torch.equal(encode(grey).keys_values, encode(grey.expand(-1, -1, -1, 3)).keys_values)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 8, 500, 3), (1, 64, 64, 5), (0, 64, 64, 3)])
def test_what_cannot_be_a_reference_is_refused(encode, tools, shape):
    with pytest.raises(ValueError) as error:
        encode(torch.rand(shape))
    assert "reference" in tools.one_sentence(error).lower()


def test_a_picture_with_nan_is_refused(encode, tools):
    image = tools.picture(1)
    image[0, 3, 4, 1] = float("nan")
    with pytest.raises(ValueError) as error:
        encode(image)
    tools.one_sentence(error)


def test_8000_x_6000_pixels(encode):
    small = torch.rand(1, 30, 40, 3, generator=torch.Generator().manual_seed(1))
    large = small.repeat_interleave(200, dim=1).repeat_interleave(200, dim=2)
    assert large.shape == (1, 6000, 8000, 3)
    subject = encode(large)
    like = encode(small.repeat_interleave(20, dim=1).repeat_interleave(20, dim=2))
    assert torch.allclose(subject.keys_values, like.keys_values, atol=0.3) and subject.pixels.shape == (1, 64, 64, 3)


def test_a_wide_picture_is_cropped_about_its_centre_never_squashed(encode):
    image = torch.zeros(1, 64, 128, 3)
    image[:, :, 32:96] = torch.linspace(0, 1, 64).view(1, 64, 1, 1)
    assert torch.allclose(encode(image).pixels, image[:, :, 32:96], atol=1e-6)


@pytest.mark.contract
def test_several_pictures_together_on_average_or_one_each(encode, tools):
    images = tools.picture(4, n=3)
    together, average = encode(images), encode(images, several="average")
    each = encode(images, several="one per picture")
    one = encode(images[:1])
    assert together.keys_values.shape[:2] == (1, 48) and together.null_keys_values.shape[:2] == (1, 48)
    assert average.keys_values.shape[:2] == (1, 16) and each.keys_values.shape[:2] == (3, 16)
    assert torch.allclose(each.keys_values[:1], one.keys_values, atol=1e-4)
    assert torch.allclose(together.keys_values[:, :16], one.keys_values, atol=1e-4)
    assert torch.allclose(together.null_keys_values, one.null_keys_values.repeat(1, 3, 1), atol=1e-4)
    assert torch.allclose(average.keys_values, each.keys_values.mean(0, keepdim=True), atol=1e-4)


def test_the_number_of_masks_must_fit_the_pictures(encode, tools):
    encode(tools.picture(4, n=3), mask=torch.ones(1, 96, 96))
    encode(tools.picture(4, n=3), mask=torch.ones(3, 10, 10))
    with pytest.raises(ValueError) as error:
        encode(tools.picture(4, n=3), mask=torch.ones(2, 96, 96))
    assert "2 masks for 3" in tools.one_sentence(error)


def test_a_clip_vision_of_another_width_is_refused(encode, tools, tmp_path):
    wrong = tools.make_clip_vision(tmp_path, hidden_size=64, intermediate_size=128)
    with pytest.raises(ValueError) as error:
        encode(tools.picture(1), clip_vision=wrong)
    assert "64" in tools.one_sentence(error) and "128" in str(error.value)


@pytest.mark.contract
def test_a_vision_model_that_is_not_clip_is_refused(encode, tools):
    class SigLip:
        model_type = "siglip_vision_model"

    with pytest.raises(ValueError) as error:
        encode(tools.picture(1), clip_vision=SigLip())
    assert "siglip_vision_model" in tools.one_sentence(error)


@pytest.mark.contract
def test_latents_and_prompt_for_later_nodes_are_made_when_their_sockets_are_connected(encode, mini, tools):
    class Vae:
        def encode(self, pixels):
            assert pixels.shape == (1, 64, 64, 3) and 0 <= pixels.min() and pixels.max() <= 1
            return torch.zeros(1, 4, 8, 8)

    class Clip:
        def tokenize(self, text):
            return text

        def encode_from_tokens_scheduled(self, tokens):
            return [[tokens, {}]]

    bare = encode(tools.picture(1))
    assert bare.latents is None and bare.kv_prompt is None
    full = encode(tools.picture(1), vae=Vae(), clip=Clip())
    assert full.latents.shape == (1, 4, 8, 8) and full.kv_prompt == [["a photo of a face", {}]]
    own = mini.text(3)
    assert encode(tools.picture(1), clip=Clip(), conditioning=own).kv_prompt is own


def test_size_is_the_encoders_own_unless_said(mini, tools):
    def side(metadata, **options):
        encoder = tools.encoder(mini.encoder, metadata)
        reference = tools.run("LookaheadEncodeReference", encoder, mini.clip_vision, tools.picture(1), **options)
        return reference.subjects[0].pixels.shape[1]

    own = {"format": "lcm-lookahead-encoder", "format_version": "1", "size": "128"}
    assert side(own) == 128 and side({}) == 1024 and side(own, size=64) == 64


@pytest.mark.parametrize(("height", "width"), [(96, 64), (64, 96)])
def test_which_square_of_a_picture_counts(encode, tools, height, width):
    """The upper one, or all of it: the padding is outside of the mask and the null input."""
    image, mask = tools.picture(1, height=height, width=width), torch.rand(1, height, width)
    side, left = min(height, width), (width - 64) // 2
    part = slice(None), slice(0, side), slice(left, left + side)
    top, cut = encode(image, mask=mask, square="top"), encode(image[part], mask=mask[part])
    for field in ("pixels", "mask", "keys_values"):
        assert torch.equal(getattr(top, field), getattr(cut, field))
    assert encode(image[part], square="padded").mask is None
    padded = encode(image, square="padded", size=96)
    inside = slice(16, 80) if width < height else slice(None), slice(16, 80) if height < width else slice(None)
    rows, columns = (slice(None), inside[0]) if width < height else (inside[1], slice(None))
    assert torch.equal(padded.pixels[:, rows, columns], image)
    assert padded.mask[:, rows, columns].min() == 1 and padded.mask.mean() == pytest.approx(2 / 3)
    assert padded.pixels.isfinite().all() and not torch.allclose(
        padded.keys_values, encode(image).keys_values, atol=1e-3
    )


def test_a_folder_of_pictures_by_the_host_s_own_nodes_is_one_reference(encode, mini, tools, tmp_path, monkeypatch):
    """Load Image (from Folder) gives a list, of which Rebatch Images makes a batch."""
    import folder_paths
    from comfy_extras.nodes_dataset import LoadImageDataSetFromFolderNode
    from comfy_extras.nodes_rebatch import ImageRebatch

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    (tmp_path / "person").mkdir()
    for number in range(3):
        picture = (tools.picture(number)[0] * 255).round().byte().numpy()
        Image.fromarray(picture).save(tmp_path / "person" / f"{number}.png")
    (listed,) = LoadImageDataSetFromFolderNode.execute("person").result
    ((batch,),) = ImageRebatch.execute(listed, [len(listed)]).result
    together, one = encode(batch), encode(batch[:1])
    assert batch.shape[0] == 3 and together.keys_values.shape[-2] == 3 * one.keys_values.shape[-2]
