"""What skills are told of their tenant: from a real store, and through the door that cells ask at."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event

from agentvoicebox.bus_bridge import about
from agentvoicebox.bus_bridge.answers import Answers, _Recent
from agentvoicebox.bus_bridge.bus import Line
from agentvoicebox.bus_bridge.chat import CellDoor
from agentvoicebox.bus_bridge.talk import Talk
from agentvoicebox.config import settings
from agentvoicebox.config.errors import BadInput, NotFound
from agentvoicebox.plugins.chat import Chats
from agentvoicebox.plugins.chat.solvers import Solvers
from agentvoicebox.tenancy import personas, projects, sessions, skills, tenants
from agentvoicebox.tenancy.masterkeys import FileKeys
from agentvoicebox.tenancy.metering import Ledger, Usage
from agentvoicebox.tenancy.models import Metric
from agentvoicebox.tenancy.personas import Character
from agentvoicebox.tenancy.voices import VoiceConfig

SKILL = "skill-hello.example"
CELL = "cell-key"


class Site:
    """Two tenants, and one who knows what both have chosen."""

    def __init__(self, store: Any, answers: Answers, ledger: Ledger) -> None:
        self.store = store
        self.answers = answers
        self.ledger = ledger
        self.lines: dict[str, Line] = {}
        self.doors: CellDoor = CellDoor(answers, {CELL: self.lines.get, "other-cell": {}.get}, store)

    async def tenant(self, name: str, *named: str) -> uuid.UUID:
        """A tenant with personas; what it has set for the skill is its name."""
        voice = VoiceConfig(persona_name="House")
        made = await tenants.create(self.store, f"t-{uuid.uuid4().hex[:12]}", name, "starter", voice=voice)
        for each in named:
            await personas.create(self.store, made.id, Character(each))
        await skills.set_settings(self.store, made.id, SKILL, {"greeting": f"Hello from {name}"})
        return made.id

    async def tell(self, tenant_id: uuid.UUID, skill: str = SKILL, project_id: uuid.UUID | None = None) -> Any:
        return await about.tell(self.store, self.answers, tenant_id, project_id, None, "Ada", "de-DE", skill)

    def begin(self, turn_id: str, tenant_id: uuid.UUID, name: str = "House") -> Line:
        """A session of the tenant in the middle of a turn."""
        line = self.lines[turn_id] = Line(str(uuid.uuid4()), str(tenant_id), context={"persona_name": name})
        line.talk = talk = Talk()

        def switched(persona: Any) -> None:
            line.context["persona_name"] = persona.name if persona is not None else name

        talk.on_switch = switched
        return line

    def cell(self, turn_id: str, key: str = CELL) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key}", "X-AVB-Turn": turn_id}
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.doors), base_url="http://node", headers=headers)


@pytest.fixture
async def site(store: Any, tmp_path: Path) -> AsyncIterator[Site]:
    ledger, chats, solvers = Ledger(store), Chats(), Solvers()
    chosen = settings.load({"data": tmp_path}, environ={"HOME": str(tmp_path)})
    answers = Answers(store, FileKeys(tmp_path / "master.keys"), chats, solvers, ledger, chosen)
    yield Site(store, answers, ledger)
    await answers.close()
    await chats.close()
    solvers.close()
    await ledger.close()


async def test_all_that_is_told(site: Site) -> None:
    tenant_id = await site.tenant("Acme", "Bo", "Ada")
    project = await projects.create(site.store, tenant_id, "Shop")
    now = datetime.now(UTC)
    long_ago = now - timedelta(days=366)
    used = [("1", Metric.STT_AUDIO_SECONDS, 60.5, now), ("2", Metric.STT_AUDIO_SECONDS, 30, now)]
    used += [("3", Metric.STT_AUDIO_SECONDS, 1000, long_ago)]
    await site.ledger.record([Usage(name, tenant_id, metric, amount, at) for name, metric, amount, at in used])
    told = await site.tell(tenant_id, project_id=project.id)
    account = told.pop("account")
    assert told == {
        "tenant": {"id": str(tenant_id), "name": "Acme", "slug": told["tenant"]["slug"]},
        "project": {"id": str(project.id), "name": "Shop"},
        "session": None,
        "locale": "de-DE",
        "persona": "Ada",
        "personas": ["Ada", "Bo"],
        "skill": SKILL,
        "settings": {"greeting": "Hello from Acme"},
    }
    assert account["plan"] == "starter"
    assert set(account["used"]) == set(account["limits"]) == {str(metric) for metric in Metric}
    assert account["used"]["stt_audio_seconds"] == 90.5, "of this month"
    assert account["limits"] == {str(metric): None for metric in Metric} | {"sessions": 1_000}
    resets = date.fromisoformat(account["resets"])
    assert resets.day == 1
    assert 0 < (resets - now.date()).days <= 31


async def test_sessions_are_counted_as_their_limit_counts(site: Site) -> None:
    tenant_id = await site.tenant("Acme")
    for _ in range(3):
        await sessions.create(site.store, tenant_id)
    assert (await site.tell(tenant_id))["account"]["used"]["sessions"] == 3


async def test_two_tenants_have_their_own(site: Site) -> None:
    """Hazard H13: what stock OVOS keeps for a skill is everybody's."""
    ours, theirs = await site.tenant("Acme", "Ada"), await site.tenant("Globex", "Bo")
    theirs_project = await projects.create(site.store, theirs, "Secret plans")
    for _ in range(2):
        for tenant_id, name, others in ((ours, "Acme", "Globex"), (theirs, "Globex", "Acme")):
            told = await site.tell(tenant_id)
            assert told["settings"] == {"greeting": f"Hello from {name}"}
            assert others not in str(told)
    told = await site.tell(ours, project_id=theirs_project.id)
    assert told["project"] is None, "its row is invisible"


