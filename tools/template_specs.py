"""What is in the workflow files, apps and blueprints; `templates` writes them.

Values are those of the nodes, but where measurements say better: the image prompt at 0.75 and the KV injection up to
0.4 of the sampling (docs/knobs.md: likeness 0.585 and 0.609 with style 0.85 and 1.00, against 0.608 and 0.78 at 1), KV
alone up to 0.6. Prompts are written for SDXL.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence

from .common import ROOT
from .template_graph import Node, Subgraph, Template

PACK = "lcm-lookahead"  # the name in the registry
ADDRESS: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
NOTES = ("MarkdownNote", "Note")
FOLDED = Node("", height=0)  # where a subgraph stands in a column
SAMPLER_ROOM = 350  # units that stay free under a sampler, which grows by its live preview

HUB = "https://huggingface.co"
BASE, ENCODER = "sd_xl_base_1.0.safetensors", "ip-adapter-plus-face_sdxl_vit-h.safetensors"
VISION, CLIP = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors", "clip-vit-large-patch14.safetensors"
LORA, CONTROLNET, TAESD = "lcm-lora-sdxl.safetensors", "controlnet-canny-sdxl-1.0.safetensors", "taesdxl"
FACES, VGG, FACE_ID = "buffalo_l", "vgg16-397923af.pth", "ip-adapter-faceid-plusv2_sdxl.bin"
#: Files that one makes oneself: of a training, and saved by another workflow
CONCEPT_ENCODER, NOISE_GUIDE, CONCEPT = (
    "concept_encoder.safetensors",
    "noise_guide.safetensors",
    "my_concept.safetensors",
)
OWN_FILES = (CONCEPT_ENCODER, NOISE_GUIDE, CONCEPT)


def model(name: str, url: str, folder: str, sha256: str = "") -> dict[str, str]:
    """A model file as the page knows it: it offers those that are missing for download."""
    known = {"hash": sha256, "hash_type": "SHA256"} if sha256 else {}
    return {"name": name, "url": url, "directory": folder, **known}


#: The value of a widget -> the files behind it. Addresses and hashes are the publishers'.
MODELS: dict[str, list[dict[str, str]]] = {
    BASE: [
        model(
            BASE,
            f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/{BASE}",
            "checkpoints",
            "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b",
        )
    ],
    ENCODER: [
        model(
            ENCODER,
            f"{HUB}/h94/IP-Adapter/resolve/main/sdxl_models/{ENCODER}",
            "ipadapter",
            "677ad8860204f7d0bfba12d29e6c31ded9beefdf3e4bbd102518357d31a292c1",
        )
    ],
    VISION: [
        model(
            VISION,
            f"{HUB}/h94/IP-Adapter/resolve/main/models/image_encoder/model.safetensors",
            "clip_vision",
            "6ca9667da1ca9e0b0f75e46bb030f7e011f44f86cbfb8d5a36590fcd7507b030",
        )
    ],
    FACE_ID: [model(FACE_ID, f"{HUB}/h94/IP-Adapter-FaceID/resolve/main/{FACE_ID}", "ipadapter")],
    CLIP: [model(CLIP, f"{HUB}/openai/clip-vit-large-patch14/resolve/main/model.safetensors", "clip_vision")],
    LORA: [
        model(LORA, f"{HUB}/latent-consistency/lcm-lora-sdxl/resolve/main/pytorch_lora_weights.safetensors", "loras")
    ],
    CONTROLNET: [
        model(
            CONTROLNET,
            f"{HUB}/diffusers/controlnet-canny-sdxl-1.0/resolve/main/diffusion_pytorch_model.fp16.safetensors",
            "controlnet",
        )
    ],
    TAESD: [
        model(
            f"taesdxl_{half}.safetensors",
            f"{HUB}/madebyollin/taesdxl/resolve/main/taesdxl_{half}.safetensors",
            "vae_approx",
        )
        for half in ("encoder", "decoder")
    ],
    FACES: [
        model(
            "buffalo_l.zip",
            "https://github.com/deepinsight/insightface/releases/download/v0.7/buffalo_l.zip",
            "insightface/models",
        )
    ],
    "vgg": [
        model(
            VGG,
            f"https://download.pytorch.org/models/{VGG}",
            "lookahead_losses",
            "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        )
    ],
}

_FILES = {  # a line each in the notes
    BASE: f"**models/checkpoints**: [{BASE}]({MODELS[BASE][0]['url']})",
    ENCODER: f"**models/ipadapter** (or lookahead): [{ENCODER}]({MODELS[ENCODER][0]['url']})",
    VISION: f"**models/clip_vision**: [model.safetensors]({MODELS[VISION][0]['url']}) of h94/IP-Adapter, renamed to "
    f"{VISION}",
    LORA: f"**models/loras**: [pytorch_lora_weights.safetensors]({MODELS[LORA][0]['url']}), renamed to {LORA}",
    TAESD: f"**models/vae_approx**: taesdxl [encoder]({MODELS[TAESD][0]['url']}) and "
    f"[decoder]({MODELS[TAESD][1]['url']})",
    CLIP: f"**models/clip_vision**: [model.safetensors]({MODELS[CLIP][0]['url']}), renamed to {CLIP}",
    CONTROLNET: f"**models/controlnet**: [diffusion_pytorch_model.fp16.safetensors]({MODELS[CONTROLNET][0]['url']}), "
    f"renamed to {CONTROLNET}",
    FACE_ID: f"**models/ipadapter**: [{FACE_ID}]({MODELS[FACE_ID][0]['url']}) (for research only)",
    VGG: f"**models/lookahead_losses**: [{VGG}]({MODELS['vgg'][0]['url']}), and `pip install lpips`",
    FACES: f"**models/insightface/models/** a face pack: [AuraFace]({HUB}/fal/AuraFace-v1) (free to use), "
    f"or [buffalo_l]({MODELS[FACES][0]['url']}) (for research only), and `pip install insightface onnxruntime`",
}
_FILES |= {
    CONCEPT_ENCODER: f"**models/lookahead**: {CONCEPT_ENCODER}, which you train with `lookahead concept train` "
    f"([how]({ADDRESS}/blob/main/docs/concept.md)); nobody has released one for SDXL yet",
    CONCEPT: f"**models/lookahead_concepts**: {CONCEPT}, which *Anything from one picture* saves; or one that you were "
    "given",
    NOISE_GUIDE: f"**models/lookahead**: {NOISE_GUIDE}, which you train with `lookahead guide train` "
    f"([how]({ADDRESS}/blob/main/docs/noise_guide.md)); nobody has released one for SDXL yet",
}
ADAPTER = (BASE, ENCODER, VISION)
NULL_TEXT = (
    "The **negative prompt** may stay empty; zeros behind it (*ConditioningZeroOut*), as the paper has it, made no "
    f"difference ([measured]({ADDRESS}/blob/main/docs/null_text.md))"
)
RECOGNISER = "for the recogniser of the pack also `pip install onnx` and `pip install --no-deps onnx2torch`"
GUIDED = (
    "Looking ahead costs about as much as 65 evaluations more (a plain run has 60), and at 1024x1024 up to 5.8 GB "
    "beside the weights; inside of the node, **gradient through the network** off takes a third of that, and much less "
    "memory. To compare, choose **off** as **preset**: the seed stays. **as set below** are the numbers inside of the "
    "node; **instant** to **quick** are for likeness."
)
BY_PRESET = (
    "**balanced** costs about as much as 21 evaluations more (a plain run has 60), and at 1024x1024 up to 5.8 GB "
    "beside the weights; **quick** costs 10, and much less memory, **instant** one. **strong** and **gentle** do more "
    "and less. To compare, choose **off**: the seed stays. **as set below** are the numbers inside of the node."
)


def note(text: str, files: Sequence[str], *tips: str, height: float = 300) -> Node:
    """The note of a workflow: first what it needs, then what to do and the files."""
    lines = [f"Needs the node pack [LCM-Lookahead]({ADDRESS}).", "", text, ""]
    lines += [f"- {tip}" for tip in tips]
    lines += ["", "Files, if the page says that some are missing:", "", *(f"- {_FILES[file]}" for file in files)]
    return Node("MarkdownNote", "How to use this", {"text": "\n".join(lines)}, height=height)


CHECKPOINT = Node("CheckpointLoaderSimple", values={"ckpt_name": BASE})
LOAD_ENCODER = Node("LookaheadLoadEncoder", values={"encoder_name": ENCODER}, height=190)  # room for its provenance
LOAD_VISION = Node("CLIPVisionLoader", values={"clip_name": VISION})
NEGATIVE = Node("CLIPTextEncode", "Negative prompt", {"text": ""}, {"clip": "checkpoint.CLIP"}, height=90, colour="bad")
LATENT = Node("EmptyLatentImage", values={"width": 1024, "height": 1024, "batch_size": 1})
WIDE = Node("EmptyLatentImage", values={"width": 1216, "height": 832, "batch_size": 1})
DECODE = Node("VAEDecode", links={"samples": "sampler", "vae": "checkpoint.VAE"})


def picture(file: str, title: str, height: float = 360) -> Node:
    """A Load Image that names an example picture of the pack (`workflows/input`, copied into the host's input)."""
    return Node("LoadImage", title, {"image": f"lookahead_{file}"}, height=height)


def prompt(text: str, title: str = "Prompt") -> Node:
    """The prompt."""
    return Node("CLIPTextEncode", title, {"text": text}, {"clip": "checkpoint.CLIP"}, height=130, colour="good")


def save(name: str, images: str = "decode", height: float = 400) -> Node:
    """Save Image into the folder `lookahead`."""
    return Node("SaveImage", values={"filename_prefix": f"lookahead/{name}"}, links={"images": images}, height=height)


def ksampler(
    source: str,
    seed: str = "fixed",
    latent: str = "latent",
    denoise: float = 1.0,
    below: float = SAMPLER_ROOM,
    positive: str = "prompt",
) -> Node:
    """KSampler as SDXL likes it."""
    values = {"seed": 1, "control_after_generate": seed, "steps": 30, "cfg": 5, "sampler_name": "dpmpp_2m"}
    links = {"model": source, "positive": positive, "negative": "negative", "latent_image": latent}
    return Node("KSampler", values={**values, "scheduler": "karras", "denoise": denoise}, links=links, below=below)


def custom_sampler(
    guider: str, model_: str, sampler: str, steps: int = 30, scheduler: str = "karras"
) -> dict[str, Node]:
    """The four nodes around SamplerCustomAdvanced."""
    parts = {"noise": "noise", "guider": guider, "sampler": sampler, "sigmas": "sigmas", "latent_image": "latent"}
    return {
        "noise": Node("RandomNoise", values={"noise_seed": 1, "control_after_generate": "fixed"}),
        "sigmas": Node(
            "BasicScheduler", values={"scheduler": scheduler, "steps": steps, "denoise": 1}, links={"model": model_}
        ),
        "sampler": Node("SamplerCustomAdvanced", links=parts, below=SAMPLER_ROOM),
    }


# -- blueprints: what a part of a graph does, in one node

FACE, FACE_KV, TWO, AHEAD = (
    "Face under a new prompt (Lookahead)",
    "Face with KV injection (Lookahead)",
    "Two people (Lookahead)",
    "Look ahead (Lookahead)",
)


def face_nodes(image: str, model_: str = "checkpoint", weight: float = 0.75) -> dict[str, Node]:
    """Encoder, image encoder, reference, image prompt."""
    parts = {"encoder": "encoder", "clip_vision": "vision"} | ({"image": image} if image else {})
    applied = {"reference": "reference"} | ({"model": model_} if model_ else {})
    return {
        "encoder": LOAD_ENCODER,
        "vision": LOAD_VISION,
        "reference": Node("LookaheadEncodeReference", links=parts),
        "face": Node("LookaheadApplyImagePrompt", values={"weight": weight, "start": 0, "end": 1}, links=applied),
    }


FACE_PART = Subgraph(
    FACE,
    "Draws the person in a picture under your prompt (image prompt): between the checkpoint and the sampler.",
    ("encoder", "vision", "reference", "face"),
    {"model": [("face", "model")], "image": [("reference", "image")]},
    {
        "weight": ("face", "weight"),  # no preset: outside of the node the numbers would not follow it
        "start": ("face", "start"),
        "end": ("face", "end"),
        "encoder_name": ("encoder", "encoder_name"),
        "clip_name": ("vision", "clip_name"),
    },
    {"model": "face"},
)


def kv_node(model_: str, end: float) -> Node:
    """KV injection; the widgets keep the node's own values."""
    links = {"reference": "reference"} | ({"model": model_} if model_ else {})
    values = {"weight": 1, "start": 0, "end": end}
    return Node("LookaheadApplyKVInjection", values=values, links=links, height=430)  # it says more after a run


def face_kv_nodes() -> dict[str, Node]:
    """Makes the graph of `face_nodes` with KV injection."""
    return {**face_nodes("", ""), "kv": kv_node("face", 0.4)}


FACE_KV_PART = Subgraph(
    FACE_KV,
    "Draws the person in a picture under your prompt, with more of the picture's look (image prompt and KV injection): "
    "between the checkpoint and the guider.",
    ("encoder", "vision", "reference", "face", "kv"),
    {
        "model": [("face", "model")],
        "clip": [("reference", "clip")],
        "vae": [("reference", "vae")],
        "image": [("reference", "image")],
    },
    {
        "weight": ("face", "weight"),
        "kv_weight": ("kv", "weight"),
        "kv_end": ("kv", "end"),
        "encoder_name": ("encoder", "encoder_name"),
        "clip_name": ("vision", "clip_name"),
    },
    {"model": "kv"},
)


def two_nodes(first: str = "", second: str = "", model_: str = "") -> dict[str, Node]:
    """Two references, each in its half of the picture."""
    one, other = ({"image": image} if image else {} for image in (first, second))
    both = {"encoder": "encoder", "clip_vision": "vision"}
    values = {"weight": 0.75, "start": 0, "end": 1}
    return {
        "encoder": LOAD_ENCODER,
        "vision": LOAD_VISION,
        "places": Node("LookaheadPlaceMasks", values={"overlap": 0.1}),
        "reference 1": Node("LookaheadEncodeReference", "Reference on the left", links=both | one),
        "reference 2": Node("LookaheadEncodeReference", "Reference on the right", links=both | other),
        "apply 1": Node(
            "LookaheadApplyImagePrompt",
            values=values,
            links={"reference": "reference 1", "mask": "places.mask_1"} | ({"model": model_} if model_ else {}),
        ),
        "apply 2": Node(
            "LookaheadApplyImagePrompt",
            values=values,
            links={"model": "apply 1", "reference": "reference 2", "mask": "places.mask_2"},
        ),
    }


TWO_PART = Subgraph(
    TWO,
    "Draws two people under one prompt, each in its half of the picture: between the checkpoint and the sampler.",
    tuple(two_nodes()),
    {
        "model": [("apply 1", "model")],
        "left": [("reference 1", "image")],
        "right": [("reference 2", "image")],
    },
    {
        "overlap": ("places", "overlap"),
        "left_weight": ("apply 1", "weight"),
        "right_weight": ("apply 2", "weight"),
        "encoder_name": ("encoder", "encoder_name"),
        "clip_name": ("vision", "clip_name"),
    },
    {"model": "apply 2"},
)


def ahead_nodes(model_: str = "", loss: str = "", preset: str = "as set below") -> dict[str, Node]:
    """Few-step LoRA, preview VAE, shortcut and guided sampler; but for the preset the widgets keep the nodes' own
    values."""
    steered = {"sampler": "chosen", "shortcut": "shortcut"} | ({"loss": loss} if loss else {})
    return {
        "lora": Node(
            "LoraLoaderModelOnly",
            "Few-step LoRA",
            {"lora_name": LORA, "strength_model": 1},
            {"model": model_} if model_ else {},
        ),
        "preview vae": Node("VAELoader", "Preview VAE", {"vae_name": TAESD}),
        "shortcut": Node("LookaheadShortcut", links={"model": "lora", "vae": "preview vae"}),
        "chosen": Node("KSamplerSelect", values={"sampler_name": "dpmpp_2m"}),
        "ahead": Node("LookaheadGuidanceSampler", values={"preset": preset}, links=steered),
    }


AHEAD_PART = Subgraph(
    AHEAD,
    "A sampler that looks ahead: at an early step it foretells the picture in one step, and moves the noise until a "
    "Lookahead loss is pleased. For SamplerCustomAdvanced.",
    ("lora", "preview vae", "shortcut", "chosen", "ahead"),
    {"model": [("lora", "model")], "loss": [("ahead", "loss")]},
    {
        "preset": ("ahead", "preset"),
        "lora_name": ("lora", "lora_name"),
        "vae_name": ("preview vae", "vae_name"),
    },
    {"sampler": "ahead.sampler", "report": "ahead.report"},
)

BLUEPRINTS = (
    Template(face_nodes("", ""), (), (FACE_PART,)),
    Template(face_kv_nodes(), (), (FACE_KV_PART,)),
    Template(two_nodes(), (), (TWO_PART,)),
    Template(ahead_nodes(), (), (AHEAD_PART,)),
)


# -- words and nodes that several workflows have

PAINTING = "oil painting, portrait of a person in a red coat, autumn park, visible brush strokes"
PHOTO = "photo, portrait of a person on a beach at sunset, wind in the hair, 85 mm lens"
TWO_FRIENDS = "photo, two friends side by side in a cafe, half length, warm light"
WEIGHT = (
    "**weight**: 0.75 to begin with; 1 for more likeness, 0.5 to leave the prompt more room "
    f"([measured]({ADDRESS}/blob/main/docs/reference_presets.md))"
)
OWN = "Choose **your own picture** in *Reference face*: one face, cropped to a square"
FACE_TIPS = (OWN, WEIGHT, "**start** later than 0 keeps the prompt's composition")
PLAIN = {"checkpoint": CHECKPOINT, "negative": NEGATIVE, "latent": LATENT, "decode": DECODE}
