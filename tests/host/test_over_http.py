"""The pack in a ComfyUI server of its own, driven as a browser drives it: stock loaders, our nodes, stock sampler.

The weights are random, in the public files' formats and under the public files' names.
"""

import os
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from lcm_lookahead.host.client import PromptRefused
from lcm_lookahead.mini.files import checkpoint
from lcm_lookahead.mini.files.host_models import mini_host
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

pytestmark = pytest.mark.contract

ENCODER = "ip-adapter-plus-face_sdxl_vit-h.safetensors"
CHECKPOINT = "sd_xl_base_1.0.safetensors"
CLIP_VISION = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
WHOLE_CLIP = "clip-vit-large-patch14/model.safetensors"


def text_encoders(text):
    """Random text encoders in transformers' classes: CLIP-L's and bigG's, shrunken."""
    common = {
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "vocab_size": text["vocabulary"],
        "max_position_embeddings": text["positions"],
    }

    def config(width, activation):
        sizes = {"hidden_size": width, "intermediate_size": text["mlp_ratio"] * width, "projection_dim": width}
        return CLIPTextConfig(**common, **sizes, hidden_act=activation)

    return (
        CLIPTextModel(config(text["width_l"], "quick_gelu")),
        CLIPTextModelWithProjection(config(text["width_g"], "gelu")),
    )


@pytest.fixture(scope="module")
def server(mini, sizes, tmp_path_factory):
    """A running server whose models folder holds random files under the public names."""
    base = tmp_path_factory.mktemp("server base")  # a space in the path, as many users have
    models = {name: base / "models" / name for name in ("checkpoints", "clip_vision", "ipadapter", "lookahead")}
    for folder in (*models.values(), base / "input"):
        folder.mkdir(parents=True)
    torch.manual_seed(0)
    with torch.inference_mode(False):
        text_l, text_g = text_encoders(sizes["text"])
        parts = {
            "model.diffusion_model.": mini.model.model.diffusion_model.state_dict(),
            "conditioner.embedders.0.transformer.": checkpoint.clip_l(text_l.state_dict()),
            "conditioner.embedders.1.model.": checkpoint.open_clip(text_g.state_dict()),
            "first_stage_model.": checkpoint.taesd(AutoencoderTiny().state_dict()),
        }
    flat = {prefix + k: v.detach().clone().contiguous() for prefix, part in parts.items() for k, v in part.items()}
    save_file(flat, models["checkpoints"] / CHECKPOINT)
    save_file({k: v.clone() for k, v in mini.clip_vision.get_sd().items()}, models["clip_vision"] / CLIP_VISION)
    with torch.inference_mode(False):
        small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        whole = CLIPModel(CLIPConfig(text_config=small, vision_config=small | {"image_size": 32, "patch_size": 8}))
    whole.save_pretrained(models["clip_vision"] / WHOLE_CLIP.split("/")[0])
    save_file(mini.encoder, models["ipadapter"] / ENCODER)
    damaged = (models["ipadapter"] / ENCODER).read_bytes()[:-1000]
    (models["lookahead"] / "damaged.safetensors").write_bytes(damaged)
    face = np.random.default_rng(0).integers(0, 255, (12, 9, 3), dtype=np.uint8)
    Image.fromarray(face).resize((90, 120)).save(base / "input" / "face.png")
    Image.fromarray(face[:1, :1]).save(base / "input" / "dot.png")
    directory = os.environ.get("COMFYUI_DIR")
    with mini_host(
        base=base, weights=None, pack_name="my-lcm-lookahead", announce=False, directory=directory and Path(directory)
    ) as host:
        yield host