async def test_what_is_not_set_is_empty(site: Site) -> None:
    tenant_id = await site.tenant("Acme")
    for skill in ("", "skill-other.example"):
        told = await site.tell(tenant_id, skill)
        assert (told["settings"], told["skill"], told["personas"], told["project"]) == ({}, skill, [], None)


async def test_bad_input(site: Site) -> None:
    tenant_id = await site.tenant("Acme")
    for skill in ("a b", "../x", "x" * 101, ".hidden", "é", "a\x00"):
        with pytest.raises(BadInput):
            await site.tell(tenant_id, skill)
    with pytest.raises(NotFound):
        await site.tell(uuid.uuid4())


async def test_asking_again_costs_the_store_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    # What was read gets no older in the test, however slow the machine is.
    monkeypatch.setattr(site.answers, "_recent", _Recent(1_000_000.0))
    monkeypatch.setattr(about, "COUNTED", 1_000_000.0)
    tenant_id = await site.tenant("Acme", "Ada")
    asked: list[str] = []

    def note(*arguments: Any) -> None:
        if "FROM" in arguments[2]:
            asked.append(arguments[2])

    engine = site.store._app.sync_engine
    event.listen(engine, "before_cursor_execute", note)
    await site.tell(tenant_id)
    first = len(asked)
    for _ in range(20):
        await site.tell(tenant_id)
    event.remove(engine, "before_cursor_execute", note)
    assert 0 < first <= 8
    assert len(asked) == first


async def test_a_change_is_told_at_once_where_it_is_known(site: Site) -> None:
    tenant_id = await site.tenant("Acme")
    await site.tell(tenant_id)
    await skills.set_settings(site.store, tenant_id, SKILL, {"greeting": "Ahoy"})
    site.answers.forget(tenant_id)
    assert (await site.tell(tenant_id))["settings"] == {"greeting": "Ahoy"}


# --- the door of the cells --------------------------------------------------------------------------------------------


