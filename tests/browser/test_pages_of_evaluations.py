"""Pages that an evaluation leaves, in a headless Chromium: the report of `lookahead evaluate`, a study for judges."""

import json
import threading

import pytest
import yaml
from lcm_lookahead.cli import main
from lcm_lookahead.cli.world import world_of
from lcm_lookahead.evaluation import preference
from lcm_lookahead.evaluation.harness import protocol, run
from lcm_lookahead.evaluation.harness.plot import Point, plot
from lcm_lookahead.evaluation.stats import Interval
from lcm_lookahead.host import page as tool

VALUES = {
    "title": "Two people, two methods",
    "models": {"base": "mini", "image_encoder": "mini_clip_vision.safetensors", "pack": "mini"},
    "people": {"source": "drawn", "count": 2},
    "prompts": {"photo": ["a photo of a face"], "style": ["a comic of a face"]},
    "drawing": {"size": 128, "steps": 2, "guidance": 3.0},
    "backends": ["diffusers"],
    "methods": {
        "adapter": {"kind": "encoder", "file": "mini_ip_adapter_plus_face.safetensors", "weights": [1.0, 0.5]},
        "nothing": {"kind": "none"},
    },
    "measures": {
        "identity": {"kind": "identity", "recogniser": "mini"},
        "prompt": {"kind": "prompt", "clip": "mini"},
    },
}
LISTEN = """
window.said = [];
for (const kind of ['error', 'warn']) console[kind] = (...words) => window.said.push(words.join(' '));
addEventListener('error', event => window.said.push(event.message || `${event.target.src} is not there`), true);
addEventListener('unhandledrejection', event => window.said.push(`${event.reason}`));
"""
SHOWN = "(e => e.checkVisibility() && e.getBoundingClientRect().width > 0 && e.getBoundingClientRect().height > 0)"
PICTURES = "[...document.images].filter(e => e.checkVisibility())"


