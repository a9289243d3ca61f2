"""The synthetic world: invented entities, facts in five domains, one- and two-hop questions, and replies of a skill.

Everything follows from the seed, so the best model for a question is known.
Every fact has a rank in [0, 1), its difficulty. A simulated model of skill s in a domain knows the facts whose rank is
below s. So a better model knows everything that a worse one knows. If a model does not know a fact, it names a wrong
object of the right type, always the same one.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from router_r1_jax.config import ConfigError

SPLITS = {"train": 0.65, "validation": 0.10, "test": 0.25}  # share of each relation's subjects; train has over a half


class Relation(NamedTuple):
    """A kind of fact: its name, its domain, and the types of the two entities that it connects."""

    name: str
    domain: str
    subject: str
    object: str


RELATIONS = (
    Relation("director", "film", "film", "person"),
    Relation("setting", "film", "film", "city"),
    Relation("singer", "music", "song", "person"),
    Relation("origin", "music", "song", "city"),
    Relation("coach", "sport", "club", "person"),
    Relation("home", "sport", "club", "city"),
    Relation("birthplace", "people", "person", "city"),
    Relation("spouse", "people", "person", "person"),
    Relation("country", "places", "city", "country"),
    Relation("river", "places", "city", "river"),
    Relation("mayor", "places", "city", "person"),
)
DOMAINS = tuple(dict.fromkeys(relation.domain for relation in RELATIONS))

TOKEN = re.compile(r"\w+|[^\w\s]")  # a token of the simulated models: a word or a punctuation mark

# Entity type -> the field of config.synthetic.world with the number of entities of that type.
COUNTS = dict(
    film="films", song="songs", club="clubs", person="persons", city="cities", country="countries", river="rivers"
)

# A name is start + vowel + middle + vowel + end. The middles are consonant pairs that are rare inside English words. So
# no name is, or contains, a word of the prompts or the name of a model.
_NAME_PARTS = (
    ("B", "D", "F", "G", "H", "J", "K", "L", "M", "N", "P", "R", "S", "T", "V", "Z", "Br", "Dr"),
    ("a", "e", "i", "o", "u"),
    ("lm", "rv", "zr", "km", "rz", "vd", "zl", "vr", "ks", "dz", "gm", "rg", "bn", "tv", "kr", "zm"),
    ("a", "e", "i", "o", "u"),
    ("ra", "x", "th", "sa", "ro", "rin", "ven", "dor", "ka", "mis", "zu", "lek"),
)
_NAME_COUNT = math.prod(map(len, _NAME_PARTS))


@dataclasses.dataclass(frozen=True)
class Fact:
    """One fact. `mistaken` is the wrong object that a model names if it does not know the fact."""

    relation: str
    subject: str
    object: str
    domain: str
    rank: float  # difficulty in [0, 1): models know the fact if their skill in the domain is greater
    mistaken: str


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its gold answers, and the facts that lead to them, in the order in which a router must ask."""

    id: str
    text: str
    golds: tuple[str, ...]
    hops: tuple[Fact, ...]


def count_tokens(text: str) -> int:
    """Tokens as the simulated models count them: words and punctuation marks."""
    return len(TOKEN.findall(text))


def query_text(relation: str, subject: str) -> str:
    """The query that asks a model for one fact: "director of Velmora?"."""
    return f"{relation} of {subject}?"


