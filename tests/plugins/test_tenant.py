"""Whose assistant is speaking: in a cell, where each message says so and a node tells more, and on a device."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ovos_bus_client.message import Message

from agentvoicebox.config.errors import NotFound, Unavailable
from agentvoicebox.plugins import node, tenant
from agentvoicebox.plugins.device import choices, link, wire
from agentvoicebox.plugins.device.section import Section

WHOLE = {"tenant_id": "t1", "tenant_name": "Acme", "persona_name": "Ada", "avb_session": "avb:1", "avb_turn": "turn-1"}
IDENTITY = ("tenant_id", "tenant_name", "persona_name")
SKILL = "skill-hello.example"


def told(tenant_id: str = "t1", name: str = "Acme", **further: Any) -> dict[str, Any]:
    """What a node or platform tells."""
    return {
        "tenant": {"id": tenant_id, "name": name, "slug": name.lower()},
        "project": {"id": "p1", "name": "Shop"},
        "session": "s1",
        "locale": "de-DE",
        "persona": "Bo",
        "personas": ["Ada", "Bo"],
        "skill": SKILL,
        "settings": {"greeting": f"Hello from {name}"},
        "account": {
            "plan": "starter",
            "used": {"sessions": 12, "stt_audio_seconds": 90.5},
            "limits": {"sessions": 1000, "stt_audio_seconds": None},
            "resets": "2026-12-01",
        },
        **further,
    }


class Desk:
    """A node that keeps what it is asked and answers as it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str, Any]] = []
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.says(told())
        self.hold = threading.Event()
        self.hold.set()

    def says(self, answer: Any, status: int = 200, turn: str = "") -> None:
        self.answers[turn] = (status, answer if isinstance(answer, bytes) else json.dumps(answer).encode())


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Desk]:
    """The node of a cell."""
    desk = Desk()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            turn = self.headers["X-AVB-Turn"]
            desk.asked.append((self.command, self.path, turn, json.loads(body) if body else None))
            assert self.headers["Authorization"] == "Bearer cell-key"
            desk.hold.wait(60)
            status, answer = desk.answers.get(turn) or desk.answers[""]
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    key = tmp_path / "node.key"
    key.write_text("cell-key\n")
    section = {"place": "cell", "url": f"http://127.0.0.1:{server.server_port}/v1", "key_file": str(key)}
    monkeypatch.setattr(tenant, "Configuration", lambda: {"agentvoicebox": section})
    yield desk
    desk.hold.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered from test to test; within one nothing is too old or too late, unless it says so."""
    monkeypatch.setattr(tenant, "_RECENT", tenant._Recent())
    monkeypatch.setattr(tenant, "FRESH", 1_000.0)
    monkeypatch.setattr(node, "TELL", 30.0)


def message(**context: Any) -> Message:
    return Message("any", {"lang": "en-us"}, {**WHOLE, "skill_id": SKILL, **context})


# --- in a cell --------------------------------------------------------------------------------------------------------


def test_all_that_a_skill_may_know(desk: Desk) -> None:
    found = tenant.current(message())
    assert found == tenant.TenantContext(
        id="t1",
        name="Acme",
        persona="Ada",
        slug="acme",
        project=tenant.Project("p1", "Shop"),
        session="avb:1",
        locale="de-DE",
        personas=("Ada", "Bo"),
        settings={"greeting": "Hello from Acme"},
    )
    assert desk.asked == [("GET", f"/v1/about?skill={SKILL}", "turn-1", None)]
    with pytest.raises(TypeError):
        found.settings["greeting"] = "mine"  # type: ignore[index]


def test_who_it_is_can_be_told_without_asking(desk: Desk) -> None:
    assert tenant.identity(message()) == tenant.TenantContext("t1", "Acme", "Ada", session="avb:1", locale="en-us")
    assert tenant.identity(message(tenant_id="")) is None
    assert desk.asked == []


def test_a_skill_can_be_named(desk: Desk) -> None:
    tenant.current(message(), "skill-other&x=1")
    tenant.current(message(skill_id=None))
    tenant.current(message(skill_id=["x"]))
    assert [path for _, path, _, _ in desk.asked] == ["/v1/about?skill=skill-other%26x%3D1", "/v1/about?skill="]


@pytest.mark.parametrize("missing", IDENTITY)
@pytest.mark.parametrize("value", [None, "", 5, ["t1"], {"id": "t1"}])
def test_half_a_tenant_is_none(desk: Desk, missing: str, value: Any) -> None:
    for context in (WHOLE | {missing: value}, {k: v for k, v in WHOLE.items() if k != missing}):
        assert tenant.current(Message("any", {}, context)) is None
        assert tenant.account(Message("any", {}, context)) is None
        with pytest.raises(NotFound):
            tenant.choose_persona(Message("any", {}, context), "Ada")
    assert desk.asked == []


def test_it_survives_the_ways_a_message_goes_on(desk: Desk) -> None:
    for onward in (message().forward("x"), message().reply("x"), message().response()):
        assert tenant.current(onward) == tenant.current(message())


def test_it_is_asked_once_for_a_while(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(tenant, "time", SimpleNamespace(monotonic=lambda: clock.now))
    for _ in range(3):
        tenant.current(message())
        tenant.account(message())
    assert len(desk.asked) == 1
    desk.says(told(settings={"greeting": "changed"}))
    clock.now += tenant.FRESH + 0.1
    assert tenant.current(message()).settings == {"greeting": "changed"}


def test_two_tenants_and_two_skills_are_kept_apart(desk: Desk) -> None:
    """Hazard H13: what stock OVOS keeps for a skill is everybody's."""
    desk.says(told("t2", "Globex"), turn="turn-2")
    ours, theirs = message(), message(tenant_id="t2", tenant_name="Globex", avb_turn="turn-2")
    for _ in range(2):
        assert tenant.current(ours).settings == {"greeting": "Hello from Acme"}
        assert tenant.current(theirs).settings == {"greeting": "Hello from Globex"}
    desk.says(told(settings={}))
    assert tenant.current(ours, "skill-other").settings == {}
    assert tenant.current(ours).settings == {"greeting": "Hello from Acme"}


