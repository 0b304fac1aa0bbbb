"""From a protocol to pictures and scores: what is there already is neither drawn nor judged again."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ...tools.common import Stopwatch, say
from .backends import Backend, ModelFiles, OpenHost, Setting
from .library import EvaluationError, Library, digest_of
from .measures import MEASURES, OTHERS, PLAIN, REFERENCE, TARGET, Case, MeasureKind, OpenedMeasure
from .methods import METHODS, BestOf, Method, Nothing
from .opening import NAMES, opened
from .people import PeopleSource, ReferencePerson, read_people
from .protocol import Protocol, of_kind
from .scenes import Drawable, Drawn, KeptPicture, PictureJob
from .store import EvaluationStore, digest

NEWS = 15.0  # seconds between lines of progress


@dataclass(frozen=True)
class Arm:
    """A method at a weight, drawn by a back end."""

    method: str
    weight: float
    backend: str


@dataclass(frozen=True, eq=False)
class Surroundings:
    """Holds what an evaluation is run with beside its protocol, given by whoever puts rooms together.

    sources, kinds: of people, methods and measures beside the usual.
    """

    files: ModelFiles
    library: Library
    open_host: OpenHost
    sources: Mapping[str, PeopleSource]
    measures: Mapping[str, type[MeasureKind]]
    methods: Mapping[str, type[Method]]


class EvaluationRun:
    """A protocol with its people, prompts, methods and measures, and the folder that all is kept in.

    Raises EvaluationError or ConfigError, one sentence, for what cannot be run; nothing is drawn before.
    """

    def __init__(self, protocol: Protocol, world: Surroundings, worker: int = 0, workers: int = 1):
        self.protocol, self.world = protocol, world
        self.folder = Path(protocol.out or "output/evaluate").expanduser()
        self.methods = protocol.parsed_methods({**METHODS, **world.methods})
        self.kinds = {**MEASURES, **world.measures}
        measured = protocol.parsed_measures(self.kinds)
        self.prompts = protocol.prompt_list()
        self._check()
        self.store = EvaluationStore(self.folder, worker)
        self.people = read_people(protocol.people, self.prompts, self.folder / "references", world.sources)
        self.own_people = self.people[worker::workers]
        self.measures = {name: m.open(world.library, protocol.models.pack) for name, m in measured.items()}
        self._check_references()
        self.warnings = self._own_judges()
        self._model = world.files.digest()
        self._pack = digest_of(world.files.pack) if world.files.pack else None
        self._drawing = protocol.drawing.model_dump_json()
        self._cases: dict[tuple[Arm, PictureJob], tuple[Case, dict[str, object]]] = {}
        self._targets: dict[Path, str] = {}
        self._digests = {
            name: method.digest(world.library, protocol.drawing.steps) for name, method in self.methods.items()
        }

    def _check(self) -> None:
        if unknown := [b for b in self.protocol.backends if b not in NAMES]:
            raise EvaluationError(f"backends names {unknown[0]!r}: use {' and '.join(NAMES)}, or one of them.")
        for name, method in self.methods.items():
            for other in method.related():
                if other not in self.methods or self.methods[other].LATE:
                    raise EvaluationError(
                        f"methods.{name} names {other!r}, which is no method that is drawn for itself: name one of "
                        f"{', '.join(n for n, m in self.methods.items() if not m.LATE)}."
                    )
            try:
                method.check_files(self.world.library)
                method.check_backends(self.protocol.backends)
                method.check_others(self.methods)
            except EvaluationError as error:
                raise EvaluationError(f"methods.{name}: {error}") from None
        base = self.protocol.baseline
        if base is not None and base not in self.methods:
            raise EvaluationError(f"baseline is {base!r}: name one of the methods, {', '.join(self.methods)}.")

    def _check_references(self) -> None:
        """Says of every reference whether the judges see a face in it, before anything is drawn."""
        missing = []
        for name, measure in self.measures.items():
            if measure.judge and REFERENCE in measure.needs and measure.missing is not None:
                for person in self.people:
                    case = Case(person.reference, person.name, "", person.reference)
                    if measure.score(case) is None:
                        missing.append((person.name, name))
        if missing:
            names = list(dict.fromkeys(n for n, _ in missing))
            raise EvaluationError(
                f"No face was found in the reference {', '.join(names[:5])}{' ...' if len(names) > 5 else ''} (measure "
                f"{missing[0][1]}): take it out of people.source, or give a picture that shows one face clearly."
            )

    def _check_targets(self) -> None:
        """The same of how this worker's people truly look under the prompts, where that is known and not judged yet."""
        missing = {}
        for name, measure in self.measures.items():
            if not measure.judge or TARGET not in measure.needs or measure.missing is None:
                continue
            for person in self.own_people:
                left = [
                    job for arm, job in product(self.all_arms(), self.jobs([person])) if self._waits(measure, arm, job)
                ]
                for prompt in dict.fromkeys(job.prompt for job in left):
                    target = person.target(prompt)
                    if target is None:
                        continue
                    if measure.score(Case(target, person.name, prompt.text, person.reference, target)) is None:
                        missing[f"{target.name} of {person.name}"] = name
        if missing:
            raise EvaluationError(
                f"No face was found in the target {', '.join([*missing][:5])}{' ...' if len(missing) > 5 else ''} "
                f"(measure {next(iter(missing.values()))}), so that nobody could be like it: take it out, or give one "
                "that shows a face."
            )

    def _own_judges(self) -> list[str]:
        """A sentence for each measure whose recogniser a method was trained, is steered or chosen by."""
        out = []
        for name, method in self.methods.items():
            used = method.loss_recognisers(self.world.library, self.world.files.pack)
            for key, measure in self.measures.items():
                if measure.judge and (measure.judged_by in used or measure.judge in used):
                    out.append(
                        f"measures.{key} judges by {measure.judge}, by which methods.{name} was trained, is steered or "
                        "chosen: that flatters it, so judge by another."
                    )
        return out

    # --- pictures

    def arms(self, backend: str) -> list[tuple[str, float]]:
        """Methods and weights that a back end draws, those that need others last."""
        fit = [(n, m) for n, m in self.methods.items() if self._fits(m, backend)]
        fit.sort(key=lambda pair: pair[1].LATE)
        return [(name, weight) for name, method in fit for weight in method.weights]

    def _fits(self, method: Method, backend: str) -> bool:
        return backend in method.drawn_by() and all(backend in self.methods[o].drawn_by() for o in method.related())

    def all_arms(self) -> list[Arm]:
        """Every arm, in the order of the protocol."""
        wanted = [(n, w) for n, m in self.methods.items() for w in m.weights]
        return [Arm(n, w, b) for b in self.protocol.backends for n, w in wanted if (n, w) in set(self.arms(b))]

    def jobs(self, people: list[ReferencePerson] | None = None) -> list[PictureJob]:
        """Every person under every prompt with every seed."""
        everyone = self.people if people is None else people
        return [PictureJob(*parts) for parts in product(everyone, self.prompts, self.protocol.seeds)]

    def key(self, name: str, job: PictureJob, weight: float, backend: str) -> str:
        """The content key of a picture: hash of all that it depends on."""
        method = self.methods[name]
        methods = [self._digests[n] for n in (name, *method.related())]
        person = job.person.digest if method.sees_reference() else None
        whose_time = self._whose_time(method)
        parts = (backend, self._model, methods, weight, self._drawing, person, job.prompt.text, job.noise_seed)
        return digest(*parts, *whose_time)

    def _whose_time(self, method: Method) -> list[float]:
        """The weight by whose time pictures are counted, where another could have been it."""
        other = method.same_time_as if isinstance(method, BestOf) else None
        weights = self.methods[other].weights if other else ()
        return [weights[0]] if len(weights) > 1 else []

    def timed(self, method: str, other: str, weight: float, backend: str) -> tuple[Arm, Arm]:
        """The arms whose times say how many pictures of a method fit into one of another's."""
        return Arm(method, weight, backend), Arm(other, self.methods[other].weights[0], backend)

    def counts(self) -> dict[str, int]:
        """Tells how many pictures fit into the time of another method's, for each best of so many."""
        found = {}
        for arm in self.all_arms():
            method = self.methods[arm.method]
            if isinstance(method, BestOf) and method.same_time_as:
                count = self.counted(method.of, method.same_time_as, arm.weight, arm.backend)
                if count is not None:
                    of = method.of + (f", {arm.weight:g}" if len(method.weights) > 1 else "")
                    found[f"{arm.backend}: {of} in the time of {method.same_time_as}"] = count
        return found

    def counted(self, method: str, other: str, weight: float, backend: str) -> int | None:
        """Tells how many pictures of a method fit into the time of one of another's, where that was found before. An
        earlier version of this code named counts by the methods alone; that one holds where pictures by it are there.
        """
        by_name = self.store.counted_by_name(f"{backend}: {method} in the time of {other}")
        if by_name is not None:
            choosers = [
                n
                for n, m in self.methods.items()
                if isinstance(m, BestOf) and (m.of, m.same_time_as) == (method, other)
            ]
            keys = (self.key(name, job, weight, backend) for name in choosers for job in self.jobs())
            if any(self.store.has(key) for key in keys):
                return by_name
        return self.store.counted(self.count_key(*self.timed(method, other, weight, backend)))

    def count_key(self, own: Arm, theirs: Arm) -> str:
        """The content key of how many pictures of an arm fit into the time of one of another's."""
        parts = [(self._digests[arm.method], arm.weight, arm.backend) for arm in (own, theirs)]
        return digest("count", self._model, parts, self._drawing)

    def draw(self) -> None:
        """Draw what is missing of this worker's people. The same call again goes on where it stopped."""
        self._check_targets()
        for name in self.protocol.backends:
            jobs = self.jobs(self.own_people)
            todo = [
                (n, w, job) for n, w in self.arms(name) for job in jobs if not self.store.has(self.key(n, job, w, name))
            ]
            if not todo:
                continue
            setting = Setting(
                self.world.files, self.protocol.drawing, self.world.library, self.methods, self.world.open_host
            )
            say(f"{name}: {len(todo)} pictures are to be drawn")
            with opened(name, setting) as backend:
                for method in dict.fromkeys(n for n, _, _ in todo):
                    if not self.methods[method].LATE:
                        asked = {job.prompt: job for n, _, job in todo if n == method}
                        for job in asked.values():
                            backend.check(method, self.methods[method], job)
                desk = _Desk(self, backend, name)
                for n, w, job in _with_progress(todo, name):
                    desk.picture(n, job, w)

    def missing(self) -> int:
        """Counts the pictures that are not there yet, or not judged by every measure, of all workers."""
        self.store.refresh()
        return sum(not self._is_done(arm, job) for arm in self.all_arms() for job in self.jobs())

    def _is_done(self, arm: Arm, job: PictureJob) -> bool:
        there = self.store.has(str(self.case(arm, job)[1]["picture"]))
        return there and not any(self._waits(measure, arm, job) for measure in self.measures.values())

    def _waits(self, measure: OpenedMeasure, arm: Arm, job: PictureJob) -> bool:
        """Tells whether a measure has yet to judge a picture of which it can say something."""
        case, depends = self.case(arm, job)
        can = all(case.has(need) for need in measure.needs)
        return can and self.score_key(measure, case, depends) not in self.store.scores

    # --- scores

    def case(self, arm: Arm, job: PictureJob) -> tuple[Case, dict[str, object]]:
        """A picture with all that judges may ask for, and by field what that depends on."""
        if (arm, job) not in self._cases:
            self._cases[arm, job] = self._case(arm, job)
        return self._cases[arm, job]

    def _case(self, arm: Arm, job: PictureJob) -> tuple[Case, dict[str, object]]:

        def path(one: PictureJob, method: str = arm.method, weight: float = arm.weight) -> tuple[str, Path]:
            key = self.key(method, one, weight, arm.backend)
            return key, self.store.picture(key)

        plain = next(((n, m) for n, m in self.methods.items() if isinstance(m, Nothing) and not m.guidance), None)
        method = self.methods[arm.method]
        compared = method.sees_reference() and method.same_noise(self.protocol.drawing.steps)
        key, picture = path(job)
        target = job.person.target(job.prompt)
        others = [path(PictureJob(job.person, job.prompt, s)) for s in self.protocol.seeds if s != job.seed]
        before = path(job, plain[0], plain[1].weights[0]) if plain and compared else None
        case = Case(
            picture,
            job.person.name,
            job.prompt.text,
            job.person.reference,
            target,
            before and before[1],
            tuple(p for _, p in others),
        )
        depends: dict[str, object] = {
            "picture": key,
            REFERENCE: job.person.digest,
            TARGET: self._target_digest(target) if target else None,
            PLAIN: before and before[0],
            OTHERS: sorted(k for k, _ in others),
        }
        return case, depends

    def _target_digest(self, target: Path) -> str:
        if target not in self._targets:  # more than `digest_of` keeps
            self._targets[target] = digest_of(target)
        return self._targets[target]

    def score_key(self, measure: OpenedMeasure, case: Case, depends: Mapping[str, object]) -> str:
        """The content key of a score."""
        parts = (depends[part] for part in ("picture", *measure.needs))
        return digest(measure.title, measure.digest, self._pack, case.prompt, *parts)

    def score(self) -> None:
        """Judge what is missing of this worker's people."""
        todo = []
        for arm, job in product(self.all_arms(), self.jobs(self.own_people)):
            case, depends = self.case(arm, job)
            for name, measure in self.measures.items():
                if self._waits(measure, arm, job):
                    todo.append((name, measure, self.score_key(measure, case, depends), case, depends["picture"]))
        if todo:
            say(f"{len(todo)} scores are to be measured")
        for name, measure, key, case, picture in _with_progress(todo, "scores"):
            if key not in self.store.scores:
                about = {"measure": name, "judge": measure.title, "picture": picture}
                self.store.keep_score(key, measure.score(case), about)

    def values(self, arm: Arm, measure: OpenedMeasure) -> list[list[float | None]]:
        """Scores of an arm by person, in the order of prompts and seeds; None where there is none to count."""
        rows: list[list[float | None]] = []
        for person in self.people:
            row: list[float | None] = []
            for job in self.jobs([person]):
                case, depends = self.case(arm, job)
                value = self.store.scores.get(self.score_key(measure, case, depends), None)
                asked = all(case.has(need) for need in measure.needs)
                row.append(measure.missing if value is None and asked else value)
            rows.append(row)
        return rows

    def lines(self) -> list[dict[str, Any]]:
        """Lists what is known of every picture of this evaluation that is there, each once."""
        keys = (self.key(a.method, job, a.weight, a.backend) for a in self.all_arms() for job in self.jobs())
        return [self.store.drawn[key] for key in dict.fromkeys(keys) if key in self.store.drawn]

    def seconds(self, arm: Arm) -> float | None:
        """The median time of a picture of an arm."""
        return self._median(arm, "seconds")

    def memory(self, arm: Arm) -> float | None:
        """The median of the peaks of memory, in bytes, while pictures of an arm were drawn."""
        return self._median(arm, "memory")

    def _median(self, arm: Arm, field: str) -> float | None:
        keys = [self.key(arm.method, job, arm.weight, arm.backend) for job in self.jobs()]
        known = [self.store.drawn[k].get(field) for k in keys if k in self.store.drawn]
        values = [value for value in known if value is not None]
        return statistics.median(values) if values else None