class World:
    """Entities, facts and questions of one seed.

    Attributes:
      names: entity type -> the names of its entities.
      facts: all facts.
    """

    def __init__(self, config: Mapping[str, int]) -> None:
        """`config` is config.synthetic.world. Raises ConfigError if a count is below 3, or names are too few."""
        _check(config)
        rng = np.random.default_rng(config["seed"])
        self.names = _draw_names(config, rng)
        self._type = {name: kind for kind, names in self.names.items() for name in names}
        self._entity = {name.lower(): name for name in self._type}
        self._split: dict[tuple[str, str], str] = {}
        self._fact: dict[tuple[str, str], Fact] = {}
        for domain in DOMAINS:
            self._add_domain(domain, rng)
        self.facts = tuple(self._fact.values())
        questions = list(self._compose())
        order = rng.permutation(len(questions))  # so that the first n questions of a split are a fair sample of it
        self._questions = {split: [] for split in SPLITS}
        for i in order:
            first = questions[i].hops[0]
            self._questions[self._split[first.relation, first.subject]].append(questions[i])

    def _add_domain(self, domain: str, rng: np.random.Generator) -> None:
        """Draw the domain's facts and assign a split and a rank to each."""
        drafts = []  # (difficulty key, relation, subject, object, mistaken)
        relations = [r for r in RELATIONS if r.domain == domain]
        order = rng.permutation(len(self.names[relations[0].subject]))
        for i, relation in enumerate(relations):
            subjects, objects = self.names[relation.subject], self.names[relation.object]
            splits = _assign_splits(order, i / len(relations))
            keys = _difficulty_keys(splits, rng)
            for subject, split, key in zip(subjects, splits, keys, strict=True):
                others = [name for name in objects if name != subject]  # nobody is married to themselves
                right, wrong = rng.choice(len(others), size=2, replace=False)
                drafts.append((key, relation.name, subject, others[right], others[wrong]))
                self._split[relation.name, subject] = split
        drafts.sort()
        for position, (_, name, subject, right_object, wrong_object) in enumerate(drafts):
            rank = (position + 0.5) / len(drafts)  # so the share of known facts is as close to the skill as it can be
            self._fact[name, subject] = Fact(name, subject, right_object, domain, rank, wrong_object)

    def _compose(self) -> Iterator[Question]:
        """All one-hop questions, and all two-hop questions whose two facts belong to different domains."""
        for fact in self.facts:
            yield _question((fact,))
            for relation in RELATIONS:
                if relation.subject == self._type[fact.object] and relation.domain != fact.domain:
                    yield _question((fact, self.fact(relation.name, fact.object)))

    def questions(self, split: str) -> tuple[Question, ...]:
        """The split's questions in a fixed random order. No two splits share a first (relation, entity)."""
        return tuple(self._questions[split])

    def fact(self, relation: str, subject: str) -> Fact:
        """The fact that answers "`relation` of `subject`". KeyError if the subject has no such relation."""
        return self._fact[relation, subject]

    def lookup(self, query: str) -> Fact | None:
        """The fact that a free-form query asks for, found by whole words in any case.

        None unless the query names exactly one relation and exactly one entity, and the entity has the relation. So a
        two-hop question in one query finds nothing.
        """
        words = set(re.findall(r"\w+", query.lower()))
        relations = [relation.name for relation in RELATIONS if relation.name in words]
        entities = [self._entity[word] for word in words if word in self._entity]
        if len(relations) != 1 or len(entities) != 1:
            return None
        return self._fact.get((relations[0], entities[0]))

    def reply(self, query: str, skill: Mapping[str, float]) -> str:
        """The reply of a model. `skill` maps domains to [0, 1]; a missing domain is 0."""
        fact = self.lookup(query)
        if fact is None:
            return "I do not know."
        return f"The {fact.relation} of {fact.subject} is {claim(fact, skill)}."

    def texts(self) -> Iterator[str]:
        """Every question, query, reply and name, for the training of a tokenizer."""
        for split in SPLITS:
            for question in self._questions[split]:
                yield question.text
        for fact in self.facts:
            query = query_text(fact.relation, fact.subject)
            yield query
            yield self.reply(query, {fact.domain: 1.0})
            yield self.reply(query, {fact.domain: 0.0})
        yield self.reply("", {})
        for word in (*self._type, *DOMAINS, *(relation.name for relation in RELATIONS)):
            yield f" {word}"


def claim(fact: Fact, skill: Mapping[str, float]) -> str:
    """The object that a model of this skill names for the fact: the right one if it knows the fact."""
    return fact.object if fact.rank < skill.get(fact.domain, 0.0) else fact.mistaken


def _check(config: Mapping[str, int]) -> None:
    for field in COUNTS.values():
        if config[field] < 3:  # a subject, its right object and its wrong object may have the same type
            raise ConfigError(f"synthetic.world.{field} is {config[field]}; at least 3 are needed")
    total = sum(config[field] for field in COUNTS.values())
    if total > _NAME_COUNT:
        raise ConfigError(f"synthetic.world asks for {total} entities; there are {_NAME_COUNT} names, lower the counts")


def _draw_names(config: Mapping[str, int], rng: np.random.Generator) -> dict[str, tuple[str, ...]]:
    """Distinct names for all entities, by entity type."""
    total = sum(config[field] for field in COUNTS.values())
    numbers = rng.choice(_NAME_COUNT, size=total, replace=False)
    rows = zip(*np.unravel_index(numbers, [len(part) for part in _NAME_PARTS]), strict=True)
    names = ("".join(part[i] for part, i in zip(_NAME_PARTS, row, strict=True)) for row in rows)
    return {kind: tuple(itertools.islice(names, config[field])) for kind, field in COUNTS.items()}


def _assign_splits(order: np.ndarray, turn: float) -> list[str]:
    """The split of each subject, in the shares of SPLITS, by its place in a random order.

    The places are rotated by `turn`, a share of the order. All relations of a domain have the same subjects, but
    different turns. So no subject is held out of training in all of them. A router could not copy a name whose token it
    has never met.
    """
    ends = np.round(np.cumsum(list(SPLITS.values())) * len(order))
    places = (order + int(turn * len(order))) % len(order)
    return [list(SPLITS)[int(np.searchsorted(ends, place, side="right"))] for place in places]


def _difficulty_keys(splits: list[str], rng: np.random.Generator) -> np.ndarray:
    """A sort key in [0, 1) for each fact of one relation. Within each split the keys are evenly spaced.

    With independent keys a model's share of known facts would differ between splits by several percentage points. That
    is about as much as the difference between the best model and the second best one.
    """
    keys = np.empty(len(splits))
    for split in SPLITS:
        members = [i for i, name in enumerate(splits) if name == split]
        keys[members] = (rng.permutation(len(members)) + rng.random()) / max(len(members), 1)
    return keys


def _question(hops: tuple[Fact, ...]) -> Question:
    """The question about these facts: "What is the birthplace of the director of Velmora?" asks director first."""
    relations = [fact.relation for fact in reversed(hops)]
    objects = {relation.name: relation.object for relation in RELATIONS}
    word = "Who" if objects[relations[0]] == "person" else "What"
    subject = hops[0].subject
    return Question(
        id=".".join((*relations, subject)),
        text=f"{word} is the {' of the '.join(relations)} of {subject}?",
        golds=(hops[-1].object,),
        hops=hops,
    )
