"""Damaged and hostile files, made from whole ones by a seed: they must be read or refused, and never run."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import lcm_lookahead.lookahead.files
import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes

ROOT = Path(lcm_lookahead.lookahead.files.__file__).parents[2]
READERS = tuple(str(ROOT / room) for room in ("lookahead", "host", "sdxl"))
LONGEST = 1000  # characters of a message: it stands in a dialogue of the page


@dataclass(frozen=True)
class Kind:
    """A kind of file that is read from outside.

    files: one whole file or more by the name under which it lies in its folder; read: reads that of the first name;
    refuses: our own classes, all that may come of it; changes: what can be done to it beside changes of bytes.
    """

    files: dict[str, bytes]
    read: Callable[[Path], object]
    refuses: tuple[type[Exception], ...]
    changes: tuple[Callable[[bytes, random.Random, Path], bytes], ...] = field(default=())

    def write(self, folder: Path, seed: int) -> Path:
        """Write the files with one of them harmed as the seed says, and return the path of the first."""
        rng = random.Random(f"{next(iter(self.files))} {seed}")
        harmed = rng.choice(list(self.files))
        change = rng.choice(self.changes_of(harmed))
        for name, whole in self.files.items():
            content = change(whole, rng, folder) if name == harmed else whole
            (folder / name).write_bytes(content)
        return folder / next(iter(self.files))

    def changes_of(self, name: str) -> tuple[Callable[[bytes, random.Random, Path], bytes], ...]:
        """What can be done to one of the files."""
        own = self.changes if name == next(iter(self.files)) else JSON if name.endswith(".json") else ()
        return (*own, *BYTES)


def fault(kind: Kind, path: Path) -> str | None:
    """What is wrong with how a file is read: None where it is read, or refused in a sentence by a class of ours."""
    try:
        kind.read(path)
    except kind.refuses as error:
        text = str(error)
        if "\n" in text or not text.endswith((".", "?")) or len(text) > LONGEST or not text.isprintable():
            return f"no plain sentence: {text[:2000]!r}"
        return None
    except Exception as error:  # noqa: BLE001  (what else comes is what is looked for)
        return f"{type(error).__name__}: {error}"
    return None


def fuzz(kind: Kind, folder: Path, rounds: int, seed: int) -> dict[str, int]:
    """Harm files again and again, and go on from those that reached lines of the readers which none had reached.

    Returns each fault found, with the round that found it: the same rounds and seed find the same.
    """
    rng = random.Random(seed)
    path = folder / next(iter(kind.files))
    corpus, reached, faults = [kind.files], set(), {}
    for number in range(rounds):
        files = dict(rng.choice(corpus[-20:]))
        harmed = rng.choice(list(files))
        try:
            for _i in range(rng.randrange(1, 4)):
                files[harmed] = rng.choice(kind.changes_of(harmed))(files[harmed], rng, folder)
        except Exception:  # noqa: BLE001  (what is harmed already may be too broken for the next harm)
            continue
        for name, content in files.items():
            (folder / name).write_bytes(content)
        with _lines() as lines:
            found = fault(kind, path)
        if found or {one.name for one in folder.iterdir()} != set(files):
            faults.setdefault((found or "run, or half of something was left")[:200], number)
        if not lines <= reached:
            reached |= lines
            corpus.append(files)
    return faults


@contextmanager
def _lines() -> Iterator[set[tuple[str, int]]]:
    """Collects the lines of the project's own rooms that are run inside of the block."""
    lines: set[tuple[str, int]] = set()

    def trace(frame, event, _argument):
        if not frame.f_code.co_filename.startswith(READERS):
            return None
        lines.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


# --- any file


def cut(data: bytes, rng: random.Random, _) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(data: bytes, rng: random.Random, _) -> bytes:
    """Some bytes are others, near the beginning rather than further on: headers stand there."""
    out = bytearray(data)
    for _i in range(rng.choice([1, 3, 30])):
        out[min(int(len(out) * rng.random() ** 4), len(out) - 1)] = rng.randrange(256)
    return bytes(out)


def zeroed(data: bytes, rng: random.Random, _) -> bytes:
    """A part was never written, as after a crash of the machine."""
    at, length = rng.randrange(len(data)), rng.randrange(1, len(data))
    return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]


def repeated(data: bytes, rng: random.Random, _) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[max(0, at - rng.randrange(1, 200)) :]


def replaced(data: bytes, rng: random.Random, _) -> bytes:
    """What a download leaves that was no download."""
    page = b"<!DOCTYPE html><html><body>Sign in to continue</body></html>"
    return rng.choice([b"", b"\x00" * 64, page, b"version https://git-lfs", rng.randbytes(200), b"\x80", b"PK\x03\x04"])


BYTES = (cut, flipped, flipped, zeroed, repeated, replaced)


# --- safetensors


