"""Who is drawn: each person is a function of the grammar, the seed and the person's number alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from ....lookahead.files.atomic import first_line
from ...config import ConfigError
from ..metadata import read_text
from .config import PRIMES, GenerateConfig, Grammar, digest, fields


@dataclass(frozen=True)
class Person:
    """attributes: the values of each, none where one is left out. description: with its article, as in a prompt."""

    number: int
    description: str
    attributes: Mapping[str, tuple[str, ...]]


class DescribedPeople:
    """People by description. Balanced attributes follow Halton sequences, so that every run of numbers is balanced, in
    each attribute and in their combinations, nearly as well as a table of it would be; the others are drawn."""

    def __init__(self, grammar: Grammar, seed: int):
        self.grammar = grammar
        self.key = digest([seed, grammar.model_dump(mode="json")])
        shifts = random_numbers(self.key, "shift").random(len(PRIMES))
        self._sequences = {name: (p, s) for name, p, s in zip(grammar.balance, PRIMES, shifts, strict=False)}

    def __call__(self, number: int) -> Person:
        numbers = random_numbers(self.key, number)
        values: dict[str, tuple[str, ...]] = {}
        for name, attribute in self.grammar.attributes.items():
            if name in self._sequences:
                base, shift = self._sequences[name]
                values[name] = (weighted_choice(attribute.values, (halton(number, base) + shift) % 1.0),)
            else:
                least, most = attribute.draw
                count = least + int(numbers.random() * (most - least + 1))
                values[name] = tuple(weighted_order(attribute.values, numbers)[:count])
        for name, attribute in self.grammar.attributes.items():
            if any(set(values[other]) & set(them) for other, them in attribute.unless.items()):
                values[name] = ()
        return Person(number, self._describe(values), values)

    def _describe(self, values: Mapping[str, tuple[str, ...]]) -> str:
        texts = {name: " and ".join(v for v in them if v) for name, them in values.items()}
        phrases = [p.format(**texts) for p in self.grammar.phrases if all(texts[name] for name in fields(p))]
        subject = " ".join(self.grammar.subject.format(**texts).split())
        return with_article(subject + (f" with {' and '.join(phrases)}" if phrases else ""))


class NamedPeople:
    """People whom the base model knows by name, from the user's own list."""

    def __init__(self, path: Path, seed: int):
        """Raises ConfigError, one sentence, for a list that cannot be read or is empty."""
        try:
            lines = read_text(path).split("\n")
        except (OSError, UnicodeError) as error:
            why = first_line(error)
            raise ConfigError(f"names: {path} cannot be read ({why}): name a text file with a name a line.") from None
        self.names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if not self.names:
            raise ConfigError(f"names: {path} holds no name: write one a line.")
        self.key = digest([seed, self.names])

    def __call__(self, number: int) -> Person:
        """Raises ConfigError, one sentence, where the list is too short."""
        if number >= len(self.names):
            raise ConfigError(
                f"The list holds {len(self.names)} names, and person {number} is asked for: ask for fewer shards or "
                "fewer people a shard."
            )
        return Person(number, self.names[number], {})


def read_people(config: GenerateConfig) -> DescribedPeople | NamedPeople:
    """Raises ConfigError, one sentence, where a list of names is wanted and cannot be read."""
    if config.names is not None:
        return NamedPeople(Path(config.names).expanduser(), config.seed)
    assert config.people is not None  # a configuration has one of the two
    return DescribedPeople(config.people, config.seed)


def halton(number: int, base: int) -> float:
    """The radical inverse of a number: its digits in the base, mirrored at the point."""
    value, share = 0.0, 1.0 / base
    while number:
        number, figure = divmod(number, base)
        value += figure * share
        share /= base
    return value


def weighted_choice(weights: Mapping[str, float], u: float) -> str:
    """The value at u in [0, 1), each covering its share."""
    able = {value: weight for value, weight in weights.items() if weight > 0}
    sums = list(accumulate(able.values()))
    return next((value for value, end in zip(able, sums, strict=True) if u * sums[-1] < end), list(able)[-1])


def weighted_order(weights: Mapping[str, float], numbers: np.random.Generator) -> list[str]:
    """The values with a weight above zero in random order, those of larger weight rather earlier: as if each were drawn
    without putting it back (Efraimidis and Spirakis 2006)."""
    able = {value: weight for value, weight in weights.items() if weight > 0}
    when = -np.log1p(-numbers.random(len(able))) / np.array(list(able.values()))
    return [list(able)[n] for n in np.argsort(when, kind="stable")]


def random_numbers(*key: object) -> np.random.Generator:
    """Random numbers that belong to these texts and numbers, whatever was drawn before."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], "big")))


def with_article(words: str) -> str:
    """Puts the article by the first word's spelling: "an old man", but "a Ukrainian man" (u as it is mostly spoken)."""
    return f"{'an' if words[:1].lower() in 'aeio' else 'a'} {words}"
