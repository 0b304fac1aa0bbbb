"""Who draws: a small interface, behind which stand a real ComfyUI (`host.py`) and diffusers (`pipeline.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...host.client import Client
from .library import Library, digest_of
from .methods import Method
from .scenes import Drawable, Drawn, PictureJob
from .sections import DrawingOptions


@dataclass(frozen=True)
class ModelFiles:
    """The files of `models`, found.

    checkpoint: SDXL in one file, for the host; folder: SDXL as diffusers reads it (a folder, or the same file);
    image_encoder, image_encoder_folder: likewise.
    """

    checkpoint: Path | None
    folder: Path
    image_encoder: Path | None
    image_encoder_folder: Path | None
    few_step: Path | None
    pack: Path | None

    def digest(self) -> str:
        """Tells what pictures depend on: the contents of the models' files."""
        base = self.checkpoint or self.folder
        return repr([None if p is None else digest_of(p) for p in (base, self.image_encoder, self.few_step)])


#: A function that puts models into a base folder -> the running host. Given by whoever knows how hosts are started.
OpenHost = Callable[[Callable[[Path], None]], AbstractContextManager[Client]]


@dataclass(frozen=True)
class Setting:
    """All that a back end draws with."""

    files: ModelFiles
    drawing: DrawingOptions
    library: Library
    methods: Mapping[str, Method]
    open_host: OpenHost


class Backend(Protocol):
    """An opened back end. about: its version, of which pictures depend."""

    about: str

    def check(self, name: str, method: Method, job: PictureJob) -> None:
        """Make sure that a method can be drawn, before anything is. Raises EvaluationError, one sentence."""
        ...

    def draw(self, method: Drawable, job: PictureJob, weight: float) -> Drawn:
        """Draw a picture. Raises EvaluationError, one sentence, where it fails."""
        ...
