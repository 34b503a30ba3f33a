"""The evaluator decides as a recursive query over the same tuples does."""

from __future__ import annotations

import json

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentvoicebox.config.errors import BadInput
from agentvoicebox.tenancy.permissions.evaluator import DEPTH, Evaluator, Graph, Relationship, Resource, Subject
from agentvoicebox.tenancy.permissions.schema import Arrow, parse

SCHEMA = parse(
    """
    definition user {}
    definition team { relation member: user | team#member | user:* }
    definition folder {
        relation parent: folder
        relation owner: user | team#member
        relation reader: user | team#member | user:*
        permission edit = owner + parent->edit
        permission read = reader + edit + parent->read
    }
    definition note {
        relation folder: folder
        relation author: user
        permission edit = author + folder->edit
        permission read = edit + folder->read
    }
    """
)
EVALUATOR = Evaluator(SCHEMA)
ANNA, BEN = Subject("user", "anna"), Subject("user", "ben")

# The rules of a schema as rows: the goal is a name on the same object, or, with `via`, on what that relation leads to.
RULES = [
    (definition.name, name, term.relation, term.name) if isinstance(term, Arrow) else (definition.name, name, "", term)
    for definition in SCHEMA.values()
    for name, terms in definition.permissions.items()
    for term in terms
]
REACH = """
WITH RECURSIVE
rules AS (SELECT * FROM jsonb_to_recordset(%(rules)s) AS r (type text, name text, via text, goal text)),
tuples AS (SELECT * FROM jsonb_to_recordset(%(tuples)s)
           AS t (type text, id text, relation text, subject_type text, subject_id text, subject_relation text)),
reach (type, id, name) AS (
    SELECT %(type)s::text, %(id)s::text, %(name)s::text
    UNION
    SELECT found.type, found.id, found.name FROM reach, LATERAL (
        SELECT reach.type, reach.id, r.goal AS name FROM rules r
            WHERE (r.type, r.name, r.via) = (reach.type, reach.name, '')
        UNION ALL
        SELECT t.subject_type, t.subject_id, r.goal FROM rules r JOIN tuples t ON t.relation = r.via
            WHERE (r.type, r.name) = (reach.type, reach.name) AND (t.type, t.id) = (reach.type, reach.id)
        UNION ALL
        SELECT t.subject_type, t.subject_id, t.subject_relation FROM tuples t
            WHERE (t.type, t.id, t.relation) = (reach.type, reach.id, reach.name) AND t.subject_relation <> ''
    ) AS found
)
SELECT DISTINCT t.subject_id FROM reach JOIN tuples t ON (t.type, t.id, t.relation) = (reach.type, reach.id, reach.name)
WHERE t.subject_type = 'user' AND t.subject_relation = ''
"""

people = st.sampled_from([ANNA, BEN, Subject("user", "eve")])
ids = st.sampled_from("abcd")
groups = st.builds(lambda id: Subject("team", id, "member"), ids)
everybody = st.just(Subject("user", "*"))


def tuples(type: str, relation: str, subjects: st.SearchStrategy[Subject]) -> st.SearchStrategy[Relationship]:
    return st.builds(lambda id, subject: Relationship(Resource(type, id), relation, subject), ids, subjects)


folders = st.builds(lambda id: Subject("folder", id), ids)
relationships = st.sets(
    st.one_of(
        tuples("team", "member", people | groups | everybody),
        tuples("folder", "parent", folders),
        tuples("folder", "owner", people | groups),
        tuples("folder", "reader", people | groups | everybody),
        tuples("note", "folder", folders),
        tuples("note", "author", people),
    ),
    max_size=14,
)


def graph(*given: Relationship) -> Graph:
    made = Graph()
    EVALUATOR.add(made, given)
    return made


def related(text: str) -> Relationship:
    on, _, rest = text.partition("#")
    relation, _, subject = rest.partition("@")
    type, _, who = subject.partition(":")
    id, _, group = who.partition("#")
    return Relationship(Resource(*on.split(":")), relation, Subject(type, id, group))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given=relationships, wanted=st.sampled_from(sorted(EVALUATOR.permissions)), id=ids)
