"""The workflow files by their names, which are what the page shows in its list of templates."""

from __future__ import annotations

from .template_graph import Graph, Node
from .template_specs import (
    ADAPTER,
    AHEAD,
    AHEAD_PART,
    BASE,
    CHECKPOINT,
    CLIP,
    CONTROLNET,
    DECODE,
    ENCODER,
    FACE,
    FACE_PART,
    FACES,
    GUIDED,
    LATENT,
    LORA,
    NEGATIVE,
    RECOGNISER,
    SAMPLER_ROOM,
    TAESD,
    TWO,
    TWO_PART,
    VGG,
    VISION,
    ahead_nodes,
    custom_sampler,
    face_nodes,
    ksampler,
    kv_node,
    note,
    picture,
    prompt,
    save,
    two_nodes,
)

PAINTING = "oil painting, portrait of a person in a red coat, autumn park, visible brush strokes"
PHOTO = "photo, portrait of a person on a beach at sunset, wind in the hair, 85 mm lens"
WEIGHT = "**weight**: 0.75 to begin with; 1 for more likeness, 0.5 to leave the prompt more room ([measured]({0}/blob/main/docs/knobs.md))"
OWN = "Choose **your own picture** in *Reference face*: one face, cropped to a square"


def measured(text: str) -> str:
    """A tip with the address of the figures behind it."""
    from .template_specs import ADDRESS

    return text.format(ADDRESS)


FACE_TIPS = (OWN, measured(WEIGHT), "**start** later than 0 keeps the prompt's composition")
PLAIN = {"checkpoint": CHECKPOINT, "negative": NEGATIVE, "latent": LATENT, "decode": DECODE}


def guided(name: str, loss: dict[str, Node], source: str, more: dict[str, Node], text: str, how: Node) -> dict[str, Node]:
    """What the guided workflows share: the graph around the loss (the node `loss`), drawn by the model of `source`."""
    return {
        **PLAIN,
        **more,
        **loss,
        **ahead_nodes("checkpoint", "loss"),
        "prompt": prompt(text),
        "guider": Node("CFGGuider", values={"cfg": 5}, links={"model": source, "positive": "prompt", "negative": "negative"}),
        **custom_sampler("guider", source, "ahead.sampler"),
        "save": save(name, height=300),
        "report": Node("LookaheadGuidanceReport", links={"latent": "sampler", "report": "ahead.report"}, height=200),
        "curve": Node("PreviewImage", "Loss over the iterations", links={"images": "report"}, height=220),
        "previews": Node("PreviewImage", "Previews before and after", links={"images": "report.previews"}, height=220),
        "note": how,
    }


def guided_columns(left: list[str], middle: list[str]) -> list[tuple[float, list[str]]]:
    """Five columns: what is drawn, what is wanted, how, the run, what came of it."""
    return [
        (320, left),
        (320, middle),
        (320, [AHEAD, "guider", "sigmas", "noise", "latent"]),
        (320, ["decode", "report", "sampler"]),
        (400, ["save", "curve", "previews"]),
    ]


