"""How a tenant's assistant sounds."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from sqlalchemy import select

from agentvoicebox.config.errors import BadInput, NotFound
from agentvoicebox.tenancy import voices
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import AuditEntry, Tenant
from agentvoicebox.tenancy.voices import VoiceConfig


async def test_a_new_tenant_has_the_defaults(database: Database, tenant: Tenant) -> None:
    assert await voices.get(database, tenant.id) == VoiceConfig()


async def test_what_is_put_is_got(database: Database, tenant: Tenant, other: Tenant) -> None:
    chosen = VoiceConfig(
        voice="am_onyx",
        speed=1.25,
        language="zh-Hant-TW",
        wake_word="hey Jürgen",
        persona_name="Jürgen O'Neill",
        disabled_skills=("skill-date-time.openvoiceos", "skill-account.agentvoicebox"),
        stt="ovos-stt-plugin-fasterwhisper",
        tts="agentvoicebox-tts-kokoro",
    )
    await voices.put(database, tenant.id, chosen)
    await voices.put(database, tenant.id, chosen)
    assert await voices.get(database, tenant.id) == chosen
    assert await voices.get(database, other.id) == VoiceConfig()


async def test_a_change_is_written_down_and_no_change_is_not(database: Database, tenant: Tenant) -> None:
    for _ in range(2):
        await voices.put(database, tenant.id, VoiceConfig(language="de-DE", persona_name="Jürgen"))
    async with database.tenant(tenant.id) as session:
        lines = (await session.execute(select(AuditEntry).order_by(AuditEntry.seq))).scalars().all()[1:]
    assert [(line.action, line.resource_type) for line in lines] == [("settings_change", "voice_config")]
    assert lines[0].old_values == {"language": "en-US", "persona_name": "Assistant"}
    assert lines[0].new_values == {"language": "de-DE", "persona_name": "Jürgen"}


async def test_an_unknown_tenant(database: Database) -> None:
    with pytest.raises(NotFound):
        await voices.get(database, uuid.uuid4())
    with pytest.raises(NotFound):
        await voices.put(database, uuid.uuid4(), VoiceConfig())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("voice", ""),
        ("voice", "-o /etc/passwd"),
        ("voice", "a/b"),
        ("voice", "x" * 65),
        ("voice", None),
        ("tts", "rm -rf"),
        ("stt", "a\nb"),
        ("speed", 0.49),
        ("speed", 2.01),
        ("speed", float("nan")),
        ("speed", float("inf")),
        ("speed", "1"),
        ("speed", True),
        ("language", "english"),
        ("language", "e"),
        ("language", "en_US"),
        ("language", "en-US\n"),
        ("wake_word", "x"),
        ("wake_word", "a\x00b"),
        ("persona_name", ""),
        ("persona_name", "two\nlines"),
        ("disabled_skills", ["a list"]),
        ("disabled_skills", ("../etc",)),
        ("disabled_skills", ("",)),
        ("disabled_skills", tuple(f"skill-{i}" for i in range(201))),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(BadInput) as caught:
        VoiceConfig(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize("language", ["de", "en-US", "es-419", "zh-Hant-TW", "fil", "sl-IT-nedis"])
def test_languages_that_are_fine(language: str) -> None:
    assert VoiceConfig(language=language).language == language
