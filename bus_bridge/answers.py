"""Who answers a tenant's question: which persona, by which models and solvers, with whose keys, and on whose bill.

A question goes along the persona's solvers, in order, until one answers; `llm` among them is the language model, which
is the tenant's own choice of providers. A tenant's key is sent to the provider's own address or to that which the
tenant has given, the platform's key to the platform's address, and neither ever to the other's.

What a model read and wrote is in the ledger before the end of its answer is told, and also when nobody waits for the
end. Nothing of what is asked or answered is kept or logged here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Any, NamedTuple, Protocol, TypeVar, cast
from zoneinfo import ZoneInfo

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.bus_bridge import talk as talks
from agentvoicebox.bus_bridge.talk import Reset, Switch, Talk
from agentvoicebox.config.errors import AvbError, BadInput, NotFound, Unavailable
from agentvoicebox.config.settings import Settings
from agentvoicebox.config.tasks import end
from agentvoicebox.plugins.chat import ChatMetrics, Chats, Delta, Endpoint, Request, Tokens
from agentvoicebox.plugins.chat.solvers import Solvers
from agentvoicebox.tenancy import models, personas, secrets
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.masterkeys import MasterKeys
from agentvoicebox.tenancy.metering import Ledger, Usage
from agentvoicebox.tenancy.models import Metric, Persona
from agentvoicebox.tenancy.personas import LLM, LONGEST_KNOWLEDGE
from agentvoicebox.tenancy.settings import Settings as TenantSettings
from agentvoicebox.tenancy.voices import PROVIDERS

log = logging.getLogger(__name__)

FRESH = 2.0
"""Seconds for which what a tenant has chosen is remembered; `Answers.forget` ends that at once."""

MODELS = {
    "openai": "gpt-5.4-mini",
    "anthropic": "claude-haiku-5-5",
    "groq": "llama-3.1-8b-instant",
    "ollama": "llama3.1",
}
"""What `auto` is for a provider other than that of the tenant's settings."""

SPOKEN = (
    "Your answers are spoken aloud: give one to three short sentences of plain text, without lists, markup or emoji. "
    "If you do not know something, say so."
)

_MOST_TENANTS = 2_000
_MOST_OF_A_TENANT = 200
"""Readings that are remembered at once."""

_END = Delta(finish="stop", tokens=Tokens(0, 0))
"""Of an answer that no language model gave."""

Choices = list[tuple[Endpoint, str]]
Value = TypeVar("Value")


class Defaults(Protocol):
    """What of a tenant's settings counts here."""

    @property
    def default_llm_provider(self) -> str: ...
    @property
    def default_llm_model(self) -> str: ...


