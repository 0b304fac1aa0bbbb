"""The workflows of concepts (DATE): anything from one picture; `template_workflows` has the others."""

from __future__ import annotations

from .template_graph import Node, Template
from .template_specs import (
    ADDRESS,
    BASE,
    CONCEPT,
    CONCEPT_ENCODER,
    LOAD_VISION,
    PLAIN,
    VISION,
    ksampler,
    note,
    picture,
    save,
)

BLENDS = {"half": (0.5, "Half the concept"), "whole": (1.0, "The concept alone")}
TEXT = "a watercolor painting of a S* on a beach"
NULL_TEXT = (
    "The **negative prompt** may stay empty; that zeros behind it make no difference was "
    f"[measured]({ADDRESS}/blob/main/docs/null_text.md) for references, not for concepts"
)


def words(text: str) -> Node:
    """The prompt with the concept's word in it."""
    return Node(
        "LookaheadEncodeConceptPrompt",
        "Prompt with the concept",
        {"text": text},
        {"clip": "checkpoint.CLIP", "concept": "concept"},
        height=150,
        colour="good",
    )


def blends() -> dict[str, Node]:
    """The nodes that draw one prompt and seed at each blend."""
    nodes = {}
    for name, (blend, title) in BLENDS.items():
        nodes[f"apply {name}"] = Node(
            "LookaheadApplyConcept", title, {"blend": blend}, {"model": "checkpoint", "concept": "concept"}
        )
        nodes[f"sampler {name}"] = ksampler(f"apply {name}")
        nodes[f"decode {name}"] = Node("VAEDecode", links={"samples": f"sampler {name}", "vae": "checkpoint.VAE"})
    nodes["side by side"] = Node(
        "ImageStitch",
        values={"direction": "right", "match_image_size": True, "spacing_width": 16},
        links={"image1": "decode half", "image2": "decode whole"},
    )
    return nodes


CONCEPT_WORKFLOWS: dict[str, Template] = {
    "22 Anything from one picture (concept)": Template(
        {
            **PLAIN,
            "encoder": Node("LookaheadLoadConceptEncoder", values={"encoder_name": CONCEPT_ENCODER}, height=260),
            "vision": LOAD_VISION,
            "picture": picture("thing.jpg", "One picture of the thing", 330),
            "predicted": Node(
                "LookaheadPredictConcept",
                links={
                    "concept_encoder": "encoder",
                    "model": "checkpoint",
                    "clip": "checkpoint.CLIP",
                    "clip_vision": "vision",
                    "image": "picture",
                },
                height=220,
            ),
            "concept": Node(
                "LookaheadTuneConcept",
                links={
                    "concept": "predicted",
                    "model": "checkpoint",
                    "clip": "checkpoint.CLIP",
                    "vae": "checkpoint.VAE",
                    "image": "picture",
                },
                height=360,
            ),
            "keep": Node(
                "LookaheadSaveConcept", values={"name": "my_concept"}, links={"concept": "concept"}, height=170
            ),
            "prompt": words(TEXT),
            "apply": Node("LookaheadApplyConcept", links={"model": "checkpoint", "concept": "concept"}),
            "sampler": ksampler("apply"),
            "save": save("concept"),
            "note": note(
                "The thing in **One picture of the thing**, whatever it is, under your prompt, where it is called "
                "**S\\***. One pass of an encoder foretells its word and its attention; twelve steps of tuning bring "
                "it nearer.",
                (BASE, CONCEPT_ENCODER, VISION),
                "**blend** of *Apply Lookahead Concept*: 1 is most like the picture, 0 is the prompt with a real word "
                "instead of it, -1 what it was tuned with",
                "**steps** of *Tune Lookahead Concept*: more is more like the picture, and follows the prompt less",
                "Run it once: *Save Lookahead Concept* keeps it, and the next workflow draws it without its picture",
                NULL_TEXT,
                height=500,
            ),
        },
        [
            (330, ["checkpoint", "encoder", "vision", "picture"]),
            (330, ["predicted", "concept", "keep"]),
            (340, ["apply", "prompt", "negative", "latent"]),
            (280, ["sampler"]),
            (420, ["note", "decode", "save"]),
        ],
        asks=[("picture", "image"), ("prompt", "text"), ("concept", "steps"), ("apply", "blend")],
        shows=["save"],
    ),
    "23 A concept from a file, at two blends": Template(
        {
            **{name: node for name, node in PLAIN.items() if name != "decode"},
            "concept": Node("LookaheadLoadConcept", values={"concept_name": CONCEPT}, height=170),
            "prompt": words(TEXT),
            **blends(),
            "save": save("concept_blends", "side by side", 380),
            "note": note(
                "A concept that *Anything from one picture* has saved, under one prompt and seed: half of it and half "
                "the prompt with a real word in its place (left), and the concept alone (right). Keep the **blend** "
                "that follows the prompt as far as you like.",
                (BASE, CONCEPT),
                "It needs neither the picture nor the encoder; press R after saving another",
                "Change a seed in both samplers alike",
                NULL_TEXT,
                height=440,
            ),
        },
        [
            (340, ["checkpoint", "concept", "note"]),
            (360, ["prompt", "negative", "latent"]),
            (280, ["apply half", "sampler half"]),
            (280, ["apply whole", "sampler whole"]),
            (440, ["decode half", "decode whole", "side by side", "save"]),
        ],
        asks=[("concept", "concept_name"), ("prompt", "text")],
        shows=["save"],
    ),
}