async def test_it_decides_as_a_recursive_query(
    admin: psycopg.AsyncConnection, given: set[Relationship], wanted: tuple[str, str], id: str
) -> None:
    type, permission = wanted
    rows = [
        dict(
            zip(
                ("type", "id", "relation", "subject_type", "subject_id", "subject_relation"),
                (*each.resource, each.relation, *each.subject),
                strict=True,
            )
        )
        for each in given
    ]
    rules = [dict(zip(("type", "name", "via", "goal"), rule, strict=True)) for rule in RULES]
    cursor = await admin.execute(
        REACH, {"rules": json.dumps(rules), "tuples": json.dumps(rows), "type": type, "id": id, "name": permission}
    )
    expected = {who for (who,) in await cursor.fetchall()}
    # However they are spread over graphs.
    halves = (graph(*list(given)[::2]), graph(*list(given)[1::2]))
    for graphs in ((graph(*given),), halves):
        found = EVALUATOR.subjects(graphs, Resource(type, id), permission, "user")
        assert {subject.id for subject in found} == expected
        for person in (ANNA, BEN, Subject("user", "eve"), Subject("user", "stranger")):
            may = person.id in expected or "*" in expected
            assert EVALUATOR.check(graphs, Resource(type, id), permission, person) is may
            assert bool(EVALUATOR.explain(graphs, Resource(type, id), permission, person)) is may


def test_circles_end() -> None:
    folders = [related(f"folder:{one}#parent@folder:{two}") for one in "abc" for two in "abc"]
    teams = [related(f"team:{one}#member@team:{two}#member") for one in "xyz" for two in "xyz"]
    made = graph(*folders, *teams, related("folder:c#owner@team:x#member"))
    assert not EVALUATOR.check([made], Resource("folder", "a"), "edit", ANNA)
    EVALUATOR.add(made, [related("team:z#member@user:anna")])
    assert EVALUATOR.check([made], Resource("folder", "a"), "edit", ANNA)


def test_a_single_circle_ends() -> None:
    made = graph(related("folder:a#parent@folder:a"))
    assert not EVALUATOR.check([made], Resource("folder", "a"), "edit", ANNA)
    assert EVALUATOR.explain([made], Resource("folder", "a"), "edit", ANNA) == []


@pytest.mark.parametrize(("steps", "granted"), [(DEPTH - 1, True), (DEPTH, False)])
def test_ways_have_an_end(steps: int, granted: bool) -> None:
    chain = [related(f"folder:{n}#parent@folder:{n + 1}") for n in range(steps)]
    made = graph(*chain, related(f"folder:{steps}#owner@user:anna"))
    assert EVALUATOR.check([made], Resource("folder", "0"), "edit", ANNA) is granted
    assert bool(EVALUATOR.explain([made], Resource("folder", "0"), "edit", ANNA)) is granted


def test_many_ways_are_not_gone_one_by_one() -> None:
    levels = 40
    ladder = [
        related(f"folder:{n}{one}#parent@folder:{n + 1}{two}") for n in range(levels) for one in "ab" for two in "ab"
    ]
    made = graph(*ladder, related(f"folder:{levels}a#owner@user:anna"))
    assert EVALUATOR.check([made], Resource("folder", "0a"), "edit", ANNA)  # of 2 to the 40th ways
    assert not EVALUATOR.check([made], Resource("folder", "0a"), "edit", BEN)


def test_a_group_is_a_subject_too() -> None:
    made = graph(related("folder:a#owner@team:x#member"))
    assert EVALUATOR.check([made], Resource("folder", "a"), "read", Subject("team", "x", "member"))
    assert not EVALUATOR.check([made], Resource("folder", "a"), "read", Subject("team", "x"))


def test_everybody_is_everybody_of_that_type() -> None:
    made = graph(related("folder:a#reader@user:*"))
    assert EVALUATOR.check([made], Resource("folder", "a"), "read", BEN)
    assert not EVALUATOR.check([made], Resource("folder", "a"), "edit", BEN)
    assert not EVALUATOR.check([made], Resource("folder", "a"), "read", Subject("team", "x"))


def test_a_way_is_told_step_by_step() -> None:
    made = graph(
        related("note:n#folder@folder:a"), related("folder:a#owner@team:x#member"), related("team:x#member@user:anna")
    )
    assert EVALUATOR.explain([made], Resource("note", "n"), "read", ANNA) == [
        "note:n read",
        "folder:a edit",
        "team:x member",
        "team:x#member@user:anna",
    ]


def test_unknown_names_are_mistakes_and_unknown_ids_are_denied() -> None:
    made = graph(related("folder:a#owner@user:anna"))
    assert not EVALUATOR.check([made], Resource("folder", "z"), "edit", ANNA)
    assert not EVALUATOR.check([made], Resource("folder", "a"), "edit", Subject("user", "nobody"))
    for resource, permission in ((Resource("fold", "a"), "edit"), (Resource("folder", "a"), "owner")):
        with pytest.raises(BadInput):
            EVALUATOR.check([made], resource, permission, ANNA)
    with pytest.raises(BadInput):
        EVALUATOR.subjects([made], Resource("folder", "a"), "edit", "robot")