class Voice(Protocol):
    """What of a tenant's voice configuration counts here."""

    @property
    def llm_provider(self) -> str: ...
    @property
    def llm_model(self) -> str: ...
    @property
    def llm_fallbacks(self) -> Sequence[str]: ...
    @property
    def llm_url(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Who:
    """Whose question it is."""

    tenant_id: uuid.UUID
    project_id: uuid.UUID | None
    session_id: uuid.UUID | None
    key: str
    """Names this answer in the ledger, for good: printable, at most 150 characters."""
    language: str = ""
    """What the user speaks: a BCP 47 tag, or empty when that is not known."""


@dataclass(slots=True)
class By:
    """Who gave an answer: a provider and its model, or a solver."""

    provider: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, who gave it, and in how many seconds."""

    text: str
    tokens: Tokens
    provider: str
    """Or the name of the solver that knew it."""
    model: str
    seconds: float


class _House(NamedTuple):
    """What a tenant has chosen, for all of its answers."""

    voice: models.VoiceConfig
    choices: Choices
    timezone: str
    owned: frozenset[str]
    """The providers for which it has keys of its own."""


Spent = Callable[[uuid.UUID, uuid.UUID, int, int], None]
"""Told of tenant, session, and the tokens that a model has read and written for it."""


def _nothing(tenant_id: uuid.UUID, session_id: uuid.UUID, input_tokens: int, output_tokens: int) -> None:
    """Nobody keeps count."""


class Answers:
    """Gives answers to the tenants of one node."""

    def __init__(
        self,
        database: Database,
        keys: MasterKeys,
        chats: Chats,
        solvers: Solvers,
        ledger: Ledger,
        settings: Settings,
        *,
        spent: Spent = _nothing,
    ) -> None:
        """`spent` is told what a session has used, once that is in the ledger."""
        self._spent = spent
        self._database = database
        self._keys = keys
        self._chats = chats
        self._solvers = solvers
        self._ledger = ledger
        self._settings = settings
        self._recent = _Recent(FRESH)

    # --- who answers --------------------------------------------------------------------------------------------------

    def forget(self, tenant_id: uuid.UUID) -> None:
        """What the tenant has chosen has changed; the next question already finds the new state."""
        self._recent.forget(tenant_id)

    async def close(self) -> None:
        """Stop reading what tenants have chosen."""
        await self._recent.close()

    def metrics(self) -> list[ChatMetrics]:
        """How the language models do on this node, by provider and model, for all tenants together."""
        return self._chats.metrics()

    @property
    def platform_providers(self) -> frozenset[str]:
        """The providers of language models that the platform has a key or an address for."""
        settings = self._settings
        ways = {
            "openai": settings.openai_key,
            "anthropic": settings.anthropic_key,
            "groq": settings.groq_key,
            "ollama": settings.ollama_url,
            "compatible": settings.compatible_url,
        }
        return frozenset(provider for provider, way in ways.items() if way)

    async def persona(
        self, tenant_id: uuid.UUID, project_id: uuid.UUID | None = None, wanted: uuid.UUID | str | None = None
    ) -> Persona | None:
        """Who answers: whom the session wants, by id or name, else the project's default, else the tenant's.

        None is the platform's own assistant. Who is gone or disabled is passed over. Raises `Unavailable`.
        """

        async def read() -> Persona | None:
            return await personas.resolve(self._database, tenant_id, project_id, wanted)

        return await self._recent.get(tenant_id, ("persona", project_id, wanted), read)

    async def named(self, tenant_id: uuid.UUID, wanted: str) -> Persona:
        """The active persona of that id or name. Raises `NotFound`, `Unavailable`."""
        for persona_id, name in await self.names(tenant_id):
            if wanted.lower() == str(persona_id) or personas.alike(wanted, name):
                found = await self.persona(tenant_id, None, persona_id)
                if found is not None and found.id == persona_id:
                    return found
        raise NotFound(f"There is no persona {wanted[:100]!r}, or it is disabled.", code="persona_not_found")

    async def names(self, tenant_id: uuid.UUID) -> list[tuple[uuid.UUID, str]]:
        """The tenant's active personas. Raises `Unavailable`."""

        async def read() -> list[tuple[uuid.UUID, str]]:
            return await personas.names(self._database, tenant_id)

        return await self._recent.get(tenant_id, ("names",), read)

    async def models(self, tenant_id: uuid.UUID) -> list[str]:
        """The models that the tenant has chosen and can be asked, as `provider/model`. Raises as `choices`."""
        return [f"{endpoint.provider}/{model}" for endpoint, model in (await self._house(tenant_id)).choices]

    async def choices(self, tenant_id: uuid.UUID, voice: Voice, defaults: Defaults) -> Choices:
        """Whom to ask, in this order, each with the key and address that belong together.

        A provider for which there is no key, neither the tenant's nor the platform's, is left out. `auto` means the
        provider of the settings, or if that one is left out the first that is not. Raises `Unavailable`.
        """
        async with self._database.tenant(tenant_id) as session:
            owned = await _owned(session)
        return await self._choose(tenant_id, voice, defaults, owned)

    async def _choose(self, tenant_id: uuid.UUID, voice: Voice, defaults: Defaults, owned: frozenset[str]) -> Choices:
        chosen, model = voice.llm_provider, voice.llm_model
        provider = defaults.default_llm_provider if chosen == "auto" else chosen
        wanted = [(provider, _model(provider, defaults) if model == "auto" else model)]
        wanted += [(name, model) for name, _, model in (each.partition("/") for each in voice.llm_fallbacks)]
        found = await self._available(tenant_id, voice, owned, wanted)
        if not found and chosen == "auto":
            others = [(name, _model(name, defaults)) for name in PROVIDERS if name != provider]
            found = (await self._available(tenant_id, voice, owned, others))[:1]
        return found

    async def _available(
        self, tenant_id: uuid.UUID, voice: Voice, owned: frozenset[str], wanted: list[tuple[str, str]]
    ) -> Choices:
        """Those of `wanted` that can be asked; `owned` are the providers for which the tenant has keys of its own."""
        found = []
        for provider, model in dict.fromkeys(wanted):
            own = await self._secret(tenant_id, "llm", provider) if provider in owned else None
            try:
                endpoint = self._endpoint(voice, provider, own)
            except BadInput as error:  # a key or an address that was stored when that was still possible
                log.warning("the choice of a tenant cannot be asked: %s", error.code)
                continue
            if endpoint is not None:
                found.append((endpoint, model))
        return found

    def _endpoint(self, voice: Voice, provider: str, own: str | None) -> Endpoint | None:
        settings = self._settings
        if provider == "ollama":
            return Endpoint(provider, url=settings.ollama_url) if settings.ollama_url else None
        if provider == "compatible":
            if voice.llm_url:  # which may need no key
                return Endpoint(provider, key=own or "", url=voice.llm_url, trusted=settings.private_urls)
            if settings.compatible_url:
                return Endpoint(provider, key=settings.compatible_key or "", url=settings.compatible_url)
            return None
        if own:
            return Endpoint(provider, key=own)
        ours: dict[str, tuple[str | None, str | None]] = {
            "openai": (settings.openai_key, settings.openai_url),
            "anthropic": (settings.anthropic_key, settings.anthropic_url),
            "groq": (settings.groq_key, settings.groq_url),
        }
        key, url = ours.get(provider, (None, None))
        return Endpoint(provider, key=key, url=url or "") if key else None

    async def key_of(self, tenant_id: uuid.UUID, kind: str, name: str) -> str | None:
        """The tenant's own secret, or None; as old as `FRESH` at most. Raises `Unavailable`."""
        return await self._recent.get(tenant_id, ("secret", kind, name), lambda: self._secret(tenant_id, kind, name))

    async def _secret(self, tenant_id: uuid.UUID, kind: str, name: str) -> str | None:
        try:
            return (await secrets.get(self._database, self._keys, tenant_id, kind, name)).decode(errors="replace")
        except NotFound:
            return None

    async def _house(self, tenant_id: uuid.UUID) -> _House:
        async def read() -> _House:
            query = (
                select(models.VoiceConfig, models.TenantSettings, models.Tenant.timezone)
                .join_from(models.Tenant, models.VoiceConfig, models.VoiceConfig.tenant_id == models.Tenant.id)
                .outerjoin(models.TenantSettings, models.TenantSettings.tenant_id == models.Tenant.id)
                .where(models.Tenant.id == tenant_id)
            )
            async with self._database.tenant(tenant_id) as session:
                found = (await session.execute(query)).one_or_none()
                owned = await _owned(session)
            if found is None:
                raise NotFound("There is no such tenant.", code="tenant_not_found")
            voice, decided, timezone = found
            choices = await self._choose(tenant_id, voice, decided or TenantSettings(), owned)
            return _House(voice, choices, timezone, owned)

        return await self._recent.get(tenant_id, ("house",), read)

    async def heard(self, tenant_id: uuid.UUID, name: str, language: str) -> Persona:
        """The active persona whose name this is, or sounds like. Raises `NotFound`, `Unavailable`."""
        found = talks.called(name, language, await self.names(tenant_id))
        return await self.named(tenant_id, str(found[0]) if found is not None else name)

    async def recent(
        self, tenant_id: uuid.UUID, what: Hashable, read: Callable[[], Awaitable[Value]], seconds: float = FRESH
    ) -> Value:
        """What `read` returns of the tenant, or has returned so many seconds ago. Raises what it raises.

        `forget` ends that as well, so this is for what a tenant has chosen or used.
        """
        return await self._recent.get(tenant_id, what, read, seconds)

    # --- the answer ---------------------------------------------------------------------------------------------------

    async def answer_turn(self, who: Who, talk: Talk, text: str) -> AsyncGenerator[Delta]:
        """The answer to what the user of a session has said; the last Delta has `finish` and `tokens`.

        A wish to talk to somebody else is fulfilled, for this session alone. The conversation is read here, and
        noted by whoever knows what of the answer was heard. Raises as `stream`.
        """
        done = await self.obey(who, talk, text)
        if done is not None:
            yield Delta(text=done)
            yield _END
            return
        persona = await self.answering(who, talk)
        messages = [*talk.messages(), {"role": "user", "content": text}]
        if talk.instructions:
            messages.insert(0, {"role": "system", "content": talk.instructions})
        async with aclosing(self.stream(who, persona, messages)) as deltas:
            async for delta in deltas:
                yield delta

    async def answering(self, who: Who, talk: Talk) -> Persona | None:
        """Who answers in a session now; when whom it talked to is gone, it is switched to whoever takes over."""
        persona = await self.persona(who.tenant_id, who.project_id, talk.persona)
        if isinstance(talk.persona, uuid.UUID) and (persona is None or persona.id != talk.persona):
            talk.persona = persona.id if persona is not None else None
            talk.on_switch(persona)
        return persona

    async def obey(self, who: Who, talk: Talk, text: str) -> str | None:
        """What is said to a command of the user's, which is fulfilled for this session alone; None for what is none."""
        if not talks.is_command(text, who.language):
            return None
        command = talks.command(text, who.language, await self.names(who.tenant_id))
        if command is None:
            return None
        kind = "asked"
        if isinstance(command, Switch | Reset):
            kind = "switched" if isinstance(command, Switch) else "resetted"
            talk.persona = command.persona_id if isinstance(command, Switch) else None
        persona = await self.answering(who, talk)
        if kind != "asked":
            talk.on_switch(persona)
        name = persona.name if persona is not None else (await self._house(who.tenant_id)).voice.persona_name
        return talks.sentence(kind, who.language, name)

    async def stream(
        self,
        who: Who,
        persona: Persona | None,
        messages: Sequence[dict[str, Any]],
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
        tools: list[dict[str, Any]] | None = None,
        tool_choice: Any = None,
        model: str | None = None,
        by: By | None = None,
    ) -> AsyncGenerator[Delta]:
        """The answer to `messages`, which are in OpenAI's chat format; the last Delta has `finish` and `tokens`.

        `model` is one of `provider/model`, None for the tenant's choices; with it and no persona the messages go to
        the model as they are. Tools, and what is not the question of a user, are for the language model alone. `by`
        learns who has answered.

        Raises `Unavailable` with the code `no_language_model` when there is nobody to ask and `no_answer` when none of
        the persona's solvers knows one, `ProviderFailed`, `BadInput`.
        """
        by = by or By()
        house = await self._house(who.tenant_id)
        plain = persona is None and model is not None
        request = Request(
            messages=list(messages) if plain else _prompted(messages, who, persona, house),
            temperature=house.voice.llm_temperature if temperature is None else temperature,
            max_tokens=house.voice.llm_max_tokens if max_tokens is None else max_tokens,
            tools=tools,
            tool_choice=tool_choice,
        )
        question = _question(messages)
        chain: Sequence[str] = (LLM,)
        if persona is not None and model is None and not tools and question:
            chain = persona.solvers
        failure: AvbError | None = None
        for solver in chain:
            if solver != LLM:
                if answer := await self._solve(who, solver, question):
                    by.provider, by.model = solver, ""
                    yield Delta(text=answer)
                    yield _END
                    return
                continue
            choices = house.choices if model is None else await self._chosen(who.tenant_id, model)
            if not choices:
                failure = _no_language_model()
                continue
            begun = False
            try:
                async with aclosing(self._asked(who, choices, request, by)) as deltas:
                    async for delta in deltas:
                        begun = True
                        yield delta
                return
            except AvbError as error:
                if begun or error.status < 500:
                    raise
                failure = error
        raise failure or Unavailable("Nobody whom this persona asks knows an answer.", code="no_answer")

    async def complete(
        self, who: Who, persona: Persona | None, messages: Sequence[dict[str, Any]], **options: Any
    ) -> Answer:
        """The whole answer at once; options and errors are those of `stream`."""
        begin = time.monotonic()
        by, text, tokens = By(), "", Tokens(0, 0)
        async with aclosing(self.stream(who, persona, messages, by=by, **options)) as deltas:
            async for delta in deltas:
                text += delta.text
                tokens = delta.tokens or tokens
        return Answer(text, tokens, by.provider, by.model, time.monotonic() - begin)

    async def _chosen(self, tenant_id: uuid.UUID, model: str) -> Choices:
        """The one model that was asked for by name, at the provider as the tenant has it."""
        house = await self._house(tenant_id)

        async def read() -> Choices:
            provider, _, name = model.partition("/")
            return await self._available(tenant_id, house.voice, house.owned, [(provider, name)])

        return await self._recent.get(tenant_id, ("model", model), read)

    async def _asked(self, who: Who, choices: Choices, request: Request, by: By) -> AsyncGenerator[Delta]:
        """What the language model says; what it used is metered once, however this ends."""
        answer = self._chats.stream(choices, request, str(who.tenant_id))
        metered = False
        try:
            async with aclosing(answer):
                async for delta in answer:
                    if delta.finish is not None:
                        metered = True
                        await self._meter(who, answer.tokens)
                    yield delta
        except BaseException:
            if not metered:
                try:
                    await self._meter(who, answer.tokens)
                except AvbError as error:  # which is not what the caller has to be told of
                    log.error("the tokens of an answer that broke off could not be metered: %s", error.code)
            raise
        finally:
            by.provider, by.model = answer.endpoint.provider if answer.endpoint is not None else "", answer.model

    async def _meter(self, who: Who, tokens: Tokens) -> None:
        """Raises `Unavailable`. Being cancelled takes nothing back: the ledger has it from its first step on."""
        now = datetime.now(UTC)
        used = ((Metric.LLM_INPUT_TOKENS, tokens.input), (Metric.LLM_OUTPUT_TOKENS, tokens.output))
        await self._ledger.record(
            [
                Usage(f"{who.key}:{metric}", who.tenant_id, metric, count, now, who.session_id, who.project_id)
                for metric, count in used
                if count > 0
            ]
        )
        if who.session_id is not None:
            self._spent(who.tenant_id, who.session_id, tokens.input, tokens.output)

    async def _solve(self, who: Who, solver: str, question: str) -> str | None:
        """What a solver plugin knows. One that fails knows nothing."""

        async def read() -> dict[str, Any]:
            return _options(await self._secret(who.tenant_id, "solver", solver))

        try:
            options = await self._recent.get(who.tenant_id, ("solver", solver), read)
            tenant = str(who.tenant_id)
            return await self._solvers.ask(solver, question, who.language or "en-US", options, tenant=tenant)
        except AvbError as error:
            log.warning("the solver %s did not answer: %s", solver, error.code)
            return None


_Readings = dict[Hashable, tuple[float, Any]]
"""What was read, and until when it counts."""


class _Recent:
    """What has been read of tenants lately."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._held: OrderedDict[uuid.UUID, _Readings] = OrderedDict()
        self._renewing: dict[tuple[uuid.UUID, Hashable], asyncio.Task[None]] = {}

    async def get(
        self, tenant_id: uuid.UUID, what: Hashable, read: Callable[[], Awaitable[Value]], seconds: float | None = None
    ) -> Value:
        """What `read` returns, or has returned in the last so many seconds. Raises what it raises."""
        seconds = self._seconds if seconds is None else seconds
        held = self._held.get(tenant_id)
        if held is None:
            held = self._held[tenant_id] = {}
            if len(self._held) > _MOST_TENANTS:
                self._held.popitem(last=False)
        now = time.monotonic()
        found = held.get(what)
        if found is None or now >= found[0]:
            return await self._read(held, what, read, seconds)
        about = (tenant_id, what)
        if now > found[0] - seconds / 2 and about not in self._renewing:
            # Read anew beside the answer, so that of many questions none has to wait for it.
            task = self._renewing[about] = asyncio.create_task(self._renew(held, what, read, seconds))
            task.add_done_callback(lambda _: self._renewing.pop(about))
        return cast("Value", found[1])

    async def _renew(
        self, held: _Readings, what: Hashable, read: Callable[[], Awaitable[Value]], seconds: float
    ) -> None:
        try:
            await self._read(held, what, read, seconds)
        except AvbError:  # of which whoever needs it is told, when this is too old
            pass
        except Exception as error:  # its text may hold what was read
            log.error("what a tenant has chosen could not be read anew: %s", type(error).__name__)

    async def _read(
        self, held: _Readings, what: Hashable, read: Callable[[], Awaitable[Value]], seconds: float
    ) -> Value:
        now = time.monotonic()
        value = await read()
        if len(held) >= _MOST_OF_A_TENANT:
            held.clear()
        held[what] = (now + seconds, value)  # of nobody any more, if the tenant was forgotten meanwhile
        return value

    def forget(self, tenant_id: uuid.UUID) -> None:
        """Read it all anew, the next time."""
        self._held.pop(tenant_id, None)

    async def close(self) -> None:
        """Stop reading."""
        await end(*self._renewing.values())


async def _owned(session: AsyncSession) -> frozenset[str]:
    return frozenset((await session.scalars(select(models.Secret.name).where(models.Secret.kind == "llm"))).all())


def _model(provider: str, defaults: Defaults) -> str:
    """The model of `auto`."""
    if provider == defaults.default_llm_provider:
        return defaults.default_llm_model
    return MODELS.get(provider, defaults.default_llm_model)


def _prompted(
    messages: Sequence[dict[str, Any]], who: Who, persona: Persona | None, house: _House
) -> list[dict[str, Any]]:
    """The messages, with one before them that says who the model is; what the caller instructs is part of it."""
    name = persona.name if persona is not None else house.voice.persona_name
    parts = [f"You are {name}, a voice assistant."]
    if persona is not None and persona.system_prompt:
        parts = [f"Your name is {name}.", persona.system_prompt]
    if persona is not None and persona.knowledge:
        parts.append(f"What you know beyond that:\n{persona.knowledge[:LONGEST_KNOWLEDGE]}")
    rest = list(messages)
    while rest and rest[0].get("role") in ("system", "developer"):
        parts.append(_text(rest.pop(0)))
    parts.append(SPOKEN)
    if who.language:
        parts.append(f"The user speaks {who.language}; answer in that language.")
    # Last, so that what does not change comes first: providers charge less for a beginning they know.
    parts.append(f"It is {datetime.now(_zone(house.timezone)):%A, %Y-%m-%d %H:%M} ({house.timezone}).")
    return [{"role": "system", "content": "\n\n".join(filter(None, parts))}, *rest]


def _zone(name: str) -> tzinfo:
    return UTC if name == "UTC" else ZoneInfo(name)  # a system may know no zones at all


def _question(messages: Sequence[dict[str, Any]]) -> str:
    """What a solver is asked: the last message, if it is a user's."""
    return _text(messages[-1]).strip() if messages and messages[-1].get("role") == "user" else ""


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _options(secret: str | None) -> dict[str, Any]:
    """A solver's configuration as tenants keep it: a JSON object, or a bare key."""
    if not secret:
        return {}
    try:
        found = json.loads(secret)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"appid": secret.strip(), "api_key": secret.strip()}


def _no_language_model() -> Unavailable:
    return Unavailable(
        "No language model is configured: store a key for a provider (secrets of the kind llm), or have the operator "
        "set one, such as AVB_GROQ_KEY.",
        code="no_language_model",
    )