def test_what_is_told_of_another_tenant_is_nobodys(desk: Desk) -> None:
    """A message that names one tenant and the turn of another: nothing of either is said."""
    desk.says(told("t2", "Globex"))
    assert tenant.current(message()) is None
    assert tenant.account(message()) is None


def test_who_it_is_is_known_without_the_node(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenant, "Configuration", lambda: {})
    found = tenant.current(message())
    assert (found.id, found.name, found.persona, found.locale) == ("t1", "Acme", "Ada", "en-us")
    assert (found.settings, found.project, found.personas) == ({}, None, ())
    assert tenant.account(message()) is None
    with pytest.raises(Unavailable):
        tenant.choose_persona(message(), "Ada")


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (503, {"error": {"code": "store_unavailable"}}),
        (404, {"error": {"code": "turn_not_found"}}),
        (500, b"<html>"),
        (200, b"not JSON"),
        (200, b"[1]"),
        (200, b"\xff"),
        (200, b"x" * (node.MOST + 1)),
        (404, {"error": "text"}),
        (404, []),
    ],
)
def test_a_node_that_cannot_tell_leaves_the_last_that_was_told(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, status: int, answer: Any
) -> None:
    desk.says(answer, status)
    assert tenant.current(message()).settings == {}, "nothing was told yet"
    desk.says(told(), turn="turn-2")
    monkeypatch.setattr(tenant, "_RECENT", tenant._Recent())
    monkeypatch.setattr(tenant, "FRESH", 0.0)
    assert tenant.current(message(avb_turn="turn-2")).settings == {"greeting": "Hello from Acme"}
    found = tenant.current(message())
    assert (found.name, found.settings) == ("Acme", {"greeting": "Hello from Acme"})
    assert tenant.account(message()) is None, "old figures are no figures"


