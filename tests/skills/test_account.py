"""The account skill's words: complete in every language, and said as they are."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ovos_bus_client.message import Message

from agentvoicebox.config.errors import NotFound, Unavailable
from agentvoicebox.plugins import tenant
from agentvoicebox.skills import account
from agentvoicebox.skills.account import AccountSkill

LOCALE = Path(account.__file__).parent / "locale"
LANGUAGES = sorted(each.name for each in LOCALE.iterdir())


def test_there_is_more_than_one_language() -> None:
    assert {"en-us", "de-de"} <= set(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_every_file_with_the_same_places(language: str) -> None:
    def files(name: str) -> dict[str, set[str]]:
        return {
            file.name: set(re.findall(r"{(\w+)}", file.read_text(encoding="utf-8")))
            for file in (LOCALE / name).iterdir()
        }

    assert files(language) == files("en-us")


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_line_of_a_dialog_has_all_places(language: str) -> None:
    for file in (LOCALE / language).glob("*.dialog"):
        lines = file.read_text(encoding="utf-8").splitlines()
        assert len({frozenset(re.findall(r"{(\w+)}", line)) for line in lines}) == 1, file.name


class Skill(AccountSkill):
    """The skill without OVOS around it: what it says is put together as OVOS does."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def __del__(self) -> None:
        """There is nothing to shut down."""

    def speak_dialog(self, dialog: str, words: dict[str, str], render_callback: Any) -> None:
        line = (LOCALE / "en-us" / f"{dialog}.dialog").read_text(encoding="utf-8").splitlines()[0]
        self.said.append(render_callback(line.format(**words), "en-us"))


@pytest.fixture
def skill() -> Skill:
    return Skill()


@pytest.fixture
def whose(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the skill learns of its tenant."""
    found = SimpleNamespace(
        tenant=tenant.TenantContext("t1", "Acme", "Ada", personas=("Ada", "Bo", "Cy")),
        account=tenant.Account("starter", {"sessions": 12.0}, {"sessions": 100.0}, None),  # type: ignore[arg-type]
        choose=lambda message, name: name,
    )
    monkeypatch.setattr(tenant, "current", lambda message: found.tenant)
    monkeypatch.setattr(tenant, "identity", lambda message: found.tenant)
    monkeypatch.setattr(tenant, "account", lambda message: found.account)
    monkeypatch.setattr(tenant, "choose_persona", lambda message, name: found.choose(message, name))
    return found


MESSAGE = Message("any", {"name": "bo"})


@pytest.mark.parametrize(
    ("used", "limit", "said"),
    [
        (12, 100, "88 of 100 conversations are left until the end of this month."),
        (99, 100, "One of 100 conversations is left until the end of this month."),
        (100, 100, "All 100 conversations of this month are used up. Counting begins anew on the first of next month."),
        (120, 100, "All 100 conversations of this month are used up. Counting begins anew on the first of next month."),
        (12, None, "Conversations are not limited. There have been 12 this month."),
        (0, 0, "All 0 conversations of this month are used up. Counting begins anew on the first of next month."),
    ],
)
def test_what_is_left(skill: Skill, whose: Any, used: float, limit: float | None, said: str) -> None:
    whose.account = tenant.Account("starter", {"sessions": used}, {"sessions": limit}, None)  # type: ignore[arg-type]
    skill.handle_left(MESSAGE)
    assert skill.said == [said]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "Minutes are not limited. Hardly any have been used this month."),
        (119, "Minutes are not limited. Hardly any have been used this month."),
        (150, "Minutes are not limited. 2 minutes of speech have been used this month."),
        (7230.7, "Minutes are not limited. 121 minutes of speech have been used this month."),
    ],
)
def test_minutes_are_whole(skill: Skill, whose: Any, seconds: float, said: str) -> None:
    used = {"stt_audio_seconds": seconds / 2, "tts_audio_seconds": seconds / 2}
    whose.account = tenant.Account("starter", used, {}, None)  # type: ignore[arg-type]
    skill.handle_minutes(MESSAGE)
    assert skill.said == [said]


def test_the_plan(skill: Skill, whose: Any) -> None:
    skill.handle_plan(MESSAGE)
    assert skill.said == ["Acme has the Starter plan."]


def test_who_could_be_talked_to(skill: Skill, whose: Any) -> None:
    skill.handle_personas(MESSAGE)
    whose.tenant = tenant.TenantContext("t1", "Acme", "Ada", personas=("Ada",))
    skill.handle_personas(MESSAGE)
    assert skill.said == [
        "You are talking to Ada. You can also talk to Bo, Cy.",
        "There is nobody else to talk to. I am Ada.",
    ]


def test_who_answers_is_changed(skill: Skill, whose: Any) -> None:
    whose.choose = lambda message, name: {"bo": "Bo"}[name]
    skill.handle_switch(MESSAGE)
    assert skill.said == ["You are talking to Bo now."]


def test_nobody_of_that_name(skill: Skill, whose: Any) -> None:
    def nobody(message: Message, name: str) -> str:
        raise NotFound("nobody")

    whose.choose = nobody
    skill.handle_switch(MESSAGE)
    assert skill.said == ["There is nobody called bo here.", "You are talking to Ada. You can also talk to Bo, Cy."]


def test_what_cannot_be_known_now_is_said(skill: Skill, whose: Any) -> None:
    def away(message: Message, name: str) -> str:
        raise Unavailable("away")

    whose.account, whose.choose = None, away
    for handle in (skill.handle_plan, skill.handle_left, skill.handle_minutes, skill.handle_switch):
        handle(MESSAGE)
    assert skill.said == ["I cannot look that up right now. Please try again in a moment."] * 4


def test_nothing_of_any_tenant_is_said_to_nobodys_question(skill: Skill, whose: Any) -> None:
    whose.tenant = None
    handlers = (skill.handle_who, skill.handle_plan, skill.handle_left, skill.handle_minutes)
    for handle in (*handlers, skill.handle_personas, skill.handle_switch):
        handle(MESSAGE)
    assert skill.said == ["I do not know this account."] * 6


def test_names_are_said_as_they_are(skill: Skill, whose: Any) -> None:
    whose.tenant = tenant.TenantContext("t1", "{plan} (UK|US) %s", "(a|b)", personas=("{names}", "[c]"))
    for handle in (skill.handle_who, skill.handle_plan, skill.handle_personas):
        handle(MESSAGE)
    assert skill.said == [
        "I am (a|b), the assistant of {plan} (UK|US) %s.",
        "{plan} (UK|US) %s has the Starter plan.",
        "You are talking to (a|b). You can also talk to {names}, [c].",
    ]
