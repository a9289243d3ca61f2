"""The synthetic world: invented entities, facts in five domains, one- and two-hop questions, and a model's replies.

Everything follows from the configured seed, so the best choice per question is known and regret can be measured.
Every fact has a rank in [0, 1), its difficulty. A simulated model of skill s in a domain knows just the facts of rank
below s, so a better model knows all that a worse one knows; where it does not know, it names a wrong object of the
right type, always the same one.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping

import numpy as np

from router_r1_jax.config import ConfigError

SPLITS = {"train": 0.65, "validation": 0.10, "test": 0.25}  # share of each relation's subjects; train is over a half


@dataclasses.dataclass(frozen=True)
class Relation:
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

# Entity type -> the configuration field with the number of entities of that type.
COUNTS = {
    "film": "films",
    "song": "songs",
    "club": "clubs",
    "person": "persons",
    "city": "cities",
    "country": "countries",
    "river": "rivers",
}

# A name is start + vowel + middle + vowel + end. The middles are consonant pairs that English hardly has inside a word,
# so that no name is (or contains) an English word of the prompts or the name of a model.
_NAME_PARTS = (
    ("B", "D", "F", "G", "H", "J", "K", "L", "M", "N", "P", "R", "S", "T", "V", "Z", "Br", "Dr"),
    ("a", "e", "i", "o", "u"),
    ("lm", "rv", "zr", "km", "rz", "vd", "zl", "vr", "ks", "dz", "gm", "rg", "bn", "tv", "kr", "zm"),
    ("a", "e", "i", "o", "u"),
    ("ra", "x", "th", "sa", "ro", "rin", "ven", "dor", "ka", "mis", "zu", "lek"),
)


@dataclasses.dataclass(frozen=True)
class Fact:
    """One fact. `mistaken` is the object that a model names which does not know the fact."""

    relation: str
    subject: str
    object: str
    domain: str
    rank: float  # difficulty in [0, 1): known to the models whose skill in the domain exceeds it
    mistaken: str


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its gold answers, and the facts that lead to them in the order in which they must be asked."""

    id: str
    text: str
    golds: tuple[str, ...]
    hops: tuple[Fact, ...]


def query_text(relation: str, subject: str) -> str:
    """The query that asks a model for one fact: "director of Velmora?"."""
    return f"{relation} of {subject}?"


class World:
    """Entities, facts and questions of one seed.

    `config` maps "seed" and the fields of COUNTS to integers (config.data.world); a missing, unknown or too small field
    raises ConfigError. `facts` holds all facts, `names` maps each entity type to its names.
    """

    def __init__(self, config: Mapping[str, int]):
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
        """Draw the domain's facts, the split of each and its rank."""
        drafts = []  # (key of the difficulty order, relation, subject, object, mistaken)
        relations = [r for r in RELATIONS if r.domain == domain]
        order = rng.permutation(len(self.names[relations[0].subject]))
        for i, relation in enumerate(relations):
            subjects, objects = self.names[relation.subject], self.names[relation.object]
            splits = _assign_splits(order, i / len(relations))
            keys = _difficulty_keys(splits, rng)
            for subject, split, key in zip(subjects, splits, keys, strict=True):
                others = [name for name in objects if name != subject]  # nobody is their own spouse
                right, wrong = rng.choice(len(others), size=2, replace=False)
                drafts.append((key, relation.name, subject, others[right], others[wrong]))
                self._split[relation.name, subject] = split
        drafts.sort()
        for position, (_, relation_name, subject, right_name, wrong_name) in enumerate(drafts):
            rank = (position + 0.5) / len(drafts)  # the half makes the share known the nearest one to the skill
            fact = Fact(relation_name, subject, right_name, domain, rank, wrong_name)
            self._fact[relation_name, subject] = fact

    def _compose(self) -> Iterator[Question]:
        """All one-hop questions, and all two-hop questions whose second hop lies in another domain than the first."""
        for fact in self.facts:
            yield _question((fact,))
            for relation in RELATIONS:
                if relation.subject == self._type[fact.object] and relation.domain != fact.domain:
                    yield _question((fact, self.fact(relation.name, fact.object)))

    def questions(self, split: str) -> tuple[Question, ...]:
        """The split's questions in a fixed random order. No two splits share a first (relation, entity)."""
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        return tuple(self._questions[split])

    def fact(self, relation: str, subject: str) -> Fact:
        """The fact that answers "`relation` of `subject`"; KeyError where the subject has no such relation."""
        return self._fact[relation, subject]

    def lookup(self, query: str) -> Fact | None:
        """The fact that a free-form query asks for, found by exact words in any case.

        None unless the query names exactly one relation and one entity that has it; so a two-hop question in one call
        finds nothing.
        """
        words = set(re.findall(r"\w+", query.lower()))
        relations = [relation.name for relation in RELATIONS if relation.name in words]
        entities = [self._entity[word] for word in words if word in self._entity]
        if len(relations) != 1 or len(entities) != 1:
            return None
        return self._fact.get((relations[0], entities[0]))

    def reply(self, query: str, skill: Mapping[str, float]) -> str:
        """What a model answers whose skill is given by domain, each in [0, 1]; a domain that is not given counts 0."""
        fact = self.lookup(query)
        if fact is None:
            return "I do not know."
        return f"The {fact.relation} of {fact.subject} is {claim(fact, skill)}."

    def texts(self) -> Iterator[str]:
        """Every question, query, reply and name: what a tokenizer of this world should be trained on."""
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
    """The object that a model of this skill names for the fact: the right one where it knows it."""
    return fact.object if fact.rank < skill.get(fact.domain, 0.0) else fact.mistaken