async def test_a_skill_asks_in_the_name_of_a_turn(site: Site) -> None:
    ours, theirs = await site.tenant("Acme", "Ada"), await site.tenant("Globex", "Bo")
    mine = site.begin("turn_1", ours)
    site.begin("turn_2", theirs)
    async with site.cell("turn_1") as http:
        reply = await http.get("/v1/about", params={"skill": SKILL})
    assert reply.status_code == 200
    told = reply.json()
    assert told["tenant"]["id"] == str(ours)
    assert (told["session"], told["persona"], told["locale"]) == (mine.id.removeprefix("avb:"), "House", "en-US")
    assert told["settings"] == {"greeting": "Hello from Acme"}
    async with site.cell("turn_2") as http:
        told = (await http.get(f"/v1/about?skill={SKILL}&skill=x&tenant={ours}")).json()
    assert told["settings"] == {"greeting": "Hello from Globex"}
    assert "Acme" not in str(told)


async def test_who_answers_can_be_changed(site: Site) -> None:
    tenant_id, theirs = await site.tenant("Acme", "Ada", "Beatrice"), await site.tenant("Globex", "Bruno")
    line = site.begin("turn_1", tenant_id)
    other = site.begin("turn_2", tenant_id)
    site.begin("turn_3", theirs)

    async def choose(name: Any, turn_id: str = "turn_1") -> Any:
        async with site.cell(turn_id) as http:
            reply = await http.post("/v1/persona", json={"name": name})
        return reply.status_code, reply.json().get("persona") or reply.json()["error"]["code"]

    assert await choose("Ada") == (200, "Ada")
    assert (line.context["persona_name"], other.context["persona_name"]) == ("Ada", "House"), "in this session alone"
    assert await choose("beatriss") == (200, "Beatrice"), "as it was heard"
    async with site.cell("turn_1") as http:
        assert (await http.get("/v1/about")).json()["persona"] == "Beatrice"
    for name in ("Bruno", "Nobody", "x" * 200, "...", "%", "\u0000"):
        assert await choose(name) == (404, "persona_not_found")
    assert await choose("Ada", "turn_3") == (404, "persona_not_found"), "that is another tenant's"
    assert line.context["persona_name"] == "Beatrice"
    assert await choose("") == (200, "House")
    for name in (5, None, ["Ada"], "x" * 201):
        assert (await choose(name))[0] == 400


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/about"), ("POST", "/v1/persona")])
async def test_only_turns_in_flight_of_that_cell_open(site: Site, method: str, path: str) -> None:
    site.begin("turn_1", await site.tenant("Acme", "Ada"))
    site.lines["deaf"] = Line(str(uuid.uuid4()), str(uuid.uuid4()), context={})

    async def refusal(turn_id: str = "turn_1", key: str = CELL, method: str = method) -> Any:
        async with site.cell(turn_id, key) as http:
            reply = await http.request(method, path, json={"name": "Ada"})
        return reply.status_code, reply.json()["error"]["code"]

    for key in ("cell-ke", f"{CELL}x", "avb_" + "a" * 43):
        assert await refusal(key=key) == (401, "invalid_api_key")
    for turn_id in ("turn_2", "", "deaf", "x" * 100):
        assert await refusal(turn_id) == (404, "turn_not_found")
    assert await refusal(key="other-cell") == (404, "turn_not_found"), "it is in flight, but in another cell"
    assert (await refusal(method="DELETE"))[0] == 405


async def test_bad_questions_are_refused_by_name(site: Site) -> None:
    site.begin("turn_1", await site.tenant("Acme"))
    async with site.cell("turn_1") as http:
        for query in ("skill=a%20b", "skill=%ff", "skill=" + "x" * 101):
            assert (await http.get(f"/v1/about?{query}")).status_code == 400, query
        assert (await http.post("/v1/persona", content=b"nonsense")).status_code == 400
