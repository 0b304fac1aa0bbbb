"""IP-Adapter FaceID Plus v2: its file's layout, read strictly, and its LoRA beside the weights."""

import pytest
import torch
from lcm_lookahead.lookahead.files import encoder_file, face_id_file
from lcm_lookahead.lookahead.files.face_id_file import FaceIDFile
from lcm_lookahead.lookahead.files.tensors import EncoderFileError
from lcm_lookahead.lookahead.method.face_id import AttentionLoRA, FaceIDSizes

SIZES = FaceIDSizes(tokens=2, context_width=64, face_width=8, hidden=16, image_width=12, depth=2, heads=1, ff_width=32)
WIDTHS = (6, 6, 10)


@pytest.fixture
def weights():
    """A narrow random file in the public layout, as two nested dicts."""
    g = torch.Generator().manual_seed(1)
    image_proj = {name: torch.randn(shape, generator=g) for name, shape in SIZES.shapes().items()}
    ip = {}
    for n, width in enumerate(WIDTHS):
        ip |= {f"{2 * n + 1}.to_{x}_ip.weight": torch.randn(width, 64, generator=g) for x in "kv"}
        for attention in (2 * n, 2 * n + 1):
            for to in ("to_q", "to_k", "to_v", "to_out"):
                width_in = 64 if attention % 2 and to in ("to_k", "to_v") else width
                ip[f"{attention}.{to}_lora.down.weight"] = torch.randn(3, width_in, generator=g)
                ip[f"{attention}.{to}_lora.up.weight"] = torch.randn(width, 3, generator=g)
    return {"image_proj": image_proj, "ip_adapter": ip}


def flat(weights):
    return {f"{half}.{name}": value for half, part in weights.items() for name, value in part.items()}


def test_the_public_layout_is_read_whether_pickled_or_not(weights, tmp_path):
    torch.save(weights, tmp_path / "a.bin")
    file = face_id_file.read_encoder(tmp_path / "a.bin")
    assert isinstance(file, FaceIDFile) and file.sizes == SIZES and file.widths == WIDTHS
    assert len(file.lora) == 3 * 2 * 4 and file.lora["2.attn1.to_q"][0].shape == (3, 10)
    assert torch.equal(file.lora["1.attn2.to_k"][1], weights["ip_adapter"]["3.to_k_lora.up.weight"])
    assert torch.equal(file.ip_adapter[2][1], weights["ip_adapter"]["5.to_v_ip.weight"])
    text = face_id_file.provenance(file)
    assert "FaceID Plus v2" in text and "LoRA of rank 3 on 24 projections" in text and "research only" in text


def test_a_file_without_its_lora_is_read(weights, tmp_path):
    tensors = {key: value for key, value in flat(weights).items() if "_lora" not in key}
    file = face_id_file.from_tensors(tensors, {}, "a.bin")
    assert not file.lora and "no LoRA" in face_id_file.provenance(file)


def test_the_default_sizes_are_those_of_the_published_file():
    shapes = FaceIDSizes().shapes()
    assert shapes["proj.2.weight"] == (4 * 2048, 1024)
    assert shapes["perceiver_resampler.layers.3.0.to_kv.weight"] == (4096, 2048)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) > 2e8


@pytest.mark.parametrize(
    "key",
    [
        "image_proj.norm.weight",
        "image_proj.proj.0.weight",
        "image_proj.proj.2.bias",
        "image_proj.perceiver_resampler.layers.1.0.to_kv.weight",
        "image_proj.perceiver_resampler.proj_out.bias",
        "ip_adapter.3.to_k_ip.weight",
        "ip_adapter.5.to_v_ip.weight",
        "ip_adapter.0.to_q_lora.down.weight",
        "ip_adapter.5.to_out_lora.up.weight",
    ],
)
def test_a_missing_a_misshapen_and_a_non_finite_weight_are_refused(weights, key):
    whole = flat(weights)
    broken = [
        {name: value for name, value in whole.items() if name != key},
        {**whole, key: whole[key][:-1]},
        {**whole, key: torch.full_like(whole[key], float("nan"))},
        {**whole, key: whole[key].to(torch.int8)},
        {**whole, key + ".more": whole[key]},
    ]
    for tensors in broken:
        with pytest.raises(EncoderFileError) as error:
            face_id_file.from_tensors(tensors, {}, "a.bin")
        text = str(error.value)
        assert text.startswith("a.bin") and text.endswith(".") and "\n" not in text and text.count(". ") == 0


def test_other_encoders_are_read_as_before_and_other_readers_still_refuse_it(weights, tmp_path):
    torch.save(weights, tmp_path / "a.bin")
    with pytest.raises(EncoderFileError, match="FaceID"):
        encoder_file.read(tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(b"")
    with pytest.raises(EncoderFileError, match="empty"):
        face_id_file.read_encoder(tmp_path / "b.bin")


def test_the_lora_is_a_product_beside_the_layer():
    g = torch.Generator().manual_seed(2)
    a, b, x, y = (torch.randn(shape, generator=g) for shape in ((2, 5), (7, 2), (1, 3, 5), (1, 3, 7)))
    lora = AttentionLoRA.from_weights({"0.attn1.to_q": (a, b)})
    assert torch.allclose(lora.add("0.attn1.to_q", y, x, 0.5), y + 0.5 * x @ a.T @ b.T, atol=1e-5)
    assert lora.add("1.attn1.to_q", y, x) is y and lora.widths == {"0.attn1.to_q": (5, 7)}
