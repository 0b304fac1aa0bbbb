"""What people give a concept: a picture, and a prompt with a placeholder; and what is said where one will not do."""

from __future__ import annotations

import hashlib
import re

from torch import Tensor

#: Stands for the concept in a prompt.
PLACEHOLDER = "S*"
#: A single token of CLIP that nobody writes: it holds the concept's place while a prompt is turned into tokens.
STAND_IN = "ldnont"
#: The prompts that a concept is trained and tuned under.
TEMPLATES = (f"a photo of a {PLACEHOLDER}",)
_WHOLE = re.compile(rf"(?<!\w){re.escape(PLACEHOLDER)}(?!\w)")  # as a word of its own, which is one token
LEAST_SIDE = 64  # pixels of a picture, below which nothing can be seen on it


class ConceptError(ValueError):
    """Says what is wrong with a concept, its picture or its prompt, in one sentence for the user."""


def with_stand_in(prompt: str) -> str:
    """The prompt with `STAND_IN` in the placeholder's place.

    Raises ConceptError, one sentence, where the placeholder is not there once, or the stand-in is written out.
    """
    found = len(_WHOLE.findall(prompt))
    if found != 1:
        how = "no" if not found else str(found)
        raise ConceptError(
            f"The prompt {prompt!r} has {how} {PLACEHOLDER}, which stands for the concept: write it once, as in "
            f'"a comic of a {PLACEHOLDER} on a beach".'
        )
    if re.search(rf"\b{STAND_IN}\b", prompt, re.IGNORECASE):
        raise ConceptError(f"The prompt has the word {STAND_IN!r}, which this pack keeps for itself: leave it out.")
    return _WHOLE.sub(STAND_IN, prompt)


def with_word(prompt: str, word: str) -> str:
    """The hard prompt, for people to read: the concept's real word in the placeholder's place. Raises as
    `with_stand_in`."""
    with_stand_in(prompt)
    return _WHOLE.sub(lambda _: word, prompt)


def check_picture(height: int, width: int, name: str = "The picture") -> None:
    """Raise ConceptError, one sentence, for a picture on which nothing can be seen."""
    if min(height, width) < LEAST_SIDE:
        raise ConceptError(
            f"{name} has {width} x {height} pixels, and a concept needs {LEAST_SIDE} a side or more: give a larger one."
        )


def picture_hash(picture: Tensor) -> str:
    """A hash of the pixels of a picture [3, H, W] in [0, 1], in 8 bit."""
    return hashlib.sha256((picture * 255).round().byte().cpu().contiguous().numpy().tobytes()).hexdigest()


def check_blend(blend: float) -> float:
    """The blend as it is. Raises ConceptError where it is not from 0 to 1."""
    if not 0 <= blend <= 1:
        raise ConceptError(f"The blend is {blend:g}: give a number from 0 (the base alone) to 1 (the concept alone).")
    return blend
