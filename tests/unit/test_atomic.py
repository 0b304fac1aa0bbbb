"""Files are there whole or not at all; errors of other packages fit into a sentence."""

import pytest
from lcm_lookahead.lookahead.files.atomic import atomic, first_line


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with atomic(path) as part:
        part.write_text("after")
        assert path.read_text() == "before" and part.parent == tmp_path
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_after_an_error_what_stood_there_stays_and_nothing_is_left(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(RuntimeError), atomic(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("too deep.\n  at 3"), "too deep"), (KeyError(), "KeyError"), (ValueError("x" * 999), "x" * 200)],
)
def test_an_error_fits_into_a_sentence(error, line):
    assert first_line(error) == line
