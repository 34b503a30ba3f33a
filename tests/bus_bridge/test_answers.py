"""Who answers whom, with whose key and on whose bill: on a real store, and a real server that speaks as a provider."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentvoicebox.bus_bridge.answers import MODELS, Answers, Who, _Recent
from agentvoicebox.bus_bridge.talk import Talk
from agentvoicebox.config import settings
from agentvoicebox.config.errors import AvbError, BadInput, NotFound, Unavailable
from agentvoicebox.plugins.chat import Chats, Delta, Endpoint, Patience, ProviderFailed, Tokens
from agentvoicebox.tenancy import metering, personas, projects, secrets, tenants, voices
from agentvoicebox.tenancy.masterkeys import FileKeys
from agentvoicebox.tenancy.metering import Ledger
from agentvoicebox.tenancy.models import Metric, Persona
from agentvoicebox.tenancy.personas import Character
from agentvoicebox.tenancy.settings import Settings as Defaults
from agentvoicebox.tenancy.voices import VoiceConfig

INPUT, OUTPUT = Metric.LLM_INPUT_TOKENS, Metric.LLM_OUTPUT_TOKENS
QUESTION = [{"role": "user", "content": "what is a quasar"}]


class Known:
    """Solvers that know what a test tells them; what they are asked is `asked`."""

    def __init__(self) -> None:
        self.facts: dict[str, str | AvbError] = {}
        self.asked: list[tuple[str, str, str, dict[str, Any]]] = []

    async def ask(
        self, name: str, question: str, language: str, config: Mapping[str, Any], deadline: float = 5.0, *, tenant: str
    ) -> str | None:
        assert uuid.UUID(tenant)
        self.asked.append((name, question, language, dict(config)))
        fact = self.facts.get(name)
        if isinstance(fact, AvbError):
            raise fact
        return fact


class Shop:
    """One platform and one of its tenants."""

    def __init__(self, store: Any, tenant: Any, keys: FileKeys, directory: Path) -> None:
        self.store = store
        self.tenant = tenant
        self.keys = keys
        self.ledger = Ledger(store)
        self.known = Known()
        self.chats = Chats(Patience(attempts=1))
        self._directory = directory
        self._numbers = itertools.count()

    def answers(self, **chosen: Any) -> Answers:
        """Answers of a platform with these settings."""
        known: Any = self.known
        read = settings.load({"data": self._directory, **chosen}, environ={"HOME": str(self._directory)})
        return Answers(self.store, self.keys, self.chats, known, self.ledger, read)

    def who(self, language: str = "en-US", project_id: uuid.UUID | None = None) -> Who:
        return Who(self.tenant.id, project_id, None, f"test:{next(self._numbers)}", language)

    async def make(self, **character: Any) -> Persona:
        return await personas.create(self.store, self.tenant.id, Character(**character))

    async def put(self, name: str, value: str, kind: str = "llm") -> None:
        await secrets.put(self.store, self.keys, self.tenant.id, kind, name, value)

    async def used(self) -> tuple[float, float]:
        """Tokens read and written, as the ledger has it."""
        totals = await metering.totals(self.store, self.tenant.id)
        return totals.get(INPUT, 0), totals.get(OUTPUT, 0)


@pytest.fixture
async def shop(store: Any, tmp_path: Path) -> AsyncIterator[Shop]:
    tenant = await tenants.create(store, f"t-{uuid.uuid4().hex[:12]}", "A tenant", "enterprise")
    shop = Shop(store, tenant, FileKeys(tmp_path / "master.keys"), tmp_path)
    yield shop
    await shop.ledger.close()
    await shop.chats.close()


@pytest.fixture
def answers(shop: Shop, language_model: Any) -> Answers:
    """Of a platform that has a key with one provider."""
    return shop.answers(openai_key="sk-platform", openai_url=language_model.url)


async def hear(deltas: AsyncIterator[Delta], heard: list[Delta]) -> None:
    async for delta in deltas:
        heard.append(delta)


async def said(deltas: AsyncIterator[Delta]) -> str:
    return "".join([delta.text async for delta in deltas])


# --- whom to ask ------------------------------------------------------------------------------------------------------


async def test_the_tenants_order_counts_and_who_has_no_key_is_left_out(shop: Shop):
    answers = shop.answers(groq_key="gsk-platform", openai_key="sk-platform")
    voice = VoiceConfig(
        llm_provider="openai",
        llm_model="gpt-4o",
        llm_fallbacks=("anthropic/claude-3-opus", "groq/llama-3.3-70b", "groq/llama-3.1-8b-instant"),
    )
    assert await answers.choices(shop.tenant.id, voice, Defaults()) == [
        (Endpoint("openai", key="sk-platform"), "gpt-4o"),
        (Endpoint("groq", key="gsk-platform"), "llama-3.3-70b"),
        (Endpoint("groq", key="gsk-platform"), "llama-3.1-8b-instant"),
    ]


async def test_a_tenants_key_comes_first_and_goes_to_no_address_of_the_platforms(shop: Shop):
    await shop.put("groq", "gsk-own")
    answers = shop.answers(groq_key="gsk-platform", groq_url="http://127.0.0.1:9/v1")
    assert await answers.choices(shop.tenant.id, VoiceConfig(), Defaults()) == [
        (Endpoint("groq", key="gsk-own", url=""), "llama-3.1-8b-instant")
    ]


async def test_what_cannot_be_asked_gives_way_to_the_next_choice(shop: Shop, caplog: pytest.LogCaptureFixture):
    await shop.put("openai", "sk-own\n")
    answers = shop.answers(groq_key="gsk-platform")
    voice = VoiceConfig(
        llm_provider="openai",
        llm_url="https://models.example.com/v1?x=1",
        llm_fallbacks=("compatible/a", "groq/b"),
    )
    assert await answers.choices(shop.tenant.id, voice, Defaults()) == [(Endpoint("groq", key="gsk-platform"), "b")]
    assert [record.args for record in caplog.records] == [("provider_key_invalid",), ("provider_url_invalid",)]


async def test_the_platforms_providers_are_those_it_has_a_way_to_ask(shop: Shop):
    assert shop.answers().platform_providers == frozenset()
    answers = shop.answers(groq_key="gsk-platform", openai_url="http://127.0.0.1:9", ollama_url="http://127.0.0.1:9")
    assert answers.platform_providers == {"groq", "ollama"}


async def test_a_tenant_whose_answers_fail_switches_nobody_else_s_off(
    shop: Shop, answers: Answers, language_model: Any
):
    other = await tenants.create(shop.store, f"t-{uuid.uuid4().hex[:12]}", "Another", "enterprise")
    language_model.says(status=500)
    codes = []
    for _ in range(6):
        with pytest.raises(AvbError) as caught:
            await said(answers.stream(shop.who(), None, QUESTION))
        codes.append(caught.value.code)
    assert codes == ["provider_failed"] * 5 + ["circuit_open"]
    language_model.says()
    assert await said(answers.stream(replace(shop.who(), tenant_id=other.id), None, QUESTION)) == "Hello there."


async def test_the_platforms_key_goes_to_no_address_of_a_tenants(shop: Shop):
    ours = {"compatible_key": "platform", "compatible_url": "http://127.0.0.1:9/v1"}
    theirs = VoiceConfig(llm_provider="compatible", llm_model="mistral", llm_url="https://llm.example.com/v1")

    async def choice(voice: VoiceConfig, **chosen: Any) -> Endpoint:
        found = await shop.answers(**chosen).choices(shop.tenant.id, voice, Defaults())
        return found[0][0]

    platform = Endpoint("compatible", key="platform", url="http://127.0.0.1:9/v1")
    assert await choice(VoiceConfig(llm_provider="compatible"), **ours) == platform
    assert await choice(theirs, **ours) == Endpoint("compatible", url="https://llm.example.com/v1", trusted=False)
    await shop.put("compatible", "own")
    own = Endpoint("compatible", key="own", url="https://llm.example.com/v1", trusted=False)
    assert await choice(theirs, **ours) == own
    assert (await choice(theirs, private_urls=True, **ours)).trusted
    assert await choice(VoiceConfig(llm_provider="compatible"), **ours) == platform, "nor their key to ours"


async def test_auto_is_the_provider_of_the_settings_or_one_that_is_there(shop: Shop):
    defaults = Defaults(default_llm_provider="anthropic", default_llm_model="claude-3-opus")

    async def asked(voice: VoiceConfig, **chosen: Any) -> list[tuple[str, str]]:
        found = await shop.answers(**chosen).choices(shop.tenant.id, voice, defaults)
        return [(endpoint.provider, model) for endpoint, model in found]

    auto = VoiceConfig()
    assert await asked(auto, anthropic_key="k", openai_key="k") == [("anthropic", "claude-3-opus")]
    assert await asked(auto, ollama_url="http://127.0.0.1:9", groq_key="k") == [("groq", MODELS["groq"])]
    assert await asked(auto, ollama_url="http://127.0.0.1:9") == [("ollama", MODELS["ollama"])]
    assert await asked(auto) == []
    assert await asked(VoiceConfig(llm_provider="openai"), groq_key="k") == [], "who chooses is not given another"
    assert await asked(VoiceConfig(llm_provider="openai"), openai_key="k") == [("openai", MODELS["openai"])]


# --- who answers ------------------------------------------------------------------------------------------------------


async def test_a_persona_is_the_sessions_or_the_projects_or_the_tenants(shop: Shop, answers: Answers):
    made = {name: await shop.make(name=name) for name in ("Own", "Project", "Tenant")}
    project = await projects.create(shop.store, shop.tenant.id, "A project")
    tenant_id = shop.tenant.id

    async def name(wanted: uuid.UUID | str | None = None) -> str | None:
        answers.forget(tenant_id)
        found = await answers.persona(tenant_id, project.id, wanted)
        return found.name if found is not None else None

    assert await name() is None
    await personas.make_default(shop.store, tenant_id, made["Tenant"].id)
    assert await name() == "Tenant"
    await personas.set_project_default(shop.store, tenant_id, project.id, made["Project"].id)
    assert await name() == "Project"
    assert await name(made["Own"].id) == await name("own") == "Own"
    await personas.update(shop.store, tenant_id, made["Own"].id, {"status": "disabled"})
    assert await name(made["Own"].id) == "Project"
    await personas.delete(shop.store, tenant_id, made["Project"].id)
    assert await name(made["Own"].id) == "Tenant"


async def test_one_is_asked_for_by_id_or_name_and_no_other_stands_in(shop: Shop, answers: Answers):
    ada = await shop.make(name="Ada")
    gone = await shop.make(name="Gone")
    await personas.make_default(shop.store, shop.tenant.id, ada.id)
    await personas.update(shop.store, shop.tenant.id, gone.id, {"status": "disabled"})
    assert (await answers.named(shop.tenant.id, "ADA")).id == ada.id
    assert (await answers.named(shop.tenant.id, str(ada.id).upper())).id == ada.id
    for nobody in ("Gone", str(gone.id), str(uuid.uuid4()), ""):
        with pytest.raises(NotFound):
            await answers.named(shop.tenant.id, nobody)


async def test_choices_are_remembered_for_a_moment_unless_they_are_forgotten(
    shop: Shop, answers: Answers, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(answers, "_recent", _Recent(1_000_000.0))  # a moment that no stall outlasts
    assert await answers.models(shop.tenant.id) == ["openai/gpt-5.4-mini"]
    await voices.put(shop.store, shop.tenant.id, VoiceConfig(llm_provider="openai", llm_model="gpt-4o"))
    assert await answers.models(shop.tenant.id) == ["openai/gpt-5.4-mini"]
    answers.forget(shop.tenant.id)
    assert await answers.models(shop.tenant.id) == ["openai/gpt-4o"]


async def test_choices_that_age_are_read_anew_beside_the_answer():
    recent = _Recent(1_000_000.0)
    tenant_id = uuid.uuid4()
    numbers = itertools.count()
    may_read = asyncio.Event()

    async def read() -> int:
        if number := next(numbers):
            await may_read.wait()
        return number

    assert await recent.get(tenant_id, "what", read) == 0
    held = recent._held[tenant_id]
    held["what"] = (held["what"][0] - 600_000.0, 0)
    assert [await recent.get(tenant_id, "what", read) for _ in range(3)] == [0, 0, 0]
    renewing = list(recent._renewing.values())
    assert len(renewing) == 1
    may_read.set()
    await asyncio.wait(renewing)
    assert await recent.get(tenant_id, "what", read) == 1
    recent.forget(tenant_id)
    assert await recent.get(tenant_id, "what", read) == 2


# --- what is asked ----------------------------------------------------------------------------------------------------


async def test_the_model_is_told_who_it_is_and_how_to_speak(shop: Shop, answers: Answers, language_model: Any):
    await voices.put(shop.store, shop.tenant.id, VoiceConfig(persona_name="Robin", llm_temperature=0.2))
    ada = await shop.make(name="Ada", system_prompt="You count.", knowledge="The answer is 42.")
    asked = [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Rhyme."}, *QUESTION]
    assert await said(answers.stream(shop.who("de-DE"), ada, asked)) == "Hello there."
    body = language_model.asked[0]
    assert language_model.keys == ["sk-platform"]
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    prompt = body["messages"][0]["content"]
    parts = ["Ada", "You count.", "The answer is 42.", "Be brief.", "Rhyme.", "spoken aloud", "de-DE", "(UTC)"]
    assert [part for part in parts if part not in prompt] == []
    assert sorted(parts, key=prompt.index) == parts
    assert (body["temperature"], body["max_completion_tokens"]) == (0.2, 1024)

    await said(answers.stream(shop.who(), None, QUESTION, temperature=1.5, max_tokens=5))
    body = language_model.asked[1]
    assert "You are Robin" in body["messages"][0]["content"]
    assert (body["temperature"], body["max_completion_tokens"]) == (1.5, 5)


async def test_a_model_asked_for_by_name_gets_the_messages_as_they_are(
    shop: Shop, answers: Answers, language_model: Any
):
    assert await said(answers.stream(shop.who(), None, QUESTION, model="openai/o3")) == "Hello there."
    assert language_model.asked[0]["messages"] == QUESTION
    assert language_model.asked[0]["model"] == "o3"
    with pytest.raises(Unavailable) as caught:
        await said(answers.stream(shop.who(), None, QUESTION, model="groq/llama"))
    assert caught.value.code == "no_language_model"


async def test_without_a_provider_it_says_so_and_nothing_is_invented(shop: Shop):
    with pytest.raises(Unavailable) as caught:
        await said(shop.answers().stream(shop.who(), None, QUESTION))
    assert caught.value.code == "no_language_model"
    assert await shop.used() == (0, 0)


async def test_solvers_are_asked_in_order_until_one_answers(shop: Shop, answers: Answers, language_model: Any):
    await shop.put("wolfram", "an-app-id", kind="solver")
    await shop.put("wiki", '{"sentences": 2}', kind="solver")
    ada = await shop.make(name="Ada", solvers=("wiki", "wolfram", "llm", "wordnet"))
    shop.known.facts = {"wolfram": "Forty two."}
    deltas = [delta async for delta in answers.stream(shop.who("fr-FR"), ada, QUESTION)]
    assert deltas == [Delta("Forty two."), Delta(finish="stop", tokens=Tokens(0, 0))]
    assert shop.known.asked == [
        ("wiki", "what is a quasar", "fr-FR", {"sentences": 2}),
        ("wolfram", "what is a quasar", "fr-FR", {"appid": "an-app-id", "api_key": "an-app-id"}),
    ]
    assert language_model.asked == []
    shop.known.facts = {"wolfram": Unavailable("It hangs.", code="solver_timeout")}
    assert await said(answers.stream(shop.who(), ada, QUESTION)) == "Hello there."
    answer = await answers.complete(shop.who(), ada, QUESTION)
    assert (answer.text, answer.provider, answer.model) == ("Hello there.", "openai", "gpt-5.4-mini")
    assert answer.tokens == Tokens(7, 3)


async def test_when_the_model_fails_the_next_solver_is_asked(shop: Shop, answers: Answers, language_model: Any):
    ada = await shop.make(name="Ada", solvers=("llm", "wordnet"))
    language_model.says(status=500)
    shop.known.facts = {"wordnet": "A celestial object."}
    answer = await answers.complete(shop.who(), ada, QUESTION)
    assert (answer.text, answer.provider, answer.model) == ("A celestial object.", "wordnet", "")
    shop.known.facts = {}
    with pytest.raises(ProviderFailed):
        await answers.complete(shop.who(), ada, QUESTION)
    only = await shop.make(name="Only", solvers=("wordnet",))
    with pytest.raises(Unavailable) as caught:
        await answers.complete(shop.who(), only, QUESTION)
    assert caught.value.code == "no_answer"


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        (QUESTION, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}),
        ([*QUESTION, {"role": "assistant", "content": "A bright galaxy."}], {}),
    ],
)
async def test_tools_and_what_is_no_question_are_for_the_model_alone(
    shop: Shop, answers: Answers, language_model: Any, messages: list[Any], options: dict[str, Any]
):
    ada = await shop.make(name="Ada", solvers=("wordnet",))
    shop.known.facts = {"wordnet": "A celestial object."}
    assert await said(answers.stream(shop.who(), ada, messages, **options)) == "Hello there."
    assert shop.known.asked == []


async def test_what_cannot_be_asked_is_the_askers_fault_and_asked_of_nobody_else(shop: Shop, answers: Answers):
    ada = await shop.make(name="Ada", solvers=("llm", "wordnet"))
    with pytest.raises(BadInput) as caught:
        await said(answers.stream(shop.who(), ada, [{"role": "user", "content": "word " * 100_000}]))
    assert caught.value.code == "prompt_too_long"
    assert shop.known.asked == []


async def test_what_cannot_be_read_anew_is_logged_and_nothing_is_left_behind(caplog: pytest.LogCaptureFixture):
    recent, tenant, begun = _Recent(1e9), uuid.uuid4(), asyncio.Event()
    reads = 0

    async def read() -> int:
        nonlocal reads
        reads += 1
        if reads == 2:
            raise ValueError("a secret")
        if reads == 3:
            begun.set()
            await asyncio.Event().wait()
        return reads

    assert await recent.get(tenant, "what", read) == 1
    recent._held[tenant]["what"] = (time.monotonic() + 1e8, 1)
    assert await recent.get(tenant, "what", read) == 1
    while recent._renewing:
        await asyncio.sleep(0)
    assert await recent.get(tenant, "what", read) == 1
    assert [record.args for record in caplog.records] == [("ValueError",)]
    await begun.wait()
    (task,) = recent._renewing.values()
    await recent.close()
    assert task.cancelled()
    assert not recent._renewing


# --- what it costs ----------------------------------------------------------------------------------------------------


async def test_tokens_are_in_the_ledger_before_the_end_is_told(shop: Shop, answers: Answers):
    before = []
    async with aclosing(answers.stream(shop.who(), None, QUESTION)) as deltas:
        async for delta in deltas:
            before.append((delta.finish, await shop.used()))
    assert before == [(None, (0, 0)), (None, (0, 0)), ("stop", (7, 3))]
    assert await shop.used() == (7, 3)


async def test_the_same_answer_is_counted_once(shop: Shop, answers: Answers):
    who = shop.who()
    await said(answers.stream(who, None, QUESTION))
    await said(answers.stream(who, None, QUESTION))
    assert await shop.used() == (7, 3)


Leave = Callable[[asyncio.Task[Any], Any], Awaitable[None]]


async def cancelled(task: asyncio.Task[Any], deltas: Any) -> None:
    task.cancel()
    await asyncio.wait([task])


async def closed(task: asyncio.Task[Any], deltas: Any) -> None:
    task.cancel()
    await asyncio.wait([task])
    await deltas.aclose()


@pytest.mark.parametrize("leave", [cancelled, closed])
async def test_what_nobody_waits_for_any_more_is_metered_once(
    shop: Shop, answers: Answers, language_model: Any, leave: Leave
):
    language_model.says("Once upon a time, ", "never told", hold_after=1)
    deltas = answers.stream(shop.who(), None, QUESTION)
    assert (await anext(deltas)).text == "Once upon a time, "
    waiting = asyncio.ensure_future(anext(deltas))
    await asyncio.sleep(0)
    await leave(waiting, deltas)
    await asyncio.wait_for(language_model.hung_up.wait(), 30)
    read, written = await shop.used()
    assert read > 0
    assert 0 < written < 10
    await deltas.aclose()
    assert await shop.used() == (read, written)


async def test_an_answer_that_is_left_between_two_pieces_is_metered(shop: Shop, answers: Answers, language_model: Any):
    language_model.says("Once upon a time, ", "never told", hold_after=1)
    async with aclosing(answers.stream(shop.who(), None, QUESTION)) as deltas:
        await anext(deltas)
    await asyncio.wait_for(language_model.hung_up.wait(), 30)
    read, written = await shop.used()
    assert read > 0
    assert written > 0


async def test_an_answer_that_breaks_off_is_an_error_and_metered(shop: Shop, answers: Answers, language_model: Any):
    language_model.says("Once upon ", "a time", breaks_off=True)
    heard: list[Delta] = []
    with pytest.raises(ProviderFailed) as caught:
        await hear(answers.stream(shop.who(), None, QUESTION), heard)
    assert caught.value.code == "provider_broke_off"
    assert [delta.text for delta in heard] == ["Once upon ", "a time"]
    read, written = await shop.used()
    assert read > 0
    assert written > 0


async def test_without_the_ledger_no_end_is_told(shop: Shop, answers: Answers):
    async def away(usages: Any) -> None:
        raise Unavailable("The store does not answer.", code="store_unavailable")

    shop.ledger.record = away  # type: ignore[method-assign]
    heard: list[Delta] = []
    with pytest.raises(Unavailable) as caught:
        await hear(answers.stream(shop.who(), None, QUESTION), heard)
    assert caught.value.code == "store_unavailable"
    assert [delta.finish for delta in heard] == [None, None]


# --- a session --------------------------------------------------------------------------------------------------------


async def test_a_turn_knows_what_was_said_before(shop: Shop, answers: Answers, language_model: Any):
    talk = Talk(instructions="Speak like a sailor.")
    talk.note("my name is Jim", "Ahoy, Jim.")
    assert await said(answers.answer_turn(shop.who(), talk, "who am i")) == "Hello there."
    system, *rest = language_model.asked[0]["messages"]
    assert "Speak like a sailor." in system["content"]
    assert [message["content"] for message in rest] == ["my name is Jim", "Ahoy, Jim.", "who am i"]


async def test_a_user_switches_who_answers_in_that_session_alone(shop: Shop, answers: Answers, language_model: Any):
    ada = await shop.make(name="Ada", system_prompt="You count.")
    mine, other = Talk(), Talk()
    told: list[str | None] = []
    mine.on_switch = lambda persona: told.append(persona.name if persona is not None else None)
    assert await said(answers.answer_turn(shop.who(), mine, "who am I talking to")) == "You are talking to Assistant."
    assert await said(answers.answer_turn(shop.who("fr-FR"), mine, "parle à Ada")) == "Vous parlez maintenant avec Ada."
    assert (mine.persona, other.persona) == (ada.id, None)
    assert told == ["Ada"]
    assert await said(answers.answer_turn(shop.who(), mine, "who am I talking to")) == "You are talking to Ada."
    assert language_model.asked == []
    for talk in (mine, other):
        await said(answers.answer_turn(shop.who(), talk, "hello"))
    assert ["You count." in body["messages"][0]["content"] for body in language_model.asked] == [True, False]
    again = await said(answers.answer_turn(shop.who(), mine, "go back to the default persona"))
    assert again == "You are talking to Assistant again."
    assert mine.persona is None
    assert told == ["Ada", None]
    assert await shop.used() == (14, 6)


async def test_a_persona_of_another_tenant_cannot_be_asked_for(shop: Shop, answers: Answers, language_model: Any):
    other = await tenants.create(shop.store, f"t-{uuid.uuid4().hex[:12]}", "Another", "enterprise")
    theirs = await personas.create(shop.store, other.id, Character(name="Zaphod", system_prompt="A secret."))
    talk = Talk()
    assert await said(answers.answer_turn(shop.who(), talk, "talk to Zaphod")) == "Hello there."
    assert talk.persona is None
    talk.persona = theirs.id
    await said(answers.answer_turn(shop.who(), talk, "hello"))
    assert "A secret." not in json.dumps(language_model.asked)


async def test_a_persona_that_vanishes_while_it_speaks_finishes_and_the_default_goes_on(
    shop: Shop, answers: Answers, language_model: Any
):
    ada = await shop.make(name="Ada", system_prompt="You count.")
    talk = Talk(persona=ada.id)
    language_model.says("One, ", "two.", hold_after=1)
    deltas = answers.answer_turn(shop.who(), talk, "count")
    heard = [(await anext(deltas)).text]
    await personas.delete(shop.store, shop.tenant.id, ada.id)
    answers.forget(shop.tenant.id)
    language_model.go_on.set()
    heard += [delta.text async for delta in deltas]
    assert "".join(heard) == "One, two."
    assert await shop.used() == (7, 3)
    language_model.says("Three.")
    assert await said(answers.answer_turn(shop.who(), talk, "go on")) == "Three."
    assert "You count." not in language_model.asked[1]["messages"][0]["content"]
