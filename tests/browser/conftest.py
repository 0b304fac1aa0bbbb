"""The real web page of ComfyUI in a headless Chromium of 1600x1000, as a first visitor has it, before a real host with
the mini weights under the names of the public files."""

import os

import pytest
from lcm_lookahead.host import page as tool
from lcm_lookahead.host.fetch import DEFAULT_VERSION
from lcm_lookahead.mini.files.host_models import MINI_EXTENSIONS, link_models, write_taesd
from lcm_lookahead.mini.plan import WEIGHTS
from lcm_lookahead.tools.common import ROOT
from lcm_lookahead.tools.template_specs import FACE_ID
from stock_files import write_face_id

WINDOW = (1600, 1000)


@pytest.fixture(scope="session")
def window():
    """Width and height of a first visitor's window."""
    return WINDOW


@pytest.fixture(scope="session")
def models():
    """Puts the mini models into a host's folder; skips where there is no page to look at."""
    if tool.browser() is None:
        pytest.skip("no Chromium on the PATH (on Debian: apt install chromium)")
    if os.environ.get("COMFYUI_DIR"):
        pytest.skip("COMFYUI_DIR is set: the page that belongs to it is not known")

    def prepare(base):
        link_models(base)
        write_taesd(base)
        # The mini world has none: a random one for its sizes.
        write_face_id(base / "models" / "ipadapter" / FACE_ID, WEIGHTS / "mini_ip_adapter_plus_face.safetensors", 128)

    return prepare


@pytest.fixture(scope="session")
def host(models):
    with tool.page_host(models, version=DEFAULT_VERSION, extensions=MINI_EXTENSIONS) as running:
        yield running


@pytest.fixture(scope="session")
def browser(host):
    """One Chromium for all tests: starting it takes longer than they do."""
    with tool.Page(host.url, WINDOW) as opened:
        yield opened


@pytest.fixture
def page(browser):
    """The page, loaded anew."""
    browser.load()
    return browser


@pytest.fixture
def keep():
    """Saves a picture of the window under `output/browser`, to be looked at."""

    def save(page, name):
        folder = ROOT / "output" / "browser"
        folder.mkdir(parents=True, exist_ok=True)
        page.screenshot().save(folder / f"{name}.png")

    return save
