"""The node that loads an encoder file."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io, ui

from ..folders import file_names, fingerprint, nothing_chosen, searched, there
from ..schema import schema
from ..sockets import ENCODER
from .face_id_encoder import load

FOLDERS = ("lookahead", "ipadapter")
EXTENSIONS = (".safetensors", ".bin")


def encoder_names() -> list[str]:
    """Names of all files that may be encoders, those of `models/lookahead` first."""
    return list(dict.fromkeys(name for folder in FOLDERS for name in file_names(folder, EXTENSIONS)))


def places() -> list[str]:
    """The folders in which encoder files are looked for."""
    return [path for folder in FOLDERS for path in folder_paths.get_folder_paths(folder)]


def encoder_path(name: str) -> str:
    """Path of an encoder file. Raises FileNotFoundError, one sentence, naming the folders that were searched."""
    for folder in FOLDERS:
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return path
    raise FileNotFoundError(
        f"There is no encoder file {name!r} in {searched(places())}: put it into one of these folders."
    )


class LookaheadLoadEncoder(io.ComfyNode):
    """Encoder file -> ENCODER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadLoadEncoder",
            display_name="Load Lookahead Encoder",
            category="lookahead/loaders",
            has_intermediate_output=True,
            description="Loads an encoder: an LCM-Lookahead encoder file, a stock IP-Adapter Plus (Face) or IP-Adapter "
            "FaceID Plus v2 for SDXL. What the file is follows from its contents, not from its name.",
            search_aliases=[
                "ip-adapter loader",
                "ipadapter",
                "face encoder",
                "lcm lookahead",
                "identity",
                "faceid",
                "pulid",
                "instantid",
            ],
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=encoder_names(),
                    tooltip="A .safetensors or .bin file in models/lookahead or models/ipadapter.",
                ),
            ],
            outputs=[
                ENCODER.Output(
                    "ENCODER", display_name="encoder", tooltip="The loaded encoder, for Encode Lookahead Reference."
                ),
                io.String.Output(
                    "PROVENANCE",
                    display_name="provenance",
                    tooltip="What the file says about itself: base model, image encoder, data, recogniser and licence.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, encoder_name: str | None = None) -> bool | str:
        """Say where the file was looked for, instead of the host's 'value not in list'."""
        if not encoder_name:
            return nothing_chosen(encoder_names(), "encoder file", places(), encoder_name)
        return there(encoder_path, encoder_name)

    @classmethod
    def fingerprint_inputs(cls, encoder_name: str | None = None) -> str:
        """Load again when the file was replaced."""
        return fingerprint(encoder_path, encoder_name)

    @classmethod
    def execute(cls, encoder_name: str) -> io.NodeOutput:
        encoder, text = load(encoder_path(encoder_name))
        return io.NodeOutput(encoder, text, ui=ui.PreviewText(text))
