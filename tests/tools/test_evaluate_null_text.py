"""What `make evaluate ARGS=--null-text` compares, and how changes are told."""

import json

import pytest
import torch
from lcm_lookahead.evaluation.stats import Interval
from lcm_lookahead.mini.studies import drawing, guidance, null_text
from lcm_lookahead.mini.studies.study import SIMILARITY, STYLE
from lcm_lookahead.mini.world.references import reference_faces

PAIRS = {
    "reference": (null_text.ARMS, lambda arms: drawing.graph(["a.png"], 5, arms, ("photo",)), "| photo guider"),
    "guided": (null_text.GUIDED, lambda arms: guidance.graph(guidance.IDENTITY, ["a.png"], 0, 5, arms), "samples"),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_two_arms_of_a_pair_differ_in_the_null_text_alone(kind):
    arms, graph, what = PAIRS[kind]
    both = null_text.with_both(arms)
    assert list(both) == [f"{arm}, {text}" for arm in arms for text in null_text.NULL_TEXTS]
    nodes = graph(both)

    def reached(node):
        """All that a node draws with, by class, without names."""
        inputs = nodes[node]["inputs"].items()
        return [nodes[node]["class_type"], *((k, reached(v[0]) if isinstance(v, list) else v) for k, v in inputs)]

    for arm in arms:
        empty, zeros = (reached(f"{arm}, {text} {what}") for text in null_text.NULL_TEXTS)
        assert empty != zeros and "ConditioningZeroOut" not in repr(empty)
        encoded = reached("negative")
        assert repr(zeros).replace(repr(["ConditioningZeroOut", ("conditioning", encoded)]), repr(encoded)) == repr(
            empty
        )


def test_guidance_is_measured_by_two_presets_and_without_it():
    settings = [arm.settings.get("preset") for arm in null_text.GUIDED.values()]
    assert settings == [None, "instant", "balanced"] and list(null_text.GUIDED_PEOPLE)[::47] == [300, 347]


def test_changes_are_paired_person_by_person():
    faces = reference_faces(10)
    drawn = {f"a, {text}": faces[:, None] for text in null_text.NULL_TEXTS}
    drawn["a, zeros"] = torch.stack([faces, faces.roll(1, 0)], 1)
    drawn["a, empty prompt"] = torch.stack([faces, faces], 1)
    figures = null_text.measure(faces, drawn, ["a"], [["photo", "photo"]] * 10)
    change = figures[null_text.change_of("a")]
    empty, zeros = (figures[f"a, {text}"] for text in null_text.NULL_TEXTS)
    assert list(empty[SIMILARITY]) == pytest.approx([1.0] * 3, abs=1e-5)
    assert change[SIMILARITY].value == pytest.approx(zeros[SIMILARITY].value - 1, abs=1e-5)
    assert change[SIMILARITY].high < 0 and change[STYLE].value == 0


def test_the_page_has_both_tables_and_marks_what_is_beyond_its_interval():
    none, some = Interval(0.0, -0.1, 0.1), Interval(0.1, 0.05, 0.2)
    arms = [*null_text.ARMS, *null_text.GUIDED]
    names = [f"{arm}, {text}" for arm in arms for text in null_text.NULL_TEXTS]
    figures = {name: {SIMILARITY: some, STYLE: some} for name in names}
    figures |= {null_text.change_of(arm): {SIMILARITY: none, STYLE: none} for arm in arms}
    still = null_text.page(figures, 10)
    assert "]*" not in still and "No change is beyond its interval" in still and "changes by less than 0.11" in still
    figures[null_text.change_of("guidance, balanced")][SIMILARITY] = some
    moved = null_text.page(figures, 10)
    rows = [line for line in moved.splitlines() if line.startswith("| ") and "null text" not in line]
    assert len(rows) == 3 * len(arms)
    assert [row for row in rows if "]*" in row] == [rows[-1]] and "numbers 300 to 347" in moved
    assert f"intervals: {SIMILARITY} of guidance, balanced." in moved


def test_each_part_is_drawn_of_its_own_people_and_all_is_written(tmp_path, monkeypatch):
    faces, asked = reference_faces(10), {}

    def draw(references, arms, styles):
        asked["reference"] = (references, list(arms))
        return faces, {arm: faces[:, None].expand(-1, len(styles), -1, -1, -1) for arm in arms}

    def draw_guided(loss, arms, count, first):
        asked["guided"] = (loss, list(arms), count, first)
        return guidance.DrawnArms(faces, dict.fromkeys(arms, faces), dict.fromkeys(arms, 1.0))

    monkeypatch.setattr(null_text, "draw", draw)
    monkeypatch.setattr(guidance, "draw", draw_guided)
    null_text.evaluate(10, tmp_path, range(300, 310))
    assert asked["reference"] == (10, list(null_text.with_both(null_text.ARMS)))
    assert asked["guided"] == (guidance.IDENTITY, list(null_text.with_both(null_text.GUIDED)), 10, 300)
    found = json.loads((tmp_path / "null_text.json").read_text())
    assert len(found) == 3 * (len(null_text.ARMS) + len(null_text.GUIDED))
    assert (tmp_path / "null_text.jpg").stat().st_size > 0
    assert "numbers 300 to 309" in (tmp_path / "null_text.md").read_text()