class Paper(tool.Page):
    """A page of ours instead of ComfyUI's, which notes what its console is told and what it does not find."""

    def __enter__(self):
        self.listening = False
        return super().__enter__()

    def load(self):
        """Load the page anew, with what it has stored."""
        self.call("Page.navigate", url="about:blank")
        self.wait_for("location.href === 'about:blank'")
        self.errors.clear()
        if not self.listening:
            self.call("Page.addScriptToEvaluateOnNewDocument", source=LISTEN)
            self.listening = True
        self.call("Page.navigate", url=self.url)
        self.wait_for("location.href !== 'about:blank' && document.readyState === 'complete'")

    def complaints(self):
        """All that went wrong since it was loaded."""
        return self.errors + self.evaluate("window.said")

    def sizes(self):
        """Width and height of the files of all pictures that are seen; 0 of one that cannot be shown."""
        self.wait_for(f"{PICTURES}.every(e => e.complete)")
        return self.evaluate(f"{PICTURES}.map(e => [e.naturalWidth, e.naturalHeight])")

    def whole(self):
        """Make the window as high as the page, for a picture of all of it."""
        self.resize(self.size[0], self.evaluate("document.documentElement.scrollHeight"))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A finished evaluation of the real command."""
    if tool.browser() is None:
        pytest.skip("no Chromium on the PATH (on Debian: apt install chromium)")
    folder = tmp_path_factory.mktemp("evaluated")
    path = folder / "protocol.yaml"
    path.write_text(yaml.safe_dump({**VALUES, "out": str(folder / "out")}), encoding="utf-8")
    main.main(["evaluate", str(path)])
    settings = protocol.load(path)
    return run.EvaluationRun(settings, world_of(settings))


@pytest.fixture(scope="module")
def study(evaluated, tmp_path_factory):
    """A study of its pictures, as `lookahead study make` writes it."""
    folder = tmp_path_factory.mktemp("study")
    given = ["--evaluation", str(evaluated.folder), "--questions", "identity,prompt", "--repeats", "0"]
    main.main(["study", "make", "adapter", "nothing", *given, "--out", str(folder / "study")])
    return folder / "study"


def test_the_report_shows_its_tables_plot_and_pictures_and_fits_the_window(evaluated, keep):
    with Paper((evaluated.folder / "report.html").as_uri(), (1280, 900)) as page:
        assert page.complaints() == []
        assert page.evaluate("document.title") == VALUES["title"]
        titles = [line[3:] for line in (evaluated.folder / "table.md").read_text().splitlines() if line[:3] == "## "]
        shown = page.evaluate(f"[...document.querySelectorAll('table')].filter({SHOWN}).map(t => t.rows.length)")
        assert len(titles) == 4 and shown == [4, 3, 2, 4]  # with their heads, of three arms, two of them the baseline's
        heads = page.evaluate("[...document.querySelectorAll('h2')].map(e => e.textContent)")
        assert heads == ["Trade-off", *titles, "Pictures", "Protocol"]
        assert page.evaluate(f"[...document.querySelectorAll('svg')].filter({SHOWN}).length") == 1
        assert page.evaluate("document.querySelectorAll('svg circle').length") == 3 + 2  # arms, and a legend of curves
        ((width, height),) = page.sizes()
        assert width > 3 * 128 and height > 6 * 128  # a row an arm and person
        assert page.evaluate(f"[...document.querySelectorAll('li.warning')].filter({SHOWN}).length") == 1  # few people
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.whole()
        keep(page, "report")
        page.click("document.querySelector('summary')")
        assert page.evaluate(f"{SHOWN}(document.querySelector('pre'))")
        assert page.complaints() == []


def test_a_judge_answers_in_the_study_and_the_answers_are_kept_and_sent(study, keep):
    server = preference.server(study)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    answered, pairs = [], VALUES["people"]["count"] * len(VALUES["prompts"])

    def choose(page, side):
        """A click for each question of the pair that is shown."""
        for question in ("identity", "prompt"):
            page.click(f"document.querySelector('[data-question={question}][data-side={side}]')")
            answered.append(side)

    try:
        with Paper(f"http://127.0.0.1:{server.server_address[1]}/", (1000, 800)) as page:
            button = "document.getElementById('next')"
            assert page.sizes() == [[128, 128]] * 3 and page.evaluate(f"{button}.disabled")
            prompts = {f"“{text}”" for texts in VALUES["prompts"].values() for text in texts}
            assert page.evaluate("document.getElementById('prompt').textContent") in prompts
            choose(page, "left")
            keep(page, "study")
            page.load()  # a judge who comes back finds the answers
            pressed = page.evaluate("[...document.querySelectorAll('[aria-pressed=true]')].map(e => e.dataset.side)")
            assert pressed == ["left", "left"] and not (study / "answers.jsonl").exists()
            page.click(button)
            for _ in range(1, pairs):
                assert page.sizes() == [[128, 128]] * 3
                choose(page, "right")
                page.click(button)
            page.wait_for("document.getElementById('sent').textContent === 'Your answers are sent.'")
            assert page.evaluate(f"{SHOWN}(document.getElementById('save'))")
            assert page.complaints() == []
    finally:
        server.shutdown()
        server.server_close()
    (sheet,) = [json.loads(line) for line in (study / "answers.jsonl").read_text().splitlines()]
    assert sorted(a["side"] for a in sheet["answers"]) == sorted(answered) and len(answered) == 2 * pairs
    verdicts, _ = preference.count(study)
    assert [(v.question, v.answers, v.judges) for v in verdicts] == [
        (question, pairs, 1) for question in ("identity", "prompt")
    ]


@pytest.mark.parametrize(
    "title", ["a method with a long title, its image prompt alone (diffusers)", "\u4e00\u5f20\u4eba\u8138" * 8]
)
def test_a_plot_shows_long_names_whole_and_keeps_weights_out_of_them(title, tmp_path):
    edge, middle = (Point(Interval(x, x - 0.05, x), Interval(0.5, 0.4, 0.6), f"{x:g}") for x in (0.95, 0.9))
    drawn = plot([(title, [middle, edge])], "prompt", "face")
    (tmp_path / "plot.html").write_text(f"<title>plot</title>{drawn}", encoding="utf-8")
    with Paper((tmp_path / "plot.html").as_uri(), (1000, 600)) as page:
        assert page.complaints() == []
        assert page.evaluate("[...document.querySelectorAll('svg text')].at(-1).textContent") == title
        name, weights, whole = page.evaluate(
            """(svg => { const box = e => [e.getBoundingClientRect().left, e.getBoundingClientRect().right];
                return [box([...svg.querySelectorAll('text')].at(-1)),
                    [...svg.querySelectorAll('text[font-size="10"]')].map(box), box(svg)];
            })(document.querySelector('svg'))"""
        )
    assert len(weights) == 2 and whole[0] < name[0] < name[1] < whole[1]
    assert all(right < name[0] - 14 for _, right in weights)  # with the dot of the legend between them
