"""Language models: who has them, what a tenant has chosen, its own keys with providers, and answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from msgspec import UNSET, Meta, Struct, UnsetType, structs

from agentvoicebox.admin_api import auth, schemas, speech
from agentvoicebox.admin_api.auth import Visiting
from agentvoicebox.admin_api.listings import View
from agentvoicebox.admin_api.schemas import Body
from agentvoicebox.admin_api.stores import Store
from agentvoicebox.admin_api.visits import Visit
from agentvoicebox.bus_bridge.answers import MODELS, Who
from agentvoicebox.bus_bridge.chat import unless_gone
from agentvoicebox.config.errors import BadInput, NotFound, Unavailable
from agentvoicebox.plugins.chat import ChatMetrics, Endpoint
from agentvoicebox.plugins.chat.metrics import Durations
from agentvoicebox.tenancy import audit, secrets, settings, voices
from agentvoicebox.tenancy.models import Persona

router = APIRouter(prefix="/api/v2/llm", tags=["llm"])

TEMPERATURE = (
    "0 always gives the most likely answer and suits facts; around 0.7 is natural; towards 2 answers become more "
    "varied and less reliable."
)

_FIELDS = {name: f"llm_{name}" for name in ("provider", "model", "temperature", "max_tokens", "url", "fallbacks")}
"""What `VoiceConfig` calls them."""
_LONGEST_KEY = 500
_SHORTEST_KEY = 8
_END = r"$(?!\n)"
"""Also where `$` would put up with a line's end after it."""
_LISTENERS = ("deepgram",)
"""Providers that listen; their keys are kept beside those of language models."""
_CONVERSATION = 256 * 1024
"""Bytes of a body that holds one."""

Provider = Literal["auto", "openai", "anthropic", "groq", "ollama", "compatible"]
Model = Annotated[str, Meta(pattern=f"^{voices.MODEL.pattern}{_END}")]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Tokens = Annotated[int, Meta(ge=256, le=4096)]
Choice = Annotated[str, Meta(pattern=f"^({'|'.join(voices.PROVIDERS)})/{voices.MODEL.pattern}{_END}")]
"""As `provider/model`."""
Fallbacks = Annotated[list[Choice], Meta(max_length=voices.MOST_FALLBACKS)]
"""Who is asked when the first fails, in this order."""
Text = Annotated[str, Meta(min_length=1, max_length=32_000)]


class LlmChange(Body):
    """What is to be different about the language model."""

    provider: Provider | UnsetType = UNSET
    model: Model | UnsetType = UNSET
    temperature: Temperature | UnsetType = UNSET
    max_tokens: Tokens | UnsetType = UNSET
    url: Annotated[str, Meta(max_length=2000)] | UnsetType = UNSET
    fallbacks: (
        Annotated[list[Annotated[str, Meta(max_length=120)]], Meta(max_length=voices.MOST_FALLBACKS)] | UnsetType
    ) = UNSET


class LlmConfig(View):
    """The language model of a tenant; `auto` is the default of its settings."""

    provider: str
    model: str
    temperature: float
    temperature_explained: str = TEMPERATURE
    max_tokens: int
    url: str
    fallbacks: list[str]


class OneProvider(View):
    """Somebody who has language models. Without a key of one kind it is not asked."""

    id: str
    platform_key: bool
    """Whether the platform has a way to ask it."""
    tenant_key: bool
    """Whether the tenant has brought a key of its own."""
    models: list[str]
    """Those of it that the tenant's choices name, and the one that is asked where they name none."""


class Providers(View):
    """Everybody who has language models."""

    items: list[OneProvider]


class Credential(View):
    """What may be told of a key with a provider."""

    provider: str
    kind: str
    last4: str
    set_at: datetime


class Credentials(View):
    """The tenant's keys with providers."""

    items: list[Credential]


class NewCredential(Body):
    """A key with a provider; it is never shown again. Blanks and line ends around it are not kept."""

    api_key: Annotated[str, Meta(max_length=_LONGEST_KEY, pattern=rf"^\s*[!-~][ -~]{{{_SHORTEST_KEY - 2},}}[!-~]\s*$")]


class Prompt(Body):
    """Something to be answered."""

    prompt: Text


