"""Two hundred damaged and hostile files: each is read, or refused in one sentence of ours, and nothing in it runs."""

import io
import json
import resource
import sys

import hostile
import pytest
import torch
from hostile import Kind
from lcm_lookahead.host import workflow
from lcm_lookahead.lookahead.files import (
    concept_file,
    convert,
    encoder_file,
    face_id_file,
    lora_file,
    noise_guide_file,
    reference_file,
)
from lcm_lookahead.lookahead.files.encoder_file import EncoderFileError
from lcm_lookahead.lookahead.files.reference_file import ReferenceFileError, SavedSubject
from lcm_lookahead.lookahead.files.tensors import read_tensors
from lcm_lookahead.lookahead.method.concept import Concept, ConceptEncoder, ConceptSizes, Dictionary
from lcm_lookahead.lookahead.method.face_id import FaceIDSizes
from lcm_lookahead.lookahead.method.kv_encoder import layers
from lcm_lookahead.lookahead.method.noise_guide import NoiseGuide, NoiseGuideSizes
from lcm_lookahead.lookahead.method.resampler import ResamplerSizes
from lcm_lookahead.lookahead.vision import arcface, clip, face_models
from lcm_lookahead.lookahead.vision.arcface import RecogniserError
from lcm_lookahead.lookahead.vision.face_models import FaceModelError
from lcm_lookahead.mini.plan import WEIGHTS
from lcm_lookahead.sdxl import images
from lcm_lookahead.sdxl.images import PictureError
from lcm_lookahead.tools.common import ROOT, Problem
from safetensors.torch import save
from tensors import randn

CASES = 200
MOST_MEMORY = 1 << 30  # bytes that the largest of all cases may take beyond what was in use
BLOCKS = ("up_blocks.0.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.0")
KNOWN = (
    "CLIPTextEncode CLIPVisionLoader CheckpointLoaderSimple EmptyLatentImage KSampler LoadImage SaveImage VAEDecode "
    "LookaheadApplyImagePrompt LookaheadEncodeReference LookaheadLoadEncoder"
).split()
PACK = WEIGHTS / "insightface/models/mini"


def rand(*shape: int) -> torch.Tensor:
    return randn(*shape, seed=sum(shape))


def ip_adapter(width: int) -> dict[str, torch.Tensor]:
    return {f"ip_adapter.{2 * n + 1}.to_{x}_ip.weight": rand(16, width) for n in range(len(BLOCKS)) for x in "kv"}


def saved(folder, write, *arguments) -> bytes:
    """What one of the project's own writers makes."""
    write(folder / "whole", *arguments)
    return (folder / "whole").read_bytes()


