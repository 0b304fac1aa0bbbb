"""What is said of the pictures in a folder: captions beside them, and the metadata file.

It is read as it was meant, or refused in a sentence; nothing is guessed, since a wrong caption trains without a word.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...lookahead.files.atomic import first_line
from . import published

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.json")
# UTF-32's mark begins with UTF-16's, so it is asked first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class DataError(ValueError):
    """Says what is wrong with a data set, in one sentence for the user."""


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in what its byte order mark says; line ends as they stand.

    Raises OSError, and UnicodeError for another encoding (also for UTF-16 without a mark, which holds zero bytes).
    """
    data = path.read_bytes()
    text = data.decode(next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8"))
    if "\0" in text:
        raise UnicodeError("it holds zero bytes")
    return text


def read_captions(paths: Iterable[Path]) -> dict[Path, str]:
    """The captions in text files, by path. Raises DataError where some are in another encoding than UTF-8."""
    out, foreign = {}, []
    for path in paths:
        try:
            out[path] = read_text(path).strip()
        except UnicodeError:
            foreign.append(path)
    if foreign:
        raise DataError(
            f"The caption {foreign[0]} is not in UTF-8 ({len(foreign)} such files): save it with that encoding."
        )
    return out


def same_name(text: str) -> str:
    """The one spelling (NFC) of a name: macOS writes an accented letter as two characters where others have one."""
    return unicodedata.normalize("NFC", text)


def read_metadata(folder: Path, given: str | None) -> tuple[Path | None, dict[str, dict[str, Any]]]:
    """The metadata file, and what it says by `same_name` of the picture's path; (None, {}) where there is none.

    given: file of JSON lines or CSV (with commas, semicolons or tabs); by default one of METADATA in the folder. Raises
    DataError, which names the line.
    """
    paths = [Path(given)] if given else [p for p in (folder / name for name in METADATA) if p.is_file()][:1]
    if not paths:
        return None, {}
    path = paths[0]
    try:
        text = read_text(path)
    except OSError as error:
        raise DataError(f"The metadata {path} cannot be read ({error.strerror}): check data.metadata.") from None
    except UnicodeError as error:
        why = getattr(error, "reason", error)
        raise DataError(f"The metadata {path} is not in UTF-8 ({why}): save it with that encoding.") from None
    rows = {".csv": _csv, ".json": _published}.get(path.suffix.lower(), _json_lines)(path, text)
    table = {}
    for number, row in rows:
        if not isinstance(row, Mapping) or not row.get("file_name"):
            raise DataError(f"Line {number} of {path} has no file_name: each line names one picture.")
        table[same_name(str(row["file_name"]).replace("\\", "/").removeprefix("./"))] = dict(row)
    return path, table


def _published(path: Path, text: str) -> Iterator[tuple[int, object]]:
    try:
        table = json.loads(text)
        if not isinstance(table, dict) or not all(isinstance(person, str) for person in table.values()):
            raise ValueError("no object of texts")
    except ValueError as error:
        raise DataError(
            f"{path} is no table as the paper's data has it ({first_line(error)}): write an object from each file to "
            "its person, or use metadata.jsonl."
        ) from None
    yield from enumerate(published.rows(table), 1)


def _csv(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    header = text.lstrip().partition("\n")[0]
    separator = max(",;\t", key=header.count)  # Excel writes semicolons where the comma is the decimal point
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    if "file_name" not in (reader.fieldnames or ()):
        columns = ", ".join(reader.fieldnames or ()) or "none"
        raise DataError(f"The first line of {path} names the columns {columns}, and file_name must be one of them.")
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"Line {reader.line_num} of {path} is no CSV ({error}): save the table anew.") from None


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, object]]:
    if text.lstrip().startswith("["):
        raise DataError(f"{path} is one JSON list: write its objects one a line, without brackets and commas around.")
    for number, line in enumerate(text.split("\n"), 1):  # (splitlines would cut at U+2028, which JSON may hold)
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"Line {number} of {path} is no JSON ({error.msg}): write one object a line.") from None
