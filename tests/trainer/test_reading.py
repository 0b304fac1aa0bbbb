"""What users' files hold: deep and odd pictures, captions in other encodings, other spellings; many pictures."""

import io
import json
import os
import random
import unicodedata

import numpy as np
import pytest
import torch
from lcm_lookahead.mini.files import insightface_pack
from lcm_lookahead.mini.plan import WEIGHTS
from lcm_lookahead.sdxl.images import PictureError, as_pixels, read
from lcm_lookahead.trainer.data import doctor
from lcm_lookahead.trainer.data.pairs import DataError, Entry, Seen, listing, look_of, make_pairs, passed_over, scan
from lcm_lookahead.trainer.data.references import References, copies
from lcm_lookahead.trainer.lookahead.config import data_alone
from PIL import Image

GREY = np.linspace(0, 65535, 48 * 40).reshape(40, 48).round()


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


# -- pictures


@pytest.mark.parametrize(
    ("values", "kind", "options", "wanted"),
    [
        (GREY.astype(np.uint16), "PNG", {}, GREY / 65535),
        (GREY.astype(np.uint16), "TIFF", {}, GREY / 65535),
        (GREY.astype(">u2"), "TIFF", {}, GREY / 65535),
        (GREY.astype(np.uint16), "TIFF", {"tiffinfo": {262: 0}}, 1 - GREY / 65535),  # its zero is white
        (GREY.astype(np.int32), "TIFF", {}, GREY / 65535),
        ((GREY / 65535).astype(np.float32), "TIFF", {}, GREY / 65535),
        ((GREY / 257).round().astype(np.uint8), "TIFF", {}, (GREY / 257).round() / 255),
    ],
)
def test_grey_of_any_depth_keeps_its_values(values, kind, options, wanted):
    picture = read(saved(Image.fromarray(values), kind, **options))
    assert picture.shape == (3, 40, 48) and torch.equal(picture[0], picture[2])
    assert np.allclose(picture[1].numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize("values", [GREY.astype(np.int32) - 9, (GREY / 300).astype(np.int32), GREY.astype(np.float32)])
def test_numbers_that_do_not_say_what_is_white_are_refused(values):
    with pytest.raises(PictureError, match="has grey values of 32 bit from .* save it with 8 or 16 bit"):
        read(saved(Image.fromarray(values), "TIFF"))


def test_what_is_transparent_is_white_whatever_colour_hides_there():
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 20, 40))
    hidden = clear.copy()
    hidden.paste((9, 99, 9, 0), (20, 0, 40, 40))
    assert torch.equal(as_pixels(clear), as_pixels(hidden)) and torch.equal(as_pixels(clear)[0, 0, 30], torch.ones(3))
    assert torch.equal(read(saved(hidden, "PNG")), as_pixels(clear)[0].permute(2, 0, 1))
    grey = read(saved(Image.fromarray(GREY.astype(np.uint16)), "PNG", transparency=0))
    assert grey[0, 0, 0] == 1 and grey[0, 0, 1] < 0.01


def test_a_reference_of_16_bit_is_no_white_square():
    assert abs(float(as_pixels(Image.fromarray(GREY.astype(np.uint16))).mean()) - 0.5) < 1e-3


@pytest.fixture(scope="module")
def detector():
    from lcm_lookahead.cli.assemble import open_detector

    return open_detector(str((WEIGHTS / insightface_pack.DETECTOR).parent), 1)


@pytest.mark.parametrize("shape", [(3, 4000), (4000, 3), (1, 1), (40, 4000)])
def test_a_strip_has_no_face_and_stops_nothing(detector, shape):
    assert detector(torch.rand(1, 3, *shape)) == [[]]


