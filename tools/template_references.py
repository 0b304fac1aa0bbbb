"""The workflows that save, blend, recognise and compare references; `template_workflows` has the others."""

from __future__ import annotations

from dataclasses import replace

from .template_graph import Node, Template
from .template_specs import (
    ADAPTER,
    BASE,
    CLIP,
    DECODE,
    FACE,
    FACE_ID,
    FACE_PART,
    FACES,
    LATENT,
    NULL_TEXT,
    OWN,
    PAINTING,
    PHOTO,
    PLAIN,
    VISION,
    face_nodes,
    ksampler,
    note,
    picture,
    prompt,
    save,
    two_nodes,
)

BLENDED = ("encoder", "vision", "reference 1", "reference 2")

REFERENCE_WORKFLOWS: dict[str, Template] = {
    "15 A person as a file": Template(
        {
            **{name: PLAIN[name] for name in ("checkpoint", "negative")},
            **{name: node for name, node in face_nodes("picture").items() if name != "face"},
            "picture": picture("face_1.jpg", "Reference face"),
            "store": Node(
                "LookaheadSaveReference",
                values={"file_name": "my_character"},
                links={"reference": "reference"},
                height=280,  # room for what it says it has written
            ),
            "load": Node("LookaheadLoadReference", off=True),
            "face": Node(
                "LookaheadApplyImagePrompt",
                values={"weight": 0.75},
                links={"model": "checkpoint", "reference": "load"},
                off=True,
            ),
            "prompt": prompt(PAINTING),
            "latent": replace(LATENT, off=True),
            "sampler": replace(ksampler("face"), off=True),
            "decode": replace(DECODE, off=True),
            "save": replace(save("person_of_a_file"), off=True),
            "note": note(
                "*Save Lookahead Reference* keeps a person as a file without the photo: here the tokens of the image "
                "prompt. Run once; then press R, unmute the grey nodes (select them, Ctrl+M), choose the file, and run "
                "again.",
                ADAPTER,
                "The file goes to **models/lookahead_references** and can be shared; its encoder must be the same",
                "For KV injection too: link **vae** and **clip** of the checkpoint to *Encode Lookahead Reference*",
                NULL_TEXT,
                height=400,
            ),
        },
        [
            (320, ["checkpoint", "encoder", "vision", "picture"]),
            (320, ["reference", "store", "note"]),
            (320, ["load", "face", "prompt", "negative", "latent"]),
            (280, ["sampler"]),
            (400, ["decode", "save"]),
        ],
        asks=[("picture", "image"), ("store", "file_name")],
        shows=["store"],
    ),
    "16 Blend two people, weights by layer": Template(
        {
            **PLAIN,
            **{name: node for name, node in two_nodes("first", "second").items() if name in BLENDED},
            "blend": Node(
                "LookaheadCombineReferences",
                values={"weight_1": 0.6, "weight_2": 0.4},
                links={"reference_1": "reference 1", "reference_2": "reference 2"},
            ),
            "weights": Node("LookaheadWeights", values={"preset": "likeness"}),
            "face": Node(
                "LookaheadApplyImagePrompt",
                values={"weight": 0.75},
                links={"model": "checkpoint", "reference": "blend", "weights": "weights"},
            ),
            "first": picture("face_1.jpg", "First person", 290),
            "second": picture("face_2.jpg", "Second person", 290),
            "prompt": prompt(PAINTING),
            "sampler": ksampler("face"),
            "save": save("blend"),
            "note": note(
                "A new face between two. A negative weight takes a person away instead.",
                ADAPTER,
                "**preset** of *Lookahead Weights*: likeness leaves out the layers of style and composition",
                "**steps**: 0, 1, 1 eases in",
                NULL_TEXT,
                height=340,
            ),
        },
        [
            (320, ["checkpoint", "encoder", "vision", "first"]),
            (320, ["reference 1", "reference 2", "second"]),
            (320, ["blend", "weights", "face", "prompt", "negative"]),
            (280, ["latent", "sampler"]),
            (400, ["note", "decode", "save"]),
        ],
        asks=[
            ("first", "image"),
            ("second", "image"),
            ("blend", "weight_1"),
            ("blend", "weight_2"),
            ("prompt", "text"),
        ],
        shows=["save"],
    ),
    "17 Face ID (FaceID Plus v2)": Template(
        {
            **PLAIN,
            "encoder": Node("LookaheadLoadEncoder", values={"encoder_name": FACE_ID}, height=190),
            "vision": face_nodes("")["vision"],
            "faces": Node("LookaheadLoadFaceAnalysis", values={"pack_name": FACES, "device": "cpu"}, height=180),
            "picture": picture("face_1.jpg", "Reference face", 320),
            "reference": Node(
                "LookaheadEncodeFace",
                links={"encoder": "encoder", "clip_vision": "vision", "face_analysis": "faces", "image": "picture"},
            ),
            "face": Node(
                "LookaheadApplyImagePrompt",
                values={"weight": 1},
                links={"model": "checkpoint", "reference": "reference"},
            ),
            "prompt": prompt(PHOTO),
            "sampler": ksampler("face"),
            "save": save("face_id"),
            "note": note(
                "IP-Adapter FaceID Plus v2: the face by its recogniser and its look; the LoRA in the file acts beside "
                "the model's weights.",
                (BASE, FACE_ID, VISION, FACES),
                "Any photo with a face: it is found and turned upright",
                NULL_TEXT,
                height=360,
            ),
        },
        [
            (320, ["checkpoint", "encoder", "vision", "faces"]),
            (320, ["picture", "reference", "face"]),
            (320, ["prompt", "negative", "latent"]),
            (280, ["sampler"]),
            (400, ["note", "decode", "save"]),
        ],
        asks=[("picture", "image"), ("prompt", "text"), ("face", "weight"), ("sampler", "seed")],
        shows=["save"],
    ),
    "19 Best of eight": Template(
        {
            **PLAIN,
            **face_nodes("picture"),
            "picture": picture("face_1.jpg", "Reference face", 320),
            "faces": Node("LookaheadLoadFaceAnalysis", values={"pack_name": FACES, "device": "cpu"}, height=180),
            "prompt": prompt(PAINTING),
            "latent": replace(LATENT, values={**LATENT.values, "batch_size": 8}),
            "sampler": ksampler("face", "randomize"),
            "likeness": Node(
                "LookaheadIdentityScore",
                links={"face_analysis": "faces", "image": "decode", "reference": "picture"},
                height=300,  # room for its nine lines
            ),
            "follows": Node(
                "LookaheadPromptScore",
                values={"clip_name": CLIP, "text": "an oil painting of a person in a red coat"},
                links={"image": "decode"},
                height=340,
            ),
            "rank": Node(
                "LookaheadRank",
                values={"keep": 1, "at_least": 0.2},
                links={"image": "decode", "scores": "likeness", "limit": "follows"},
                height=240,
            ),
            "all": Node("PreviewImage", "All eight", links={"images": "decode"}, height=240),
            "save": save("best_of_eight", "rank", 320),
            "note": note(
                "Draws eight pictures of **Reference face** and keeps the one that shows the person best, of those "
                "that follow the words of *Lookahead Prompt Score* well enough.",
                (*ADAPTER, FACES, CLIP),
                OWN,
                "**keep**: 0 saves all eight, the best first",
                "**at_least**: higher for the words' sake, -1 for likeness alone",
                "Eight are too many for the card? A smaller **batch_size**, and the best of fewer",
                NULL_TEXT,
                height=420,
            ),
        },
        [
            (320, ["checkpoint", "picture", "faces"]),
            (340, [FACE, "prompt", "negative", "latent"]),
            (300, ["sampler", "decode"]),
            (320, ["likeness", "follows", "rank"]),
            (380, ["save", "all", "note"]),
        ],
        (FACE_PART,),
        [("picture", "image"), ("prompt", "text"), ("follows", "text"), ("rank", "keep"), ("sampler", "seed")],
        ["save", "all"],
    ),
}
