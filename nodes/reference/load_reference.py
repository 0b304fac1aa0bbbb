"""The node that loads a reference from a file."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ...lookahead.files import reference_file
from ..folders import fingerprint, nothing_chosen, there
from ..schema import schema
from ..sockets import ENCODER, REFERENCE
from .encoder import LoadedEncoder
from .reference_files import reference_names, reference_path, restored


class LookaheadLoadReference(io.ComfyNode):
    """File of `models/lookahead_references` -> REFERENCE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadLoadReference",
            display_name="Load Lookahead Reference",
            category="lookahead/reference",
            has_intermediate_output=True,
            description="Loads a person (or thing) that Save Lookahead Reference has written; no picture and no image "
            "encoder are needed. Shows what the file says of itself.",
            search_aliases=[
                "load face",
                "load ip-adapter embeds",
                "load character",
                "face model",
                "load person",
                "consistent character",
            ],
            inputs=[
                io.Combo.Input(
                    "reference_name",
                    options=reference_names(),
                    tooltip="A .safetensors file in models/lookahead_references.",
                ),
                ENCODER.Input(
                    "encoder",
                    optional=True,
                    tooltip="The encoder that the reference was read with, from Load Lookahead Encoder. Only a "
                    "reference that was read without one needs none.",
                ),
            ],
            outputs=[
                REFERENCE.Output(
                    "REFERENCE", display_name="reference", tooltip="The reference, for the nodes that apply it."
                ),
                io.String.Output(
                    "PROVENANCE",
                    display_name="provenance",
                    tooltip="What the file holds, with which encoder it was read, and what its author says.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, reference_name: str | None = None) -> bool | str:
        """Say where the file was looked for, instead of the host's 'value not in list'."""
        if not reference_name and not reference_names():
            return "There is no reference file yet: make one with Save Lookahead Reference, press R, and choose it."
        if not reference_name:
            return nothing_chosen(reference_names(), "reference file", (), reference_name)
        return there(reference_path, reference_name)

    @classmethod
    def fingerprint_inputs(cls, reference_name: str | None = None, **_) -> str:
        """Load again when the file was replaced."""
        return fingerprint(reference_path, reference_name)

    @classmethod
    def execute(cls, reference_name: str, encoder: LoadedEncoder | None = None) -> io.NodeOutput:
        subjects, about = reference_file.read(reference_path(reference_name))
        text = reference_file.provenance(subjects, about, reference_name)
        return io.NodeOutput(restored(subjects, encoder, reference_name), text, ui=ui.PreviewText(text))