class Message(Struct, forbid_unknown_fields=True):
    """One part of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


class Conversation(Body):
    """Something to be answered, as one prompt or as a conversation, and how; else as the tenant has chosen."""

    prompt: Text | UnsetType = UNSET
    messages: Annotated[list[Message], Meta(min_length=1, max_length=200)] | UnsetType = UNSET
    model: Choice | UnsetType = UNSET
    temperature: Temperature | UnsetType = UNSET
    max_tokens: Annotated[int, Meta(ge=1, le=4096)] | UnsetType = UNSET


class Doing(View):
    """How a provider of language models does, on this node, for all of its tenants together; times are seconds.

    How much others use is nobody's business: models and counts are for the operator alone.
    """

    provider: str
    model: str | None = None
    average_first_seconds: float | None
    """Until the answer begins; None before the first one."""
    average_seconds: float | None
    """Until it is complete."""
    failure_rate: float | None
    """0 to 1; None before the first request. Each attempt is one."""
    requests: int | None = None
    failures: dict[str, int] | None = None
    """By code."""
    input_tokens: int | None = None
    output_tokens: int | None = None


class Metrics(View):
    """How the language models of this node do."""

    items: list[Doing]


class Counted(View):
    """What the model read and wrote."""

    input: int
    output: int


class Reply(View):
    """An answer, and who gave it in how many seconds."""

    reply: str
    provider: str
    model: str
    tokens: Counted
    seconds: float


@router.get("", dependencies=auth.may("voice_config.view"))
async def list_providers(request: Request, visit: Visiting, store: Store) -> Providers:
    """Who has language models, and whether they can be asked here."""
    config = await voices.get(store, visit.tenant_id)
    decided = await settings.get(store, visit.tenant_id)
    own = {each.name for each in await speech.credentials(store, visit) if each.kind == "llm"}
    first = decided.default_llm_provider if config.llm_provider == "auto" else config.llm_provider
    named = [(first, decided.default_llm_model if config.llm_model == "auto" else config.llm_model)]
    named += MODELS.items()
    named += [(provider, model) for provider, _, model in (each.partition("/") for each in config.llm_fallbacks)]
    answers = request.app.state.answers
    platform = answers.platform_providers if answers is not None else frozenset()
    return Providers(
        items=[
            OneProvider(
                id=provider,
                platform_key=provider in platform,
                tenant_key=provider in own,
                models=list(dict.fromkeys(model for of, model in named if of == provider)),
            )
            for provider in voices.PROVIDERS
        ]
    )


@router.get("/metrics", dependencies=auth.may("voice_config.view"))
async def read_llm_metrics(request: Request, visit: Visiting) -> Metrics:
    """How well and how fast the language models answer that this node asks."""
    found = speech.answers(request).metrics()
    if visit.operator:
        return Metrics(items=[_counted(each) for each in found])
    return Metrics(items=[_doing(name, [each for each in found if each.provider == name]) for name in voices.PROVIDERS])


@router.get("/config", dependencies=auth.may("voice_config.view"))
async def read_llm_config(visit: Visiting, store: Store) -> LlmConfig:
    """The language model."""
    return _shown(await voices.get(store, visit.tenant_id))


@router.patch("/config", dependencies=auth.may("tenant.configure_voice"), openapi_extra=schemas.document(LlmChange))
async def change_llm_config(request: Request, visit: Visiting, store: Store) -> LlmConfig:
    """Change the language model; answers that begin from now on are of it."""
    changes = schemas.changes(await schemas.read(request, LlmChange))
    if changes.get("url"):
        Endpoint("compatible", url=changes["url"], trusted=False)  # raises what asking it would
    changed = await speech.change(store, visit, changes, _FIELDS)
    speech.forget(request, visit)
    return _shown(changed)


@router.get("/credentials", dependencies=auth.may("tenant.administrate"))
async def list_credentials(visit: Visiting, store: Store) -> Credentials:
    """The tenant's keys with providers: the last four characters of each."""
    found = await speech.credentials(store, visit)
    return Credentials(
        items=[Credential(provider=each.name, kind=each.kind, last4=each.last4, set_at=each.set_at) for each in found]
    )


@router.put(
    "/credentials/{provider}",
    status_code=204,
    dependencies=auth.may("tenant.administrate"),
    openapi_extra=schemas.document(NewCredential),
)
async def set_credential(request: Request, visit: Visiting, store: Store, provider: str) -> Response:
    """Keep a key with a provider, in place of the one before; it is used from the next answer on."""
    keys = speech.master_keys(request)
    kind = _kind(request, provider)
    wanted = await schemas.read(request, NewCredential)
    await secrets.put(store, keys, visit.tenant_id, kind, provider, wanted.api_key.strip(), audit.actor().id)
    speech.forget(request, visit)
    return Response(status_code=204)


