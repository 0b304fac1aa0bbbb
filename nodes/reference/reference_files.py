"""Where reference files are, and what goes from a reference into a file and back."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import folder_paths

from ...lookahead.files.reference_file import SavedSubject
from ..folders import file_names, made, plain_name, searched
from .encoder import LoadedEncoder, keys_values_of
from .subject import Reference, Subject

FOLDER = "lookahead_references"
EXTENSION = ".safetensors"


def reference_names() -> list[str]:
    """Names of all reference files."""
    return file_names(FOLDER, (EXTENSION,))


def reference_path(name: str) -> str:
    """Path of a reference file. Raises FileNotFoundError, one sentence, naming the folders that were searched."""
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        where = searched(folder_paths.get_folder_paths(FOLDER))
        raise FileNotFoundError(
            f"There is no reference file {name!r} in {where}: put it there, or make one with Save Lookahead Reference."
        )
    return path


def new_path(file_name: str) -> Path:
    """Gives a new file its place: in the first `models/lookahead_references`. Raises ValueError for no plain name."""
    name = plain_name(file_name, "file_name", "anna")
    folder = made(FOLDER)
    return folder / (name if name.lower().endswith(EXTENSION) else name + EXTENSION)


def saved(subject: Subject, with_latents: bool) -> SavedSubject:
    """Takes of a subject what a file holds.

    with_latents: also what KV injection needs, of which the picture can be decoded.
    Raises ValueError, one sentence, where that leaves nothing.
    """
    latents = subject.latents if with_latents else None
    if subject.tokens is None and latents is None:
        raise ValueError(
            "The reference has no image prompt, and without its latents nothing is left to save: choose everything, or "
            "connect encoder and clip_vision at Encode Lookahead Reference."
        )
    prompt = subject.kv_prompt[0] if latents is not None and subject.kv_prompt else None
    return SavedSubject(
        tokens=subject.tokens,
        null_tokens=subject.null_tokens,
        latents=latents,
        mask=None if latents is None else subject.mask,
        kv_text=None if prompt is None else prompt[0],
        kv_pooled=None if prompt is None else prompt[1].get("pooled_output"),
        face=subject.face,
        encoder="" if subject.encoder is None else subject.encoder.name,
        encoder_mark="" if subject.encoder is None else subject.encoder.mark,
        recogniser=subject.recogniser,
        one_each=subject.one_each,
        weight=subject.weight,
    )


def restored(subjects: list[SavedSubject], encoder: LoadedEncoder | None, name: str) -> Reference:
    """A reference as it was saved: keys and values are made of the tokens anew, by the encoder that read them.

    Raises ValueError, one sentence, where that encoder is missing or another.
    """
    return Reference(tuple(_restored(subject, encoder, name) for subject in subjects))


def _restored(subject: SavedSubject, encoder: LoadedEncoder | None, name: str) -> Subject:
    if not subject.encoder_mark:
        encoder = None  # KV injection without training: an encoder would change it
    elif encoder is None:
        raise ValueError(
            f"{name} was read with the encoder {subject.encoder}: connect that from Load Lookahead Encoder."
        )
    elif encoder.mark != subject.encoder_mark:
        raise ValueError(
            f"{name} was read with the encoder {subject.encoder}, and {encoder.name} has other weights, to which its "
            "tokens mean nothing: load the encoder that it was read with, or encode the pictures again."
        )
    device = comfy.model_management.intermediate_device()
    moved = {key: value.to(device) for key, value in subject.tensors.items()}
    keys_values = null_keys_values = prompt = None
    if encoder is not None and subject.tokens is not None:
        keys_values, null_keys_values = keys_values_of(encoder, subject.tokens, subject.null_tokens)
    if "kv_text" in moved:
        pooled = {"pooled_output": moved["kv_pooled"]} if "kv_pooled" in moved else {}
        prompt = [[moved["kv_text"], pooled]]
    return Subject(
        encoder=encoder,
        pixels=None,
        mask=moved.get("mask"),
        keys_values=keys_values,
        null_keys_values=null_keys_values,
        latents=moved.get("latents"),
        kv_prompt=prompt,
        one_each=subject.one_each,
        tokens=moved.get("tokens"),
        null_tokens=moved.get("null_tokens"),
        face=moved.get("face"),
        recogniser=subject.recogniser,
        weight=subject.weight,
    )
