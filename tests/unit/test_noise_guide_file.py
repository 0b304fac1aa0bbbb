"""Files of noise guides: the round trip, and bad files in a sentence."""

import pytest
import torch
from lcm_lookahead.lookahead.files import encoder_file, noise_guide_file
from lcm_lookahead.lookahead.files.tensors import EncoderFileError, read_tensors
from lcm_lookahead.lookahead.method.noise_guide import NoiseGuide, NoiseGuideSizes
from lcm_lookahead.tools.common import ROOT
from safetensors.torch import save_file

ABOUT = {"start": "0.12", "end": "0.2", "recogniser": "w600k.onnx", "base_model": "mini", "modelspec.title": "mine"}
SIGNATURE = torch.nn.functional.normalize(torch.arange(12.0) - 4, dim=0)


@pytest.fixture(scope="module")
def guide():
    torch.manual_seed(2)
    guide = NoiseGuide(NoiseGuideSizes(identity=12, width=8, hidden=16))
    torch.nn.init.normal_(guide.conv_out.weight, std=0.1)
    return guide


@pytest.fixture
def path(guide, tmp_path):
    noise_guide_file.write(tmp_path / "guide.safetensors", guide, SIGNATURE, ABOUT)
    return tmp_path / "guide.safetensors"


def test_a_guide_that_is_written_reads_back(guide, path, tmp_path):
    file = noise_guide_file.read(path)
    assert file.network.sizes == guide.sizes and (file.start, file.end) == (0.12, 0.2)
    expected = guide.state_dict()
    assert all(torch.equal(v, expected[k].half().float()) for k, v in file.network.state_dict().items())
    assert torch.equal(file.signature, SIGNATURE) and not any(p.requires_grad for p in file.network.parameters())
    assert "w600k.onnx" in file.provenance() and "title: mine" in file.provenance()
    assert [p.name for p in tmp_path.iterdir()] == ["guide.safetensors"]


def test_the_shipped_guides_and_encoders_say_where_they_come_from_in_what_a_node_has_room_for():
    """Of a training's whole configuration only how it begins."""
    folder = ROOT / "mini" / "trained"
    guide = noise_guide_file.read(folder / "mini_noise_guide.safetensors").provenance()
    encoder = encoder_file.provenance(encoder_file.read(folder / "mini_encoder.safetensors"))
    assert all('training configuration: {"name": "mini_' in text and len(text) < 1000 for text in (guide, encoder))


def test_another_recogniser_is_refused_and_the_same_by_another_name_is_not(path):
    file = noise_guide_file.read(path)
    file.check_recogniser(SIGNATURE + 1e-3, "the same.onnx")
    for other in (SIGNATURE.roll(1), torch.ones(7)):
        with pytest.raises(EncoderFileError, match=r"w600k\.onnx, and other\.pth tells"):
            file.check_recogniser(other, "other.pth")


def changed(path, metadata=None, **tensors):
    """The file with other tensors (None: without one) and metadata."""
    before, about = read_tensors(path)
    there = {k: v for k, v in (before | tensors).items() if v is not None}
    save_file({k: v.contiguous() for k, v in there.items()}, path, about | (metadata or {}))
    return path


@pytest.mark.parametrize(
    ("metadata", "tensors", "match"),
    [
        ({"format": "lcm-lookahead-encoder"}, {}, "no noise guide"),
        ({"format_version": "1"}, {}, "version 1, and this version of the pack reads 2"),
        ({"start": "0.5"}, {}, "from 0.5 to 0.2"),
        ({"end": "nan"}, {}, "to nan of the sampling"),
        ({}, {"conv_in.weight": None}, "not a whole noise guide"),
        ({}, {"conv_in.bias": torch.ones(12)}, "not a whole noise guide"),
        ({}, {"conv_out.bias": torch.full((4,), float("inf"))}, "not finite"),
        ({}, {"more": torch.ones(3)}, "not a whole noise guide"),
        ({}, {"recogniser_signature": None}, "has shape"),
        ({}, {"recogniser_signature": torch.ones(13)}, "12 numbers"),
    ],
)
def test_a_bad_file_is_a_sentence(path, metadata, tensors, match):
    with pytest.raises(EncoderFileError, match=match) as error:
        noise_guide_file.read(changed(path, metadata, **tensors))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_what_could_not_be_read_is_not_written(guide, tmp_path):
    place = tmp_path / "guide.safetensors"
    for about, signature in (
        ({"start": "0.12"}, SIGNATURE),
        (ABOUT, SIGNATURE[:3]),
        (ABOUT | {"mood": "x"}, SIGNATURE),
    ):
        with pytest.raises(EncoderFileError):
            noise_guide_file.write(place, guide, signature, about)
    assert not list(tmp_path.iterdir())
