"""The shipped weights through the host's stock loaders, and what they draw, judged by the networks that measure."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from lcm_lookahead.mini.files.host_models import MINI_MODELS, mini_host
from lcm_lookahead.mini.files.weights import evaluators
from lcm_lookahead.mini.stages import style_lora
from lcm_lookahead.mini.world.edges import edges
from lcm_lookahead.mini.world.faces import STYLES
from lcm_lookahead.mini.world.references import reference_faces
from PIL import Image
from samples import standard_errors

DRAWN = ("photo", "comic")
EACH = 4  # pictures a style; those of one number share their noise, so that gains are paired
LORAS = {"lcm-lora-sdxl": (4, 1.0), "sd_xl_turbo_lora_v1": (1, 1.0)}  # steps, cfg
BASE = (12, 3.0)
# What the hosts log about weights that a loader misses, or has left over.
COMPLAINTS = (
    *("unet missing", "unet unexpected", "clip missing", "Missing VAE keys", "missing clip vision"),
    *("lora key not loaded", "NOT LOADED", "missing controlnet keys", "leftover keys"),
)


@pytest.fixture(scope="module")
def server():
    directory = os.environ.get("COMFYUI_DIR")
    with mini_host(announce=False, directory=directory and Path(directory)) as host:
        save(reference_faces(1)[0], host.folder("input") / "face.png")
        yield host


def save(picture, path):
    """Write a picture [3, H, W] in [0, 1]."""
    Image.fromarray((picture.movedim(0, -1) * 255).round().byte().numpy()).save(path)


def graph(lora=None, prompted=False, named=False):
    """EACH pictures a style, by the stock nodes alone but for the image prompt; SaveImage nodes are the styles."""
    steps, cfg = LORAS.get(lora, BASE)
    nodes = {
        "base": ("CheckpointLoaderSimple", {"ckpt_name": "sd_xl_base_1.0.safetensors"}),
        "latent": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": EACH}),
        "": ("CLIPTextEncode", {"clip": ["base", 1], "text": ""}),
    }
    if lora:
        options = {"model": ["base", 0], "lora_name": f"{lora}.safetensors", "strength_model": 1.0}
        nodes["lora"] = ("LoraLoaderModelOnly", options)
    if prompted:
        nodes["vision"] = ("CLIPVisionLoader", {"clip_name": "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"})
        nodes["encoder"] = ("LookaheadLoadEncoder", {"encoder_name": "ip-adapter-plus-face_sdxl_vit-h.safetensors"})
        nodes["face"] = ("LoadImage", {"image": "face.png"})
        read = {"encoder": ["encoder", 0], "clip_vision": ["vision", 0], "image": ["face", 0]}
        nodes["reference"] = ("LookaheadEncodeReference", {**read, "size": 128, "several": "together"})
        applied = {"model": ["base", 0], "reference": ["reference", 0], "weight": 0.6, "start": 0.0, "end": 1.0}
        nodes["prompted"] = ("LookaheadApplyImagePrompt", applied)
    for style in DRAWN:
        text = f"a {style} of a face"
        text = style_lora.named(text) if named else text
        nodes[f"text {style}"] = ("CLIPTextEncode", {"clip": ["base", 1], "text": text})
        few = {"sampler_name": "lcm", "scheduler": "sgm_uniform"} if cfg == 1 else None
        how = few or {"sampler_name": "dpmpp_2m", "scheduler": "karras"}
        run = {"positive": [f"text {style}", 0], "negative": ["", 0], "latent_image": ["latent", 0]}
        run |= {"seed": 3, "denoise": 1.0}
        model = ["lora" if lora else "prompted" if prompted else "base", 0]
        nodes[f"run {style}"] = ("KSampler", {"model": model, "steps": steps, "cfg": cfg, **how, **run})
        nodes[f"decode {style}"] = ("VAEDecode", {"samples": [f"run {style}", 0], "vae": ["base", 2]})
        nodes[style] = ("SaveImage", {"images": [f"decode {style}", 0], "filename_prefix": "shipped"})
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def pictures_of(host, graph, savers):
    """What a graph's SaveImage nodes save, [n, 3, H, W] in [0, 1]; and no loader had anything to complain of."""
    result = host.run(graph).check()
    assert not [line for line in host.log.splitlines() if any(c in line for c in COMPLAINTS)]
    files = [image for saver in savers for image in result.outputs[saver]["images"]]
    folder = host.folder("output")
    pictures = [np.asarray(Image.open(folder / f["subfolder"] / f["filename"]).convert("RGB")) for f in files]
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 1) / 255


def draw(host, **options):
    """[styles x EACH, 3, 128, 128] in [0, 1]."""
    return pictures_of(host, graph(**options), DRAWN)


@pytest.fixture(scope="module")
def plain(server):
    """What the base draws by itself."""
    return draw(server)


def likeness(pictures, face):
    """How much each picture shows the person of an embedding, [n]."""
    recogniser, _ = evaluators()
    with torch.no_grad():
        return recogniser.embed(pictures) @ face