def test_a_strip_is_left_out_with_its_size(tmp_path, detector):
    (tmp_path / "anna").mkdir()
    Image.new("RGB", (4000, 3)).save(tmp_path / "anna/strip.png")
    entries, _ = listing(tmp_path)
    seen = scan(tmp_path, entries, detector, "mini", tmp_path / "scan.jsonl")
    assert seen["anna/strip.png"].error.endswith("strip.png has 4000x3 pixels, and at least 32 a side are needed.")
    report = doctor.examine(data_alone(tmp_path, [f"cache={tmp_path / 'cache'}"]), detector, "mini")
    assert ("unreadable", 1, "left out") in report.rows


def test_files_of_cameras_and_phones_are_read_or_said(tmp_path):
    (tmp_path / "anna").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "anna/a.jfif", "JPEG")
    for name in ("IMG_1.HEIC", "IMG_2.heic", "b.gif", "notes.txt"):
        (tmp_path / "anna" / name).touch()
    assert [entry.file for entry in listing(tmp_path)[0]] == ["anna/a.jfif"]
    said = passed_over(tmp_path)
    assert said.startswith("3 pictures are of kinds that are not read (") and "2 .heic" in said and "1 .gif" in said
    report = doctor.examine(data_alone(tmp_path, [f"cache={tmp_path / 'cache'}"]), None, "")
    assert said in report.better


# -- what is said of them


def folder_of(tmp_path, *names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_caption_is_the_text_that_was_written(tmp_path, encoding):
    folder = folder_of(tmp_path, "anna/a.png")
    (folder / "anna/a.txt").write_bytes("a café at night\n".encode(encoding))
    assert listing(folder)[0][0].text == "a café at night"
    (folder / "metadata.jsonl").write_bytes(
        '{"file_name": "anna/a.png", "text": "on a pier, très tôt"}'.encode(encoding)
    )
    assert listing(folder)[0][0].text == "on a pier, très tôt"


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le"])
def test_a_caption_in_another_encoding_is_refused_and_not_guessed(tmp_path, encoding):
    folder = folder_of(tmp_path, "anna/a.png", "anna/b.png")
    (folder / "anna/b.txt").write_bytes("a café".encode(encoding))
    with pytest.raises(DataError, match=r"The caption .*b.txt is not in UTF-8 \(1 such files\): save it with"):
        listing(folder)


def test_a_line_separator_inside_a_text_ends_no_json_line(tmp_path):
    folder = folder_of(tmp_path, "anna/a.png", "anna/b.png")
    lines = [{"file_name": f"anna/{n}.png", "text": f"{n}\u2028two\u0085three"} for n in "ab"]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8", newline="")
    assert [entry.text for entry in listing(folder)[0]] == ["a\u2028two\u0085three", "b\u2028two\u0085three"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_may_have_cells_of_two_lines_and_other_separators(tmp_path, separator):
    folder = folder_of(tmp_path, "anna/a.png")
    rows = [["file_name", "person", "text"], ["anna/a.png", "Anna", '"by day,\nby night"']]
    (folder / "metadata.csv").write_text("\n".join(separator.join(row) for row in rows), encoding="utf-8")
    assert listing(folder)[0] == [Entry("anna/a.png", "Anna", "by day,\nby night")]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metadata.jsonl", '[\n{"file_name": "anna/a.png"}\n]', "is one JSON list: write its objects one a line"),
        ("metadata.csv", "name,text\nanna/a.png,x", "names the columns name, text, and file_name must be one"),
        ("metadata.jsonl", '{"file_name": "a.png"}', "None of the 1 files that .* names is in .*first: a.png"),
    ],
)
def test_metadata_that_says_nothing_of_the_pictures_is_refused(tmp_path, name, text, said):
    folder = folder_of(tmp_path, "anna/a.png")
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=said):
        listing(folder)


@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_name_is_the_same_in_either_spelling(tmp_path, forms):
    on_disk, written = (unicodedata.normalize(form, "zoé/café.png") for form in forms)
    folder = folder_of(tmp_path, on_disk)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": written, "text": "her"}))
    entries, gone = listing(folder)
    assert [(entry.person, entry.text) for entry in entries] == [("zoé", "her")] and not gone