def bin_of(tensors: dict[str, torch.Tensor], zipped: bool) -> bytes:
    """The nested pickle that public encoders are."""
    nested: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        half, _, name = key.partition(".")
        nested.setdefault(half, {})[name] = value
    file = io.BytesIO()
    torch.save(nested, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def read_converted(path):
    return convert.read_any(path, dtype=torch.float16)


def read_lora(path):
    shapes = {f"{BLOCKS[0]}.attn1.to_q": torch.Size([8, 8]), "conv_in": torch.Size([4, 4, 3, 3])}
    return lora_file.low_rank(read_tensors(path)[0], shapes, path.name)


def read_workflow(path):
    """As the tools read one: loaded, converted for a host, changed, put together with itself."""
    node = {"input": {"required": {"seed": ["INT", {}], "model": ["MODEL"]}}, "output": ["MODEL"], "output_node": True}
    known = {name: {**node, "name": name} for name in KNOWN}
    api = workflow.convert(path, known)
    return workflow.merge([workflow.override(api, "KSampler", seed=1), api])


def read_pack(path):
    face_models.licence_of(path.parent)
    return face_models.open_app(path.parent, threads=1)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("whole")
    sizes = ResamplerSizes(tokens=4, dim=16, depth=1, heads=1, image_width=8, context_width=12, ff_width=16)
    stock = {f"image_proj.{k}": rand(*s) for k, s in sizes.shapes().items()} | ip_adapter(12)
    kv = {}
    for half, path, projection in layers(BLOCKS):
        kv |= {f"{half}.{path}.{projection}.lora_A.weight": rand(2, 16)}
        kv |= {f"{half}.{path}.{projection}.lora_B.weight": rand(16, 2)}
    own = save(stock | kv, {"format": encoder_file.FORMAT, "format_version": "1", "size": "128", "kv_alpha": "2"})
    face = FaceIDSizes(tokens=2, context_width=64, face_width=8, hidden=8, image_width=6, depth=1, heads=1, ff_width=8)
    face_id = {f"image_proj.{k}": rand(*s) for k, s in face.shapes().items()} | ip_adapter(64)
    lora = {
        "lora_unet_conv_in.lora_down.weight": rand(2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": rand(4, 2, 1, 1),
    }
    lora |= {
        f"unet.{BLOCKS[0]}.attn1.to_q.lora_A.weight": rand(2, 8),
        f"unet.{BLOCKS[0]}.attn1.to_q.lora_B.weight": rand(8, 2),
    }
    lora |= {"lora_unet_conv_in.alpha": torch.tensor(1.0)}
    offsets = {f"{BLOCKS[1]}.attn1.to_q": (rand(2, 12), rand(12, 2))}
    concept = Concept(rand(6), rand(8), "mug", 917, offsets, 0.25, {"base_model": "mini"})
    words = Dictionary(torch.tensor([1, 2]), rand(2, 6), rand(2, 8), ("mug", "car"))
    encoder = ConceptEncoder(ConceptSizes({f"{BLOCKS[1]}.attn2.to_k": (10, 12)}, 16, 5, 24, 6, 8, 2, 3)).reset(words)
    about = {"size": "128", "blend": "0.25"}
    guide, where = NoiseGuide(NoiseGuideSizes(identity=6, width=8, hidden=8)), {"start": "0.12", "end": "0.2"}
    subject = SavedSubject(
        rand(1, 4, 8), rand(1, 4, 8), rand(2, 4, 3, 3), rand(2, 24, 24).sigmoid(), rand(1, 7, 8), rand(1, 5),
        rand(2, 6), "encoder", "0123456789abcdef", "w600k",
    )  # fmt: skip
    published = {f"image_proj_model.{k}": rand(*s) for k, s in sizes.shapes().items()}
    for block in BLOCKS:
        for which in "kv":
            layer = f"encoder_unet.{block}.extract_kv"
            published |= {f"{layer}2.to_{which}.weight": rand(16, 12), f"{layer}1.to_{which}.weight": rand(16, 16)}
            published |= {f"encoder_unet.{block}.attn1.to_{which}.weight": rand(16, 16)}
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in arcface.IResNet([2, 2, 2, 2]).state_dict().items()}
    recogniser = {k: torch.ones(s, dtype=torch.float16) for k, s in shapes.items()}
    mini_clip = {
        p.name: p.read_bytes() for p in ((WEIGHTS / "mini_clip" / n) for n in ("model.safetensors", "config.json"))
    }
    graph = next(iter(sorted((ROOT / "workflows").glob("01*prompt.json")))).read_bytes()
    api = {"1": {"class_type": "CheckpointLoaderSimple", "inputs": {}, "_meta": {"title": "a"}}}
    api["2"] = {"class_type": "KSampler", "inputs": {"seed": 4, "model": ["1", 0]}}
    pack = {p.name: p.read_bytes() for p in sorted(PACK.iterdir())}

    def encoders(name: str, data: bytes, changes, read=face_id_file.read_encoder) -> Kind:
        return Kind({name: data}, read, (EncoderFileError,), changes)

    return {
        "encoder": encoders("a.safetensors", own, hostile.SAFETENSORS),
        "kv": encoders("kv.safetensors", own, hostile.SAFETENSORS, encoder_file.read),
        "stock": encoders("stock.safetensors", save(stock), hostile.SAFETENSORS),
        "bin": encoders("stock.bin", bin_of(stock, True), hostile.PICKLES),
        "old bin": encoders("old.bin", bin_of(stock, False), hostile.PICKLES),
        "converted": encoders("model_ckpt.pt", bin_of(stock, True), hostile.PICKLES, read_converted),
        "published": encoders("published.safetensors", save(published), hostile.SAFETENSORS, convert.read_any),
        "face id": encoders("id.safetensors", save(face_id), hostile.SAFETENSORS),
        "face id bin": encoders("id.bin", bin_of(face_id, True), hostile.PICKLES),
        "lora": encoders("lcm.safetensors", save(lora), hostile.SAFETENSORS, read_lora),
        "lora bin": encoders("lcm.bin", bin_of(lora, True), hostile.PICKLES, read_lora),
        "concept": encoders(
            "mug.safetensors",
            saved(folder, concept_file.write_concept, concept),
            hostile.SAFETENSORS,
            concept_file.read_concept,
        ),
        "concept encoder": encoders(
            "date.safetensors",
            saved(folder, concept_file.write_concept_encoder, encoder, {1: "mug", 2: "car"}, about),
            hostile.SAFETENSORS,
            concept_file.read_concept_encoder,
        ),
        "noise guide": encoders(
            "guide.safetensors",
            saved(folder, noise_guide_file.write, guide, rand(6), where),
            hostile.SAFETENSORS,
            noise_guide_file.read,
        ),
        "reference": Kind(
            {"who.safetensors": saved(folder, reference_file.write, [subject, subject], "mine")},
            reference_file.read,
            (ReferenceFileError,),
            hostile.SAFETENSORS,
        ),
        "clip": Kind(mini_clip, lambda path: clip.CLIPPictures(clip.read(path)), (ValueError,), hostile.SAFETENSORS),
        "recogniser": Kind({"r.pth": bin_of(recogniser, True)}, arcface.read, (RecogniserError,), hostile.PICKLES),
        "picture": Kind({"me.png": hostile.picture("PNG")}, images.read, (PictureError,), (hostile.odd_picture,)),
        "photo": Kind({"me.jpg": hostile.picture("JPEG")}, images.read, (PictureError,), (hostile.odd_picture,)),
        "webp": Kind({"me.webp": hostile.picture("WEBP")}, images.read, (PictureError,), (hostile.odd_picture,)),
        "workflow": Kind({"graph.json": graph}, read_workflow, (Problem,), hostile.JSON),
        "api": Kind({"api.json": json.dumps(api).encode()}, read_workflow, (Problem,), hostile.JSON),
        "pack": Kind(pack, read_pack, (FaceModelError, FileNotFoundError)),
        "onnx": Kind({"r.onnx": (PACK / "rec_mini.onnx").read_bytes()}, arcface.read, (RecogniserError,)),
    }


def peak() -> int:
    """The most memory that this process ever had in use, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


NAMES = (
    "encoder", "kv", "stock", "bin", "old bin", "converted", "published", "face id", "face id bin", "lora", "lora bin",
    "concept", "concept encoder", "noise guide", "reference", "clip", "recogniser", "picture", "photo", "webp",
    "workflow", "api", "pack", "onnx",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_file_of_each_kind_is_read(kinds, name, tmp_path):
    assert tuple(kinds) == NAMES
    for file, content in kinds[name].files.items():
        (tmp_path / file).write_bytes(content)
    kinds[name].read(tmp_path / next(iter(kinds[name].files)))


@pytest.mark.filterwarnings("ignore")  # torch's, of quantised tensors and old storage
@pytest.mark.parametrize("number", range(CASES))
def test_a_harmed_file_is_read_or_refused_in_one_sentence_and_never_run(kinds, number, tmp_path):
    kind = kinds[NAMES[number % len(NAMES)]]
    path = kind.write(tmp_path, number)
    there, before = sorted(tmp_path.rglob("*")), peak()
    assert (fault := hostile.fault(kind, path)) is None, fault
    assert sorted(tmp_path.rglob("*")) == there, "something in the file was run, or half of something was left"
    assert peak() - before < MOST_MEMORY


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_harm_upon_harm_that_reaches_new_lines_of_the_readers_is_refused_too(kinds, name, tmp_path):
    megabytes = sum(map(len, kinds[name].files.values())) / 1e6
    assert hostile.fuzz(kinds[name], tmp_path, rounds=300 if megabytes < 5 else 60, seed=len(name)) == {}
