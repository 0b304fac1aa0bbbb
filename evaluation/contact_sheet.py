"""One picture that shows a run: a row for each reference, a column for each prompt, a line of text under each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT = (250, 250, 248), (28, 28, 30), (110, 110, 115)
GAP = 14


@dataclass(frozen=True)
class Cell:
    """A picture and the text under it."""

    picture: Image.Image
    caption: str = ""


def wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines that are no wider than `width` pixels, unless one word is."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def contact_sheet(
    headings: Sequence[str], rows: Sequence[Sequence[Cell]], title: str = "", cell_size: int = 192
) -> Image.Image:
    """Draw the sheet.

    Args:
        headings: the text above each column.
        rows: the cells, row by row, one for each heading.
        title: a line above all.
        cell_size: pixels of the square that each picture is fitted into, never cropped or squashed.

    Returns:
        An RGB picture.
    """
    if not rows or any(len(row) != len(headings) for row in rows):
        raise ValueError(f"every row needs {len(headings)} cells, got {[len(row) for row in rows]}")
    large, small = ImageFont.load_default(18), ImageFont.load_default(13)
    heads = [wrap(text, small, cell_size) for text in headings]
    captions = [[wrap(cell.caption, small, cell_size) for cell in row] for row in rows]
    line = 17
    top = GAP + (line + GAP if title else 0)
    head = line * max(len(lines) for lines in heads)
    below = [line * max(len(lines) for lines in row) + 4 for row in captions]
    width = GAP + len(headings) * (cell_size + GAP)
    height = top + head + GAP // 2 + sum(cell_size + extra + GAP for extra in below) + GAP // 2
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((GAP, GAP), title, INK, large)

    def write(lines: Sequence[str], x: int, y: int, colour: tuple[int, int, int]) -> None:
        for number, text in enumerate(lines):
            pen.text((x + (cell_size - small.getlength(text)) / 2, y + number * line), text, colour, small)

    lefts = [GAP + column * (cell_size + GAP) for column in range(len(headings))]
    for x, lines in zip(lefts, heads, strict=True):
        write(lines, x, top + head - line * len(lines), INK)
    y = top + head + GAP // 2
    for row, texts, extra in zip(rows, captions, below, strict=True):
        for x, cell, lines in zip(lefts, row, texts, strict=True):
            picture = fit(cell.picture, cell_size)
            sheet.paste(picture, (x + (cell_size - picture.width) // 2, y + (cell_size - picture.height) // 2))
            write(lines, x, y + cell_size + 4, FAINT)
        y += cell_size + extra + GAP
    return sheet


def fit(picture: Image.Image, size: int) -> Image.Image:
    """The picture in RGB, scaled so that its longer side has `size` pixels."""
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
