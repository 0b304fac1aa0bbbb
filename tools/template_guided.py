"""The workflows that look ahead; `template_workflows` has the others."""

from __future__ import annotations

from dataclasses import replace

from ..lookahead.method.guidance_presets import BALANCED, OFF
from .template_graph import Node, Template
from .template_specs import (
    ADAPTER,
    AHEAD,
    AHEAD_PART,
    BASE,
    BY_PRESET,
    CLIP,
    FACE,
    FACE_PART,
    FACES,
    GUIDED,
    LORA,
    NOISE_GUIDE,
    NULL_TEXT,
    PHOTO,
    PLAIN,
    RECOGNISER,
    TAESD,
    TWO,
    TWO_FRIENDS,
    TWO_PART,
    VGG,
    WIDE,
    ahead_nodes,
    custom_sampler,
    face_nodes,
    note,
    picture,
    prompt,
    save,
    two_nodes,
)


def guided(
    name: str,
    loss: dict[str, Node],
    source: str,
    more: dict[str, Node],
    text: str,
    how: Node,
    preset: str = "as set below",
) -> dict[str, Node]:
    """Makes what guided workflows share: the graph around the loss (node `loss`), drawn by the model of `source`."""
    return {
        **PLAIN,
        **more,
        **loss,
        **ahead_nodes("checkpoint", "loss", preset),
        "prompt": prompt(text),
        "guider": Node(
            "CFGGuider", values={"cfg": 5}, links={"model": source, "positive": "prompt", "negative": "negative"}
        ),
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


def with_noise_guide(nodes: dict[str, Node]) -> dict[str, Node]:
    """Has a noise guide act in a guided workflow, which has no curve then: there are no iterations."""
    ahead = nodes["ahead"]
    return {
        **{name: node for name, node in nodes.items() if name != "curve"},
        "guide": Node("LookaheadLoadNoiseGuide", values={"guide_name": NOISE_GUIDE}, height=230),
        "ahead": replace(ahead, links={**ahead.links, "noise_guide": "guide"}),
    }


# A person who is drawn by an image prompt and steered to by likeness
PERSON = {**face_nodes("picture", weight=0.6), "picture": picture("face_1.jpg", "Reference face", 330)}
LIKENESS = {
    "faces": Node("LookaheadLoadFaceAnalysis", values={"pack_name": FACES, "device": "cpu"}, height=180),
    "loss": Node("LookaheadIdentityLoss", links={"face_analysis": "faces", "image": "picture"}),
}

GUIDED_WORKFLOWS: dict[str, Template] = {
    "08 Look ahead for likeness (identity)": Template(
        guided(
            "ahead_identity",
            LIKENESS,
            "face",
            PERSON,
            PHOTO,
            note(
                "The image prompt says roughly who it is. At an early step the sampler looks ahead, puts the face of "
                "**Reference face** in the place of the one it finds, and moves the noise until a face recogniser "
                "knows the person.",
                (*ADAPTER, LORA, TAESD, FACES),
                NULL_TEXT,
                BY_PRESET,
                RECOGNISER,
                height=540,
            ),
            BALANCED,
        ),
        guided_columns(
            ["checkpoint", "picture", "note"],
            [FACE, "prompt", "negative", "faces", "loss"],
        ),
        (FACE_PART, AHEAD_PART),
        [("picture", "image"), ("prompt", "text"), (FACE, "weight"), (AHEAD, "preset"), ("noise", "noise_seed")],
        ["save"],
    ),
    "24 Look ahead in one pass (noise guide)": Template(
        with_noise_guide(
            guided(
                "ahead_noise_guide",
                LIKENESS,
                "face",
                PERSON,
                PHOTO,
                note(
                    "At an early step the sampler looks ahead, puts the face of **Reference face** in the place of the "
                    "one it finds, and a small trained network moves the noise there in one pass: likeness at the cost "
                    "of one evaluation (a plain run has 60).",
                    (*ADAPTER, LORA, TAESD, FACES, NOISE_GUIDE),
                    "For more likeness choose **gentle** (15 evaluations more) or **balanced** (21) in place of "
                    "**off**: their iterations go on from there. Without a noise guide, **instant** is what it "
                    "begins with",
                    NULL_TEXT,
                    RECOGNISER,
                    height=350,
                ),
                OFF,
            )
        ),
        [
            (320, ["checkpoint", "picture", "latent", "note"]),
            (320, [FACE, "prompt", "negative", "faces", "loss"]),
            (320, ["ahead", "sigmas", "guide"]),  # last, since provenance grows on it in Nodes 2.0
            (320, ["lora", "preview vae", "shortcut", "chosen", "guider", "noise", "sampler"]),
            (400, ["decode", "save", "report", "previews"]),
        ],
        (FACE_PART,),
        [("picture", "image"), ("prompt", "text"), (FACE, "weight"), ("ahead", "preset"), ("noise", "noise_seed")],
        ["save"],
    ),
    "09 Look ahead for a look (CLIP)": Template(
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
                NULL_TEXT,
                GUIDED,
                height=480,
            ),
        ),
        guided_columns(["checkpoint", "picture", "note"], ["prompt", "negative", "loss"]),
        (AHEAD_PART,),
        [("picture", "image"), ("prompt", "text"), (AHEAD, "preset"), ("noise", "noise_seed")],
        ["save"],
    ),
    "10 Look ahead for a layout (LPIPS and L1)": Template(
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
                NULL_TEXT,
                GUIDED,
                height=480,
            ),
        ),
        guided_columns(["checkpoint", "picture", "note"], ["prompt", "negative", "shapes", "colours", "loss"]),
        (AHEAD_PART,),
        [("picture", "image"), ("prompt", "text"), (AHEAD, "preset"), ("noise", "noise_seed")],
        ["save"],
    ),
    "11 How well one step foretells (preview grid)": Template(
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
    "18 Look ahead for two people (identity)": Template(
        guided(
            "ahead_two_people",
            {
                "faces": Node("LookaheadLoadFaceAnalysis", values={"pack_name": FACES, "device": "cpu"}, height=180),
                "loss": Node(
                    "LookaheadPeopleLoss",
                    links={"face_analysis": "faces", "person_1": "first", "person_2": "second"},
                ),
            },
            "apply 2",
            {
                **two_nodes("first", "second", "checkpoint"),
                "first": picture("face_1.jpg", "Person on the left", 300),
                "second": picture("face_2.jpg", "Person on the right", 300),
                "latent": WIDE,
            },
            TWO_FRIENDS,
            note(
                "The image prompts say roughly who is on the left and who on the right. At an early step the sampler "
                "looks ahead, finds the faces, and moves the noise until a face recogniser knows each person in the "
                "face that is theirs. Both are guided at once.",
                (*ADAPTER, LORA, TAESD, FACES),
                "Say in the prompt that there are **two** people side by side",
                "**matching** finds whose a face is, in any order of the pictures. Faces swapped all the same? Connect "
                "the masks of *Lookahead Place Masks* to the loss",
                NULL_TEXT,
                BY_PRESET,
                RECOGNISER,
                height=640,
            ),
            BALANCED,
        ),
        [
            (320, ["checkpoint", "first", "second", "faces"]),
            (320, [TWO, "prompt", "negative", "loss"]),
            (320, [AHEAD, "guider", "sigmas", "noise", "latent", "previews"]),
            (320, ["decode", "report", "curve", "sampler"]),
            (400, ["save", "note"]),
        ],
        (TWO_PART, AHEAD_PART),
        [("first", "image"), ("second", "image"), ("prompt", "text"), (AHEAD, "preset"), ("noise", "noise_seed")],
        ["save"],
    ),
}
