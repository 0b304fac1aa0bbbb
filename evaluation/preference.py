"""People as judges (table 3 of arXiv 2404.03620): a blind comparison of two methods, its page, and what it came to.

A study is a folder. `public/` is all that a judge's browser may see: one page and pictures under names that tell
nothing. `key.json`, beside it, knows which side of which question is whose. Answers are JSON, one file a judge, or one
line each in `answers.jsonl` where the page was served.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image
from scipy.stats import binomtest

from ..lookahead.files.atomic import atomic_folder, first_line
from ..sdxl.images import PictureError, read

QUESTIONS = {
    "identity": "Which picture shows the person of the reference better?",
    "prompt": "Which picture follows the text better?",
    "overall": "Which picture would you take?",
}
SIDES = ("left", "right")
ANSWERS = 64 * 1024  # bytes of one judge's answers, at most
_TEMPLATE = Path(__file__).with_name("preference.html.jinja")


class StudyError(ValueError):
    """Says what is wrong with a study or its pictures, in one sentence."""


@dataclass(frozen=True)
class Pair:
    """One comparison: picture files of both methods, and where there are any, a reference and the prompt."""

    name: str
    first: Path
    second: Path
    reference: Path | None = None
    prompt: str = ""


@dataclass(frozen=True)
class Verdict:
    """Tells how often judges chose the first method on a question.

    chosen of answers; share with its 95 % interval (Wilson); p: of the two-sided binomial test against one half;
    agreement: Krippendorff's alpha over the judges (1 is complete, 0 is chance), None with less than two judges of any
    pair; pairs and judges: how many took part. Answers of one judge are not independent: the interval counts answers.
    """

    question: str
    chosen: int
    answers: int
    share: float
    low: float
    high: float
    p: float
    agreement: float | None
    pairs: int
    judges: int


def pairs_of(
    first: Path, second: Path, references: Path | None = None, prompts: Mapping[str, str] | None = None
) -> list[Pair]:
    """The pictures that both folders hold under one name. references: a folder with the same names; prompts: by name.

    Raises StudyError where the folders share no picture, or one lacks its reference.
    """
    names = sorted(p.name for p in first.iterdir() if p.suffix.lower() in Image.registered_extensions())
    both = [name for name in names if (second / name).is_file()]
    if not both:
        raise StudyError(f"{first} and {second} share no picture: give both methods' files the same names.")
    out = []
    for name in both:
        reference = None if references is None else references / name
        if reference is not None and not reference.is_file():
            raise StudyError(f"{reference} is missing: every compared picture needs its reference, under its own name.")
        out.append(Pair(name, first / name, second / name, reference, (prompts or {}).get(name, "")))
    return out


def pairs_in(evaluation: Path, first: str, second: str) -> list[Pair]:
    """The pictures of two methods in the folder of an evaluation, of the same person, prompt and seed.

    first, second: METHOD or METHOD@WEIGHT, as the protocol has them; by default the first weight that is there, and the
    first back end that drew both. Raises StudyError, one sentence, where there is no such evaluation or method.
    """
    path = evaluation / "scores.csv"
    if not path.is_file():
        raise StudyError(f"{evaluation} has no scores.csv: name the folder of a finished `lookahead evaluate`.")
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    arms = [_arm_of(name, lines) for name in (first, second)]
    if arms[0] == arms[1]:
        raise StudyError(f"{first} and {second} are the same arm: name two that differ, such as two weights.")

    def drawn(arm: tuple[str, str], backend: str) -> dict[tuple[str, str, str], dict[str, str]]:
        mine = (line for line in lines if (line["method"], line["weight"], line["backend"]) == (*arm, backend))
        return {(line["person"], line["prompt"], line["seed"]): line for line in mine}

    for backend in dict.fromkeys(line["backend"] for line in lines):
        one, other = (drawn(arm, backend) for arm in arms)
        both = [key for key in one if key in other]
        if both:
            return [
                Pair(
                    ", ".join(key),
                    evaluation / one[key]["picture"],
                    evaluation / other[key]["picture"],
                    evaluation / one[key]["reference"],
                    prompt=key[1],
                )
                for key in both
            ]
    raise StudyError(f"No back end drew both {first} and {second}: name two methods that one has drawn.")


def _arm_of(name: str, lines: Sequence[Mapping[str, str]]) -> tuple[str, str]:
    """Method and weight, as the lines have them."""
    arms = list(dict.fromkeys((line["method"], line["weight"]) for line in lines))
    for method, weight in arms:
        if name in (method, f"{method}@{weight}"):
            return method, weight
    raise StudyError(f"{name!r} was not drawn: name one of {', '.join(f'{m}@{w}' for m, w in arms)}.")


def make_study(
    folder: Path,
    pairs: Sequence[Pair],
    methods: tuple[str, str],
    questions: Sequence[str] = tuple(QUESTIONS),
    repeats: float = 0.1,
    seed: int = 0,
) -> Path:
    """Write a study; returns its page. Which method stands on which side is drawn for every pair.

    repeats: the share of pairs that a judge sees twice, with the sides turned: who answers by side is found out so. A
    question about references or prompts is left out where no pair has one. Raises StudyError for a folder that is there
    already (answers may lie in it), a picture that cannot be read, or no question.
    """
    asked = [q for q in questions if q != "identity" or any(p.reference for p in pairs)]
    asked = [q for q in asked if q != "prompt" or any(p.prompt for p in pairs)]
    if unknown := set(asked) - QUESTIONS.keys():
        raise StudyError(f"{sorted(unknown)[0]!r} is no question: use some of {', '.join(QUESTIONS)}.")
    if not asked or not pairs:
        raise StudyError("Nothing is left to ask: give pairs, and references or prompts for the questions about them.")
    if folder.exists() and any(folder.iterdir()):
        raise StudyError(f"{folder} is there already, and may hold answers: name a new folder.")
    chance = random.Random(seed)
    again = chance.sample(range(len(pairs)), round(repeats * len(pairs)))
    places = [(n, chance.random() < 0.5, False) for n in range(len(pairs))]
    places += [(n, not places[n][1], True) for n in again]
    chance.shuffle(places)
    for left in folder.parent.glob(f".{folder.name}.*part"):  # of one that was killed
        shutil.rmtree(left, ignore_errors=True)
    with atomic_folder(folder) as part:
        (part / "public").mkdir()
        items, key = [], []
        for place, (n, turned, repeat) in enumerate(places):
            sides = (pairs[n].second, pairs[n].first) if turned else (pairs[n].first, pairs[n].second)
            shown = {"left": sides[0], "right": sides[1], "reference": pairs[n].reference}
            files = {k: _copy(path, part / "public", f"{seed}-{place}-{k}") for k, path in shown.items() if path}
            items.append({"id": place, "prompt": pairs[n].prompt, **files})
            key.append({"id": place, "pair": pairs[n].name, "left": methods[turned], "repeat": repeat})
        page = _page(items, {q: QUESTIONS[q] for q in asked}, _digest(part / "public", items))
        (part / "public" / "index.html").write_text(page, encoding="utf-8")
        (part / "key.json").write_text(json.dumps({"methods": methods, "questions": asked, "items": key}, indent=1))
    return folder / "public" / "index.html"


def _copy(path: Path, folder: Path, salt: str) -> str:
    """A picture under a name that tells nothing, without what its file says beside the pixels."""
    name = hashlib.sha256(salt.encode()).hexdigest()[:16] + ".png"
    try:
        pixels = (read(path).permute(1, 2, 0) * 255).round().byte().numpy()
    except PictureError as error:
        raise StudyError(f"{str(error).rstrip('.')}: draw it again, or take it out.") from error
    Image.fromarray(pixels).save(folder / name)
    return name


def _digest(public: Path, items: list[dict[str, Any]]) -> str:
    """Names a study by all that it shows: what a browser keeps of one is not another's."""
    parts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(public.iterdir())]
    return hashlib.sha256(repr((items, parts)).encode()).hexdigest()[:16]