WORKFLOWS: dict[str, Graph] = {
    "01 Face under a new prompt": Graph(
        {
            **PLAIN,
            **face_nodes("picture"),
            "picture": picture("face_1.jpg", "Reference face"),
            "prompt": prompt(PAINTING),
            "sampler": ksampler("face", "randomize"),
            "save": save("face"),
            "note": note("The blue node draws the person of **Reference face** under your prompt.", ADAPTER, *FACE_TIPS),
        },
        [
            (360, ["checkpoint", "picture", "note"]),
            (380, [FACE, "prompt", "negative", "latent"]),
            (340, ["sampler"]),
            (440, ["decode", "save"]),
        ],
        (FACE_PART,),
        [("picture", "image"), ("prompt", "text"), (FACE, "weight"), ("sampler", "seed")],
        ["save"],
        app=True,
    ),
    "02 Face with more of its look (KV)": Graph(
        {
            **PLAIN,
            **face_nodes("picture"),
            "reference": Node(
                "LookaheadEncodeReference",
                links={
                    "image": "picture",
                    "encoder": "encoder",
                    "clip_vision": "vision",
                    "vae": "checkpoint.VAE",
                    "clip": "checkpoint.CLIP",
                },
            ),
            "kv": kv_node("face", 0.4),
            "picture": picture("face_1.jpg", "Reference face"),
            "prompt": prompt(PAINTING),
            "guider": Node(
                "LookaheadGuider", links={"model": "kv", "positive": "prompt", "negative": "negative"}
            ),
            "chosen": Node("KSamplerSelect", values={"sampler_name": "dpmpp_2m"}),
            **custom_sampler("guider", "checkpoint", "chosen"),
            "save": save("face_kv"),
            "note": note(
                "The image prompt says who it is, the KV injection brings in the detail of the reference, and the "
                "Lookahead Guider weighs them.",
                ADAPTER,
                OWN,
                "**end** of the KV injection: 0.4 keeps the prompt's style at the same likeness; 1 also brings in "
                "clothes, light and style of the reference",
                "**text**, **full**, **kv**: raise text for the prompt's style, full for likeness",
                "**cache_gb**: 11 keeps all 12 steps, and the next run with this reference and seed is quicker",
            ),
        },
        [
            (320, ["checkpoint", "encoder", "vision", "picture"]),
            (320, ["prompt", "negative", "reference", "latent"]),
            (320, ["face", "kv", "guider"]),
            (320, ["noise", "chosen", "sigmas", "sampler"]),
            (400, ["note", "decode", "save"]),
        ],
        asks=[("picture", "image"), ("prompt", "text"), ("face", "weight"), ("kv", "end"), ("noise", "noise_seed")],
        shows=["save"],
        app=True,
    ),
    "03 Face by KV alone (checkpoint only)": Graph(
        {
            **PLAIN,
            "picture": picture("face_1.jpg", "Reference face"),
            "reference": Node(
                "LookaheadEncodeReference",
                links={"image": "picture", "vae": "checkpoint.VAE", "clip": "checkpoint.CLIP"},
            ),
            "kv": kv_node("checkpoint", 0.6),
            "prompt": prompt(PAINTING),
            "guider": Node("LookaheadGuider", links={"model": "kv", "positive": "prompt", "negative": "negative"}),
            "chosen": Node("KSamplerSelect", values={"sampler_name": "dpmpp_2m"}),
            **custom_sampler("guider", "checkpoint", "chosen"),
            "save": save("face_kv_alone"),
            "note": note(
                "The reference runs through the same SDXL model beside the picture, whose self-attention reads what "
                "the model sees there. No further file is needed.",
                (BASE,),
                OWN,
                "**end**: 0.6 to begin with; later for more of the reference, earlier for the prompt's style",
                "**start**: later leaves the layout to the prompt",
                "Things and pets work as well as faces",
            ),
        },
        [
            (320, ["checkpoint", "picture", "note"]),
            (320, ["prompt", "negative", "reference", "latent"]),
            (320, ["kv", "guider"]),
            (320, ["noise", "chosen", "sigmas", "sampler"]),
            (400, ["decode", "save"]),
        ],
        asks=[("picture", "image"), ("prompt", "text"), ("kv", "end"), ("noise", "noise_seed")],
        shows=["save"],
    ),
    "04 Two people in one picture": Graph(
        {
            **PLAIN,
            **two_nodes("first", "second", "checkpoint"),
            "first": picture("face_1.jpg", "Person on the left", 300),
            "second": picture("face_2.jpg", "Person on the right", 300),
            "prompt": prompt("photo, two friends side by side in a cafe, half length, warm light"),
            "latent": Node("EmptyLatentImage", values={"width": 1216, "height": 832, "batch_size": 1}),
            "sampler": ksampler("apply 2", "randomize"),
            "save": save("two_people"),
            "note": note(
                "Each person acts in its half of the picture: the masks are made inside of the blue node.",
                ADAPTER,
                "Say in the prompt that there are **two** people side by side",
                "Other halves: open the blue node and draw masks of your own",
            ),
        },
        [
            (340, ["checkpoint", "first", "second"]),
            (380, [TWO, "prompt", "negative", "latent"]),
            (340, ["sampler"]),
            (460, ["decode", "save", "note"]),
        ],
        (TWO_PART,),
        [("first", "image"), ("second", "image"), ("prompt", "text"), (TWO, "left_weight"), (TWO, "right_weight")],
        ["save"],
        app=True,
    ),
    "05 A face out of a group photo": Graph(
        {
            **PLAIN,
            **face_nodes("crop.face"),
            "picture": picture("group.jpg", "Group photo", 320),
            "faces": Node("LookaheadLoadFaceAnalysis", values={"pack_name": FACES, "device": "cpu"}, height=180),
            "crop": Node("LookaheadCropFace", links={"face_analysis": "faces", "image": "picture"}),
            "found": Node("PreviewImage", "Faces that were found", links={"images": "crop.preview"}, height=300),
            "prompt": prompt(PHOTO),
            "sampler": ksampler("face"),
            "save": save("face_of_a_group"),
            "note": note(
                "*Crop Lookahead Face* numbers the faces (see the preview) and cuts one out: choose it with **face**.",
                (*ADAPTER, FACES),
                "**margin**: 0.3 shows the hair as well",
                "No face found: lower **threshold**, or add a smaller number to **detection_sizes**",
            ),
        },
        [
            (320, ["checkpoint", "picture", "faces"]),
            (320, ["crop", "found"]),
            (360, [FACE, "prompt", "negative", "latent"]),
            (280, ["sampler"]),
            (400, ["note", "decode", "save"]),
        ],
        (FACE_PART,),
        [("picture", "image"), ("crop", "face"), ("prompt", "text"), (FACE, "weight")],
        ["found", "save"],
    ),
    "06 Several photos of one person": Graph(
        {
            **PLAIN,
            **face_nodes("all three"),
            "one": picture("face_1.jpg", "Photo 1", 290),
            "two": picture("face_1b.jpg", "Photo 2", 290),
            "three": picture("face_1c.jpg", "Photo 3", 290),
            "first two": Node("ImageBatch", links={"image1": "one", "image2": "two"}),
            "all three": Node("ImageBatch", links={"image1": "first two", "image2": "three"}),
            "prompt": prompt(PAINTING),
            "sampler": ksampler("face"),
            "save": save("several_photos"),
            "note": note(
                "Three photos speak together: what they share (the person) wins over light and expression of one.",
                ADAPTER,
                "All photos: cropped to the face, of one size (others are scaled to the first)",
                "Inside of the blue node **several** of *Encode Lookahead Reference* can average them instead",
            ),
        },
        [
            (320, ["one", "two", "three"]),
            (320, ["checkpoint", "first two", "all three", "note"]),
            (360, [FACE, "prompt", "negative", "latent"]),
            (280, ["sampler"]),
            (400, ["decode", "save"]),
        ],
        (FACE_PART,),
        [("one", "image"), ("two", "image"), ("three", "image"), ("prompt", "text"), (FACE, "weight")],
        ["save"],
    ),
    "07 Face in the lines of a pose (ControlNet, 8 steps)": Graph(
        {
            **PLAIN,
            "lora": Node(
                "LoraLoaderModelOnly", values={"lora_name": LORA, "strength_model": 1}, links={"model": "checkpoint"}
            ),
            "picture": picture("face_1.jpg", "Reference face", 330),
            "pose": picture("face_2.jpg", "Picture to follow", 330),
            "lines": Node("Canny", values={"low_threshold": 0.2, "high_threshold": 0.4}, links={"image": "pose"}),
            "controlnet": Node("ControlNetLoader", values={"control_net_name": CONTROLNET}),
            "control": Node(
                "ControlNetApplyAdvanced",
                values={"strength": 0.6, "start_percent": 0, "end_percent": 0.7},
                links={"positive": "prompt", "negative": "negative", "control_net": "controlnet", "image": "lines"},
            ),
            "reference": Node(
                "LookaheadEncodeReference",
                links={"image": "picture", "vae": "checkpoint.VAE", "clip": "checkpoint.CLIP"},
            ),
            "kv": kv_node("lora", 1.0),
            "prompt": prompt(PHOTO),
            "guider": Node(
                "LookaheadGuider",
                values={"text": 0.7, "full": 0.5, "kv": 0.5},
                links={"model": "kv", "positive": "control.positive", "negative": "control.negative"},
            ),
            "chosen": Node("KSamplerSelect", values={"sampler_name": "lcm"}),
            **custom_sampler("guider", "lora", "chosen", 8, "sgm_uniform"),
            "save": save("face_in_a_pose"),
            "note": note(
                "The face comes from **Reference face** by KV injection, the lines from **Picture to follow** by a "
                "ControlNet, and the LCM-LoRA makes eight steps enough.",
                (BASE, LORA, CONTROLNET),
                "**Lookahead Guider**: with a few-step LoRA text and full stay between 1 and 1.5 together",
                "**strength**, **end_percent**: lower, to leave more of the shape to the reference",
                height=280,
            ),
        },
        [
            (320, ["checkpoint", "lora", "picture", "controlnet"]),
            (320, ["prompt", "negative", "pose", "lines", "latent"]),
            (320, ["reference", "kv", "control", "guider"]),
            (320, ["noise", "chosen", "sigmas", "sampler"]),
            (400, ["note", "decode", "save"]),
        ],
        asks=[("picture", "image"), ("pose", "image"), ("prompt", "text"), ("control", "strength")],
        shows=["save"],
    ),
    "08 Look ahead for likeness (identity)": Graph(
        guided(
            "ahead_identity",
            {
                "faces": Node("LookaheadLoadFaceAnalysis", values={"pack_name": FACES, "device": "cpu"}, height=180),
                "loss": Node("LookaheadIdentityLoss", links={"face_analysis": "faces", "image": "picture"}),
            },
            "face",
            {**face_nodes("picture", weight=0.6), "picture": picture("face_1.jpg", "Reference face", 330)},
            PHOTO,
            note(
                "The image prompt says roughly who it is. At an early step the sampler looks ahead, finds the face, and "
                "moves the noise until a face recogniser knows the person of **Reference face**.",
                (*ADAPTER, LORA, TAESD, FACES),
                GUIDED,
                RECOGNISER,
                height=540,
            ),
        ),
        guided_columns(
            ["checkpoint", "picture", "note"],
            [FACE, "prompt", "negative", "faces", "loss"],
        ),
        (FACE_PART, AHEAD_PART),
        [("picture", "image"), ("prompt", "text"), (FACE, "weight"), (AHEAD, "iterations"), ("noise", "noise_seed")],
        ["save"],
    ),
    "09 Look ahead for a look (CLIP)": Graph(
        guided(
            "ahead_look",
            {"loss": Node("LookaheadCLIPLoss", values={"clip_name": CLIP}, links={"image": "picture"}, height=300)},
            "checkpoint",
            {"picture": picture("look.jpg", "Reference look", 330)},
            "a lighthouse on a cliff, evening",
            note(
                "At an early step the sampler looks ahead, and moves the noise until CLIP sees the look of **Reference "
                "look** in what is to come. The prompt stays what it is.",
                (BASE, LORA, TAESD, CLIP),
                "By words: write them into **text** of the CLIP loss (*an oil painting*), and unlink the picture or "
                "keep both",
                GUIDED,
                height=480,
            ),
        ),
        guided_columns(["checkpoint", "picture", "note"], ["prompt", "negative", "loss"]),
        (AHEAD_PART,),
        [("picture", "image"), ("prompt", "text"), (AHEAD, "iterations"), ("noise", "noise_seed")],
        ["save"],
    ),
    "10 Look ahead for a layout (LPIPS and L1)": Graph(
        guided(
            "ahead_layout",
            {
                "shapes": Node("LookaheadLPIPSLoss", links={"image": "picture"}),
                "colours": Node("LookaheadL1Loss", links={"image": "picture"}),
                "loss": Node(
                    "LookaheadCombineLosses",
                    values={"weight_a": 1, "weight_b": 0.5},
                    links={"loss_a": "shapes", "loss_b": "colours"},
                ),
            },
            "checkpoint",
            {"picture": picture("face_2.jpg", "Reference layout", 330)},
            "watercolour, portrait of a robot in a garden",
            note(
                "At an early step the sampler looks ahead, and moves the noise until shapes (LPIPS) and rough colours "
                "(L1) lie where they lie in **Reference layout**. Style and content are the prompt's.",
                (BASE, LORA, TAESD, VGG),
                "Colours alone need no further file: give *L1* to the blue node without *Combine*",
                GUIDED,
                height=480,
            ),
        ),
        guided_columns(["checkpoint", "picture", "note"], ["prompt", "negative", "shapes", "colours", "loss"]),
        (AHEAD_PART,),
        [("picture", "image"), ("prompt", "text"), (AHEAD, "iterations"), ("noise", "noise_seed")],
        ["save"],
    ),
    "11 How well one step foretells (preview grid)": Graph(
        {
            **{name: PLAIN[name] for name in ("checkpoint", "negative", "latent")},
            **{name: node for name, node in ahead_nodes("checkpoint").items() if name not in ("ahead", "chosen")},
            "prompt": prompt(PHOTO),
            "grid": Node(
                "LookaheadPreviewGrid",
                values={
                    "seed": 1,
                    "control_after_generate": "fixed",
                    "steps": 30,
                    "cfg": 5,
                    "sampler_name": "dpmpp_2m",
                    "scheduler": "karras",
                },
                links={
                    "model": "checkpoint",
                    "shortcut": "shortcut",
                    "positive": "prompt",
                    "negative": "negative",
                    "latent_image": "latent",
                },
            ),
            "save": save("preview_grid", "grid", 340),
            "numbers": Node("PreviewAny", "Numbers", links={"source": "grid.text"}, height=240),
            "note": note(
                "Upper row: what the few-step LoRA foretells in one step; lower row: what the model itself foretells, "
                "at the parts of the run in **fractions**; at the right the finished picture. The more alike the upper "
                "row is to it, the better it can be steered by.",
                (BASE, LORA, TAESD),
                "Connect a **loss** as well, and it is measured on every preview",
            ),
        },
        [
            (320, ["checkpoint", "lora", "preview vae", "latent"]),
            (360, ["prompt", "negative", "shortcut", "note"]),
            (320, ["grid"]),
            (740, ["save", "numbers"]),
        ],
        asks=[("prompt", "text"), ("grid", "seed")],
        shows=["save", "numbers"],
    ),
    "12 Before and after": Graph(
        {
            **PLAIN,
            **face_nodes("picture"),
            "picture": picture("face_1.jpg", "Reference face"),
            "prompt": prompt(PAINTING),
            "plain": ksampler("checkpoint"),
            "sampler": ksampler("face"),
            "decode plain": Node("VAEDecode", links={"samples": "plain", "vae": "checkpoint.VAE"}),
            "side by side": Node(
                "ImageStitch",
                values={"direction": "right", "match_image_size": True, "spacing_width": 16},
                links={"image1": "decode plain", "image2": "decode"},
            ),
            "save": save("before_and_after", "side by side", 380),
            "note": note(
                "The same prompt and seed without (left) and with (right) the reference.",
                ADAPTER,
                "Change a seed in both samplers alike",
                measured(WEIGHT),
            ),
        },
        [
            (340, ["checkpoint", "picture", "note"]),
            (360, [FACE, "prompt", "negative", "latent"]),
            (280, ["plain"]),
            (280, ["sampler"]),
            (440, ["decode plain", "decode", "side by side", "save"]),
        ],
        (FACE_PART,),
        [("picture", "image"), ("prompt", "text"), (FACE, "weight")],
        ["save"],
    ),
    "13 Paint a face into a picture (inpaint)": Graph(
        {
            **PLAIN,
            **face_nodes("picture"),
            "picture": picture("face_1.jpg", "Reference face", 320),
            "scene": picture("scene.webp", "Picture with a mask", 320),
            "scaled": Node(
                "ImageScale",
                "Size of the picture",
                {"upscale_method": "lanczos", "width": 1024, "height": 1024, "crop": "center"},
                {"image": "scene"},
            ),
            "encoded": Node("VAEEncode", links={"pixels": "scaled", "vae": "checkpoint.VAE"}),
            "latent": Node("SetLatentNoiseMask", links={"samples": "encoded", "mask": "scene.MASK"}),
            "prompt": prompt("photo, portrait of a person in the snow, mountains behind"),
            "sampler": ksampler("face", denoise=0.9),
            "save": save("inpaint"),
            "note": note(
                "The face of **Reference face** is painted where **Picture with a mask** is masked; the rest stays.",
                ADAPTER,
                "Your own mask: right click on the picture, *Open in Mask Editor*, paint over the face",
                "**denoise**: lower keeps more of the old face",
            ),
        },
        [
            (340, ["checkpoint", "picture", "scene"]),
            (360, [FACE, "prompt", "negative"]),
            (340, ["scaled", "encoded", "latent", "sampler"]),
            (440, ["decode", "save", "note"]),
        ],
        (FACE_PART,),
        [("picture", "image"), ("scene", "image"), ("prompt", "text"), ("sampler", "denoise")],
        ["save"],
    ),
    "14 Convert an encoder file": Graph(
        {
            "convert": Node(
                "LookaheadConvertEncoder",
                values={"source_name": ENCODER, "file_name": "my_encoder", "to": "encoder", "precision": "float16"},
                height=340,
            ),
            "written": Node("PreviewAny", "What was written", links={"source": "convert"}, height=340),
            "note": note(
                "Makes an encoder file of the checkpoint of the paper's authors (`model_ckpt.pt`) or of a stock "
                "IP-Adapter Plus, or a stock IP-Adapter of an encoder file. Needed once a file; nothing is overwritten.",
                (ENCODER,),
                "The new file goes to **models/lookahead**: press R, and *Load Lookahead Encoder* has it",
            ),
        },
        [(420, ["convert"]), (420, ["written"]), (420, ["note"])],
        asks=[("convert", "source_name"), ("convert", "file_name"), ("convert", "to")],
        shows=["written"],
    ),
}