def _parts(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _whole(header: object, body: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def claims(data: bytes, rng: random.Random, _) -> bytes:
    """The header speaks of what is not there: terabytes, negative places, a length beyond every file."""
    header, body = _parts(data)
    keys = [key for key in header if key != "__metadata__"]
    entry = header[rng.choice(keys)]
    how = rng.randrange(7)
    if how == 0:
        entry["shape"] = [1 << 40, 1 << 10]
    elif how == 1:
        entry["shape"], entry["data_offsets"] = [1 << 40], [0, 1 << 42]
    elif how == 2:
        entry["data_offsets"] = rng.choice([[0, -4], [1 << 62, 1 << 63], [4, 0], [0.5, 1], ["a", "b"], None, [0]])
    elif how == 3:
        return _whole(header, body, rng.choice([1 << 63, (1 << 64) - 1, 1 << 40, 1, 0]))
    elif how == 4:
        entry["dtype"] = rng.choice(["F128", "", None, 7, "BOOL", "U8", "I64", "F8_E4M3", "C64", "F4"])
    elif how == 5:
        return _whole(b"[" * 100_000, body)
    else:
        entry["shape"] = rng.choice([[1 << 62, 4], [-1], [0], [], "x", [1.5], [1] * 2000])
    return _whole(header, body)


def reshaped(data: bytes, rng: random.Random, _) -> bytes:
    """One tensor is of another shape or kind, or holds what is no number; the file itself is sound."""
    header, body = _parts(data)
    tensors = _tensors(data)
    key = rng.choice(list(tensors))
    value = tensors[key]
    others = (
        lambda: value.flatten(),
        lambda: value[None],
        lambda: torch.tensor(1.0),
        lambda: torch.zeros(0),
        lambda: torch.zeros(1, 0, 3),
        lambda: torch.full_like(value.float(), float("nan")),
        lambda: torch.full_like(value.float(), 3e38),
        lambda: torch.ones_like(value, dtype=torch.int64),
        lambda: torch.ones_like(value, dtype=torch.bool),
        lambda: torch.ones_like(value, dtype=torch.complex64),
        lambda: torch.ones_like(value, dtype=torch.float8_e4m3fn),
        lambda: torch.ones(1 << 16),
        lambda: torch.ones((1,) * 9),
        lambda: torch.cat([value, value]) if value.ndim else value,
    )
    tensors[key] = rng.choice(others)().contiguous()
    return safetensors_bytes(tensors, header.get("__metadata__"))


def renamed(data: bytes, rng: random.Random, _) -> bytes:
    """One tensor is missing, or has a name that nobody gives: of many characters, lines, the numbers of others."""
    header, _body = _parts(data)
    tensors = _tensors(data)
    key = rng.choice(list(tensors))
    value = tensors.pop(key)
    strange = ["", "x" * 100_000, "a\nb. C", "\x00", "\U0001d518.weight", "../../etc/passwd", f"{key}.", key.upper()]
    numbered = [f"ip_adapter.{10**12}.to_k_ip.weight", "ip_adapter.1.to_k_ip.weight", "layers.10.0.to_q.weight"]
    if rng.random() < 0.8:
        tensors[rng.choice(strange + numbered)] = value
    return safetensors_bytes(tensors, header.get("__metadata__"))


def retold(data: bytes, rng: random.Random, _) -> bytes:
    """One field of the metadata says something else."""
    header, body = _parts(data)
    metadata = dict(header.get("__metadata__") or {"format": "lcm-lookahead-encoder", "format_version": "1"})
    key = rng.choice([*metadata, "size", "blend", "kv_alpha", "kv_prompt", "tuning"])
    values = [
        "",
        "nan",
        "-1",
        "1e999",
        "9" * 5000,
        "x" * 100_000,
        "a\nb. C",
        "[" * 100_000,
        "null",
        "{}",
        '[{"weight": 1}]',
    ]
    metadata[key] = rng.choice(values)
    if rng.random() < 0.2:
        del metadata[key]
    return _whole({**header, "__metadata__": metadata}, body)


def _tensors(data: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(data)


SAFETENSORS = (claims, reshaped, reshaped, renamed, retold, retold)


# --- pickles


class Runs:
    """Unpickled by pickle itself it would write a file: nothing of ours may."""

    def __init__(self, call: Callable, *arguments: object):
        self.made = call, arguments

    def __reduce__(self):
        return self.made


def _saved(content: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def code(data: bytes, rng: random.Random, folder: Path) -> bytes:
    """Code in a pickle: in a zip, in torch's older layout, and bare."""
    mark = str(folder / "EXECUTED")
    call = rng.choice(
        [(os.mkdir, mark), (eval, f"open({mark!r}, 'w')"), (exec, f"open({mark!r}, 'w')"), (open, mark, "w")]
    )
    content = {"image_proj": {"latents": torch.zeros(1)}, "x": Runs(*call)}
    how = rng.randrange(4)
    if how == 0:
        return pickle.dumps(content["x"], protocol=rng.choice([2, 4]))
    if how == 1:
        return pickle.dumps({"x": content["x"]}, protocol=2)
    return _saved(content, how == 2)


def strange(data: bytes, rng: random.Random, _) -> bytes:
    """Sound pickles of what is no flat table of plain tensors."""
    loop: dict = {}
    loop["again"] = loop
    wide: dict = {"a": torch.zeros(1)}
    for _i in range(50):
        wide = {"a": wide, "b": wide}
    deep: dict = {}
    for _i in range(300):
        deep = {"a": deep}
    small = torch.zeros(1)
    spread = torch.as_strided(small, (1 << 20, 1 << 20), (0, 0))
    others = (
        lambda: loop,
        lambda: wide,
        lambda: deep,
        lambda: {"a": spread, "image_proj.latents": spread},
        lambda: {"image_proj": {"latents": torch.empty(1 << 40, device="meta")}},
        lambda: {"image_proj": {"latents": torch.eye(3).to_sparse()}},
        lambda: {"image_proj": {"latents": torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)}},
        lambda: [torch.zeros(1)],
        lambda: torch.zeros(1),
        lambda: {("a", 1): torch.zeros(1), None: torch.zeros(2), 3: 4},
        lambda: {"a\nb. C": torch.zeros(1)},
        lambda: {"x" * 100_000: torch.zeros(1)},
        lambda: {"a": [torch.zeros(1)]},
        lambda: {},
        lambda: "text",
    )
    return _saved(rng.choice(others)(), rng.random() < 0.7)


def bomb(data: bytes, rng: random.Random, _) -> bytes:
    """A zip whose records are larger than the file: gigabytes of zeros in some kilobytes, or a size that is a lie."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_saved({"image_proj": {"latents": torch.zeros(64)}}))) as old:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.infolist():
                content = old.read(entry)
                if entry.filename.endswith("data/0"):
                    content = bytes(1 << 25)
                new.writestr(entry.filename, content)
    return out.getvalue()


def claimed(data: bytes, rng: random.Random, _) -> bytes:
    """A pickle that gives a tensor more numbers than its file has."""
    zipped = rng.random() < 0.5
    whole = _saved({"image_proj": {"latents": torch.zeros(1, 4, 251)}}, zipped)
    at = whole.find(
        b"K\x01K\x04K\xfb"
    )  # the shape's three numbers, of a byte each; a sum (CRC) of the record is not asked
    number = pickle.dumps(rng.choice([1 << 30, 1 << 40]), protocol=2)[2:-1]
    if zipped:
        return _rewritten(whole, lambda text: text.replace(b"K\xfb", number))
    return whole[:at] + whole[at:].replace(b"K\xfb", number, 1)


def _rewritten(whole: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The zip of a torch file with another pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, change(content) if entry.filename.endswith("data.pkl") else content)
    return out.getvalue()


PICKLES = (code, code, strange, strange, strange, bomb, claimed)


# --- JSON


def rewritten(data: bytes, rng: random.Random, _) -> bytes:
    """A value somewhere in the JSON is of another kind, or missing."""
    content = json.loads(data)
    places: list[tuple] = []

    def walk(value: object) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(content)
    owner, key = rng.choice(places[:: rng.choice([1, 1, max(1, len(places) // 9)])])
    values = [None, -1, 1 << 70, 1e308, "", "x" * 100_000, "a\nb. C", [], {}, [[]], [None], {"class_type": None}, True]
    if rng.random() < 0.15:
        del owner[key]
    else:
        owner[key] = rng.choice(values)
    return json.dumps(content).encode()


def nested(data: bytes, rng: random.Random, _) -> bytes:
    """JSON that is JSON, and nothing more."""
    return rng.choice(
        [b"[" * 100_000, b'{"a":' * 100_000, b"null", b"[]", b"{}", b"NaN", b'"x"', b"9" * 5000, b'{"nodes": [null]}',
         b'{"1": {"class_type": []}}', b'{"1": {"class_type": "KSampler"}}', b"\xff\xfe{\x00}\x00", b'{"nodes": 3}',
         b'{"1": {"class_type": "KSampler", "inputs": 4}}', b'{"nodes": [], "links": [[1, 2]]}']
    )  # fmt: skip


JSON = (rewritten, rewritten, rewritten, nested)


# --- pictures


def picture(ending: str) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(file, ending)
    return file.getvalue()


def odd_picture(data: bytes, rng: random.Random, _) -> bytes:
    """Pictures that are sound, and that few programs make; and one that says it has billions of pixels."""
    how = rng.randrange(6)
    if how == 0:  # a PNG of 60000 x 60000 by its header
        whole = bytearray(picture("PNG"))
        whole[16:24] = struct.pack(">II", 60_000, 60_000)
        import zlib

        whole[29:33] = struct.pack(">I", zlib.crc32(whole[12:29]))
        return bytes(whole)
    file = io.BytesIO()
    if how == 1:
        Image.new("F", (4, 4), float("nan")).save(file, "TIFF")
    elif how == 2:
        Image.new("1", (1, 1)).save(file, "PNG")
    elif how == 3:
        Image.new("RGBA", (1, 3000), (0, 0, 0, 0)).save(file, "PNG")
    elif how == 4:
        Image.new("I;16", (3, 3), 40_000).save(file, "PNG")
    else:
        frames = [Image.new("P", (2, 2), n) for n in range(3)]
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()
