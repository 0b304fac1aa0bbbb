"""`lookahead curves`: what logs hold becomes a picture, and what is no log is said."""

import json

import pytest
from lcm_lookahead.cli import main
from lcm_lookahead.trainer import curves
from PIL import Image


def log(folder, lines):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_figures_of_steps_and_validations_are_read_and_what_is_no_number_is_left_out(tmp_path):
    run = log(
        tmp_path / "a",
        [
            {"step": 0, "validation": {"identity": 0.5, "style": 1}},
            {"step": 1, "diffusion": 0.1, "distance": float("nan")},
            {"step": 2, "diffusion": 0.2, "distance": 0.3},
        ],
    )
    found = curves.read(run)
    assert found["diffusion"] == [(1, 0.1), (2, 0.2)]
    assert found["distance"] == [(2, 0.3)]
    assert found["identity"] == [(0, 0.5)]
    assert found["style"] == [(0, 1)]


def test_a_mean_is_over_a_twentieth_of_the_run_and_stands_at_its_last_step():
    points = [(step, float(step)) for step in range(100)]
    assert curves.smooth(points)[0] == (4, 2.0)
    assert curves.smooth(points)[-1] == (99, 97.0)
    assert curves.smooth(points[:3]) == points[:3]


def test_the_command_draws_every_run_and_leaves_nothing_else(tmp_path, capsys):
    steps = [{"step": n, "diffusion": 1 / n, "norm_diffusion": 0.1} for n in range(1, 101)]
    folders = [log(tmp_path / name / "run", steps) for name in ("a", "b")]  # of one name: told apart by their path
    target = tmp_path / "out" / "curves.png"
    main.main(["curves", *map(str, folders), "--to", str(target)])
    assert f"Written: {target}" in capsys.readouterr().out
    with Image.open(target) as picture:
        one, colours = picture.convert("RGB"), {c for _, c in picture.convert("RGB").getcolors(1 << 16)}
    assert one.width > 2 * 3 * 110
    assert len(colours) > 2  # something is drawn
    assert [p.name for p in target.parent.iterdir()] == ["curves.png"]


@pytest.mark.parametrize(
    ("text", "says"), [(None, "cannot be read"), ("loss 0.1\n", "is not the log"), ("", "hold no figures yet")]
)
def test_what_is_no_log_is_said_in_one_sentence(tmp_path, text, says):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=says):
        main.main(["curves", str(tmp_path), "--to", str(tmp_path / "c.png")])
    assert not (tmp_path / "c.png").exists()
