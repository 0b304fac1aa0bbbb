"""Files and folders are there whole or not at all; errors of other packages fit into a sentence."""

import os
from pathlib import Path

import pytest
from lcm_lookahead.lookahead.files.atomic import atomic, atomic_folder, first_line


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


@pytest.mark.parametrize("before", [None, (), ("old.txt",)])
def test_a_folder_takes_its_name_when_it_is_whole(tmp_path, before):
    path = tmp_path / "above" / "a"
    if before is not None:
        path.mkdir(parents=True)
        for name in before:
            (path / name).touch()
    with atomic_folder(path, over=True) as part:
        (part / "new.txt").touch()
        assert path.is_dir() == (before is not None) and part.parent == path.parent
        assert [p.name for p in path.glob("*")] == list(before or ())
    assert [p.name for p in path.iterdir()] == ["new.txt"] and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("over", [True, False])
def test_after_an_error_the_folder_that_stood_there_stays_and_nothing_is_left(tmp_path, over):
    path = tmp_path / "a"
    path.mkdir()
    (path / "old.txt").touch()
    with pytest.raises(RuntimeError), atomic_folder(path, over) as part:
        (part / "half").mkdir()
        raise RuntimeError
    assert [p.name for p in path.iterdir()] == ["old.txt"] and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_holds_something_gives_way_only_where_that_is_said(tmp_path):
    path = tmp_path / "a"
    with atomic_folder(path):
        path.mkdir()  # by another process, meanwhile: empty
    with pytest.raises(OSError), atomic_folder(path):
        (path / "answers.json").touch()
    assert [p.name for p in path.iterdir()] == ["answers.json"] and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_gave_way_comes_back_where_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.mkdir()
    (path / "old.txt").touch()
    replace = os.replace

    def refused(source, target):
        if Path(target) == path and (Path(source) / "new.txt").exists():
            raise PermissionError("a file is in use")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(PermissionError), atomic_folder(path, over=True) as part:
        (part / "new.txt").touch()
    assert [p.name for p in path.iterdir()] == ["old.txt"] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("too deep.\n  at 3"), "too deep"), (KeyError(), "KeyError"), (ValueError("x" * 999), "x" * 200)],
)
def test_an_error_fits_into_a_sentence(error, line):
    assert first_line(error) == line
