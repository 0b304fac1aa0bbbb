"""The host's model folders. Nodes list them while they register and whenever they are validated, where an error would
take the whole pack, or show an errno: what cannot be read is left out, with a line in the log."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import folder_paths

LONGEST_NAME = 200  # bytes; file systems take 255, and a file has more in its name while it is written
_logged: set[str] = set()


def register(folder: str) -> None:
    """Make the folder `folder` in the host's `models` known to the host, beside what users configured for it."""
    folder_paths.add_model_folder_path(folder, os.path.join(folder_paths.models_dir, folder))


def file_names(folder: str, endings: tuple[str, ...]) -> list[str]:
    """Names of the files in a model folder of the host that end so, in any case."""
    try:
        try:
            names = folder_paths.get_filename_list(folder)
        except FileNotFoundError:  # the host asks for the time of folders that it knows and somebody has removed since
            folder_paths.filename_list_cache.pop(folder, None)
            names = folder_paths.get_filename_list(folder)
    except OSError as error:
        _left_out(getattr(error, "filename", None) or folder, error)
        names = []
    return [name for name in names if name.lower().endswith(endings)]


def made(folder: str) -> Path:
    """The first of a model folder's places, where new files go, made if need be. Raises ValueError, one sentence."""
    place = Path(folder_paths.get_folder_paths(folder)[0])
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{place} cannot be made ({error.strerror}): make it, and let ComfyUI write there.") from error
    return place


def plain_name(name: str, what: str, such_as: str) -> str:
    """The name of a new file as a user gave it to the input `what`, without blanks around it.

    Raises ValueError, one sentence, for what is no name of a file, or is too long for one.
    """
    name = name.strip()
    if not name or name.startswith(".") or any(mark in "/\\:" or not mark.isprintable() for mark in name):
        raise ValueError(f"The {what} is {name!r}, and a name without folders is needed, such as {such_as}.")
    if (length := len(os.fsencode(name))) > LONGEST_NAME:
        raise ValueError(
            f"The {what} has {length} bytes, and a file's name has room for {LONGEST_NAME}: choose a shorter one."
        )
    return name


def nothing_chosen(there: Sequence[str], what: str, folders: Iterable[str], name: str | None = None) -> bool | str:
    """Answers for `validate_inputs` where no name is given: True where it comes by a link (None), else a sentence.

    The page sends "" where its list is empty, or was when the node was made.
    """
    if not there:
        return f"There is no {what} in {searched(folders)} yet: put one there, press R in the page, and choose it."
    return True if name is None else f"No {what} is chosen: choose one, such as {there[0]}."


def there(find: Callable[[str], str], name: str) -> bool | str:
    """Answers for `validate_inputs` whether a file is there: True, or the sentence with which `find` says that not."""
    try:
        find(name)
    except FileNotFoundError as error:
        return str(error)
    return True


def fingerprint(find: Callable[[str], str], name: str | None) -> str:
    """Tells a file from what replaced it, for `fingerprint_inputs`; one that is missing, or comes by a link, by its
    name alone."""
    try:
        stat = os.stat(find(name or ""))
    except OSError:
        return str(name)
    return f"{name} {stat.st_size} {stat.st_mtime_ns}"


def safetensors_in(folder: str) -> list[str]:
    """Names of the .safetensors files in a folder of models."""
    return file_names(folder, (".safetensors",))


def path_in(folder: str, name: str, what: str) -> str:
    """Path of a file by name. Raises FileNotFoundError, one sentence, naming the folders that were searched."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        places = searched(folder_paths.get_folder_paths(folder))
        raise FileNotFoundError(f"There is no {what} {name!r} in {places}: put it into one of these folders.")
    return path


def found(folder: str, name: str | None, what: str) -> bool | str:
    """Says whether a file is there, for a node's validation: True, or a sentence; no name comes by a link, or there is
    no file yet."""
    if not name:
        return nothing_chosen(safetensors_in(folder), what, folder_paths.get_folder_paths(folder), name)
    return there(lambda name: path_in(folder, name, what), name)


def changed(folder: str, name: str | None) -> str:
    """Tells a file from what replaced it, for a node's fingerprint."""
    return fingerprint(lambda name: path_in(folder, name, "file"), name)


def subfolders(place: Path) -> list[Path]:
    """The folders in a folder, by name; none where it is missing."""
    try:
        with os.scandir(place) as entries:
            found = sorted(place / entry.name for entry in entries if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        _left_out(place, error)
        return []
    return found


def searched(paths: Iterable[str | os.PathLike[str]]) -> str:
    """The folders that were searched, for an error: with a word where ComfyUI may not read one."""

    def named(path: str | os.PathLike[str]) -> str:
        # A folder in one that may not be read seems to be missing.
        nearest = next(parent for parent in (Path(path), *Path(path).parents) if os.path.lexists(parent))
        try:
            os.listdir(nearest)
            os.stat(nearest / ".")
        except PermissionError:
            return f"{path} (ComfyUI may not read {nearest})"
        except OSError:
            pass
        return str(path)

    return ", ".join(map(named, paths))


def _left_out(path: str | os.PathLike[str], error: OSError) -> None:
    if str(path) not in _logged:
        _logged.add(str(path))
        logging.warning("[LCM-Lookahead] %s cannot be read (%s), so its files are left out.", path, error.strerror)