def test_a_name_that_is_no_text_is_said(tmp_path):
    folder = folder_of(tmp_path, "anna/a.png")
    try:
        os.rename(folder / "anna", os.fsencode(folder) + b"/J\xf6rg")
    except OSError:
        pytest.skip("this file system refuses such names")
    with pytest.raises(DataError, match=r"The name J\\xf6rg/a.png is not in UTF-8 \(1 such files\): rename"):
        listing(folder)


# -- who may be whose reference


def plain_copies(looks):
    """The rule itself, pair by pair."""
    values = [bytes.fromhex(look) for look in looks]

    def alike(a, b):
        apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
        return sum(apart) <= 1.5 * len(apart) and max(apart) <= 12

    return [[n for n, b in enumerate(values) if alike(a, b)] for a in values]


def test_copies_are_those_of_the_rule_for_every_pair():
    draw = random.Random(0)
    looks = []
    for _ in range(30):
        look = [draw.randrange(256) for _ in range(256)]
        looks.append(look)
        for most in (1, 3, 4, 12, 13):  # some within the rule, some just beyond it
            looks.append([min(255, max(0, v + draw.randint(-most, most))) for v in look])
    draw.shuffle(looks)
    looks = [bytes(look).hex() for look in looks]
    found = copies(looks)
    assert found == plain_copies(looks) and 1 < max(map(len, found)) < 6
    assert copies([]) == [] and copies(looks[:1]) == [[0]]


def test_references_are_those_of_each_picture_alone():
    """Against the choice pair by pair, with copies, pictures without a face and such as may be no references."""
    draw = random.Random(1)
    entries, seen = [], {}
    for person in range(40):
        pictures = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(draw.randrange(3))) for _ in range(6)]
        for n, picture in enumerate(pictures[: draw.randint(1, 6)]):
            entry = Entry(f"{person}/{n}", str(person), reference=draw.random() < 0.8)
            face = (1.0,) * 15 if draw.random() < 0.7 else None
            entries.append(entry)
            seen[entry.file] = Seen(entry.file, 1, 1, "", None, "", look_of(picture), 40, 40, 1, face)
    found = make_pairs(entries, seen, True)
    wanted = {}
    for target in entries:
        theirs = [e for e in entries if e.person == target.person and e.reference and seen[e.file].face]
        looks = [seen[target.file].look, *(seen[e.file].look for e in theirs)]
        wanted[target.file] = [e.file for n, e in enumerate(theirs, 1) if n not in plain_copies(looks)[0]]
    used = {file for files in wanted.values() for file in files}
    kept = [e.file for e in entries if wanted[e.file] or e.file in used]
    assert [e.file for e in found.pictures] == kept and {found.pictures[n].file for n in found.used} == used
    for entry, fit in zip(found.pictures, found.references, strict=True):
        assert [found.pictures[n].file for n in fit] == wanted[entry.file]
        assert [fit[n] for n in range(len(fit))] == list(fit) and bool(fit) == bool(wanted[entry.file])
    assert found.left_out.keys() == {e.file for e in entries} - set(kept)
    with pytest.raises(IndexError):
        References([1, 2], [0])[1]


def test_a_person_may_have_thousands_of_pictures():
    """(Which took hours pair by pair, and the memory of 25 million numbers.)"""
    looks = np.random.default_rng(0).integers(0, 256, (5000, 256), dtype=np.uint8)
    entries = [Entry(f"a/{n}", "a") for n in range(len(looks))]
    seen = {}
    for entry, look in zip(entries, looks, strict=True):
        seen[entry.file] = Seen(entry.file, 1, 1, "", None, "", look.tobytes().hex(), 40, 40)
    found = make_pairs(entries, seen, False)
    assert len({id(fit.members) for fit in found.references}) == 1
    assert len(found.references) == 5000 and {len(fit) for fit in found.references} == {4999}