def test_a_node_that_hangs_is_waited_for_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "TELL", 0.05)
    monkeypatch.setattr(tenant, "AGAIN", 1e9)
    asked: list[Any] = []  # counted here: the desk may hear of it when nobody waits any more
    tell = node.Node.tell
    monkeypatch.setattr(node.Node, "tell", lambda *question: asked.append(question) or tell(*question))
    desk.hold.clear()
    for _ in range(3):
        assert tenant.current(message()).name == "Acme"
    assert len(asked) == 1


def test_what_is_remembered_is_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenant, "MOST", 3)
    for number in range(10):
        tenant.current(message(avb_session=f"avb:{number}"))
    assert len(tenant._RECENT._held) == 3


@pytest.mark.parametrize("turn", [None, "", 5, "a\r\nX-Evil: 1", "ü\u2026"])
def test_a_message_without_a_turn_asks_nobody(desk: Desk, turn: Any) -> None:
    assert tenant.current(message(avb_turn=turn)).settings == {}
    assert desk.asked == []


def test_plan_and_usage(desk: Desk) -> None:
    account = tenant.account(message())
    assert account is not None
    assert (account.plan, account.resets) == ("starter", date(2026, 12, 1))
    assert (account.left("sessions"), account.left("stt_audio_seconds"), account.left("nothing")) == (988, None, None)
    assert account.used["stt_audio_seconds"] == 90.5


@pytest.mark.parametrize(
    "account", [None, {}, {"plan": "free"}, {"plan": "x", "used": [], "limits": {}, "resets": ""}, 5]
)
def test_half_an_account_is_none(desk: Desk, account: Any) -> None:
    desk.says(told(account=account))
    assert tenant.account(message()) is None


def test_who_answers_can_be_changed(desk: Desk) -> None:
    assert tenant.current(message()).personas == ("Ada", "Bo")
    desk.says({"persona": "Ada"})
    assert tenant.choose_persona(message(), "ada") == "Ada"
    assert desk.asked[-1] == ("POST", "/v1/persona", "turn-1", {"name": "ada"})
    desk.says(told(personas=["Ada"]))
    assert tenant.current(message()).personas == ("Ada",), "what was known before is asked anew"
    assert tenant.current(message(persona_name="Cy")).persona == "Cy", "the message knows it first"
    desk.says({"error": {"code": "persona_not_found"}}, 404)
    with pytest.raises(NotFound):
        tenant.choose_persona(message(), "Nobody")
    for status, answer in ((404, {"error": {"code": "turn_not_found"}}), (200, {}), (500, b"")):
        desk.says(answer, status)
        with pytest.raises(Unavailable):
            tenant.choose_persona(message(), "Ada")


