"""The back end that draws in a real ComfyUI, through its HTTP API: one that is started, or one that runs already."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ...host.client import Client
from ...host.server import Host, link
from ...tools.common import Problem
from .backends import Backend, Setting
from .library import EvaluationError
from .memory import PeakMemory
from .methods import Method
from .scenes import Drawable, Drawn, HostNames, HostScene, PictureJob

HOURS = 2  # after which a picture is given up


@contextmanager
def open_backend(setting: Setting) -> Iterator[Backend]:
    """A ComfyUI with the models of the setting. Raises EvaluationError where there is no checkpoint for it."""
    files = setting.files
    if files.checkpoint is None:
        raise EvaluationError(
            f"models.base is the folder {files.folder}, and ComfyUI reads SDXL from one file: give the .safetensors."
        )
    wanted = {"checkpoints": files.checkpoint, "clip_vision": files.image_encoder, "loras": files.few_step}
    own = [(f, p) for m in setting.methods.values() for f, p in m.in_host(setting.library) if f]
    names: dict[Path, str] = {}
    places: dict[str, Path] = {}
    for folder, path in [*wanted.items(), *dict.fromkeys(own)]:
        if path is None or path in names:
            continue
        name = path.name if f"{folder}/{path.name}" not in places else f"{len(names)}-{path.name}"
        names[path], places[f"{folder}/{name}"] = name, path
    if files.pack is not None:
        places[f"insightface/models/{files.pack.name}"] = files.pack

    def put(base: Path) -> None:
        for place, path in places.items():
            link(path, base / "models" / place)

    def of(path: Path | None) -> str | None:
        return None if path is None else names[path]

    pack = files.pack.name if files.pack else None
    known = HostNames(names[files.checkpoint], of(files.image_encoder), of(files.few_step), pack, names)
    with setting.open_host(put) as client:
        yield HostBackend(client, setting, known)


class HostBackend:
    """A running host (`Backend`)."""

    def __init__(self, client: Client, setting: Setting, names: HostNames):
        self._client, self._setting, self._names = client, setting, names
        self._info: dict[str, Any] = client.object_info()
        stats = client.call("/system_stats") or {}
        self.about = f"ComfyUI {(stats.get('system') or {}).get('comfyui_version', 'unknown')}"
        self._uploaded: dict[str, str] = {}

    def _scene(self, method: Drawable, job: PictureJob, weight: float, reference: str) -> tuple[HostScene, str]:
        scene = HostScene(job, self._setting.drawing, self._setting.library, self._names, self._info, reference)
        node = method.on_host(scene, weight)
        complete(scene.nodes, self._info)
        return scene, node

    def check(self, name: str, method: Method, job: PictureJob) -> None:
        try:
            for weight in method.weights:
                scene, _ = self._scene(method, job, weight, "reference.png")
        except EvaluationError as error:
            raise EvaluationError(f"methods.{name}: {error}") from None
        if unknown := sorted({n["class_type"] for n in scene.nodes.values()} - self._info.keys()):
            raise EvaluationError(
                f"methods.{name} needs the node {', '.join(unknown)}, which this ComfyUI does not have: install the "
                "pack that it belongs to, or set host.url to a ComfyUI that has it."
            )

    def draw(self, method: Drawable, job: PictureJob, weight: float) -> Drawn:
        digest = job.person.digest
        if digest not in self._uploaded:
            self._uploaded[digest] = self._client.upload(job.person.reference, f"lookahead-{digest[:16]}.png")
        scene, node = self._scene(method, job, weight, self._uploaded[digest])
        process = self._client.process if isinstance(self._client, Host) else None  # one of somebody else is not known
        peak = PeakMemory(process.pid if process else None)
        try:
            prompt_id = self._client.queue(scene.nodes)
            result = self._client.wait(prompt_id, timeout=HOURS * 3600).check()
            images = (result.outputs.get(node) or {}).get("images") or []
            if not images:
                raise Problem(f"node {node} put out no picture")
            file = self._client.picture(images[0])
        except Problem as problem:
            raise EvaluationError(f"{method.kind}, {job.prompt.text!r}, {job.person.name}: {problem}") from None
        with Image.open(io.BytesIO(file)) as image:
            return Drawn(image.convert("RGB"), self._seconds(prompt_id, result.seconds), peak.bytes)

    def _seconds(self, prompt_id: str, otherwise: float) -> float:
        """How long the host was at it, by its own clock."""
        entry = (self._client.call(f"/history/{prompt_id}") or {}).get(prompt_id) or {}
        times = {name: data.get("timestamp") for name, data in (entry.get("status") or {}).get("messages") or []}
        start, end = times.get("execution_start"), times.get("execution_success")
        return otherwise if start is None or end is None else (end - start) / 1000


def complete(nodes: dict[str, dict[str, Any]], info: Mapping[str, Any]) -> None:
    """Give every input that is left out its default, as the page does."""
    for node in nodes.values():
        described = (info.get(node["class_type"]) or {}).get("input", {})
        for name, (kind, *options) in described.get("required", {}).items():
            choices = kind if isinstance(kind, list) and kind else [None]
            default = (options[0] if options else {}).get("default", choices[0])
            if default is not None:
                node["inputs"].setdefault(name, default)
