"""The node for likeness of several people in one picture."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ...lookahead.losses.face_views import FaceViews
from ...lookahead.losses.identity import NoFaceError
from ...lookahead.losses.people import INSIDE, LIKENESS, ORDER, PeopleLoss
from ...lookahead.vision.face_models import FaceModels
from ..schema import schema
from ..sockets import LOSS
from .identity_loss import (
    OF_THE_PACK,
    face_analysis_input,
    fingerprint_of_recogniser,
    open_recogniser,
    person_input,
    read_person,
    recogniser_input,
    views_input,
)
from .lookahead_loss import LookaheadLoss
from .network import AVERAGE, ONE_EACH

PEOPLE = (1, 2, 3)
MATCHINGS = {"by likeness": LIKENESS, "from left to right": ORDER}


class LookaheadPeopleLoss(io.ComfyNode):
    """FACE_ANALYSIS, pictures of each person or a REFERENCE, masks -> LOOKAHEAD_LOSS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def person(number: int) -> io.Input:
            return person_input(
                f"person_{number}",
                "Who one of the people in the picture should be: one picture, or several as a batch. The largest face "
                "of each counts.",
                optional=number > 2,
            )

        def mask(number: int) -> io.Input:
            return io.Mask.Input(
                f"mask_{number}",
                optional=True,
                advanced=True,
                tooltip="Where the face of the person of the same number may be, for example from Lookahead Place "
                "Masks. Open: anywhere.",
            )

        return schema(
            node_id="LookaheadPeopleLoss",
            display_name="Lookahead Identity Loss (Several People)",
            category="lookahead/losses",
            description="How unlike two or three people in one picture are to their references: each face that is "
            "found is compared with the person whose it is. For the Lookahead Guidance Sampler.",
            search_aliases=["identity loss", "two people", "couple", "group", "multi identity", "face matching"],
            inputs=[
                face_analysis_input(),
                person(1),
                person(2),
                io.Combo.Input(
                    "matching",
                    options=list(MATCHINGS),
                    default=next(iter(MATCHINGS)),
                    tooltip="Which face is whose at first; it stays so for the rest of the run. by likeness: as all "
                    "together are most alike. from left to right: in the order of the people. Masks decide before it.",
                ),
                io.Combo.Input(
                    "several",
                    options=[AVERAGE, ONE_EACH],
                    default=AVERAGE,
                    advanced=True,
                    tooltip="What to do with several pictures: they show one person, whose likeness is averaged; or "
                    "the first is for the first image of the batch, the second for the second, and so on.",
                ),
                recogniser_input(advanced=True),
                person(3),
                *(mask(number) for number in PEOPLE),
                views_input(),
            ],
            outputs=[
                LOSS.Output("LOSS", display_name="loss", tooltip="For the Lookahead Guidance Sampler, or to combine."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, recogniser: str | None = OF_THE_PACK, **_) -> str:
        """Load again when the file was replaced."""
        return fingerprint_of_recogniser(recogniser)

    @classmethod
    def execute(
        cls,
        face_analysis: FaceModels,
        matching: str = next(iter(MATCHINGS)),
        several: str = AVERAGE,
        recogniser: str = OF_THE_PACK,
        views: int = 0,
        **given: Any,
    ) -> io.NodeOutput:
        numbers = [number for number in PEOPLE if given.get(f"person_{number}") is not None]
        masks = tuple(checked_mask(number, given.get(f"mask_{number}")) for number in numbers)
        people = []
        with torch.inference_mode(False):
            patcher = open_recogniser(face_analysis, recogniser)
            for number in numbers:
                try:
                    people.append(read_person(patcher, face_analysis, given[f"person_{number}"], several))
                except NoFaceError as error:
                    text = str(error)
                    raise NoFaceError(f"For person_{number}: {text[0].lower()}{text[1:]}") from None
        loss = PeopleLoss(
            patcher.model, face_analysis, tuple(people), MATCHINGS[matching], masks, views=FaceViews(views)
        )
        return io.NodeOutput(LookaheadLoss(loss, (patcher,), f"identity of {len(people)} people"))


def checked_mask(number: int, mask: Tensor | None) -> Tensor | None:
    """A person's mask [m, H, W] on the CPU. Raises ValueError, one sentence, where no face could lie in it."""
    if mask is None:
        return None
    mask = mask.reshape(-1, *mask.shape[-2:]).cpu()
    if not (mask >= INSIDE).flatten(1).any(1).all():
        raise ValueError(
            f"The mask_{number} is below {INSIDE} everywhere, so the face of person_{number} could be nowhere: paint "
            "where it may be, or leave the mask open."
        )
    return mask
