"""The demo with the shipped weights, in the real host: pictures, a sheet, and people who are recognised again."""

import contextlib
import dataclasses

import pytest
import torch
from lcm_lookahead.mini import demo
from lcm_lookahead.mini.files.host_models import mini_host
from PIL import Image
from samples import standard_errors

PEOPLE = 4


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    references = demo.draw_references(PEOPLE)
    with mini_host(announce=False) as host:
        sheet = demo.show_demo(host, references, demo.Extent(prompts=("a photo of a face",)), out, seed=5)
    return references, out, sheet


@pytest.mark.parametrize("arm", ["before_training", "image_prompt", "image_prompt_and_KV"])
def test_people_are_more_alike_with_a_reference_than_without(drawn, arm):
    """Paired over people: each beside the picture that was drawn of nobody from the same noise. Measured: 0.55, 0.38
    and 0.46 more alike, by 27, 4.2 and 5.5 standard errors."""
    references, out, _ = drawn
    without = Image.open(out / "without_prompt_1.png")
    gains = []
    for number, reference in enumerate(references, start=1):
        likeness = demo.similarity_to(reference)
        gains.append(likeness(Image.open(out / f"reference_{number}_{arm}_prompt_1.png")) - likeness(without))
    assert sum(gains) / PEOPLE > 0.1 and standard_errors(torch.tensor(gains)) > 2, gains


def test_the_sheet_shows_every_picture(drawn):
    _, out, sheet = drawn
    assert len(list(out.glob("*_prompt_?.png"))) == PEOPLE * len(demo.ARMS) + 1
    width, height = Image.open(sheet).size
    assert width > 2 * demo.SIZE and height > (PEOPLE * len(demo.ARMS) + 1) * demo.SIZE


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What `make demo` draws when it is called with arguments: the number of people, and the extent of both sheets."""

    def call(*arguments):
        sheets = []
        monkeypatch.setattr(demo, "mini_host", lambda port: contextlib.nullcontext())
        monkeypatch.setattr(demo, "draw_references", lambda people: [None] * people)
        monkeypatch.setattr(demo, "show_demo", lambda host, people, *asked: sheets.append((len(people), asked[0])))
        monkeypatch.setattr(demo, "show_guidance", lambda host, *asked: sheets.append(asked[0]))
        assert demo.main([f"--out={tmp_path}", *arguments]) == 0
        (people, extent), of_guidance = sheets
        assert extent == of_guidance
        return people, extent

    return call


def test_all_draws_every_prompt_arm_and_loss_and_without_it_a_part_of_them(asked, capsys):
    _, some = asked()
    assert set(some.prompts) < set(demo.PROMPTS) and set(some.arms) < set(demo.ARMS)
    assert set(some.guided) < set(demo.GUIDED) and set(some.steered) < set(demo.STEERED)
    said = capsys.readouterr().err
    assert all(part in said for part in ("start of ComfyUI", "image prompt and KV injection", "guidance"))
    everything = demo.Extent(demo.PROMPTS, tuple(demo.ARMS), tuple(demo.GUIDED), demo.STEERED)
    assert asked("--all") == (2, everything)
    assert asked("--people=3", "a face in the rain") == (3, dataclasses.replace(some, prompts=("a face in the rain",)))
