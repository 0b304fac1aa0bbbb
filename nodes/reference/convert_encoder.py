"""The node that makes an encoder file of another kind of file, or an IP-Adapter of an encoder file."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ...lookahead.files import convert
from ..folders import file_names, made, nothing_chosen, plain_name
from ..schema import schema
from .load_encoder import FOLDERS, encoder_path, places

EXTENSIONS = (".safetensors", ".bin", ".pt")
NO_BASE = "do not compare"


def source_names() -> list[str]:
    """Names of all files that may be converted, those of `models/lookahead` first."""
    return list(dict.fromkeys(name for folder in FOLDERS for name in file_names(folder, EXTENSIONS)))


def base_names() -> list[str]:
    """Checkpoints that a published checkpoint's copy of SDXL can be compared with."""
    return file_names("checkpoints", (".safetensors",))


def target_path(file_name: str) -> Path:
    """Gives a new file its place: in the first `models/lookahead`. Raises ValueError for what is no plain name."""
    name = plain_name(file_name, "file_name", "my_encoder")
    if not name.lower().endswith(".safetensors"):
        name += ".safetensors"
    return made("lookahead") / name


class LookaheadConvertEncoder(io.ComfyNode):
    """File in `models/lookahead` or `models/ipadapter` -> another file in `models/lookahead`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadConvertEncoder",
            display_name="Convert Lookahead Encoder",
            category="lookahead/loaders",
            description="Makes an encoder file of a stock IP-Adapter Plus or of the checkpoint of the paper's authors "
            "(model_ckpt.pt), or a stock IP-Adapter Plus of an encoder file. Needed once a file.",
            search_aliases=["model_ckpt.pt", "lcm lookahead checkpoint", "export ip-adapter"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "source_name",
                    options=source_names(),
                    tooltip="A .safetensors, .bin or .pt file in models/lookahead or models/ipadapter.",
                ),
                io.String.Input(
                    "file_name",
                    default="my_encoder",
                    tooltip="Name of the new file, which goes to models/lookahead. A file of that name must not exist.",
                ),
                io.Combo.Input(
                    "to",
                    options=[convert.ENCODER, convert.IP_ADAPTER],
                    default=convert.ENCODER,
                    tooltip="Format of the new file. encoder: our own, with everything. ip-adapter: the image prompt "
                    "alone, in the public format that other packs read.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(convert.PRECISIONS),
                    default="float16",
                    tooltip="Precision of the weights in the new file; public files have float16.",
                ),
                io.Combo.Input(
                    "base_name",
                    options=[NO_BASE, *base_names()],
                    default=NO_BASE,
                    optional=True,
                    tooltip="Checkpoint of SDXL to compare with the copy of the base model that the paper's checkpoint "
                    "holds (only for that file). Another base model is then refused.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "REPORT", display_name="report", tooltip="What was read and written, and what was left out."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, source_name: str | None = None) -> bool | str:
        """Say where the file was looked for, instead of the host's 'value not in list'."""
        if not source_name:
            return nothing_chosen(source_names(), "file to convert", places(), source_name)
        try:
            encoder_path(source_name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        source_name: str,
        file_name: str,
        to: str = convert.ENCODER,
        precision: str = "float16",
        base_name: str = NO_BASE,
    ) -> io.NodeOutput:
        target = target_path(file_name)
        base = None if base_name == NO_BASE else folder_paths.get_full_path("checkpoints", base_name)
        if base_name != NO_BASE and base is None:
            raise ValueError(f"There is no checkpoint {base_name!r}: choose one that is in models/checkpoints.")
        report = convert.convert(encoder_path(source_name), target, to, base, precision)
        report = f"Written: {target}\n{report}"
        return io.NodeOutput(report, ui=ui.PreviewText(report))
