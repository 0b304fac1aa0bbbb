"""The real web page of ComfyUI in a headless Chromium, before a real host that has every file the workflows name."""

import os

import pytest
from lcm_lookahead.host import page as tool
from lcm_lookahead.host.fetch import DEFAULT_VERSION
from lcm_lookahead.tools.page import stand_ins


@pytest.fixture(scope="session")
def host():
    if tool.browser() is None:
        pytest.skip("no Chromium on the PATH (on Debian: apt install chromium)")
    if os.environ.get("COMFYUI_DIR"):
        pytest.skip("COMFYUI_DIR is set: the page that belongs to it is not known")
    with tool.page_host(stand_ins, version=DEFAULT_VERSION) as running:
        yield running


@pytest.fixture(scope="session")
def browser(host):
    """One Chromium for all tests: starting it takes longer than they do."""
    with tool.Page(host.url) as opened:
        yield opened
