"""The demo with the shipped weights, in the real host: pictures, a sheet, and people who are recognised again."""

import pytest
from lcm_lookahead.mini import demo
from lcm_lookahead.mini.files.host_models import mini_host
from PIL import Image

PEOPLE = 4


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    references = demo.draw_references(PEOPLE)
    with mini_host(announce=False) as host:
        sheet = demo.show_demo(host, references, ("a photo of a face",), out, seed=5)
    return references, out, sheet


@pytest.mark.parametrize(
    ("arm", "least"), [("before_training", 0.2), ("image_prompt", 0.2), ("image_prompt_and_KV", 0.2)]
)
def test_people_are_more_alike_with_a_reference_than_without(drawn, arm, least):
    references, out, _ = drawn
    without = Image.open(out / "without_prompt_1.png")
    gains = []
    for number, reference in enumerate(references, start=1):
        likeness = demo.similarity_to(reference)
        gains.append(likeness(Image.open(out / f"reference_{number}_{arm}_prompt_1.png")) - likeness(without))
    assert sum(gains) / PEOPLE > least, gains


def test_the_sheet_shows_every_picture(drawn):
    _, out, sheet = drawn
    assert len(list(out.glob("*_prompt_?.png"))) == PEOPLE * len(demo.ARMS) + 1
    width, height = Image.open(sheet).size
    assert width > 2 * demo.SIZE and height > (PEOPLE * len(demo.ARMS) + 1) * demo.SIZE
