"""Every workflow as an app in ComfyUI's page: asks for its values, runs, and shows what comes."""

import numpy as np
import pytest
from lcm_lookahead.host.workflow import load
from lcm_lookahead.tools.common import ROOT
from PIL import Image
from visit import forget_toasts, make_small, queue, run, wait_for_picture

WORKFLOWS = {path.stem: load(path) for path in sorted((ROOT / "workflows").glob("*.json"))}
APPS = [name for name in WORKFLOWS if name.endswith(".app")]
GRAPHS = [name for name in WORKFLOWS if name not in APPS]
SMALLEST = {"steps": 1, "iterations": 1, "batch_size": 1, "words": 1}
BY_NUMBERS = {"preset": "as set below"}  # else a preset of likeness iterates more often than once
RUN_BUTTON = "document.querySelector('[data-testid=linear-run-button]')?.checkVisibility()"
LABELS = "[...document.querySelectorAll('[data-testid=builder-widget-label]')].map(e => e.innerText)"


@pytest.fixture(scope="module")
def loaded(browser):
    """The page, loaded anew once."""
    browser.load()
    return browser


@pytest.fixture
def page(loaded):
    forget_toasts(loaded)
    return loaded


def with_mode(name, app):
    """A workflow that opens as an app, or as a graph."""
    return {**WORKFLOWS[name], "extra": {**WORKFLOWS[name]["extra"], "linearMode": app}}


def asked(name):
    """The names of the values that an app asks for."""
    return [widget for _, widget in WORKFLOWS[name]["extra"]["linearData"]["inputs"]]


def put_out(name, result):
    """What the nodes that an app shows have put out: the names of their pictures, and their texts."""
    shown = [result.outputs.get(str(number), {}) for number in WORKFLOWS[name]["extra"]["linearData"]["outputs"]]
    pictures = [picture["filename"] for output in shown for picture in output.get("images") or ()]
    return pictures, [text for output in shown for text in output.get("text") or ()]


@pytest.fixture(scope="module")
def queued(loaded, host):
    """By workflow the number of the prompt that its app has queued: in one page, one after the other, while the host
    draws those before."""
    prompts = {}
    for name in GRAPHS:
        loaded.open(with_mode(name, app=True))
        loaded.wait_for(f"{RUN_BUTTON} && {LABELS}.length >= {len(asked(name))}", 30)
        assert loaded.evaluate(LABELS) == asked(name)
        assert loaded.complaints() == [], name
        make_small(loaded, **SMALLEST, **BY_NUMBERS if name.endswith("(identity)") else {})
        prompts[name] = queue(loaded, host)
    loaded.open({"nodes": [], "links": [], "version": 0.4})  # an app that waits is drawn again and again
    return prompts


@pytest.mark.parametrize("name", GRAPHS)
def test_every_workflow_runs_as_an_app_and_what_the_app_shows_comes_back(queued, host, name):
    """At one step of each sampling and at the mini world's size."""
    result = host.wait(queued[name]).check()
    pictures, texts = put_out(name, result)
    for file in result.images:
        if file.name in pictures:
            assert np.asarray(Image.open(file).convert("L")).std() > 5
    assert pictures or any(text.startswith("Written: ") for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_an_app_asks_for_its_values_and_shows_the_picture_of_its_run(page, host, keep, name):
    """Every workflow is an app by a button of the page, not only those that have a card as one."""
    page.open(with_mode(name, app=False))
    page.click("[...document.querySelectorAll('[aria-label=\"Enter app mode\"]')].find(e => e.checkVisibility())")
    page.wait_for(RUN_BUTTON)
    page.wait_for(f"{LABELS}.length >= {len(asked(name))}", 30)
    assert page.evaluate(LABELS) == asked(name)
    assert page.complaints() == [] and page.toasts() == []
    make_small(page)
    result = run(page, host).check()
    pictures, _ = put_out(name, result)
    for picture in pictures[:1]:  # a text this page does not show in an app
        wait_for_picture(page, result, picture)
    keep(page, f"{name} (as an app)")
    assert page.errors == []


@pytest.mark.slow
@pytest.mark.parametrize("name", APPS)
def test_an_app_of_the_list_of_templates_draws_a_picture(page, host, keep, name):
    page.open_templates(host.pack_name)
    page.pick_template(name)
    make_small(page)
    wait_for_picture(page, run(page, host))
    keep(page, name)
    assert page.toasts() == [] and page.errors == []