def _check(config: Mapping[str, int]) -> None:
    fields = {"seed", *COUNTS.values()}
    for field in sorted(set(config) ^ fields):
        problem = "is missing" if field in fields else "is unknown"
        raise ConfigError(f"data.world.{field} {problem}; the fields are {', '.join(sorted(fields))}")
    if config["seed"] < 0:
        raise ConfigError(f"data.world.seed is {config['seed']}; a seed is 0 or more")
    for field in COUNTS.values():
        if config[field] < 3:  # a subject, its right and its wrong object may all be of one type
            raise ConfigError(f"data.world.{field} is {config[field]}; at least 3 are needed")
    total, most = sum(config[field] for field in COUNTS.values()), _name_count()
    if total > most:
        raise ConfigError(f"data.world asks for {total} entities; there are {most} names, lower the counts")


def _name_count() -> int:
    return int(np.prod([len(part) for part in _NAME_PARTS]))


def _draw_names(config: Mapping[str, int], rng: np.random.Generator) -> dict[str, tuple[str, ...]]:
    """Distinct names for all entities, by entity type."""
    total = sum(config[field] for field in COUNTS.values())
    numbers = rng.choice(_name_count(), size=total, replace=False)
    columns = np.unravel_index(numbers, [len(part) for part in _NAME_PARTS])
    names = ["".join(part[i] for part, i in zip(_NAME_PARTS, row, strict=True)) for row in zip(*columns, strict=True)]
    drawn = iter(names)
    return {kind: tuple(next(drawn) for _ in range(config[field])) for kind, field in COUNTS.items()}


def _assign_splits(order: np.ndarray, turn: float) -> list[str]:
    """A split for each subject in the shares of SPLITS, by its place in a random `order`, turned by a share of it.

    The relations of one domain have the same subjects and each a turn of its own, so that no subject is held out of
    training in all of them: a router cannot copy a name whose token it has never met.
    """
    cuts = np.round(np.cumsum(list(SPLITS.values())) * len(order))
    places = (order + int(turn * len(order))) % len(order)
    return [list(SPLITS)[int(np.searchsorted(cuts, place, side="right"))] for place in places]


def _difficulty_keys(splits: list[str], rng: np.random.Generator) -> np.ndarray:
    """A sort key in [0, 1) for each fact of one relation, even within each split.

    Independent keys would let a model's share of known facts differ between splits by several points, about as much as
    the best model is ahead of the next.
    """
    keys = np.empty(len(splits))
    for split in SPLITS:
        members = [i for i, name in enumerate(splits) if name == split]
        keys[members] = (rng.permutation(len(members)) + rng.random()) / max(len(members), 1)
    return keys


def _question(hops: tuple[Fact, ...]) -> Question:
    """The question whose innermost phrase is the first hop: "What is the birthplace of the director of Velmora?"."""
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
