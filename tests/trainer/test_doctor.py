"""`lookahead doctor` on real files: what it counts, what it says to do, and its exit status."""

import json
import re

import pytest
import torch
from lcm_lookahead.cli import main
from lcm_lookahead.mini.files import insightface_pack
from lcm_lookahead.mini.plan import WEIGHTS
from lcm_lookahead.mini.world.data import group_of_people
from lcm_lookahead.mini.world.faces import STYLES, render
from PIL import Image

PACK = (WEIGHTS / insightface_pack.DETECTOR).parent


def save(path, picture, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(path, **options)
    return path


@pytest.fixture(scope="module")
def faces():
    drawn = group_of_people("held_out", 2, STYLES)
    per = len(STYLES) + 1
    return [[render(drawn.rows(slice(r, r + 1)), 128, seed=r)[0] for r in range(p * per, p * per + 2)] for p in (0, 1)]


def doctor(capsys, data, *more):
    """(exit status, number by row, the text)."""
    status = 0
    try:
        main.main(["doctor", str(data), "size=128", *more, "--detector", str(PACK)])
    except SystemExit as stop:
        status = stop.code
    text = capsys.readouterr().out
    rows = re.findall(r"^(\S.*?)  +([\d,]+)(?:  |$)", text, re.M)
    return status, {name: int(number.replace(",", "")) for name, number in rows}, text


def test_a_good_folder_needs_nothing_but_more_people(faces, tmp_path, capsys):
    for person, pictures in enumerate(faces):
        for n, picture in enumerate(pictures):
            save(tmp_path / f"data/p{person}/{n}.png", picture).with_suffix(".txt").write_text("a photo of a face")
    status, rows, text = doctor(capsys, tmp_path / "data")
    assert status == 0 and "To do" not in text
    assert (rows["pictures"], rows["people"], rows["targets"], rows["pairs"]) == (4, 2, 4, 4)
    assert rows["without a face"] == rows["copies of another one"] == rows["unreadable"] == 0
    assert text.count("\n- ") == 1 and "many people" in text


def test_everything_that_is_wrong_is_counted_and_said(faces, tmp_path, capsys):
    data = tmp_path / "data"
    (a, b), (c, d) = faces
    for name, picture in {"anna/1": a, "anna/2": b, "ben/1": c, "ben/copy": c, "carl/1": d, "dora/1": a}.items():
        save(data / f"{name}.png", picture)
    save(data / "carl/2.png", torch.full((3, 128, 128), 0.5))  # no face
    save(data / "anna/3.jpg", a, quality=70)  # of anna/1
    (data / "ben/broken.png").write_bytes(b"\x89PNG")
    lines = [{"file_name": "anna/1.png", "text": "Anna at sea"}, {"file_name": "gone.png", "text": "x"}]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    status, rows, text = doctor(capsys, data)
    assert status == 1
    assert (rows["pictures"], rows["people"], rows["unreadable"]) == (9, 4, 1)
    assert rows["without a face"] == 1 and rows["copies of another one"] == 2
    assert rows["targets"] == 4  # anna's three (two of them copies), and carl's grey picture
    assert rows["with a text of their own"] == 1
    for said in (
        "several people's names, which teaches that they look alike. (anna/1.png, dora/1.png)",
        "cannot be read. (ben/broken.png)",
        "names files that are not there, or are no pictures. (gone.png)",
        "hold the person's name",
        "left out because it is the only picture of its person. (dora/1.png)",
        "left out because its person's other pictures are copies of it. (ben/1.png, ben/copy.png)",
    ):
        assert said in text, said
    listed = {json.loads(line)["file"] for line in (tmp_path / "data.cache/left_out.jsonl").read_text().splitlines()}
    assert listed == {"ben/broken.png", "ben/1.png", "ben/copy.png", "dora/1.png"}


def test_a_photo_of_two_people_is_counted_and_named(faces, tmp_path, capsys):
    (a, b), (c, d) = faces
    both = torch.cat([c, a], 2)
    for name, picture in {"anna/1": a, "anna/2": b, "ben/1": c, "ben/2": d, "ben/with_anna": both}.items():
        save(tmp_path / f"data/{name}.png", picture)
    status, rows, text = doctor(capsys, tmp_path / "data")
    assert status == 0 and (rows["pictures"], rows["with several faces"]) == (5, 1)
    assert "See that the largest face is the person's. (ben/with_anna.png)" in text


def test_small_pictures_and_small_faces_are_said(faces, tmp_path, capsys):
    for n, picture in enumerate(faces[0]):
        small = torch.nn.functional.interpolate(picture[None], (100, 100), mode="area")[0]
        save(tmp_path / f"data/p/{n}.png", torch.nn.functional.pad(small, (60, 60, 60, 60), value=0.5))
    status, rows, text = doctor(capsys, tmp_path / "data", "size=256")
    assert status == 0 and rows["smaller than 256 pixels"] == 2
    if not rows["without a face"]:
        assert rows["with a face below 56 pixels"] == 0
    status, rows, text = doctor(capsys, tmp_path / "data")
    assert rows["with a face below 56 pixels"] == 2 - rows["without a face"] and "crop these pictures closer" in text


def test_a_folder_that_is_none_is_said_in_a_sentence(tmp_path, capsys):
    for path, said in ((tmp_path / "none", "There is no folder"), (tmp_path, "holds no pictures")):
        with pytest.raises(SystemExit) as stop:
            main.main(["doctor", str(path)])
        assert stop.value.code == 1 and said in capsys.readouterr().out or said in str(stop.value)