def test_no_proxy_of_the_environment_is_asked(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert tenant.current(message()).slug == "acme"


def test_a_key_that_cannot_be_read_is_no_node(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "node.key").unlink()
    assert tenant.current(message()).settings == {}


# --- on a device ------------------------------------------------------------------------------------------------------


class Platform:
    """The link of a device."""

    def __init__(self, section: Section) -> None:
        self.section = section
        self.state = link.State.UP
        self.welcome: wire.Welcome | None = wire.Welcome("t1", "Acme", "d1", 0.0)
        self.choices = choices.Choices(tenant="Acme", persona="Ada", personas=("Ada", "Bo"))
        self.told = told()
        self.asked: list[str] = []

    def about(self, skill: str = "", timeout: float = 1.0) -> dict[str, Any]:
        self.asked.append(skill)
        return self.told

    def choose(self, persona: str, timeout: float = 2.0) -> str:
        if self.state is not link.State.UP:
            raise link.Away("away")
        if persona != "Bo":
            raise link.Failed("nobody", code="persona_not_found" if persona else "internal_error")
        return persona


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Platform:
    key = tmp_path / "device.key"
    key.write_text("avb_" + "a" * 43)
    platform = Platform(Section("https://voice.example.com", key, state=tmp_path / "state"))
    monkeypatch.setattr(tenant, "Configuration", lambda: {"agentvoicebox": {"url": "https://voice.example.com"}})
    monkeypatch.setattr(link, "shared", lambda process: platform)
    tenant._device.cache_clear()
    return platform


def restart(platform: Platform) -> None:
    """The device starts anew, without its platform."""
    tenant._device.cache_clear()
    tenant._RECENT = tenant._Recent()
    platform.state, platform.welcome = link.State.AWAY, None


def test_on_a_device_every_message_is_its_tenants(platform: Platform) -> None:
    for context in ({}, {"session": {"session_id": "kitchen"}}, {"tenant_id": "t2", "tenant_name": "Globex"}):
        found = tenant.current(Message("any", {}, {"skill_id": SKILL, **context}))
        assert found is not None
        assert (found.id, found.name, found.persona, found.project) == (
            "t1",
            "Acme",
            "Ada",
            tenant.Project("p1", "Shop"),
        )
        assert found.settings == {"greeting": "Hello from Acme"}
        assert found.session == context.get("session", {}).get("session_id", "default")
    assert tenant.account(Message("any", {}, {"skill_id": SKILL})).plan == "starter"
    assert platform.asked == [SKILL, SKILL], "once for each session"


def test_without_its_platform_a_skill_keeps_its_settings(platform: Platform) -> None:
    asked = Message("any", {}, {"skill_id": SKILL})
    tenant.current(asked)
    restart(platform)
    found = tenant.current(asked)
    assert (found.id, found.name, found.settings) == ("t1", "Acme", {"greeting": "Hello from Acme"})
    assert tenant.account(asked) is None
    assert tenant.current(asked, "skill-other").settings == {}
    assert (platform.section.state / "about.json").stat().st_mode & 0o777 == 0o600


def test_what_was_another_tenants_is_gone_with_its_key(platform: Platform) -> None:
    asked = Message("any", {}, {"skill_id": SKILL})
    tenant.current(asked)
    platform.section.key_file.write_text("avb_" + "b" * 43)
    platform.choices = choices.Choices(tenant="Globex")
    restart(platform)
    found = tenant.current(asked)
    assert (found.name, found.settings) == ("Globex", {})
    platform.state, platform.told = link.State.UP, told("t2", "Globex")
    tenant._RECENT = tenant._Recent()
    tenant.current(asked)
    assert "Acme" not in (platform.section.state / "about.json").read_text()


@pytest.mark.parametrize("content", ["", "no JSON", "[]", "5", '{"told": 5}', '{"told": {"x": 5}}', "\ud800"])
def test_a_file_of_no_use_is_none(platform: Platform, content: str) -> None:
    platform.section.state.mkdir()
    (platform.section.state / "about.json").write_bytes(content.encode(errors="surrogatepass"))
    platform.state = link.State.AWAY
    assert tenant.current(Message("any", {}, {"skill_id": SKILL})).settings == {}


def test_a_full_card_keeps_nobody_from_answering(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tenant.kept, "replace", full)
    assert tenant.current(Message("any", {}, {"skill_id": SKILL})).settings == {"greeting": "Hello from Acme"}


def test_a_device_that_has_never_met_its_platform_is_nobodys(platform: Platform) -> None:
    restart(platform)
    platform.choices = choices.Choices()
    assert tenant.current(Message("any", {}, WHOLE)) is None


def test_on_a_device_who_answers_can_be_changed_too(platform: Platform) -> None:
    asked = Message("any")
    assert tenant.choose_persona(asked, "Bo") == "Bo"
    with pytest.raises(NotFound):
        tenant.choose_persona(asked, "Nobody")
    with pytest.raises(Unavailable):
        tenant.choose_persona(asked, "")
    platform.state = link.State.AWAY
    with pytest.raises(Unavailable):
        tenant.choose_persona(asked, "Bo")
