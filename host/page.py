"""The real web page of ComfyUI in headless Chromium: what a user's browser makes of a workflow file.

The page is ComfyUI's front end, a package of its own (GPL-3), fetched into `.cache` when it is first needed. Chromium
is the user's, steered through its DevTools protocol; it can reach nothing but 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..lookahead.files.atomic import atomic_folder
from ..tools.common import CACHE, Problem, Stopwatch, one_at_a_time
from ..tools.setup import pip
from .fetch import environment_python
from .server import Host, die_with_parent

#: The front end that the default ComfyUI names in its requirements, and the hash of its wheel.
FRONT_END = ("1.47.12", "b2155c1afbf30afd06ed217307a1abd92955b329361353a1b68a5297fc00902e")
#: An environment variable with another front end's version, which is fetched without a hash to hold it to.
CHOICE = "FRONT_END_VERSION"
#: The messages in the corner of the page, in JavaScript: those of PrimeVue, and newer pages' own.
TOASTS = "[...document.querySelectorAll('.p-toast-message, [data-testid=toast]')]"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # a container's root may have none; the page is the project's own server
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-sync",
    "--disable-extensions",
    "--disable-component-update",
    "--disable-background-networking",
    "--no-first-run",
    "--no-default-browser-check",
    "--mute-audio",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-port=0",
)
#: Answers what a first visit asks; all else is as a first visitor has it.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.OnboardingCoachmarks.Seen": ["appMode"]}
READY = "window.app?.extensionManager && window.app.graph?.nodes.length"  # its default workflow comes last
OPENED = "window.app.extensionManager.workflow.activeWorkflow.path"
TITLE = 30  # height of a node's title, which lies above its position
BADGE = 20  # height of the label above the title that names a node's pack


def front_end_version() -> str:
    """The version of the page: FRONT_END_VERSION, else the default ComfyUI's; a Problem where it is none."""
    version = os.environ.get(CHOICE) or FRONT_END[0]
    if not re.fullmatch(r"\d+(\.\d+)+", version):
        raise Problem(f"{CHOICE}={version} is not a version: give one like {FRONT_END[0]}, or none.")
    return version


def front_end() -> Path:
    """The folder of the page's files, fetched once."""
    version = front_end_version()
    target = CACHE / "frontend" / version
    static = target / "comfyui_frontend_package" / "static"
    if not static.is_dir():
        with one_at_a_time("frontend"):
            if not static.is_dir():
                with atomic_folder(target, over=True) as new:
                    pins = new / "pins.txt"
                    known = version == FRONT_END[0]
                    pins.write_text(f"comfyui-frontend-package=={version}{f' --hash=sha256:{FRONT_END[1]}' * known}\n")
                    quick = ["install", "--no-deps", "--no-compile", "--only-binary=:all:"]
                    quick += ["--require-hashes"] * known
                    step = "Fetching ComfyUI's web page"
                    pip(environment_python(), [*quick, "-r", str(pins), "--target", str(new)], step)
    return static