@pytest.mark.contract
def test_the_stock_loaders_offer_every_file_that_is_shipped_for_them(server):
    inputs = {
        "checkpoints": ("CheckpointLoaderSimple", "ckpt_name"),
        "clip_vision": ("CLIPVisionLoader", "clip_name"),
        "loras": ("LoraLoaderModelOnly", "lora_name"),
        "controlnet": ("ControlNetLoader", "control_net_name"),
    }
    for folder, (node, name) in inputs.items():
        kind, *options = server.object_info()[node]["input"]["required"][name]
        offered = kind if isinstance(kind, list) else options[0]["options"]
        shipped = [f.partition("/")[2] for f in MINI_MODELS if f.startswith(f"{folder}/") and not f.endswith(".json")]
        assert shipped and set(shipped) <= set(offered)


@pytest.mark.parametrize("lora", [None, *LORAS])
@pytest.mark.contract
def test_what_the_base_draws_with_and_without_few_step_loras_has_the_style_asked_for(server, plain, lora):
    """Of 8 pictures 6 must be of it (shipped: 98 in 100), and the scorer tells the two styles apart (measured: 4.2 to
    6.7 standard errors)."""
    _, scorer = evaluators()
    with torch.no_grad():
        logits = scorer(draw(server, lora=lora) if lora else plain)[0]
    asked = torch.tensor([STYLES.index(style) for style in DRAWN]).repeat_interleave(EACH)
    assert (logits.argmax(1) == asked).float().mean() >= 0.75
    contrast = logits[:, asked[0]] - logits[:, asked[-1]]  # how much more a photo than a comic
    assert standard_errors(contrast[:EACH] - contrast[EACH:]) > 2


def test_the_personal_lora_draws_its_person_and_the_base_does_not(server, plain):
    """On photos, as it was trained. Measured: 0.70 more alike, 8 standard errors."""
    recogniser, _ = evaluators()
    with torch.no_grad():
        person = torch.nn.functional.normalize(recogniser.embed(style_lora.shots()[0]).mean(0), dim=0)
    gains = (likeness(draw(server, lora="mini_style", named=True), person) - likeness(plain, person))[:EACH]
    assert gains.mean() > 0.2 and standard_errors(gains) > 3


@pytest.mark.contract
def test_the_image_encoder_and_the_adapter_draw_the_person_of_the_reference(server, plain):
    """Measured: 0.67 more alike, 10 standard errors."""
    recogniser, _ = evaluators()
    with torch.no_grad():
        face = recogniser.embed(reference_faces(1))[0]
    gains = likeness(draw(server, prompted=True), face) - likeness(plain, face)
    assert gains.mean() > 0.2 and standard_errors(gains) > 3


def foretold(host, faces, hints):
    """What the base predicts of faces in the middle of the noise with the ControlNet's hints, [n, 3, 128, 128]."""
    nodes = {
        "base": ("CheckpointLoaderSimple", {"ckpt_name": "sd_xl_base_1.0.safetensors"}),
        "net": ("ControlNetLoader", {"control_net_name": "controlnet-canny-sdxl-1.0.safetensors"}),
        "text": ("CLIPTextEncode", {"clip": ["base", 1], "text": "a photo of a face"}),
        "": ("CLIPTextEncode", {"clip": ["base", 1], "text": ""}),
    }
    both = {"positive": ["text", 0], "negative": ["", 0], "control_net": ["net", 0]}
    limits = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    how = {"steps": 2, "start_at_step": 1, "end_at_step": 2, "cfg": 1.0, "sampler_name": "euler"}
    how |= {"scheduler": "sgm_uniform", "add_noise": "enable", "return_with_leftover_noise": "disable"}
    for n, pictures in enumerate(zip(faces, hints, strict=True)):
        for name, picture in zip(("face", "edges"), pictures, strict=True):
            save(picture, host.folder("input") / f"{name}_{n}.png")
            nodes[f"{name} {n}"] = ("LoadImage", {"image": f"{name}_{n}.png"})
        nodes[f"latent {n}"] = ("VAEEncode", {"pixels": [f"face {n}", 0], "vae": ["base", 2]})
        nodes[f"control {n}"] = ("ControlNetApplyAdvanced", {**both, **limits, "image": [f"edges {n}", 0]})
        read = {"positive": [f"control {n}", 0], "negative": [f"control {n}", 1], "latent_image": [f"latent {n}", 0]}
        nodes[f"run {n}"] = ("KSamplerAdvanced", {"model": ["base", 0], "noise_seed": n, **how, **read})
        nodes[f"decode {n}"] = ("VAEDecode", {"samples": [f"run {n}", 0], "vae": ["base", 2]})
        nodes[f"foretold {n}"] = ("SaveImage", {"images": [f"decode {n}", 0], "filename_prefix": "foretold"})
    whole = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}
    return pictures_of(host, whole, [f"foretold {n}" for n in range(len(faces))])


def test_the_controlnet_foretells_the_face_whose_edges_it_is_given(server):
    """Sixteen faces, each beside the prediction from the same noise with the next one's edges. Measured: an error of
    0.116 beside 0.142, 6.8 standard errors."""
    faces = reference_faces(16)
    hints = edges(faces)
    right, wrong = (
        (foretold(server, faces, given) - faces).square().mean((1, 2, 3)).sqrt() for given in (hints, hints.roll(1, 0))
    )
    assert standard_errors(wrong - right) > 3
