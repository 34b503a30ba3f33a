"""How a tenant's assistant sounds."""

from __future__ import annotations

import asyncio
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
        stt_model="large-v3",
        stt_language="auto",
        stt_vad=False,
        stt_fallbacks=("deepgram", "openai"),
        tts_fallbacks=("agentvoicebox-tts-flite",),
        llm_provider="compatible",
        llm_model="acme/large:70b",
        llm_fallbacks=("groq/llama-3.1-8b-instant", "openai/gpt-4o"),
        llm_url="https://models.example.com/v1",
        llm_temperature=0.0,
        llm_max_tokens=4096,
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


async def test_only_what_is_patched_changes(database: Database, tenant: Tenant, other: Tenant) -> None:
    await voices.put(database, tenant.id, VoiceConfig(voice="af_sarah", speed=1.5))
    changed = await voices.patch(database, tenant.id, {"speed": 0.5, "llm_fallbacks": ("groq/x",)})
    assert changed == VoiceConfig(voice="af_sarah", speed=0.5, llm_fallbacks=("groq/x",))
    assert await voices.get(database, tenant.id) == changed
    assert await voices.patch(database, tenant.id, {}) == changed
    assert await voices.get(database, other.id) == VoiceConfig()
    async with database.tenant(tenant.id) as session:
        last = (await session.execute(select(AuditEntry).order_by(AuditEntry.seq.desc()).limit(1))).scalar_one()
    assert (last.old_values, last.new_values) == (
        {"speed": 1.5, "llm_fallbacks": []},
        {"speed": 0.5, "llm_fallbacks": ["groq/x"]},
    )


async def test_what_is_patched_makes_sense(database: Database, tenant: Tenant) -> None:
    for changes, param in (({"speed": 3}, "speed"), ({"colour": "red"}, "colour"), ({"voice": None}, "voice")):
        with pytest.raises(BadInput) as caught:
            await voices.patch(database, tenant.id, {"language": "de", **changes})
        assert caught.value.param == param
    assert await voices.get(database, tenant.id) == VoiceConfig()
    with pytest.raises(NotFound):
        await voices.patch(database, uuid.uuid4(), {})


async def test_of_two_changes_at_once_both_count(database: Database, tenant: Tenant) -> None:
    changes: list[dict[str, Any]] = [{"speed": 1.5}, {"voice": "slt"}, {"language": "de"}, {"stt_vad": False}]
    await asyncio.gather(*(voices.patch(database, tenant.id, each) for each in changes))
    wanted = VoiceConfig(speed=1.5, voice="slt", language="de", stt_vad=False)
    assert await voices.get(database, tenant.id) == wanted


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
        ("speed", 10**400),
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
        ("stt_model", "huge"),
        ("stt_model", None),
        ("stt_language", "english"),
        ("stt_vad", 1),
        ("stt_fallbacks", ["deepgram"]),
        ("stt_fallbacks", ("a/b",)),
        ("tts_fallbacks", tuple("abcdef")),
        ("llm_provider", "acme"),
        ("llm_model", ""),
        ("llm_model", "a b"),
        ("llm_model", "x" * 101),
        ("llm_fallbacks", ("groq",)),
        ("llm_fallbacks", ("acme/x",)),
        ("llm_fallbacks", ("groq/",)),
        ("llm_fallbacks", (7,)),
        ("llm_url", "http://models.example.com"),
        ("llm_url", "https://user:secret@models.example.com"),
        ("llm_url", "https://127.0.0.1"),
        ("llm_temperature", 2.01),
        ("llm_temperature", float("nan")),
        ("llm_temperature", True),
        ("llm_max_tokens", 255),
        ("llm_max_tokens", 4097),
        ("llm_max_tokens", 300.0),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(BadInput) as caught:
        VoiceConfig(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize("language", ["de", "en-US", "es-419", "zh-Hant-TW", "fil", "sl-IT-nedis"])
def test_languages_that_are_fine(language: str) -> None:
    assert VoiceConfig(language=language).language == language
