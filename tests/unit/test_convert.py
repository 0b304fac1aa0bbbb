"""Conversion: the authors' published checkpoint and stock IP-Adapter Plus to our format, and back to IP-Adapter's."""

import functools
import json
import os
import re
from pathlib import Path

import pytest
import torch
from lcm_lookahead.lookahead.files import convert as conversion
from lcm_lookahead.lookahead.files import encoder_file
from lcm_lookahead.lookahead.files.convert import AS_STORED, ENCODER, IP_ADAPTER, PublishedNames, convert
from lcm_lookahead.lookahead.files.encoder_file import EncoderFileError
from lcm_lookahead.lookahead.method.resampler import ResamplerSizes
from safetensors.torch import load_file, save_file
from stock_files import halves

ATTENTIONS = [f"attn{a}.{to}" for a in (1, 2) for to in ("to_q", "to_k", "to_v", "to_out.0")]
SMALL = ResamplerSizes(tokens=4, dim=32, depth=4, heads=1, image_width=24, context_width=16, ff_width=64)


@functools.cache
def unet_on_meta(full: bool, depth=(1, 2, 10)):
    """diffusers' UNet with SDXL's layout; not full: narrow."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=(320, 640, 1280) if full else (4, 8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=depth,
            attention_head_dim=(5, 10, 20) if full else 2,
            cross_attention_dim=2048 if full else SMALL.context_width,
            norm_num_groups=32 if full else 4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256 if full else 8,
            projection_class_embeddings_input_dim=2816 if full else 64,
        )


@functools.cache
def image_encoder_names() -> list[str]:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=32, num_attention_heads=2)
    with torch.device("meta"):
        return list(CLIPVisionModelWithProjection(config).state_dict())


def blocks_of(unet) -> list[str]:
    """In the order of the public files, which is that of diffusers' processors."""
    return [name.removesuffix(".attn2.processor") for name in unet.attn_processors if ".attn2." in name]


def published(full=False, rank=4, depth=(1, 2, 10), fill=torch.randn) -> dict[str, torch.Tensor]:
    """A checkpoint with the names and shapes of the authors' (method.md B6); meta tensors where it is full."""
    unet = unet_on_meta(full, depth)
    if full:
        fill = functools.partial(torch.empty, device="meta")
    shapes = {k: tuple(v.shape) for k, v in unet.state_dict().items()}
    blocks = blocks_of(unet)
    last = max(b for b in blocks if b.startswith("up_blocks.1"))
    copy = {k: fill(s) for k, s in shapes.items()}
    out = dict(copy)
    for b in blocks:
        for a in (1, 2):
            for layer in ATTENTIONS[4 * a - 4 : 4 * a] if b != last and rank else ():
                rows, columns = shapes[f"{b}.{layer}.weight"]
                out[f"{b}.{layer}.lora_layer.down.weight"] = fill((rank, columns))
                out[f"{b}.{layer}.lora_layer.up.weight"] = fill((rows, rank))
        for to in ("to_k", "to_v"):
            rows, columns = shapes[f"{b}.attn1.{to}.weight"]
            out[f"{b}.extract_kv1.{to}.weight"] = copy[f"{b}.attn1.{to}.weight"]
            out[f"{b}.extract_kv2.{to}.weight"] = fill((rows, shapes[f"{b}.attn2.{to}.weight"][1]))
            if rank:
                out[f"{b}.extract_kv1.{to}.lora_layer.down.weight"] = fill((rank, columns))
                out[f"{b}.extract_kv1.{to}.lora_layer.up.weight"] = fill((rows, rank))
        for a in (1, 2):
            for key in [k for k in out if k.startswith(f"{b}.attn{a}.")]:
                out[key.replace(f".attn{a}.", f".extract_kv{a}.source_attention_block.")] = out[key]
    out = {f"encoder_unet.{k}": v for k, v in out.items()}
    out |= {f"image_encoder.{k}": torch.zeros(2, device="meta" if full else "cpu") for k in image_encoder_names()}
    sizes = ResamplerSizes() if full else SMALL
    return out | {f"image_proj_model.{k}": fill(s) for k, s in sizes.shapes().items()}


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, torch.Tensor]:
    """All 70 blocks, narrow. Never changed."""
    torch.manual_seed(0)
    return published()


@pytest.fixture
def small() -> dict[str, torch.Tensor]:
    """A few blocks, for what is changed."""
    torch.manual_seed(0)
    return published(depth=(1, 1, 1))


