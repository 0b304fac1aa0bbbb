"""What a visitor does in ComfyUI's page: makes a template small, runs it, looks at what came."""

import itertools
import json
import time

from lcm_lookahead.host.page import TOASTS

NODES = "[app.graph, ...(app.graph.subgraphs?.values() ?? [])].flatMap(graph => graph.nodes)"
RUN = "[...document.querySelectorAll('button')].find(e => e.innerText.trim() === 'Run' && e.checkVisibility())"
READABLE = 0.6  # below about 0.57 the page draws no text
# The mini world's pictures have 128 pixels, and a few steps are enough to look at.
SMALL = {
    "width": 128,
    "height": 128,
    "size": 128,
    "steps": 4,
    "iterations": 2,
    "backbone": "squeeze",
    "weights": "random",
}
_seeds = itertools.count(1000)


def make_small(page, **values):
    """Set what a run takes long by, and a seed that no run had before: else the host would answer from its cache.

    values: of widgets by name, beside or in the place of SMALL.
    """
    values = SMALL | values | {"seed": next(_seeds), "noise_seed": next(_seeds)}
    page.evaluate(
        f"(values => {NODES}.flatMap(n => n.widgets ?? []).filter(w => w.name in values).forEach(w => {{"
        " const value = values[w.name]; if (w.type !== 'combo' || w.options.values.includes(value)) w.value = value;"
        f" }}))({json.dumps(values)})"
    )


def known(host):
    """The numbers of all prompts that a host has: those that wait or run first, which may end meanwhile."""
    queued = [prompt[1] for prompts in host.call("/queue").values() for prompt in prompts]
    return {*queued, *host.call("/history")}


def queue(page, host):
    """Press Run: the number of the prompt that the host has then."""
    before = known(host)
    page.click(RUN)
    new, end = set(), time.monotonic() + 300
    while not new:
        assert time.monotonic() < end, host.last_words()
        new = known(host) - before
        time.sleep(0.05)
    return new.pop()


def run(page, host):
    """Press Run and wait for the end: the result, whose picture the page shows then."""
    return host.wait(queue(page, host))


def wait_for_picture(page, result, name=None):
    """Wait until the page shows a picture that a run has put out, by default the last: on its node, or in the app's
    middle."""
    name = name or result.check().images[-1].name
    page.wait_for(
        f"[...{NODES}.flatMap(n => n.imgs ?? []), ...document.querySelectorAll('img')]"
        f".some(e => decodeURIComponent(e.src).includes('{name}') && e.naturalWidth)"
    )


def covered(boxes):
    """Pairs of nodes of which one covers a part of the other; a unit is left to rounding."""
    return [
        (one, other)
        for (one, (a, b, c, d)), (other, (e, f, g, h)) in itertools.combinations(boxes.items(), 2)
        if a + 1 < g and e + 1 < c and b + 1 < h and f + 1 < d
    ]


def forget_toasts(page):
    """Take away the messages that are shown."""
    page.evaluate("(all => all.dismissAll ? all.dismissAll() : all.removeAll())(app.extensionManager.toast)")
    page.wait_for(f"!{TOASTS}.length")


def toast_with(page, words):
    """The message that holds these words, waited for."""
    page.wait_for(f"{TOASTS}.some(e => e.innerText.includes({words!r}))", 60)
    page.wait_for(f"!{TOASTS}.some(e => e.getAnimations().length)")
    return next(text for text in page.toasts() if words in text)
