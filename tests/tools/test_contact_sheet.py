"""The contact sheet shows every picture whole, in its place, with its text."""

import numpy as np
import pytest
from lcm_lookahead.evaluation.contact_sheet import GAP, PAPER, Cell, contact_sheet, fit, wrap
from PIL import Image, ImageFont

COLOURS = [(200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10), (200, 10, 200), (10, 200, 200)]


def picture(colour, size=(128, 128)) -> Image.Image:
    return Image.new("RGB", size, colour)


def areas(sheet: Image.Image, colour) -> tuple[int, tuple[int, int, int, int]]:
    """How many pixels have this colour, and the box around them."""
    rows, columns = np.nonzero((np.asarray(sheet) == colour).all(-1))
    return len(rows), (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_every_picture_is_there_whole_and_in_its_row_and_column():
    rows = [[Cell(picture(COLOURS[3 * r + c]), "identity +0.81") for c in range(3)] for r in range(2)]
    sheet = contact_sheet(["reference", "a", "b"], rows, "Title", cell_size=64)
    boxes = []
    for colour in COLOURS:
        count, box = areas(sheet, colour)
        assert count == 64 * 64
        boxes.append(box)
    assert [box[0] for box in boxes] == [GAP, 2 * GAP + 64, 3 * GAP + 128] * 2
    assert boxes[0][1] == boxes[1][1] == boxes[2][1] < boxes[3][1] == boxes[4][1]


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (300, 100), (1, 1)])
def test_a_picture_of_another_shape_is_neither_cropped_nor_squashed(size):
    fitted = fit(picture(COLOURS[0], size), 96)
    assert max(fitted.size) == 96
    assert abs(fitted.width / fitted.height - size[0] / size[1]) < 0.05


def test_a_picture_with_alpha_is_drawn():
    sheet = contact_sheet(["a"], [[Cell(Image.new("RGBA", (8, 8), (200, 10, 10, 255)))]], cell_size=16)
    assert areas(sheet, (200, 10, 10))[0] == 16 * 16


def text_pixels(sheet: Image.Image, top: int, bottom: int) -> int:
    return int((np.asarray(sheet)[top:bottom] != PAPER).any(-1).sum())


def test_the_text_above_and_under_a_picture_does_not_touch_it():
    texts = ["a very long prompt " * 6, "short"]
    rows = [[Cell(picture(COLOURS[0]), "identity +0.81, style right " * 3), Cell(picture(COLOURS[1]), "x")]]
    sheet = contact_sheet(texts, rows, "Title", cell_size=64)
    for colour in COLOURS[:2]:
        assert areas(sheet, colour)[0] == 64 * 64
    _, box = areas(sheet, COLOURS[0])
    assert text_pixels(sheet, 0, box[1]) and text_pixels(sheet, box[3], sheet.height - 1)
    assert not text_pixels(sheet, sheet.height - 2, sheet.height)


def test_lines_are_no_wider_than_asked_for_and_hold_every_word():
    font = ImageFont.load_default(13)
    text = "a photo of a face in the forest with a long beard and glasses"
    lines = wrap(text, font, 90)
    assert " ".join(lines) == text and len(lines) > 2
    assert all(font.getlength(line) <= 90 for line in lines)


@pytest.mark.parametrize("rows", [[], [[Cell(picture(COLOURS[0]))]]])
def test_rows_that_do_not_fit_the_headings_are_refused(rows):
    with pytest.raises(ValueError, match="every row needs 2 cells"):
        contact_sheet(["a", "b"], rows)
