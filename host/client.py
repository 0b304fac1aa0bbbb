"""A client of a running ComfyUI: queue a prompt, follow its progress, read how it ended, interrupt it."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..tools.common import Problem, Stopwatch


@dataclass(frozen=True)
class Progress:
    """One step of progress in a run: `value` of `maximum` steps of a node."""

    node_id: str
    class_type: str
    value: int
    maximum: int


@dataclass
class Result:
    """Tells how a run ended. `status` is "success", "error" or "interrupted"."""

    prompt_id: str
    status: str
    seconds: float
    outputs: dict[str, dict[str, Any]]
    error: dict[str, Any] | None
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)

    def check(self) -> Result:
        """The result itself, if the run succeeded; else a Problem that names the node and what it said."""
        if self.status != "success":
            error = self.error or {}
            raise Problem(
                f"the run ended with status {self.status!r} at node {error.get('node_id')} "
                f"({error.get('node_type')}): {error.get('exception_message', '').strip()}"
            )
        return self


class PromptRefused(Problem):
    """The host did not accept a prompt; `node_errors` is its answer, by node id."""

    def __init__(self, message: str, node_errors: dict[str, Any]) -> None:
        super().__init__(message)
        self.node_errors = node_errors


class Client:
    """A client of the ComfyUI at `url`, whose output folder can be read from here.

    Args:
        url: the server's address, without a slash at its end.
        base: the server's base directory (input, output, temp ...), or None while there is none yet.
    """

    def __init__(self, url: str, base: Path | None) -> None:
        self.url, self.base = url, base
        self._object_info: dict[str, Any] | None = None

    def folder(self, name: str) -> Path:
        """A folder of the base directory: "input", "output", "models/checkpoints" ..."""
        return self.base / name

    def check_alive(self) -> None:
        """Raise a Problem when the server is known to have ended; whoever owns its process knows."""

    def last_words(self) -> str:
        """Returns what to quote of the server's log when it is silent; nothing where there is no log."""
        return ""

    def call(self, path: str, data: Any = None, timeout: float = 60) -> Any:
        """GET a path, or POST `data` to it as JSON; returns the answer's JSON (None when empty)."""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = answer.read()
        return json.loads(text) if text.strip() else None

    def object_info(self) -> dict[str, Any]:
        """The schema of every node the host has loaded, by class type."""
        if self._object_info is None:
            self._object_info = self.call("/object_info")
        return self._object_info

    def upload(self, picture: Path, name: str) -> str:
        """Put a picture into the input folder, over one of the same name; returns the name that LoadImage takes."""
        boundary = uuid.uuid4().hex
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n'.encode(),
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'.encode(),
            b"Content-Type: image/png\r\n\r\n" + picture.read_bytes() + b"\r\n",
            f"--{boundary}--\r\n".encode(),
        ]
        kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        request = urllib.request.Request(self.url + "/upload/image", b"".join(parts), kind)
        with urllib.request.urlopen(request, timeout=60) as answer:
            stored = json.loads(answer.read())
        return "/".join(filter(None, (stored.get("subfolder"), stored["name"])))

    def picture(self, image: Mapping[str, str]) -> bytes:
        """The file of a picture that a run put out, as `Result.outputs` describes it."""
        query = urllib.parse.urlencode({k: image.get(k, "") for k in ("filename", "subfolder", "type")})
        with urllib.request.urlopen(f"{self.url}/view?{query}", timeout=60) as answer:
            return answer.read()

    def queue(self, prompt: Mapping[str, Any], client_id: str | None = None) -> str:
        """Queue an API prompt and return its id; PromptRefused when the host does not accept it."""
        self.check_alive()
        try:
            answer = self.call("/prompt", {"prompt": prompt, "client_id": client_id or uuid.uuid4().hex})
        except urllib.error.HTTPError as refused:
            answer = json.loads(refused.read() or b"{}")
        errors = answer.get("node_errors") or {}
        if "prompt_id" in answer and not errors:
            return answer["prompt_id"]
        if "prompt_id" in answer:  # the host runs the outputs that are valid: all or nothing is clearer here
            self.call("/queue", {"delete": [answer["prompt_id"]]})
            self.interrupt()
        details = [
            f"node {node_id} ({error.get('class_type')}): {one.get('message')} ({one.get('details')})"
            for node_id, error in errors.items()
            for one in error.get("errors", [])
        ]
        top = answer.get("error") or {}
        top = top if isinstance(top, dict) else {"message": str(top)}
        raise PromptRefused(
            "ComfyUI refused the prompt: " + ("; ".join(details) or f"{top.get('message')} {top.get('details', '')}"),
            errors,
        )

    def interrupt(self) -> None:
        """Interrupt the run in progress."""
        self.call("/interrupt", {})

    def free(self) -> None:
        """Have the host forget its cached results and unload its models."""
        self.call("/free", {"unload_models": True, "free_memory": True})

    def wait(self, prompt_id: str, timeout: float = 600) -> Result:
        """Wait for a queued prompt by asking for it until it has ended."""
        watch = Stopwatch()
        while True:
            self.check_alive()
            history = self.call(f"/history/{prompt_id}")
            if prompt_id in history:
                return self._result(prompt_id, history[prompt_id], watch.seconds)
            if watch.seconds > timeout:
                raise Problem(
                    f"the prompt did not end within {timeout:.0f} s; the host's last words:\n{self.last_words()}"
                )
            time.sleep(0.05)

    def run(
        self, prompt: Mapping[str, Any], progress: Callable[[Progress], None] | None = None, timeout: float = 600
    ) -> Result:
        """Queue an API prompt and wait for its end, calling `progress` for every step the host reports.

        The callback may call `interrupt()`. A run that fails or is interrupted is a Result too: call its `check()`
        where only success will do. A prompt that the host refuses raises PromptRefused.
        """
        if progress is None:
            return self.wait(self.queue(prompt), timeout)
        return asyncio.run(self._run(dict(prompt), progress, timeout))

    async def _run(self, prompt: dict[str, Any], progress: Callable[[Progress], None], timeout: float) -> Result:
        import aiohttp

        watch, client = Stopwatch(), uuid.uuid4().hex
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as socket_,
        ):
            prompt_id = await asyncio.to_thread(self.queue, prompt, client)
            while True:
                try:
                    message = await socket_.receive(timeout=2)
                except TimeoutError:
                    message = None
                if message is not None and message.type == aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    data = event.get("data") or {}
                    if data.get("prompt_id") not in (None, prompt_id):
                        continue
                    if event["type"] == "progress":
                        node = str(data.get("node"))
                        class_type = prompt.get(node, {}).get("class_type", "")
                        step = Progress(node, class_type, int(data["value"]), int(data["max"]))
                        await asyncio.to_thread(progress, step)
                    elif event["type"] not in ("execution_success", "execution_error", "execution_interrupted"):
                        continue
                    else:
                        break
                elif message is None or message.type != aiohttp.WSMsgType.BINARY:  # silence, or the socket has closed
                    if prompt_id in await asyncio.to_thread(self.call, f"/history/{prompt_id}"):
                        break
                    self.check_alive()
                    if watch.seconds > timeout:
                        raise self._too_late(timeout)
                    await asyncio.sleep(0.05)
        result = await asyncio.to_thread(self.wait, prompt_id, timeout)
        result.seconds = watch.seconds
        return result

    def _too_late(self, timeout: float) -> Problem:
        return Problem(f"the prompt did not end within {timeout:.0f} s; the host's last words:\n{self.last_words()}")

    def _result(self, prompt_id: str, entry: dict[str, Any], seconds: float) -> Result:
        status = entry.get("status") or {}
        result = Result(prompt_id, status.get("status_str", "success"), seconds, entry.get("outputs") or {}, None)
        for name, data in status.get("messages") or []:
            if name == "execution_error":
                result.error = data
            elif name == "execution_interrupted":
                result.status, result.error = "interrupted", data
            elif name == "execution_cached":
                result.cached = [str(n) for n in data.get("nodes", [])]
            if name in ("execution_error", "execution_interrupted"):
                result.executed = [str(n) for n in data.get("executed", [])]
        for output in result.outputs.values():
            for image in output.get("images") or []:
                if self.base is not None and image.get("type") in ("output", "temp"):
                    folder = self.base / image["type"] / image.get("subfolder", "")
                    result.images.append(folder / image["filename"])
        return result