def _page(items: list[dict[str, Any]], questions: Mapping[str, str], study: str) -> str:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        study=study,
        items=json.dumps(items).replace("<", "\\u003c"),
        questions=json.dumps(questions).replace("<", "\\u003c"),
    )


# --- serving it


def server(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of a study on 127.0.0.1 (port 0: a free one), which appends what judges send to `answers.jsonl`.

    It serves the files of `public/` alone. Call `serve_forever`, and `shutdown` from another thread.
    """
    public, sink = folder / "public", folder / "answers.jsonl"
    served = {f"/{p.name}": p for p in public.iterdir()} | {"/": public / "index.html"}
    kinds = {".html": "text/html; charset=utf-8", ".png": "image/png"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = served.get(self.path.split("?")[0])
            if path is None:
                return self.send_error(404)
            body = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", kinds[path.suffix])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            if self.path != "/answers" or not 0 < length <= ANSWERS:
                return self.send_error(400)
            try:
                text = json.dumps(_answers(json.loads(self.rfile.read(length))))
            except (ValueError, StudyError):
                return self.send_error(400)
            with sink.open("a", encoding="utf-8") as file:  # one write a judge
                file.write(text + "\n")
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing: who answers is nobody's business."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def _answers(content: Any) -> dict[str, Any]:
    """One judge's answers, checked: {"judge": text, "answers": [{"id": int, "question": text, "side": text}, ...]}."""
    judge, answers = (content.get(name) if isinstance(content, dict) else None for name in ("judge", "answers"))
    if not (isinstance(judge, str) and isinstance(answers, list)) or not all(
        isinstance(a, dict)
        and isinstance(a.get("id"), int)
        and isinstance(a.get("question"), str)
        and a.get("side") in SIDES
        for a in answers
    ):
        raise StudyError("These are no answers of a study: take the file that its page saved.")
    kept = [{k: a[k] for k in ("id", "question", "side")} for a in answers]
    return {"judge": judge[:80], "answers": kept}


# --- counting


def read_answers(folder: Path, files: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Reads what the judges of a study sent (`answers.jsonl`) and saved (files); the last word of each counts.

    Raises StudyError, naming the file, for what is not a study's answers.
    """
    lines = []
    if (folder / "answers.jsonl").exists():
        sent = _bytes(folder / "answers.jsonl").splitlines()  # (of bytes: it cuts at no U+2028)
        lines = [(folder / "answers.jsonl", line) for line in sent]
    out = []
    for path, content in [*lines, *((path, _bytes(path)) for path in files)]:
        try:
            out.append(_answers(json.loads(content.decode("utf-8-sig"))))
        except (ValueError, StudyError) as error:
            raise StudyError(f"{path} holds something else than answers ({first_line(error)}): take it out.") from error
    return out


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror}): name a file of answers.") from None


def count(folder: Path, files: Sequence[Path] = ()) -> tuple[list[Verdict], dict[str, float]]:
    """The verdicts, a question each, and by judge the share of repeated pairs answered alike with the sides turned.

    Repeats count for that share alone. Raises StudyError where there is no study or no answer.
    """
    path = folder / "key.json"
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        items = {item["id"]: item for item in key["items"] if {"left", "repeat", "pair"} <= item.keys()}
        first, questions = key["methods"][0], list(key["questions"])
    except OSError:
        raise StudyError(
            f"{folder} is no study: it has no key.json; name the folder that `study make` wrote."
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise StudyError(f"{path} is not what `study make` wrote: take a copy of it, or make the study anew.") from None
    votes: dict[str, dict[str, dict[str, bool]]] = {q: defaultdict(dict) for q in questions}
    again: dict[tuple[str, str, str], bool] = {}
    for sheet in read_answers(folder, files):
        for answer in sheet["answers"]:
            item = items.get(answer["id"])
            if item is None or answer["question"] not in votes:
                continue  # of another study
            chose_first = (answer["side"] == "left") == (item["left"] == first)
            if item["repeat"]:
                again[sheet["judge"], answer["question"], item["pair"]] = chose_first
            else:
                votes[answer["question"]][item["pair"]][sheet["judge"]] = chose_first
    if not any(votes.values()):
        raise StudyError(f"{folder} has no answers yet: let somebody fill in its page, or name their files.")
    verdicts = [_verdict(question, by_pair) for question, by_pair in votes.items() if by_pair]
    steady: dict[str, list[bool]] = defaultdict(list)
    for (judge, question, pair), chose_first in again.items():
        if judge in votes[question].get(pair, {}):
            steady[judge].append(votes[question][pair][judge] == chose_first)
    return verdicts, {judge: sum(same) / len(same) for judge, same in steady.items()}


def _verdict(question: str, by_pair: Mapping[str, Mapping[str, bool]]) -> Verdict:
    answers = [vote for votes in by_pair.values() for vote in votes.values()]
    test = binomtest(sum(answers), len(answers))
    ends = test.proportion_ci(method="wilson")
    judges = {judge for votes in by_pair.values() for judge in votes}
    agreement = krippendorff([list(votes.values()) for votes in by_pair.values()])
    numbers = sum(answers), len(answers), float(test.statistic), float(ends.low), float(ends.high), float(test.pvalue)
    return Verdict(question, *numbers, agreement, len(by_pair), len(judges))


def krippendorff(units: Sequence[Sequence[object]]) -> float | None:
    """Krippendorff's alpha of nominal answers (Krippendorff 2004, chapter 11): units hold one answer a judge, any
    number of them; those with a single answer do not count. None where no unit has two; 1 where all answers are one.
    """
    pairable = [Counter(answers) for answers in units if len(answers) > 1]
    total = sum((answers for answers in pairable), Counter())
    n = sum(total.values())
    if not n:
        return None
    expected = n * n - sum(c * c for c in total.values())
    if not expected:
        return 1.0
    observed = sum((sum(u.values()) ** 2 - sum(c * c for c in u.values())) / (sum(u.values()) - 1) for u in pairable)
    return 1 - (n - 1) * observed / expected


def table(verdicts: Sequence[Verdict], methods: tuple[str, str]) -> str:
    """The verdicts as a table in Markdown."""
    head = f"| question | {methods[0]} chosen | over | p | agreement | pairs | judges |\n|---|---|---|---|---|---|---|"
    rows = [
        f"| {QUESTIONS.get(v.question, v.question)} | {v.share:.3f} [{v.low:.3f}, {v.high:.3f}] | {methods[1]} | "
        f"{v.p:.2g} | {'' if v.agreement is None else f'{v.agreement:.2f}'} | {v.pairs} | {v.judges} |"
        for v in verdicts
    ]
    return "\n".join([head, *rows])


def as_values(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The verdicts as plain values, for a JSON file."""
    return [asdict(verdict) for verdict in verdicts]