def graph(weight=1.0, encoder=ENCODER, image="face.png", node=True, steps=2, cfg=3.0, neighbour=None):
    """An API prompt: the checkpoint with or without our nodes, through the stock KSampler.

    neighbour: (node id, inputs) of another node that patches the MODEL, put after ours.
    """
    nodes = {
        "checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": CHECKPOINT}),
        "positive": ("CLIPTextEncode", {"clip": ["checkpoint", 1], "text": "a face"}),
        "negative": ("CLIPTextEncode", {"clip": ["checkpoint", 1], "text": "blurry"}),
        "empty": ("CLIPTextEncode", {"clip": ["checkpoint", 1], "text": ""}),
        "latent": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "encoder": ("LookaheadLoadEncoder", {"encoder_name": encoder}),
        "vision": ("CLIPVisionLoader", {"clip_name": CLIP_VISION}),
        "image": ("LoadImage", {"image": image}),
        "reference": (
            "LookaheadEncodeReference",
            {
                "encoder": ["encoder", 0],
                "clip_vision": ["vision", 0],
                "image": ["image", 0],
                "size": 0,
                "several": "together",
            },
        ),
        "apply": (
            "LookaheadApplyImagePrompt",
            {
                "model": ["checkpoint", 0],
                "reference": ["reference", 0],
                "weight": weight,
                "start": 0.0,
                "end": 1.0,
            },
        ),
        "sampler": (
            "KSampler",
            {
                "model": ["apply", 0] if node else ["checkpoint", 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["latent", 0],
                "seed": 1,
                "steps": steps,
                "cfg": cfg,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        ),
        "decode": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["checkpoint", 2]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "out"}),
    }
    if neighbour:
        kind, inputs = neighbour
        nodes["neighbour"] = (kind, {"model": nodes["sampler"][1]["model"], **inputs})
        nodes["sampler"][1]["model"] = ["neighbour", 0]
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def picture(host, fresh=True, **options):
    """Run a graph and read the picture it saved; fresh: on a host that has forgotten its cached results."""
    if fresh:
        host.free()
    result = host.run(graph(**options)).check()
    return np.asarray(Image.open(result.images[0]))


def test_a_graph_of_stock_nodes_and_ours_draws_a_picture(server):
    plain, prompted = picture(server, node=False), picture(server)
    assert prompted.shape == (128, 128, 3) and np.abs(prompted.astype(int) - plain).mean() > 1
    assert np.array_equal(picture(server, weight=0.0), plain)
    assert np.array_equal(picture(server, node=False), plain)
    assert np.array_equal(picture(server), prompted)


def test_a_saved_person_is_drawn_again_and_a_curve_and_boxes_come_from_nodes_of_the_host(server):
    known = server.object_info()
    first = graph(image="face.png")
    own = {
        "save_reference": (
            "LookaheadSaveReference",
            {"reference": ["reference", 0], "file_name": "anna", "contents": "everything"},
        )
    }
    own["weights"] = ("LookaheadWeights", {"preset": "likeness", "layers": "", "steps": "1, 0.5"})
    if "CurveEditor" in known:
        curve = {"points": [[0.0, 1.0], [1.0, 0.5]], "interpolation": "linear"}
        own["curve"] = ("CurveEditor", {"curve": curve})
        own["weights"][1]["curve"] = ["curve", 0]
    if "PrimitiveBoundingBox" in known:
        own["boxes"] = ("PrimitiveBoundingBox", {"x": 8, "y": 10, "width": 64, "height": 64})
        crop = {
            "order": "largest first",
            "face": 0,
            "margin": 0.1,
            "alignment": "as it is",
            "size": 0,
            "if_none": "error",
        }
        crop |= {
            "image": ["image", 0],
            "boxes": ["boxes", 0],
            "detection_sizes": "640",
            "threshold": 0.5,
            "edges": "pad",
        }
        own["crop"] = ("LookaheadCropFace", crop)
        first["reference"]["inputs"]["image"] = ["crop", 0]
    first |= {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in own.items()}
    first["apply"]["inputs"]["weights"] = ["weights", 0]
    drawn = server.run(first).check()
    again = {name: node for name, node in first.items() if name not in ("save_reference", "crop", "boxes", "vision")}
    loaded = {"reference_name": "anna.safetensors", "encoder": ["encoder", 0]}
    again["reference"] = {"class_type": "LookaheadLoadReference", "inputs": loaded}
    server.free()
    pictures = [np.asarray(Image.open(result.images[0])) for result in (drawn, server.run(again).check())]
    assert np.array_equal(*pictures) and not np.array_equal(pictures[0], picture(server))
    path = server.base / "models" / "lookahead_references" / "anna.safetensors"
    assert path.is_file() and "".join(drawn.outputs["save_reference"]["text"]).startswith(f"Written: {path}, ")


# TomePatchModel is not among them: it acts at the latent's full resolution alone, where SDXL has no attention.
NEIGHBOURS = {
    "SelfAttentionGuidance": {"scale": 0.5, "blur_sigma": 2.0},
    "PerturbedAttentionGuidance": {"scale": 3.0},
    "HyperTile": {"tile_size": 32, "swap_size": 2, "max_depth": 1, "scale_depth": False},
    "FreeU_V2": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2},
    "PatchModelAddDownscale": {
        "block_number": 3,
        "downscale_factor": 2.0,
        "start_percent": 0.0,
        "end_percent": 0.35,
        "downscale_after_skip": True,
        "downscale_method": "bicubic",
        "upscale_method": "bicubic",
    },
    "PerpNeg": {"empty_conditioning": ["empty", 0], "neg_scale": 1.0},
    "RescaleCFG": {"multiplier": 1.0},
}


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_beside_other_nodes_that_patch_the_model(server, neighbour):
    """The image prompt acts beside the neighbour, which acts too, and in every block."""
    options = {"fresh": False, "cfg": 12.0}  # what a neighbour does to the guidance shows
    node = (neighbour, NEIGHBOURS[neighbour])
    both, theirs = (picture(server, neighbour=node, node=ours, **options) for ours in (True, False))
    plain = picture(server, node=False, **options)
    assert np.abs(theirs.astype(int) - plain).mean() > 0.05, f"{neighbour} alone changes nothing: this shows nothing"
    assert np.abs(both.astype(int) - theirs).mean() > 0.5
    assert "run without it" not in server.log


