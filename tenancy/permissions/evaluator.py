"""Who has a permission: pure, over relationships in memory.

A permission of unions and arrows is a question of reach: is there a way from the resource along relations to the
subject? The search goes breadth first and does not ask the same thing again and again, so circles end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from agentvoicebox.config.errors import BadInput
from agentvoicebox.tenancy.permissions.schema import Arrow, Schema, SubjectType

EVERYBODY = "*"
"""As a subject's id: all subjects of that type."""

DEPTH = 50
"""Steps from a resource after which nothing is granted any more, as in SpiceDB."""

Key = tuple[str, str]
"""Type and id of an object."""


class Resource(NamedTuple):
    """What something is to be done with. Use `resource` where the id is not text yet."""

    type: str
    id: str

    def __str__(self) -> str:
        return f"{self.type}:{self.id}"


class Subject(NamedTuple):
    """Who is to do it; with a relation, all who have it on that object. Use `subject` where the id is not text yet."""

    type: str
    id: str
    relation: str = ""

    def __str__(self) -> str:
        return f"{self.type}:{self.id}" + (f"#{self.relation}" if self.relation else "")


class Relationship(NamedTuple):
    """One relation tuple, `resource#relation@subject`."""

    resource: Resource
    relation: str
    subject: Subject

    def __str__(self) -> str:
        return f"{self.resource}#{self.relation}@{self.subject}"


class Step(NamedTuple):
    """How far a search has come: an object, what is asked for there, and the step before."""

    key: Key
    name: str
    before: Step | None


class _Plan:
    """What grants a permission on one object: these relations themselves, and these steps to others."""

    __slots__ = ("arrows", "relations", "ways")

    def __init__(self, relations: frozenset[str], arrows: tuple[Arrow, ...]) -> None:
        self.relations = relations
        self.arrows = arrows
        self.ways: tuple[tuple[str, dict[str, _Plan]], ...] = ()
        """Each arrow's relation, and how to go on at each type it leads to."""


class _Node:
    """Where one object leads to, if anywhere."""

    __slots__ = ("links", "public")

    def __init__(self) -> None:
        self.links: dict[str, list[Subject]] = {}
        """What to go on to: groups, and the objects that arrows lead to."""
        self.public: dict[str, frozenset[str]] = {}
        """The relations that everybody of a type has."""


class Graph:
    """Relationships, ready to be searched. `implied` names relations that lead to the same object from everywhere."""

    __slots__ = ("asked", "held", "implied", "nodes", "size")

    def __init__(self, implied: Mapping[str, Key] | None = None) -> None:
        self.implied = implied or {}
        self.held: dict[tuple[Key, Subject], frozenset[str]] = {}
        """The relations to an object of each subject that is named itself. Flat, since most questions find nothing
        here, and then a single look is enough."""
        self.nodes: dict[Key, _Node] = {}
        """The few objects with more to them."""
        self.size = 0
        """How many relationships there are."""
        self.asked = False
        """For whoever keeps many of them, and has to choose."""


