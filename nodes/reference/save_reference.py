"""The node that saves a reference as a file."""

from __future__ import annotations

import os

import torch
from comfy_api.latest import io, ui

from ...lookahead.files import reference_file
from ..schema import schema
from ..sockets import REFERENCE
from .reference_files import new_path, saved
from .subject import Reference

EVERYTHING, PROMPT_ONLY = "everything", "image prompt only"


class LookaheadSaveReference(io.ComfyNode):
    """REFERENCE -> file in `models/lookahead_references`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadSaveReference",
            display_name="Save Lookahead Reference",
            category="lookahead/reference",
            description="Saves a person (or thing) as a small file, without the pictures, so that other graphs and "
            "other people can draw the same one: Load Lookahead Reference gives the same picture to the bit.",
            search_aliases=[
                "save face",
                "save ip-adapter embeds",
                "export character",
                "face model",
                "save person",
                "consistent character",
            ],
            is_output_node=True,
            inputs=[
                REFERENCE.Input(
                    "reference", tooltip="From Encode Lookahead Reference or Combine Lookahead References."
                ),
                io.String.Input(
                    "file_name",
                    default="my_character",
                    tooltip="Name of the file, which goes to models/lookahead_references. Another file is never "
                    "overwritten.",
                ),
                io.Combo.Input(
                    "contents",
                    options=[EVERYTHING, PROMPT_ONLY],
                    default=EVERYTHING,
                    tooltip="Contents of the file. everything: also what KV injection needs, of which the picture can "
                    "be decoded nearly as it was. image prompt only: the tokens, of which it cannot.",
                ),
                io.String.Input(
                    "about",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Words for whoever gets the file: who it is, where the pictures are from, what may be done "
                    "with it.",
                ),
            ],
            outputs=[
                io.String.Output("REPORT", display_name="report", tooltip="What was written, and where."),
            ],
        )

    @classmethod
    def execute(
        cls, reference: Reference, file_name: str, contents: str = EVERYTHING, about: str = ""
    ) -> io.NodeOutput:
        path = new_path(file_name)
        subjects = [saved(subject, contents == EVERYTHING) for subject in reference.subjects]
        if not path.exists():
            reference_file.write(path, subjects, about)
            done = "Written"
        elif same_as(path, subjects, about):
            done = "There already"
        else:
            raise ValueError(f"{path.name} exists already and holds another reference: choose another file_name.")
        text = reference_file.provenance(*reference_file.read(path), path.name)
        report = f"{done}: {path}, {path.stat().st_size / 1e6:.1f} MB\n{text}"
        return io.NodeOutput(report, ui=ui.PreviewText(report))


def same_as(path: os.PathLike[str], subjects: list[reference_file.SavedSubject], about: str) -> bool:
    """Tells whether a file holds exactly these subjects already, as when a graph is queued again."""
    try:
        there, words = reference_file.read(path)
    except reference_file.ReferenceFileError:
        return False
    if words != about or [s.settings for s in there] != [s.settings for s in subjects]:
        return False
    return all(
        old.tensors.keys() == new.tensors.keys()
        and all(torch.equal(value, new.tensors[key].float().cpu()) for key, value in old.tensors.items())
        for old, new in zip(there, subjects, strict=True)
    )
