"""The workflows of several people with a prompt for each; `template_workflows` has the others."""

from __future__ import annotations

from collections.abc import Sequence

from .template_graph import Node, Subgraph, Template
from .template_specs import (
    ADAPTER,
    LOAD_ENCODER,
    LOAD_VISION,
    NULL_TEXT,
    PLAIN,
    WIDE,
    ksampler,
    note,
    picture,
    prompt,
    save,
)

PLACES = {2: ("left", "right"), 3: ("left", "middle", "right")}
FACES_OF = {"left": "face_1.jpg", "middle": "face_3.jpg", "right": "face_2.jpg"}
WORN = {"left": "the left one in a red coat", "middle": "the middle one in a white shirt"}
WORN |= {"right": "the right one in a green jacket"}


def in_places(places: Sequence[str], model: str) -> dict[str, Node]:
    """A reference and a prompt for each place: the same mask says where both act.

    The pictures are the nodes named by their places, the prompts "prompt" and the place. `model` is the model before;
    that of the last `apply` is the model after, and the last `join` has all conditions.
    """
    nodes = {
        "encoder": LOAD_ENCODER,
        "vision": LOAD_VISION,
        "places": Node("LookaheadPlaceMasks", values={"people": len(places), "overlap": 0.1}),
    }
    joined = ""
    for number, place in enumerate(places, 1):
        mask = f"places.mask_{number}"
        nodes[f"reference {place}"] = Node(
            "LookaheadEncodeReference",
            f"Reference, {place}",
            links={"encoder": "encoder", "clip_vision": "vision", "image": place},
        )
        nodes[f"apply {place}"] = Node(
            "LookaheadApplyImagePrompt",
            values={"weight": 0.75, "start": 0, "end": 1},
            links={"model": model, "reference": f"reference {place}", "mask": mask},
        )
        model = f"apply {place}"
        nodes[f"prompt of {place}"] = Node(
            "ConditioningSetMask",
            f"Where the prompt acts, {place}",
            {"strength": 1, "set_cond_area": "default"},
            {"conditioning": f"prompt {place}", "mask": mask},
        )
        if joined:
            nodes[f"join {place}"] = Node(
                "ConditioningCombine", links={"conditioning_1": joined, "conditioning_2": f"prompt of {place}"}
            )
        joined = f"join {place}" if joined else f"prompt of {place}"
    return nodes


def people_part(number: str, places: Sequence[str]) -> Subgraph:
    """The nodes of `in_places` folded into one."""
    return Subgraph(
        f"{number} people with a prompt each (Lookahead)",
        f"Draws {number.lower()} people, each with its reference and its prompt in its part of the picture: between "
        "checkpoint and prompts and the sampler.",
        tuple(in_places(places, "")),
        {
            "model": [(f"apply {places[0]}", "model")],
            **{place: [(f"reference {place}", "image")] for place in places},
            **{f"{place}_prompt": [(f"prompt of {place}", "conditioning")] for place in places},
        },
        {
            # At most five values are open: of three people the overlap is set inside.
            **({"overlap": ("places", "overlap")} if len(places) == 2 else {}),
            **{f"{place}_weight": (f"apply {place}", "weight") for place in places},
            "encoder_name": ("encoder", "encoder_name"),
            "clip_name": ("vision", "clip_name"),
        },
        {"model": f"apply {places[-1]}", "positive": f"join {places[-1]}"},
    )


def people(count: int, number: str, name: str) -> Template:
    """The workflow of so many people; number: in words; name: of the pictures that it saves."""
    places, part = PLACES[count], people_part(number, PLACES[count])
    return Template(
        {
            **PLAIN,
            **in_places(places, "checkpoint"),
            **{
                place: picture(FACES_OF[place], f"Person {'in' if place == 'middle' else 'on'} the {place}", 320)
                for place in places
            },
            **{
                f"prompt {place}": prompt(
                    f"photo, {number.lower()} friends side by side in a cafe, half length, warm light, {WORN[place]}",
                    f"Prompt, {place}",
                )
                for place in places
            },
            "latent": WIDE,
            "sampler": ksampler(f"apply {places[-1]}", "randomize", positive=f"join {places[-1]}"),
            "save": save(name),
            "note": note(
                "Each person has a picture, a prompt and a place: inside of the blue node one mask says where the "
                "reference and its prompt act (*Conditioning (Set Mask)*), and **overlap** how far the places "
                "cross-fade.",
                ADAPTER,
                f"Say the scene in every prompt alike, with the words **{number.lower()}** and *side by side*, then "
                "what is one person's alone",
                "Your own masks, or one above the other: open the blue node, and put them in the place of *Lookahead "
                "Place Masks*",
                "A run takes longer with each prompt more",
                NULL_TEXT,
                height=390,
            ),
        },
        [
            (340, ["checkpoint", *places] if count == 2 else [*places]),  # three pictures fill a column
            (380, [part.name, *(f"prompt {place}" for place in places), "negative"]),
            (340, ["latent", "sampler"] if count == 2 else ["checkpoint", "latent", "sampler"]),
            (460, ["decode", "save", "note"]),
        ],
        (part,),
        [
            *((place, "image") for place in places),
            *((f"prompt {place}", "text") for place in places),
            ("sampler", "seed"),
        ],
        ["save"],
    )


PEOPLE_WORKFLOWS: dict[str, Template] = {
    "20 Two people with a prompt each": people(2, "Two", "two_people_two_prompts"),
    "21 Three people with a prompt each": people(3, "Three", "three_people_three_prompts"),
}