class Evaluator:
    """Answers for one schema. Raises `BadInput` for types and permissions that it does not have."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._plans = {
            (definition.name, name): self._flat(definition.name, name)
            for definition in schema.values()
            for name in (*definition.relations, *definition.permissions)
        }
        for (type, _), plan in self._plans.items():
            plan.ways = tuple(
                (
                    arrow.relation,
                    {s.type: self._plans[s.type, arrow.name] for s in schema[type].relations[arrow.relation]},
                )
                for arrow in plan.arrows
            )
        self.permissions = frozenset((each.name, name) for each in schema.values() for name in each.permissions)
        self._ways = frozenset(
            (each.name, term.relation)
            for each in schema.values()
            for terms in each.permissions.values()
            for term in terms
            if isinstance(term, Arrow)
        )
        self._sets: dict[frozenset[str], frozenset[str]] = {}

    def require(self, type: str, permission: str) -> None:
        """Raise `BadInput` unless resources of this type have this permission; relations are none (CON-63)."""
        if (type, permission) not in self.permissions:
            raise BadInput(f"There is no permission {permission!r} on {type!r} in the schema.", param="permission")

    def validate(self, relationship: Relationship) -> None:
        """Raise `BadInput` unless the schema has such relationships."""
        (type, _), relation, subject = relationship
        definition = self.schema.get(type)
        if definition is None or (types := definition.relations.get(relation)) is None:
            raise BadInput(f"There is no relation {relation!r} on {type!r} in the schema.", param="relation")
        wanted = SubjectType(subject.type, subject.relation, subject.id == EVERYBODY)
        if wanted not in types:
            raise BadInput(f"{type}#{relation} is not for {subject}.", param="subject")

    def add(self, graph: Graph, relationships: Iterable[Relationship]) -> None:
        """Put relationships, of which none is there yet, into a graph."""
        for (type, id), relation, subject in relationships:
            key = (type, id)
            if subject.id == EVERYBODY:
                public = graph.nodes.setdefault(key, _Node()).public
                public[subject.type] = self._with(public.get(subject.type), relation)
            else:
                graph.held[key, subject] = self._with(graph.held.get((key, subject)), relation)
                if subject.relation or (type, relation) in self._ways:
                    graph.nodes.setdefault(key, _Node()).links.setdefault(relation, []).append(subject)
            graph.size += 1

    def check(self, graphs: Sequence[Graph], resource: Resource, permission: str, subject: Subject) -> bool:
        """Whether the subject has the permission, by the relationships of all these graphs together.

        The same search as `_reach`, written out: it runs on every request.
        """
        if (resource.type, permission) not in self.permissions:
            self.require(resource.type, permission)
        frontier = [((resource.type, resource.id), self._plans[resource.type, permission])]
        seen: set[tuple[Key, _Plan]] = set()
        for _ in range(DEPTH):
            beyond: list[tuple[Key, _Plan]] = []
            for key, plan in frontier:
                relations = plan.relations
                for graph in graphs:
                    held = graph.held.get((key, subject))
                    if held is not None and not relations.isdisjoint(held):
                        return True
                    node = graph.nodes.get(key)
                    if node is not None:
                        if not subject.relation:
                            public = node.public.get(subject.type)
                            if public is not None and not relations.isdisjoint(public):
                                return True
                        for relation, subjects in node.links.items():
                            if relation in relations:
                                beyond += [
                                    ((s.type, s.id), self._plans[s.type, s.relation]) for s in subjects if s.relation
                                ]
                    for relation, plans in plan.ways:
                        parent = graph.implied.get(relation)
                        if parent is not None:
                            beyond.append((parent, plans[parent[0]]))
                        elif node is not None:
                            beyond += [((s.type, s.id), plans[s.type]) for s in node.links.get(relation, ())]
            # One way that goes in a circle ends with the steps; only where ways part would they become too many.
            if len(beyond) > 1:
                beyond = [asked for asked in dict.fromkeys(beyond) if asked not in seen]
                seen.update(beyond)
            if not beyond:
                return False
            frontier = beyond
        return False

    def explain(self, graphs: Sequence[Graph], resource: Resource, permission: str, subject: Subject) -> list[str]:
        """The shortest way from resource to subject, step by step; empty when there is none."""
        self.require(resource.type, permission)
        for step, relations in self._grants(graphs, resource, permission, subject):
            way = [f"{step.key[0]}:{step.key[1]}#{min(relations)}@{subject}"]
            before: Step | None = step
            while before is not None:
                way.append(f"{before.key[0]}:{before.key[1]} {before.name}")
                before = before.before
            return way[::-1]
        return []

    def subjects(self, graphs: Sequence[Graph], resource: Resource, permission: str, type: str) -> set[Subject]:
        """All of that type who have the permission; `type:*` among them when everybody has."""
        self.require(resource.type, permission)
        if type not in self.schema:
            raise BadInput(f"There is no type {type!r} in the schema.", param="subject_type")
        found: set[Subject] = set()
        reached: dict[Key, frozenset[str]] = {}
        for step, graph, plan in self._reach(graphs, resource, permission):
            reached[step.key] = reached.get(step.key, frozenset()) | plan.relations
            node = graph.nodes.get(step.key)
            if node is not None and not plan.relations.isdisjoint(node.public.get(type, ())):
                found.add(Subject(type, EVERYBODY))
        for graph in graphs:
            found.update(
                subject
                for (key, subject), relations in graph.held.items()
                if key in reached
                and subject.type == type
                and not subject.relation
                and not relations.isdisjoint(reached[key])
            )
        return found

    def _grants(
        self, graphs: Sequence[Graph], resource: Resource, permission: str, subject: Subject
    ) -> Iterator[tuple[Step, frozenset[str]]]:
        """The relations by which the subject has the permission, nearest first."""
        for step, graph, plan in self._reach(graphs, resource, permission):
            held = graph.held.get((step.key, subject), frozenset())
            node = graph.nodes.get(step.key)
            if node is not None and not subject.relation:
                held |= node.public.get(subject.type, frozenset())
            if not plan.relations.isdisjoint(held):
                yield step, plan.relations & held

    def _reach(
        self, graphs: Sequence[Graph], resource: Resource, permission: str
    ) -> Iterator[tuple[Step, Graph, _Plan]]:
        """Every object on a way from the resource, and the relations on it that would grant the permission."""
        frontier = [Step((resource.type, resource.id), permission, None)]
        seen = {(resource.type, resource.id, permission)}
        for _ in range(DEPTH):
            beyond: list[Step] = []
            for step in frontier:
                plan = self._plans.get((step.key[0], step.name))
                if plan is None:
                    continue
                for graph in graphs:
                    yield step, graph, plan
                    node = graph.nodes.get(step.key)
                    if node is not None:
                        for relation, subjects in node.links.items():
                            if relation in plan.relations:
                                beyond += [Step((s.type, s.id), s.relation, step) for s in subjects if s.relation]
                    for arrow in plan.arrows:
                        parent = graph.implied.get(arrow.relation)
                        if parent is not None:
                            beyond.append(Step(parent, arrow.name, step))
                        elif node is not None:
                            subjects = node.links.get(arrow.relation, [])
                            beyond += [Step((s.type, s.id), arrow.name, step) for s in subjects]
            frontier = []
            for step in beyond:
                asked = (*step.key, step.name)
                if asked not in seen:
                    seen.add(asked)
                    frontier.append(step)
            if not frontier:
                return

    def _flat(self, type: str, name: str) -> _Plan:
        definition = self.schema[type]
        if name in definition.relations:
            return _Plan(frozenset({name}), ())
        relations: set[str] = set()
        arrows: dict[Arrow, None] = {}
        for term in definition.permissions[name]:
            if isinstance(term, Arrow):
                arrows[term] = None
            else:
                part = self._flat(type, term)
                relations |= part.relations
                arrows.update(dict.fromkeys(part.arrows))
        return _Plan(frozenset(relations), tuple(arrows))

    def _ends(self, type: str, arrow: Arrow) -> frozenset[SubjectType]:
        return self.schema[type].relations[arrow.relation]

    def _with(self, before: frozenset[str] | None, relation: str) -> frozenset[str]:
        """The same few sets, however many subjects have them."""
        after = frozenset({relation}) if before is None else before | {relation}
        return self._sets.setdefault(after, after)