@pytest.fixture
def saved(tmp_path):
    """saved(tensors) -> path of a checkpoint as the paper's code writes it."""

    def save(tensors, name="model_ckpt.pt"):
        torch.save(tensors, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def converted(saved, tmp_path):
    """converted(tensors) -> the encoder file made of a checkpoint."""

    def run(tensors, **options):
        target = tmp_path / "mine.safetensors"
        target.unlink(missing_ok=True)
        convert(saved(tensors), target, precision=AS_STORED, **options)
        return encoder_file.read(target)

    return run


def refused(*args, **options) -> str:
    with pytest.raises(EncoderFileError) as error:
        convert(*args, **options)
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and not re.search(r"[a-z0-9]\. [A-Z]", text), text
    return text


# -- the published checkpoint


def test_a_checkpoint_of_the_paper_has_5719_weights(checkpoint):
    counts = [
        sum(k.startswith(p) for k in checkpoint) for p in ("encoder_unet.", "image_encoder.", "image_proj_model.")
    ]
    assert counts == [5148, 520, 51]


def test_all_that_was_trained_is_in_the_encoder_file(checkpoint, converted):
    file = converted(checkpoint)
    blocks = blocks_of(unet_on_meta(False))
    assert len(blocks) == len(file.ip_adapter) == 70 and len(file.kv) == 1384
    for block, pair in zip(blocks, file.ip_adapter, strict=True):
        for to, value in zip("kv", pair, strict=True):
            assert torch.equal(value, checkpoint[f"encoder_unet.{block}.extract_kv2.to_{to}.weight"])
    for layer, (a, b) in file.kv_layers.items():
        kind, _, name = layer.partition(".")
        name = name.replace(".attn1.", ".extract_kv1.") if kind == "kv_export" else name
        assert torch.equal(a, checkpoint[f"encoder_unet.{name}.lora_layer.down.weight"])
        assert torch.equal(b, checkpoint[f"encoder_unet.{name}.lora_layer.up.weight"])
    for name, value in file.image_proj.items():
        assert torch.equal(value, checkpoint[f"image_proj_model.{name}"])
    assert file.kv_scale(4) == 1 and file.metadata["kv_rank"] == "4"
    assert file.metadata["kv_prompt"] == "a photo of a face" and "model_ckpt.pt" in file.metadata["config"]


def test_at_full_size_names_and_shapes_are_those_of_sdxl_and_of_the_public_files():
    """On the meta device: 14 GB in the real file."""
    tensors = published(full=True)
    assert len(tensors) == 5719
    names = PublishedNames.find(tensors, "model_ckpt.pt")
    unet, modules = unet_on_meta(True), dict(unet_on_meta(True).named_modules())
    assert {k: tuple(tensors[v].shape) for k, v in names.image_proj.items()} == ResamplerSizes().shapes()
    widths = [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10  # IP-Adapter Plus for SDXL
    shapes = [[tuple(tensors[n].shape) for n in pair] for pair in names.ip_adapter]
    assert shapes == [[(width, 2048)] * 2 for width in widths] and list(names.blocks) == blocks_of(unet)
    trained = 0
    for key, full in names.kv.items():
        module = modules[re.sub(r"^kv_\w+\.|\.lora_[AB]\.weight$", "", key)]
        down = tuple(tensors[full].shape) == (4, module.in_features) and "lora_A" in key
        assert down or (tuple(tensors[full].shape) == (module.out_features, 4) and "lora_B" in key)
        trained += tensors[full].numel()
    assert len(names.kv) == 1384 and trained == 7_085_056
    assert names.copy.keys() == unet.state_dict().keys() and len(names.copy) == 1680
    wanted = sum(
        tensors[n].numel() for n in [*names.kv.values(), *names.image_proj.values(), *sum(names.ip_adapter, ())]
    )
    assert wanted == 430_833_920


def test_projections_that_were_trained_whole_are_kept_exactly(small, converted):
    for rank in (4, 0):
        torch.manual_seed(0)
        tensors = published(depth=(1, 1, 1), rank=rank)
        block = blocks_of(unet_on_meta(False, (1, 1, 1)))[1]
        name = f"encoder_unet.{block}.extract_kv1.to_k"
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + torch.randn(tensors[f"{name}.weight"].shape)
        a, b = converted(tensors).kv_layers[f"kv_export.{block}.attn1.to_k"]
        expected = tensors[f"{name}.weight"] - tensors[f"encoder_unet.{block}.attn1.to_k.weight"]
        if rank:
            expected = expected + tensors[f"{name}.lora_layer.up.weight"] @ tensors[f"{name}.lora_layer.down.weight"]
        torch.testing.assert_close(b @ a, expected)


def test_an_untuned_half_changes_nothing_and_an_untrained_encoder_is_left_out(small, converted):
    only_export = {k: v for k, v in small.items() if ".lora_layer." not in k or ".extract_kv1.to_" in k}
    file = converted(only_export)
    tuned = {k: b @ a for k, (a, b) in file.kv_layers.items() if k.startswith("kv_encoder")}
    assert len(tuned) == 8 * (len(file.ip_adapter) - 1) and not any(v.any() for v in tuned.values())
    zero = {k: torch.zeros_like(v) if k.endswith("lora_layer.up.weight") else v for k, v in small.items()}
    assert converted(zero).kv == {}


def test_what_varies_between_checkpoints_is_accepted(small, converted):
    expected = converted(small)
    small["encoder_unet.embedding_prediction_head.weight"] = torch.zeros(2)
    variants = [
        {f"module.{k}": v for k, v in small.items()},
        {k: v for k, v in small.items() if "source_attention_block" not in k and not k.startswith("image_encoder")},
    ]
    for variant in variants:
        found = converted(variant)
        assert found.kv.keys() == expected.kv.keys() and found.metadata == expected.metadata
        assert all(torch.equal(found.kv[k], v) for k, v in expected.kv.items())


def single_file(copy):
    """SDXL's names of its transformer blocks in the public checkpoint, written out for the depth of `small`."""
    places = {"down_blocks.1.attentions.0": "input_blocks.4.1", "down_blocks.1.attentions.1": "input_blocks.5.1"}
    places |= {"down_blocks.2.attentions.0": "input_blocks.7.1", "down_blocks.2.attentions.1": "input_blocks.8.1"}
    places |= {f"up_blocks.{u}.attentions.{i}": f"output_blocks.{3 * u + i}.1" for u in (0, 1) for i in range(3)}
    places["mid_block.attentions.0"] = "middle_block.1"
    out = {}
    for key, value in copy.items():
        for ours, theirs in places.items():
            if key.startswith(ours + ".transformer_blocks."):
                out[key.replace(ours, f"model.diffusion_model.{theirs}")] = value
    return out


@pytest.mark.parametrize("layout", ["diffusers", "single file"])
def test_the_copy_of_sdxl_is_compared_with_the_base(small, saved, tmp_path, layout):
    prefix, base = "encoder_unet.", tmp_path / "base.safetensors"
    blocks = blocks_of(unet_on_meta(False, (1, 1, 1)))
    own = {k.removeprefix(prefix): v for k, v in small.items() if "extract_kv" not in k and "lora_layer" not in k}
    own = {k: v.half() for k, v in own.items() if not k.startswith("image_")}  # the public file is in half precision
    save_file({k: v.clone() for k, v in (own if layout == "diffusers" else single_file(own)).items()}, base)
    text = convert(saved(small), tmp_path / "mine.safetensors", base=base)
    assert f"{20 * len(blocks)} weights compared" in text
    metadata = encoder_file.read(tmp_path / "mine.safetensors").metadata
    assert metadata["base_model"] == "base.safetensors" and len(metadata["base_model_hash"]) == 64

    key = f"{prefix}{blocks[-1]}.ff.net.2.weight"
    own_value = small[key]
    for other in (own_value * 1.02, own_value * torch.nan):  # as a fine-tune; as a run that broke
        small[key] = other
        text = refused(saved(small), tmp_path / "other.safetensors", base=base)
        assert "another base model" in text and blocks[-1] in text
    save_file({"weight": torch.zeros(1)}, base)
    assert "no SDXL checkpoint" in refused(saved(small), tmp_path / "other.safetensors", base=base)
    assert not (tmp_path / "other.safetensors").exists()


HARMS = {
    "an adapter's weight": (lambda t, b: t.pop(f"encoder_unet.{b}.extract_kv2.to_v.weight"), "extract_kv2.to_v"),
    "an exported projection": (lambda t, b: t.pop(f"encoder_unet.{b}.extract_kv1.to_k.weight"), "extract_kv1.to_k"),
    "SDXL's copy of it": (lambda t, b: t.pop(f"encoder_unet.{b}.attn1.to_k.weight"), "attn1.to_k.weight"),
    "one LoRA": (lambda t, b: t.pop(f"encoder_unet.{b}.attn1.to_q.lora_layer.up.weight"), "attn1.to_q.lora_B"),
    "LoRA of a layer": (
        lambda t, b: [t.pop(f"encoder_unet.{b}.attn1.to_q.lora_layer.{x}.weight") for x in ("up", "down")],
        "layers of kv_encoder",
    ),
    "the Resampler's": (lambda t, b: t.pop("image_proj_model.latents"), "latents"),
    "a strange one": (lambda t, b: t.update({"head.weight": torch.zeros(1)}), "head.weight"),
    "NaN": (lambda t, b: t[f"encoder_unet.{b}.extract_kv2.to_v.weight"].fill_(torch.nan), "not finite"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_checkpoint_that_is_not_whole_is_refused_and_nothing_is_left(small, saved, tmp_path, harm):
    change, said = HARMS[harm]
    change(small, blocks_of(unet_on_meta(False, (1, 1, 1)))[2])
    assert said in refused(saved(small), tmp_path / "mine.safetensors")
    assert os.listdir(tmp_path) == ["model_ckpt.pt"]


def test_a_cut_checkpoint_and_one_with_code_are_refused(small, saved, tmp_path):
    path = saved(small)
    path.write_bytes(path.read_bytes()[:-4000])
    assert "cut short" in refused(path, tmp_path / "mine.safetensors")
    assert "nothing in it was executed" in refused(saved({**small, "extra": Path("/")}), tmp_path / "mine.safetensors")


def test_the_loader_says_that_a_published_checkpoint_has_to_be_converted(small, saved):
    with pytest.raises(EncoderFileError, match="lookahead convert"):
        encoder_file.read(saved(small))


# -- stock files, and back


def test_a_stock_file_comes_back_bit_for_bit(weights, tmp_path):
    torch.save(halves(weights), tmp_path / "adapter.bin")
    convert(tmp_path / "adapter.bin", tmp_path / "own.safetensors", ENCODER, precision=AS_STORED)
    own = encoder_file.read(tmp_path / "own.safetensors")
    assert own.kind == encoder_file.OWN_KIND and own.kv == {}
    convert(tmp_path / "own.safetensors", tmp_path / "back.safetensors", IP_ADAPTER, precision=AS_STORED)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys() and all(torch.equal(back[k], v) for k, v in weights.items())
    assert encoder_file.read(tmp_path / "back.safetensors").kind == encoder_file.STOCK_KIND


def test_an_ip_adapter_made_of_an_encoder_keeps_its_provenance_but_not_its_kv_encoder(small, converted, tmp_path):
    file = converted(small)
    text = convert(tmp_path / "mine.safetensors", tmp_path / "ip.safetensors", IP_ADAPTER)
    assert "left out: the KV encoder" in text
    found = encoder_file.read(tmp_path / "ip.safetensors")
    assert found.kind == encoder_file.STOCK_KIND and found.metadata["config"] == file.metadata["config"]
    assert all(v.dtype == torch.float16 for v in load_file(tmp_path / "ip.safetensors").values())
    for new, old in zip(found.ip_adapter, file.ip_adapter, strict=True):
        assert torch.equal(new[0], old[0].half()) and torch.equal(new[1], old[1].half())


def test_the_metadata_of_an_encoder_survives_a_change_of_precision(small, converted, tmp_path):
    file = converted(small)
    convert(tmp_path / "mine.safetensors", tmp_path / "half.safetensors", precision="bfloat16")
    half = encoder_file.read(tmp_path / "half.safetensors")
    assert half.metadata == file.metadata and half.kv.keys() == file.kv.keys()
    assert json.dumps(half.metadata) and {v.dtype for v in half.kv.values()} == {torch.bfloat16}


def test_targets_that_cannot_be_written_are_refused(weights, tmp_path):
    source = tmp_path / "adapter.safetensors"
    save_file(weights, source)
    assert "exists already" in refused(source, source)
    assert ".safetensors" in refused(source, tmp_path / "own.pt")
    assert "make it first" in refused(source, tmp_path / "no" / "own.safetensors")
    assert "'lora'" in refused(source, tmp_path / "own.safetensors", to="lora")
    assert "'int8'" in refused(source, tmp_path / "own.safetensors", precision="int8")
    assert "check that it is there" in refused(tmp_path / "gone.safetensors", tmp_path / "own.safetensors")
    assert os.listdir(tmp_path) == ["adapter.safetensors"]


def test_values_that_16_bit_cannot_hold_are_refused(weights, tmp_path):
    weights["ip_adapter.1.to_k_ip.weight"][0, 0] = 1e6
    save_file(weights, tmp_path / "adapter.safetensors")
    assert "not finite" in refused(tmp_path / "adapter.safetensors", tmp_path / "own.safetensors")
    convert(tmp_path / "adapter.safetensors", tmp_path / "own.safetensors", precision="bfloat16")


def test_all_precisions_are_those_of_encoder_files():
    assert {d for d in conversion.PRECISIONS.values() if d} == set(encoder_file.DTYPES)
