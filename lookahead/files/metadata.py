"""The metadata of an encoder file that change what is computed: within what makes sense, else refused."""

from __future__ import annotations

from collections.abc import Mapping

from .tensors import LARGEST, EncoderFileError

LARGEST_SIZE = 4096  # pixels, as the nodes' own input has it
LONGEST_PROMPT = 2000  # characters
#: Of a value in a node's text, in characters; of a whole configuration the beginning, else it fills the page
LONGEST_SHOWN, LONGEST_CONFIG_SHOWN = 2000, 100


def check_metadata(metadata: Mapping[str, str], name: str) -> None:
    """Raise EncoderFileError, one sentence, for a size, a prompt or an alpha that cannot be meant.

    A size that is no number at all is ignored, as ever. name: the file's.
    """
    size, prompt, alpha = (metadata.get(key, "") for key in ("size", "kv_prompt", "kv_alpha"))
    if size.isdecimal() and (len(size) > 9 or int(size) > LARGEST_SIZE):
        raise EncoderFileError(
            f"{name}: the metadata field size is {short(size)}, and a reference picture has at most {LARGEST_SIZE} "
            "pixels a side: write the file anew."
        )
    if len(prompt) > LONGEST_PROMPT:
        raise EncoderFileError(
            f"{name}: the metadata field kv_prompt has {len(prompt)} characters, and a prompt has at most "
            f"{LONGEST_PROMPT}: write the file anew."
        )
    try:
        sensible = not alpha or abs(float(alpha)) <= LARGEST  # (NaN is not)
    except ValueError:
        sensible = False
    if not sensible:
        raise EncoderFileError(
            f"{name}: the metadata field kv_alpha is {short(repr(alpha))}, which is not a number that scales weights: "
            "write the file anew."
        )


def short(text: str, most: int = 40) -> str:
    """A text for a sentence: no longer than `most` characters, and three dots."""
    return text if len(text) <= most else f"{text[:most]}..."


def shown(metadata: Mapping[str, str], key: str) -> str:
    """A value as a node tells it: no longer than can be read there."""
    return short(metadata[key], LONGEST_CONFIG_SHOWN if key == "config" else LONGEST_SHOWN)


def stated(metadata: Mapping[str, str], key: str) -> str:
    """Says what a file states: short, on one line whatever it holds, "none" where it states nothing."""
    text = short(metadata.get(key, "none"))
    return text if text.isprintable() else ascii(text)