@router.delete("/credentials/{provider}", status_code=204, dependencies=auth.may("tenant.administrate"))
async def remove_credential(request: Request, visit: Visiting, store: Store, provider: str) -> Response:
    """Forget a key; from the next answer on the platform's counts, if it has one."""
    held = next((each for each in await speech.credentials(store, visit) if each.name == provider), None)
    if held is None:
        raise NotFound("There is no such key.", code="secret_not_found", param="provider")
    await secrets.delete(store, visit.tenant_id, held.kind, provider)
    speech.forget(request, visit)
    return Response(status_code=204)


@router.post(
    "/test",
    dependencies=auth.may("tenant.configure_voice", body=_CONVERSATION),
    openapi_extra=schemas.document(Prompt),
    responses=speech.FAILED,
)
async def try_model(request: Request, visit: Visiting) -> Reply:
    """The answer to a prompt, as the tenant's choices are now. Metered as any answer."""
    wanted = await schemas.read(request, Prompt)
    return await answer(request, visit, [{"role": "user", "content": wanted.prompt}])


@router.post(
    "/complete",
    dependencies=auth.may("tenant.create_session", body=_CONVERSATION),
    openapi_extra=schemas.document(Conversation),
    responses=speech.FAILED,
)
async def complete(request: Request, visit: Visiting) -> Reply:
    """The answer to a prompt or a conversation."""
    wanted = await schemas.read(request, Conversation)
    if (wanted.prompt is UNSET) == (wanted.messages is UNSET):
        raise BadInput("Send either prompt or messages.", param="messages")
    messages: list[dict[str, Any]] = (
        [{"role": "user", "content": wanted.prompt}]
        if isinstance(wanted.messages, UnsetType)
        else [structs.asdict(each) for each in wanted.messages]
    )
    given = schemas.changes(wanted)
    how = {name: given[name] for name in ("model", "temperature", "max_tokens") if name in given}
    return await answer(request, visit, messages, **how)


async def answer(
    request: Request,
    visit: Visit,
    messages: Sequence[dict[str, Any]],
    *,
    persona: Persona | None = None,
    model: str | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
) -> Reply:
    """The whole answer to a conversation in OpenAI's format, metered; it ends for a client that goes away.

    Raises `AvbError`.
    """
    answers = speech.answers(request)
    language = persona.language if persona is not None else ""
    who = Who(visit.tenant_id, speech.project_of(visit), None, visit.request_id, language)
    try:
        making = asyncio.create_task(
            answers.complete(who, persona, messages, model=model, temperature=temperature, max_tokens=max_tokens)
        )
        found = await unless_gone(request.receive, making, making)
    except Unavailable as error:
        if model is None or error.code != "no_language_model":
            raise
        # Who names a provider that cannot be asked here has asked wrongly; trying again would not help.
        raise BadInput(error.message, code=error.code, param="model") from error
    if found is None:
        raise schemas.ClientGone("The client went away before its answer.")
    return Reply(
        reply=found.text,
        provider=found.provider,
        model=found.model,
        tokens=Counted(input=found.tokens.input, output=found.tokens.output),
        seconds=found.seconds,
    )


def _kind(request: Request, provider: str) -> str:
    """As what a key with that provider is kept. Raises `NotFound`."""
    if provider in voices.PROVIDERS:
        return "llm"
    if provider in _LISTENERS:
        return "stt"
    if request.app.state.solvers is not None and any(
        each.id == provider for each in request.app.state.solvers.installed()
    ):
        return "solver"
    known = ", ".join((*voices.PROVIDERS, *_LISTENERS))
    raise NotFound(
        f"There is no such provider: it is one of {known}, or an id of /api/v2/personas/solvers.", param="provider"
    )


def _doing(provider: str, found: Sequence[ChatMetrics]) -> Doing:
    requests = sum(each.requests for each in found)
    failures = sum(each.failures.total() for each in found)
    return Doing(
        provider=provider,
        average_first_seconds=_average([each.first for each in found]),
        average_seconds=_average([each.whole for each in found]),
        failure_rate=failures / requests if requests else None,
    )


def _counted(found: ChatMetrics) -> Doing:
    doing = _doing(found.provider, [found])
    doing.model, doing.requests, doing.failures = found.model, found.requests, dict(found.failures)
    doing.input_tokens, doing.output_tokens = found.input_tokens, found.output_tokens
    return doing


def _average(times: Sequence[Durations]) -> float | None:
    count = sum(each.count for each in times)
    return sum(each.total for each in times) / count if count else None


def _shown(config: voices.VoiceConfig) -> LlmConfig:
    return LlmConfig(**{name: getattr(config, field) for name, field in _FIELDS.items()})