class _Desk:
    """Where a back end and the store meet (`scenes.Desk`)."""

    def __init__(self, run: EvaluationRun, backend: Backend, name: str):
        self._run, self._backend, self._name = run, backend, name
        self._choosers: dict[str, OpenedMeasure] = {}

    def drawn(self, method: Drawable, job: PictureJob, weight: float) -> Drawn:
        return self._backend.draw(method, job, weight)

    def picture(self, name: str, job: PictureJob, weight: float) -> KeptPicture:
        run, store = self._run, self._run.store
        key = run.key(name, job, weight, self._name)
        if not store.has(key):
            drawn = run.methods[name].make(self, job, weight)
            about = {
                "method": name,
                "weight": weight,
                "backend": f"{self._name}, {self._backend.about}",
                "person": job.person.name,
                "prompt": job.prompt.text,
                "seed": job.seed,
                "seconds": round(drawn.seconds, 3),
                "memory": drawn.memory,
            }
            store.keep(key, drawn.image, about)
        line = store.drawn[key]
        return KeptPicture(key, store.picture(key), float(line["seconds"]), line.get("memory"))

    def score(self, by: Mapping[str, Any], picture: KeptPicture, job: PictureJob) -> float:
        run = self._run
        known = repr(sorted(by.items()))
        if known not in self._choosers:
            kind = of_kind("methods", "by", by, run.kinds)
            self._choosers[known] = kind.open(run.world.library, run.protocol.models.pack)
        target = job.person.target(job.prompt)
        case = Case(picture.path, job.person.name, job.prompt.text, job.person.reference, target)
        value = self._choosers[known].score(case)
        return float("-inf") if value is None else value

    def count_in_the_time_of(self, method: str, other: str, weight: float) -> int:
        run = self._run
        known = run.counted(method, other, weight, self._name)
        if known is not None:
            return known
        arms = run.timed(method, other, weight, self._name)

        def found() -> int:
            own, theirs = (run.seconds(arm) for arm in arms)
            if own is None or theirs is None:
                raise EvaluationError(f"There is no time of {method} or {other} yet, by which pictures are counted.")
            return max(1, round(theirs / own))

        return run.store.count(run.count_key(*arms), found)


def _with_progress(todo: list[Any], name: str) -> Iterator[Any]:
    watch, last = Stopwatch(), 0.0
    for number, item in enumerate(todo):
        yield item
        if watch.seconds - last > NEWS or number + 1 == len(todo):
            last = watch.seconds
            left = watch.seconds / (number + 1) * (len(todo) - number - 1)
            say(f"{name}: {number + 1} of {len(todo)}, {last:.0f} s, about {left:.0f} s left")
