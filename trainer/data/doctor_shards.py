"""What a training run would make of a data set in shards, as the doctor says it: from the indexes and some samples."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ..lookahead.config import Data, cache_folder
from .doctor import FEW_PEOPLE, SMALL_FACE, Report
from .sharded import face_of
from .shards import Shards, embedding_of
from .store import Store

SOME = 500  # samples whose JSON is read
COMPARED = 20_000  # people who are compared with each other
TWINS = 0.9  # cosine of mean embeddings from which on two people are one to a recogniser
_SHOWN = 3  # pairs named in a sentence


def examine_shards(data: Data) -> Report:
    """Look at shards as a run would; pictures stay closed. Raises ShardError or StoreError as a run would."""
    shards = Shards(Store(data.source, cache_folder(data)))
    report = Report()
    people = len(shards.keys)
    references = np.bincount(shards.sample_of[shards.reference], minlength=people)
    fit = references[shards.sample_of] - shards.reference  # of each picture, how many others may be its reference
    report.rows += [
        ("shards", len(shards.names), f"whole by their indexes, in {shards.store}"),
        ("pictures", len(shards), ""),
        ("people", people, f"{len(np.unique(shards.sample_of[fit > 0])):,} of them with a pair to train on"),
        ("targets", int((fit > 0).sum()), "pictures with another one of their person as a reference"),
        ("pairs", int(fit.sum()), "of a target and a reference"),
    ]
    if not (fit > 0).any():
        report.wrong.append("There is no pair to train on: people need two pictures, of which one may be a reference.")
    elif people < FEW_PEOPLE:
        report.better.append(f"An encoder for anybody is learnt from many people, and here are {people:,}: make more.")
    _samples(report, data, shards)
    _twins(report, shards)
    return report


def _samples(report: Report, data: Data, shards: Shards) -> None:
    chosen = np.unique(np.linspace(0, len(shards.keys) - 1, min(SOME, len(shards.keys))).astype(int)).tolist()
    abouts = [shards.about(sample) for sample in chosen]
    pictures = [picture for about in abouts for picture in about["pictures"]]
    report.rows.append(("samples looked at", len(abouts), f"with {len(pictures):,} pictures; the rest is like them"))
    faces = [face_of(picture) for picture in pictures]
    without = sum(face is None for face in faces)
    small = blurred = 0
    for picture, face in zip(pictures, faces, strict=True):
        side = min(picture.get("width", data.size), picture.get("height", data.size))
        blurred += side < data.size
        if face is not None:
            x0, y0, x1, y1 = face.box.tolist()
            small += max(x1 - x0, y1 - y0) * data.size / side < SMALL_FACE
    report.rows += [
        ("without a face", without, "the identity loss and data.reference_margin need to know where it is"),
        (f"with a face below {SMALL_FACE} pixels", small, ""),
        (f"smaller than {data.size} pixels", blurred, "enlarged in training"),
    ]
    if without:
        report.wrong.append(
            f"Of {without:,} pictures the shards do not say where the face is: make them with checks.detector."
        )
    if small > len(pictures) / 10:
        report.better.append(f"Faces below {SMALL_FACE} pixels teach little: raise checks.face_size, or data.size.")
    if blurred > len(pictures) / 2:
        report.better.append(f"Most pictures are smaller than {data.size} pixels: set data.size to theirs.")
    captions = Counter(picture["caption"] for picture in pictures)
    report.rows.append(("different texts", len(captions), f"the most frequent: {captions.most_common(1)[0][0]!r}"))
    named = sum(
        about.get("description", "\0").lower() in p["caption"].lower() for about in abouts for p in about["pictures"]
    )
    if named:
        report.better.append(
            f"{named:,} texts hold the person's description: leave it to the reference (prompts.face), so that "
            "there is something to learn from it."
        )
    who = Counter(str(about.get("generator", {}).get("name", "unknown")) for about in abouts)
    licence = next((about["generator"]["licence"] for about in abouts if "generator" in about), "unknown")
    report.rows.append(("generators", len(who), f"{', '.join(who)}; licence: {licence}"))


def _twins(report: Report, shards: Shards) -> None:
    """People whom a recogniser takes for one, in any two shards: where they are made, a shard knows its own alone."""
    keys, means = [], []
    for sample in range(min(len(shards.keys), COMPARED)):
        known = [e for e in map(embedding_of, shards.about(sample)["pictures"]) if e is not None]
        if known:
            mean = np.mean(known, axis=0)
            means.append(mean / max(float(np.linalg.norm(mean)), 1e-12))
            keys.append(int(shards.keys[sample]))
    if len(means) < 2:
        return
    everyone, count = np.stack(means), 0
    some: list[str] = []
    for start in range(0, len(everyone), 1000):  # a block at a time: 20,000 x 20,000 are 1.6 GB
        alike = np.triu(everyone[start : start + 1000] @ everyone.T >= TWINS, start + 1)
        count += int(alike.sum())
        for a, b in np.argwhere(alike)[: _SHOWN - len(some)]:
            some.append(f"{keys[start + a]:08d} and {keys[b]:08d}")
    report.rows.append(
        ("pairs of twins", count, f"mean embeddings at least {TWINS} alike, among {len(means):,} people")
    )
    if count:
        report.better.append(
            f"Pairs of people who are one to the recogniser: {count:,} ({', '.join(some)}). Give people more that "
            "tells them apart, in people.attributes, or make fewer."
        )