def browser() -> str | None:
    """The path of a Chromium, if there is one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def check_browser() -> str:
    """The path of a Chromium; a Problem without one."""
    program = browser()
    if program is None:
        raise Problem("there is no Chromium on the PATH: install one (on Debian: `apt install chromium`).")
    return program


@contextlib.contextmanager
def page_host(prepare: Callable[[Path], None] | None = None, **options: Any) -> Iterator[Host]:
    """A host that serves the page. prepare: as for `Host`; the rest are further arguments of it."""

    def with_settings(base: Path) -> None:
        settings = base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(SETTINGS | {"Comfy.InstalledVersion": front_end_version()}))
        if prepare is not None:
            prepare(base)

    with Host(prepare=with_settings, front_end=front_end(), **options) as host:
        yield host


class Page:
    """The page of a host in a Chromium of its own; a context manager.

    Args:
        url: the host's address.
        size: width and height of the window in pixels.
    """

    def __init__(self, url: str, size: tuple[int, int] = (1920, 1080)) -> None:
        self.url, self.size = url, size
        self.errors: list[str] = []  # what the page's scripts threw
        self.clicks = 0  # of the mouse, since it was set to 0
        self._asked: int | None = None  # the file input whose dialog is open
        self._loop = asyncio.new_event_loop()
        self._profile: Path | None = None
        self._process: subprocess.Popen | None = None
        self._session = self._socket = None
        self._number = 0

    def __enter__(self) -> Page:
        program = check_browser()
        CACHE.mkdir(exist_ok=True)
        self._profile = Path(tempfile.mkdtemp(prefix="browser-", dir=CACHE))
        width, height = self.size
        window = [f"--window-size={width},{height}", f"--user-data-dir={self._profile}", "about:blank"]
        try:
            with open(self._profile / "browser.log", "wb") as log:
                self._process = subprocess.Popen(
                    [program, *FLAGS, *window],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=die_with_parent if sys.platform == "linux" else None,
                )
            self._loop.run_until_complete(self._connect())
            self.call("Runtime.enable")
            self.call("Page.enable")
            self.resize(width, height)
            self.load()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            with contextlib.suppress(Exception):
                self.call("Browser.close")
        if self._session is not None:
            self._loop.run_until_complete(self._session.close())
        self._loop.close()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    async def _connect(self) -> None:
        import aiohttp

        watch, port_file = Stopwatch(), self._profile / "DevToolsActivePort"
        while not (port_file.is_file() and "\n" in port_file.read_text()):
            if self._process.poll() is not None or watch.seconds > 60:
                last = (self._profile / "browser.log").read_text(errors="replace").strip().splitlines()[-3:]
                raise Problem(f"Chromium did not start; its last words: {' '.join(last)}")
            await asyncio.sleep(0.05)
        port = port_file.read_text().splitlines()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            tab = next(one for one in await answer.json() if one["type"] == "page")
        self._socket = await self._session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), 60))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("method") == "Runtime.exceptionThrown":
                details = message["params"]["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            if message.get("method") == "Page.fileChooserOpened":
                self._asked = message["params"]["backendNodeId"]
            if (
                message.get("method") == "Page.javascriptDialogOpening"
            ):  # "leave this page?", once something was clicked
                await self._socket.send_json(
                    {"id": 0, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
                )
            if message.get("id") == self._number:
                if "error" in message:
                    raise Problem(f"Chromium refused {method}: {message['error'].get('message')}")
                return message["result"]

    def resize(self, width: int, height: int) -> None:
        """Give the window another size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page, a promise awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise Problem(f"the page's script failed: {details.get('exception', {}).get('description', details)}")
        return answer["result"].get("value")

    def wait_for(self, expression: str, timeout: float = 120) -> None:
        """Wait until an expression is true in the page."""
        watch = Stopwatch()
        while not self.evaluate(f"!!({expression})"):
            if watch.seconds > timeout:
                raise Problem(f"the page did not get to `{expression}` within {timeout:.0f} s.")
            time.sleep(0.1)

    def load(self) -> None:
        """Load the page anew, with no workflow and nothing said against one."""
        self.call("Page.navigate", url="about:blank")
        self.wait_for("location.href === 'about:blank'")  # a navigation that overtakes another is never answered
        self.errors.clear()
        # Else the page would open again what it showed before.
        self.call("Storage.clearDataForOrigin", origin=self.url, storageTypes="all")
        # (that of the tab is not among these since Chromium 150, and a page that finds half of it opens no workflow)
        script = self.call("Page.addScriptToEvaluateOnNewDocument", source="sessionStorage.clear()")
        self.call("Page.navigate", url=self.url)
        self.wait_for(READY)
        self.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])

    def open(self, workflow: dict[str, Any]) -> None:
        """Open a workflow, as if its file were dropped on the page."""
        self.errors.clear()
        self.evaluate(f"window.app.loadGraphData({json.dumps(workflow)})")
        time.sleep(1)  # the page looks for missing files after that

    def set(self, setting: str, value: Any) -> None:
        """Change a setting of the page, as its settings panel does."""
        self.evaluate(f"app.ui.settings.setSettingValueAsync({json.dumps(setting)}, {json.dumps(value)})")

    def nodes_2(self, on: bool) -> None:
        """Show nodes as Nodes 2.0 has them, or as drawn on the canvas."""
        self.set("Comfy.VueNodes.Enabled", on)
        self.wait_for(f"!!document.querySelector('[data-node-id]') === {json.dumps(on)} || !app.graph.nodes.length")

    def boxes(self) -> dict[str, tuple[float, float, float, float]]:
        """Left, top, right and bottom of every node of the graph (or subgraph) that is shown by its id, in the graph's
        units: with its title and, where it is drawn on the canvas, its badge."""
        boxes = self.evaluate(
            "app.canvas.graph.nodes.map(n => { const e = document.querySelector(`[data-node-id='${n.id}']`); if (!e) {"
            f" const up = {TITLE} + (n.badges?.some(b => (b.visible ?? b().visible)) ? {BADGE} : 0);"
            " return [n.id, n.pos[0], n.pos[1] - up, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]; }"
            " const r = e.getBoundingClientRect(), c = app.canvas.canvas.getBoundingClientRect(),"
            " s = app.canvas.ds.scale,"
            " [x, y] = app.canvas.ds.offset; return [n.id, (r.left - c.left) / s - x, (r.top - c.top) / s - y,"
            " (r.right - c.left) / s - x, (r.bottom - c.top) / s - y]; })"
        )
        return {str(number): tuple(sides) for number, *sides in boxes}

    def click(self, element: str) -> None:
        """Wait for an element (an expression in the page) and click on its middle with the mouse."""
        self.wait_for(element)
        left, top, width, height = self.evaluate(
            f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'nearest'}});"
            " const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; })()"
        )
        self.click_at(left + width / 2, top + height / 2)

    def click_at(self, x: float, y: float) -> None:
        """Click with the mouse on a place of the window, in pixels."""
        at = {"x": x, "y": y, "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.call("Input.dispatchMouseEvent", type="mousePressed", **at)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **at)
        self.clicks += 1

    def choose_file(self, click: Callable[[], None], file: Path, timeout: float = 20) -> None:
        """Do a click that opens the browser's dialog for a file, and answer it with this one."""
        self._asked, watch = None, Stopwatch()
        self.call("Page.setInterceptFileChooserDialog", enabled=True)
        try:
            click()
            while self._asked is None:
                if watch.seconds > timeout:
                    raise Problem(f"the click opened no dialog for a file within {timeout:.0f} s.")
                self.evaluate("0")  # whose answer comes after what has happened before
                time.sleep(0.05)
            self.call("DOM.setFileInputFiles", files=[str(file)], backendNodeId=self._asked)
        finally:
            self.call("Page.setInterceptFileChooserDialog", enabled=False)

    def open_templates(self, pack: str) -> None:
        """Open the dialog with the templates, and in it those of a pack (the name of its folder), as a user does."""
        watch = Stopwatch()
        while not self.evaluate("!!document.querySelector('[role=dialog] nav')"):
            if watch.seconds > 60:
                raise Problem("the page's button Templates opened no dialog within 60 s.")
            button = "document.querySelector('button[aria-label=Templates]')"
            self.wait_for(button)
            if not self.evaluate(f"{button}.checkVisibility()"):  # an app is open, which has none
                graph = "document.querySelectorAll('button[aria-label=\"Enter node graph\"]')"
                self.click(f"[...{graph}].find(e => e.checkVisibility())")
                self.wait_for(f"{button}.checkVisibility()")
            self.click(button)  # in vain while the page still begins
            time.sleep(0.5)
        names = "[...document.querySelectorAll('[role=dialog] nav span')]"
        self.click(f"{names}.find(e => e.textContent.trim() === {json.dumps(pack)})")
        self.wait_for("document.querySelector('[data-testid^=template-workflow-]')")

    def pick_template(self, name: str) -> None:
        """Click on a template in the open dialog, and wait until it is the open workflow."""
        self.errors.clear()
        self.evaluate("window.app.graph.nodes.forEach(n => { n.before = true; })")  # a template can be open already
        card = f"[data-testid={json.dumps(f'template-workflow-{name}')}]"
        self.click(f"document.querySelector({json.dumps(card)})")
        self.wait_for(
            f"{OPENED}.startsWith({json.dumps(f'workflows/{name}')}) && !document.querySelector('[role=dialog] nav')"
            " && window.app.graph.nodes.length && !window.app.graph.nodes.some(n => n.before)"
        )
        time.sleep(1)  # the page looks for missing files after that

    def toasts(self) -> list[str]:
        """The texts of the messages in the corner of the page."""
        return self.evaluate(f"{TOASTS}.map(e => e.innerText.trim())")

    def screenshot(self):
        """Takes a picture (PIL) of what the window shows."""
        from PIL import Image

        data = self.call("Page.captureScreenshot", format="png")["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")

    def complaints(self) -> list[str]:
        """All that is wrong with the open workflow, as the page sees it; empty when it can be run."""
        if self.evaluate("!!document.querySelector('[data-testid=error-overlay-see-errors]')"):
            self.evaluate("document.querySelector('[data-testid=error-overlay-see-errors]').click()")
            self.wait_for("document.querySelector('[data-testid^=error-group-missing]')")
        groups = self.evaluate(
            "[...document.querySelectorAll('[data-testid=error-overlay], [data-testid^=error-group-missing]')]"
            ".map(e => e.innerText.replace(/\\s+/g, ' '))"
        )
        nodes = self.evaluate(
            "app.graph.nodes.filter(n => n.has_errors || !(n.type in LiteGraph.registered_node_types))"
            ".map(n => `node ${n.id} (${n.type}) is marked as wrong`)"
        )
        return groups + nodes + self.errors

    def api(self) -> dict[str, dict[str, Any]]:
        """Returns what the page would queue for the open workflow."""
        return self.evaluate("window.app.graphToPrompt().then(prompt => prompt.output)")

    def saved(self) -> dict[str, Any]:
        """The open workflow as the page saves it, without the place and zoom of the view."""
        workflow = self.evaluate("window.app.graph.serialize()")
        workflow["extra"].pop("ds", None)
        return workflow

    def help_of(self, node_type: str) -> str:
        """The text that the page's panel shows as help of a node."""
        node = {"id": 1, "type": node_type, "pos": [0, 0], "size": [300, 200], "flags": {}, "order": 0, "mode": 0}
        graph = json.dumps({"nodes": [node], "links": [], "version": 0.4})
        self.evaluate(f"window.app.loadGraphData({graph})")
        self.evaluate("app.canvas.selectNode(app.graph.getNodeById(1)), app.canvas.setDirty(true, true)")
        button, text = "[data-testid=info-button]", "[data-testid=properties-panel] .node-help-content"
        self.wait_for(f"document.querySelector('{button}')")
        self.evaluate(f"document.querySelector('{button}').click()")
        self.wait_for(f"document.querySelector('{text} h1')")
        return self.evaluate(f"document.querySelector('{text}').innerText.trim()")

    def needed_sizes(self) -> dict[str, list[float]]:
        """The least width and height in which each node of the open workflow shows all its inputs and values."""
        return self.evaluate("Object.fromEntries(app.graph.nodes.map(n => [n.id, [...n.computeSize()]]))")

    def picture(self, margin: float = 20):
        """The open graph in its true size, as a picture of PIL."""
        from PIL import Image

        left, top, right, bottom = self.evaluate(
            "app.graph.nodes.map(n => [n.pos[0], n.pos[1], n.pos[0] + n.size[0], n.pos[1] + n.size[1]])"
            ".reduce((a, b) => [Math.min(a[0], b[0]), Math.min(a[1], b[1]),"
            " Math.max(a[2], b[2]), Math.max(a[3], b[3])])"
        )
        top -= TITLE
        bars = 300  # more than the page's own bars and its map take on each side
        width, height = right - left, bottom - top
        self.resize(int(width) + 2 * bars, int(height) + 2 * bars)
        self.evaluate(
            f"app.canvas.ds.scale = 1, app.canvas.ds.offset = [{bars - left}, {bars - top}],"
            " app.canvas.setDirty(true, true)"
        )
        time.sleep(1)
        clip = {"x": bars - margin, "y": bars - margin, "scale": 1}
        clip |= {"width": width + 2 * margin, "height": height + 2 * margin}
        data = self.call("Page.captureScreenshot", format="png", clip=clip)["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def text_of(workflow: dict[str, Any]) -> str:
    """A workflow as the text of a file in which a change of one node is a change of few lines."""
    text = json.dumps(workflow, indent=1, ensure_ascii=False)

    def flat(values: re.Match[str]) -> str:
        return f"[{' '.join(line.strip() for line in values.group(1).splitlines())}]"

    return re.sub(r"\[\s*\n([^\[\]{}]*)\n\s*\]", flat, text) + "\n"
