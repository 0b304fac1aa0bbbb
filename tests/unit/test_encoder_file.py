"""The encoder file: round trips, and one sentence for everything that can be wrong with one."""

import os
import pickle
import re

import pytest
import torch
from lcm_lookahead.lookahead.files import encoder_file
from lcm_lookahead.lookahead.files.block_names import block_names
from lcm_lookahead.lookahead.files.encoder_file import EncoderFileError
from lcm_lookahead.lookahead.files.tensors import write_tensors
from safetensors.torch import save_file
from stock_files import halves


@pytest.fixture
def stock(weights, tmp_path):
    """stock(changed weights) -> path of a stock .safetensors file."""

    def save(tensors=None, name="adapter.safetensors", metadata=None):
        save_file(weights if tensors is None else tensors, tmp_path / name, metadata=metadata)
        return tmp_path / name

    return save


def refused(path) -> str:
    with pytest.raises(EncoderFileError) as error:
        encoder_file.read(path)
    text = str(error.value)
    assert text.startswith(path.name) and text.endswith(".") and "\n" not in text
    assert not re.search(r"[a-z0-9]\. [A-Z]", text), f"more than one sentence: {text}"
    return text


def same(file, weights):
    assert {f"image_proj.{k}": v for k, v in file.image_proj.items()}.keys() | {
        f"ip_adapter.{2 * n + 1}.to_{w}_ip.weight" for n in range(len(file.ip_adapter)) for w in "kv"
    } == weights.keys()
    for key, value in file.image_proj.items():
        assert torch.equal(value, weights[f"image_proj.{key}"])
    for n, (to_k, to_v) in enumerate(file.ip_adapter):
        assert torch.equal(to_k, weights[f"ip_adapter.{2 * n + 1}.to_k_ip.weight"])
        assert torch.equal(to_v, weights[f"ip_adapter.{2 * n + 1}.to_v_ip.weight"])


# -- what is read


def test_a_stock_safetensors_file(stock, weights, sizes):
    file = encoder_file.read(stock())
    same(file, weights)
    assert file.kind == encoder_file.STOCK_KIND and file.sizes == sizes and file.widths == (16, 16, 32)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_stock_bin_file(weights, tmp_path, zipped):
    path = tmp_path / "adapter.bin"
    torch.save(halves(weights), path, _use_new_zipfile_serialization=zipped)
    same(encoder_file.read(path), weights)


def test_the_kind_does_not_depend_on_the_name(stock, weights, tmp_path):
    torch.save(halves(weights), tmp_path / "faceid.safetensors")
    same(encoder_file.read(tmp_path / "faceid.safetensors"), weights)
    same(encoder_file.read(stock(name="ip-adapter_sd15.bin")), weights)


def kv_weights(blocks, width=8, rank=4):
    """A KV encoder's weights for so many blocks; the last is not tuned, since nothing reads what it puts out."""
    out = {}
    for n in range(blocks):
        path = f"mid_block.attentions.0.transformer_blocks.{n}"
        layers = [f"kv_export.{path}.attn1.to_{x}" for x in "kv"]
        if n < blocks - 1:
            layers += [f"kv_encoder.{path}.attn{a}.{x}" for a in (1, 2) for x in ("to_q", "to_k", "to_v", "to_out.0")]
        for layer in layers:
            out |= {
                f"{layer}.lora_A.weight": torch.ones(rank, width),
                f"{layer}.lora_B.weight": torch.ones(width, rank),
            }
    return out