def test_an_interrupt_leaves_nothing_behind(server):
    plain = picture(server, node=False)
    server.free()
    result = server.run(graph(steps=100), progress=lambda step: server.interrupt())
    assert result.status == "interrupted"
    assert np.array_equal(picture(server, node=False), plain)


@pytest.mark.parametrize(
    ("options", "node", "says"),
    [
        ({"encoder": "damaged.safetensors"}, "encoder", "damaged.safetensors"),
        ({"image": "dot.png"}, "reference", "1x1"),
    ],
)
def test_an_error_is_said_at_the_node_that_it_concerns(server, options, node, says):
    result = server.run(graph(**options))
    assert result.status == "error" and result.error["node_id"] == node
    assert says in result.error["exception_message"]


def test_a_missing_file_is_refused_before_anything_runs(server):
    with pytest.raises(PromptRefused) as error:
        server.run(graph(encoder="gone.safetensors"))
    assert set(error.value.node_errors) == {"encoder"} and "models/ipadapter" in str(error.value)


def test_help_pages_are_served(server):
    folder = server.object_info()["LookaheadLoadEncoder"]["python_module"].removeprefix("custom_nodes.")
    url = f"{server.url}/extensions/{folder}/docs/LookaheadLoadEncoder.md"
    assert urllib.request.urlopen(url).read().decode().startswith("# Load Lookahead Encoder")


def test_the_server_loaded_the_pack_without_complaint(server):
    about = [line for line in server.log.splitlines() if "my-lcm-lookahead" in line]
    assert about and not [line for line in about if "warning" in line.lower() or "FAILED" in line]


def losses(clip_name=WHOLE_CLIP, weights="random"):
    """An API prompt that makes losses of a picture and words, and shows what came out."""
    nodes = {
        "image": ("LoadImage", {"image": "face.png"}),
        "look": ("LookaheadCLIPLoss", {"clip_name": clip_name, "image": ["image", 0], "text": "", "neutral": ""}),
        "words": ("LookaheadCLIPLoss", {"clip_name": clip_name, "text": "a sketch", "neutral": "a photo"}),
        "layout": ("LookaheadLPIPSLoss", {"image": ["image", 0], "backbone": "squeeze", "weights": weights}),
        "both": ("LookaheadCombineLosses", {"loss_a": ["words", 0], "weight_a": 2.0, "loss_b": ["layout", 0]}),
        "all": ("LookaheadCombineLosses", {"loss_a": ["look", 0], "weight_a": 1.0, "loss_c": ["both", 0]}),
        "shown": ("PreviewAny", {"source": ["all", 0]}),
    }
    optional = {"several": "average", "views": 2, "size": 64, **{f"weight_{slot}": 1.0 for slot in "abcd"}}
    for kind, inputs in nodes.values():
        known = {"LookaheadCLIPLoss": ("several", "views"), "LookaheadLPIPSLoss": ("size", "views")}
        known["LookaheadCombineLosses"] = tuple(name for name in optional if name.startswith("weight"))
        for name in known.get(kind, ()):
            inputs.setdefault(name, optional[name])
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def test_losses_are_made_of_files_pictures_and_words_and_kept_until_a_file_changes(server):
    result = server.run(losses()).check()
    said = "1 CLIP picture + 1 (2 CLIP words + 1 LPIPS (random weights))"
    assert said in str(result.outputs["shown"])
    assert {"look", "words", "layout", "both", "all"} <= set(server.run(losses()).check().cached)


@pytest.mark.parametrize(
    ("options", "node", "says"),
    [
        ({"clip_name": "none.safetensors"}, "look", "There is no CLIP file"),
        ({"weights": "from a file"}, "layout", "download.pytorch.org"),
    ],
)
def test_a_missing_file_of_a_loss_is_said_before_anything_runs(server, options, node, says):
    with pytest.raises(PromptRefused) as refused:
        server.run(losses(**options))
    assert says in str(refused.value.node_errors[node])