def dead_layers_of_the_last_block(kv):
    """Half of them, in place of half of the first block's: as many layers as a whole file has."""
    some = [k for k in kv if k.startswith("kv_encoder") and "blocks.0.attn2" in k]
    return {k.replace("blocks.0", "blocks.2"): kv.pop(k) for k in some}


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda kv: kv.pop(next(k for k in kv if k.startswith("kv_encoder"))), "lora_A.weight is missing"),
        (lambda kv: [kv.pop(k) for k in list(kv) if "kv_encoder" in k and "blocks.0.attn2" in k], "incomplete"),
        (lambda kv: [kv.pop(k) for k in list(kv) if "kv_export" in k and "blocks.1." in k], "incomplete"),
        (lambda kv: [kv.pop(k) for k in list(kv) if "kv_export" in k], "0 layers of kv_export"),
        (lambda kv: [kv.pop(k) for k in list(kv) if "kv_encoder" in k], "0 layers of kv_encoder"),
        (lambda kv: kv.update(dead_layers_of_the_last_block(kv)), "incomplete"),
        (lambda kv: kv.update({next(iter(kv)): torch.ones(3, 8)}), "[rank, in]"),
        (lambda kv: kv.update({k: t[:0] if "_A" in k else t[:, :0] for k, t in kv.items()}), "holds no number"),
    ],
)
def test_a_kv_encoder_that_is_not_whole_is_refused(weights, tmp_path, harm, said):
    nested = halves(weights)
    pairs = [
        tuple(nested["ip_adapter"][f"{2 * n + 1}.to_{w}_ip.weight"] for w in "kv")
        for n in range(len(nested["ip_adapter"]) // 2)
    ]
    kv = kv_weights(len(pairs))
    harm(kv)
    with pytest.raises(encoder_file.EncoderFileError, match=re.escape(said)):
        encoder_file.write(tmp_path / "mine.safetensors", nested["image_proj"], pairs, {"kv_alpha": "4"}, kv)
    assert os.listdir(tmp_path) == []


def test_an_encoder_file_comes_back_as_it_was_written(weights, tmp_path):
    path = tmp_path / "mine.safetensors"
    nested = halves(weights)
    pairs = [
        tuple(nested["ip_adapter"][f"{2 * n + 1}.to_{w}_ip.weight"] for w in "kv")
        for n in range(len(nested["ip_adapter"]) // 2)
    ]
    kv = kv_weights(len(pairs))
    said = {"base_model": "mini", "steps": "10", "modelspec.title": "test"}
    encoder_file.write(path, nested["image_proj"], pairs, said, kv)
    file = encoder_file.read(path)
    same(file, weights)
    assert file.kind == encoder_file.OWN_KIND and file.kv.keys() == kv.keys()
    assert said.items() <= file.metadata.items() and file.metadata["tokens"] == "4"
    text = encoder_file.provenance(file)
    assert "mini" in text and "test" in text and encoder_file.PROVENANCE_UNKNOWN not in text
    assert os.listdir(tmp_path) == ["mine.safetensors"]


def test_what_could_not_be_read_again_is_not_written(weights, tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"an older file")
    nested = halves(weights)
    pair = tuple(nested["ip_adapter"][f"1.to_{w}_ip.weight"] for w in "kv")
    broken = {k: v for k, v in nested["image_proj"].items() if k != "norm_out.bias"}
    with pytest.raises(EncoderFileError, match="norm_out.bias"):
        encoder_file.write(path, broken, [pair], {})
    with pytest.raises(EncoderFileError, match="color"):
        encoder_file.write(path, nested["image_proj"], [pair], {"color": "red"})
    assert path.read_bytes() == b"an older file" and os.listdir(tmp_path) == ["mine.safetensors"]


def test_a_write_that_is_cut_off_leaves_the_older_file(weights, tmp_path, monkeypatch):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"an older file")
    nested = halves(weights)
    pair = tuple(nested["ip_adapter"][f"1.to_{w}_ip.weight"] for w in "kv")

    def fails(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(EncoderFileError, match="mine.safetensors cannot be written .no space left on device.: free"):
        encoder_file.write(path, nested["image_proj"], [pair], {})
    assert path.read_bytes() == b"an older file" and os.listdir(tmp_path) == ["mine.safetensors"]


def test_a_written_file_may_be_read_by_whom_any_new_file_may(tmp_path):
    (tmp_path / "any").touch()
    write_tensors(tmp_path / "mine.safetensors", {"a": torch.zeros(1)}, {})
    assert (tmp_path / "mine.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
    with pytest.raises(EncoderFileError, match="cannot be written .No such file or directory.: free some space"):
        write_tensors(tmp_path / "nowhere" / "mine.safetensors", {"a": torch.zeros(1)}, {})


# -- what is refused


def test_an_empty_file(tmp_path):
    (tmp_path / "adapter.safetensors").touch()
    assert refused(tmp_path / "adapter.safetensors") == "adapter.safetensors is empty: download it again."


@pytest.mark.parametrize("keep", [5, 200, -1])
def test_a_truncated_safetensors_file(stock, keep):
    path = stock()
    path.write_bytes(path.read_bytes()[:keep])
    assert "download it again" in refused(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_bin_file(weights, tmp_path, zipped, share):
    path = tmp_path / "adapter.bin"
    torch.save(halves(weights), path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert "cut short" in refused(path)


def test_a_missing_file(tmp_path):
    assert "check that it is there" in refused(tmp_path / "gone.safetensors")


def test_a_web_page_saved_as_a_model(tmp_path):
    path = tmp_path / "adapter.safetensors"
    path.write_text("<!DOCTYPE html><html>")
    assert "<!DOCTYPE" in refused(path)


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("how", ["torch", "torch, old", "pickle"])
def test_code_in_a_pickle_is_not_executed(weights, tmp_path, how):
    canary = tmp_path / "executed"
    content = {**halves(weights), "extra": Canary(str(canary))}
    path = tmp_path / "adapter.bin"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"extra": Canary(str(canary))}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    text = refused(path)
    assert not canary.exists() and "safetensors" in text
    pickle.loads(pickle.dumps(Canary(str(canary))))
    assert canary.exists()  # the canary itself is alive


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_numbers(stock, weights, value):
    weights["ip_adapter.3.to_v_ip.weight"][0, 0] = value
    assert "ip_adapter.3.to_v_ip.weight" in refused(stock(weights))


@pytest.mark.parametrize("value", [1e38, -1e20])
def test_weights_whose_squares_no_precision_can_hold_are_refused(stock, weights, value):
    """They are numbers, and would leave a blank picture without a word."""
    weights["ip_adapter.3.to_v_ip.weight"][0, 0] = value
    assert "as large as" in refused(stock(weights)) and "ip_adapter.3" in refused(stock(weights))


OWN = {"format": "lcm-lookahead-encoder", "format_version": "1"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("kv_alpha", alpha) for alpha in ("nan", "inf", "-Infinity", "1e39", "four")),
        *(("size", size) for size in ("10000000", "4104", "9" * 5000)),
        ("kv_prompt", "a face " * 1000),
    ],
)
def test_metadata_that_cannot_be_meant_are_refused(stock, weights, field, value):
    text = refused(stock(weights, metadata={**OWN, field: value}))
    assert f"metadata field {field}" in text and len(text) < 200


def test_metadata_that_make_sense_are_read_and_long_ones_shown_in_part(stock, weights):
    path = stock(weights, metadata={**OWN, "kv_alpha": "4", "size": "4096", "data": "x" * 10**6})
    file = encoder_file.read(path)
    assert file.kv_scale(2) == 2.0 and encoder_file.reference_size(file.metadata) == 4096
    assert len(encoder_file.provenance(file)) < 4000


@pytest.mark.parametrize("key", [f"image_proj.{k}" for k in ("layers.2.0.to_kv.weight", "latents", "norm_out.bias")])
def test_a_missing_weight_of_the_resampler(stock, weights, key):
    del weights[key]
    assert key in refused(stock(weights))


def test_a_missing_layer(stock, weights):
    del weights["ip_adapter.3.to_k_ip.weight"], weights["ip_adapter.3.to_v_ip.weight"]
    assert "ip_adapter.3.to_k_ip.weight" in refused(stock(weights))


def test_a_missing_half(stock, weights):
    assert "image_proj" in refused(stock({k: v for k, v in weights.items() if not k.startswith("image_proj")}))
    assert "ip_adapter" in refused(stock({k: v for k, v in weights.items() if k.startswith("image_proj")}))


def test_a_wrong_shape(stock, weights):
    weights["image_proj.layers.1.1.3.weight"] = torch.zeros(3, 3)
    assert "layers.1.1.3" in refused(stock(weights))


def test_a_wrong_text_width(stock, weights):
    weights["ip_adapter.1.to_k_ip.weight"] = torch.zeros(16, 41)
    assert "41" in refused(stock(weights))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_a_quantised_file(stock, weights, dtype):
    weights["image_proj.proj_in.weight"] = weights["image_proj.proj_in.weight"].to(dtype)
    assert str(dtype) in refused(stock(weights))


def test_a_surplus_weight(stock, weights):
    weights["something.else"] = torch.zeros(2)
    assert "something.else" in refused(stock(weights))
    del weights["something.else"]
    weights["image_proj.layers.0.2.weight"] = torch.zeros(2)
    assert "layers.0.2" in refused(stock(weights))


def test_a_newer_format(stock):
    text = refused(stock(metadata={"format": encoder_file.FORMAT, "format_version": "99"}))
    assert "99" in text and "update" in text


def test_an_adapter_for_sd15(stock, sizes):
    from dataclasses import replace

    from lcm_lookahead.lookahead.method.resampler import Resampler

    sd15 = Resampler(replace(sizes, context_width=768))
    tensors = {f"image_proj.{k}": v for k, v in sd15.state_dict().items()}
    for n in range(16):
        for which in "kv":
            tensors[f"ip_adapter.{2 * n + 1}.to_{which}_ip.weight"] = torch.zeros(8, 768)
    assert "Stable Diffusion 1.5" in refused(stock(tensors))


IP = {"ip_adapter.1.to_k_ip.weight": (8, 40), "ip_adapter.1.to_v_ip.weight": (8, 40)}
OTHERS = {
    "without Plus": {**IP, "image_proj.proj.weight": (8, 8), "image_proj.norm.weight": (8,)},
    "FaceID": {
        "image_proj.proj.0.weight": (8, 8),
        "image_proj.proj.2.weight": (8, 8),
        "image_proj.norm.weight": (8,),
        "ip_adapter.0.to_q_lora.down.weight": (4, 8),
        **IP,
    },
    "FaceID, which": {**IP, "image_proj.perceiver_resampler.proj_in.weight": (8, 8), "image_proj.norm.weight": (8,)},
    "Full Face": {**IP, "image_proj.proj.0.weight": (8, 8), "image_proj.proj.2.weight": (8, 8),
                  "image_proj.proj.3.weight": (8,)},
    "InstantID": {**IP, "image_proj.latents": (1, 4, 8), "image_proj.proj_in.weight": (8, 512)},
    "LoRA": {"lora_unet_input_blocks_4_1_attn1_to_q.lora_down.weight": (4, 8)},
    "diffusion model": {"model.diffusion_model.input_blocks.0.0.weight": (4, 8)},
    "training state": {"image_proj_model.latents": (1, 4, 8), "adapter_modules.1.to_k_ip.weight": (8, 8)},
    "CLIP vision": {"vision_model.embeddings.class_embedding": (8,)},
    "not an encoder file": {"weight": (8,)},
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_other_kinds_are_named(stock, kind):
    assert kind in refused(stock({k: torch.zeros(shape) for k, shape in OTHERS[kind].items()}))


def test_a_bin_that_holds_something_else(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "a.bin")
    assert "list" in refused(tmp_path / "a.bin")


def test_plain_values_beside_the_tensors_of_a_bin_are_passed_over(weights, tmp_path):
    extra = {"epoch": 3, "loss": 0.5, "note": "best", "ema": True, "parent": None}
    torch.save({**halves(weights), **extra, "state": {"step": 1}}, tmp_path / "adapter.bin")
    same(encoder_file.read(tmp_path / "adapter.bin"), weights)


def test_other_values_beside_the_tensors_of_a_bin_are_named(weights, tmp_path):
    torch.save({**halves(weights), "state": {"steps": [1, 2]}}, tmp_path / "adapter.bin")
    text = refused(tmp_path / "adapter.bin")
    assert "state.steps is of type list" in text and ".safetensors" in text


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_of_a_bin_that_are_not_plain(weights, tmp_path, kind):
    key = "ip_adapter.3.to_v_ip.weight"
    value = weights[key]
    weights[key] = value.to_sparse() if kind == "sparse" else torch.empty_like(value, device="meta")
    torch.save(halves(weights), tmp_path / "adapter.bin")
    text = refused(tmp_path / "adapter.bin")
    assert key in text and kind in text and ".safetensors" in text
    torch.save({key: weights[key]}, tmp_path / "adapter.bin")  # not "half an adapter": nothing of it can be used
    assert kind in refused(tmp_path / "adapter.bin")


# -- names


def test_sdxl_has_70_blocks_in_the_order_of_the_public_files():
    names = block_names()
    assert len(names) == 70 and len({n.host for n in names}) == 70 and len({n.diffusers for n in names}) == 70
    expected = {
        0: ("input", 4, 0, "down_blocks.1.attentions.0.transformer_blocks.0"),
        3: ("input", 5, 1, "down_blocks.1.attentions.1.transformer_blocks.1"),
        4: ("input", 7, 0, "down_blocks.2.attentions.0.transformer_blocks.0"),
        23: ("input", 8, 9, "down_blocks.2.attentions.1.transformer_blocks.9"),
        24: ("output", 0, 0, "up_blocks.0.attentions.0.transformer_blocks.0"),
        53: ("output", 2, 9, "up_blocks.0.attentions.2.transformer_blocks.9"),
        54: ("output", 3, 0, "up_blocks.1.attentions.0.transformer_blocks.0"),
        59: ("output", 5, 1, "up_blocks.1.attentions.2.transformer_blocks.1"),
        60: ("middle", 0, 0, "mid_block.attentions.0.transformer_blocks.0"),
        69: ("middle", 0, 9, "mid_block.attentions.0.transformer_blocks.9"),
    }
    for n, (group, block, index, path) in expected.items():
        assert names[n].host == (group, block, index) and names[n].diffusers == path


@pytest.mark.parametrize(("depth", "middle", "count"), [((0, 2, 10), 10, 70), ((0, 1, 2), 2, 17)])
def test_names_and_order_are_those_of_diffusers(depth, middle, count):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[max(d, 1) for d in depth],
            attention_head_dim=8,
            cross_attention_dim=32,
        )
    theirs = [name.split(".attn2")[0] for name in unet.attn_processors if "attn2" in name]
    assert [n.diffusers for n in block_names(depth, middle)] == theirs and len(theirs) == count
