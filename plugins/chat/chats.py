"""Asks language models: the first of some choices that answers is heard, retried and given up by rules.

Nothing is tried again once a piece of the answer has been handed on: a listener would hear it twice.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Final, Protocol, TypeVar

from agentvoicebox.config.errors import AvbError, BadInput, Unavailable
from agentvoicebox.plugins.breaker import Breaker
from agentvoicebox.plugins.chat import connections
from agentvoicebox.plugins.chat.connections import Reach
from agentvoicebox.plugins.chat.errors import OUR_OWN_FAULT, WORTH_A_RETRY, ProviderFailed, named
from agentvoicebox.plugins.chat.metrics import ChatMetrics, Metrics
from agentvoicebox.plugins.chat.pieces import checked, valid
from agentvoicebox.plugins.chat.request import Delta, Endpoint, Request, measure
from agentvoicebox.plugins.chat.tokens import Count, Tokens

CLASSES: Final = {
    "openai": ("openai", "OpenAI"),
    "compatible": ("openai", "Compatible"),
    "groq": ("groq", "Groq"),
    "anthropic": ("anthropic", "Anthropic"),
    "ollama": ("ollama", "Ollama"),
}
"""The module here and the class for each provider; imported at first use, since an SDK takes a second to import."""
CLIENTS_KEPT: Final = 64
"""Clients that nobody uses but that stay connected."""
KEPT: Final = 4096
"""Models at endpoints of which we remember how well they are, for each tenant."""
log = logging.getLogger(__name__)
K = TypeVar("K")
V = TypeVar("V")


class Client(Protocol):
    """What speaks one provider's protocol to one endpoint."""

    def deltas(
        self, model: str, request: Request, count: Count, *, temperature: float | None
    ) -> AsyncGenerator[Delta, None]:
        """The answer, save its end, which `count` holds; may raise anything."""

    async def close(self) -> None:
        """Close all connections."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long we wait, in seconds, and how often we try one choice."""

    first: float = 20.0
    """For the first piece of the answer, in one attempt."""
    between: float = 15.0
    """For each further piece."""
    begin: float = 40.0
    """For the first piece, with all attempts and pauses."""
    whole: float = 300.0
    """For all of the answer."""
    attempts: int = 3
    pause: float = 0.25
    """Before the second attempt; doubled before each further one, and shortened by chance by up to a half."""
    longest_pause: float = 5.0
    """A provider that asks us to come back later than this has failed."""


class Answer:
    """An answer on its way: iterate over its deltas, once, and close it (`contextlib.aclosing`) if you leave early.

    `tokens` is what it has cost up to now, at any time: also after it was closed, cancelled or failed.
    """

    def __init__(self) -> None:
        self._attempt: _Attempt | None = None
        self._deltas: AsyncGenerator[Delta, None]

    @property
    def endpoint(self) -> Endpoint | None:
        """Who answers, or was asked last; None before anybody was."""
        return self._attempt.endpoint if self._attempt is not None else None

    @property
    def model(self) -> str:
        """The model of `endpoint`."""
        return self._attempt.model if self._attempt is not None else ""

    @property
    def tokens(self) -> Tokens:
        """What was used. Of attempts that failed before anything came, nothing is counted: nobody charges for them."""
        return self._attempt.count.tokens() if self._attempt is not None else Tokens(0, 0)

    def __aiter__(self) -> AsyncGenerator[Delta, None]:
        return self._deltas

    async def __anext__(self) -> Delta:
        return await anext(self._deltas)

    async def aclose(self) -> None:
        """Stop: the connection to the provider is closed at once."""
        await self._deltas.aclose()


@dataclass(slots=True)
class _Attempt:
    """One request to one provider: its times, and the books that are kept of it."""

    endpoint: Endpoint
    model: str
    request: Request
    temperature: float | None
    count: Count
    metrics: ChatMetrics
    patience: Patience
    give_up: float
    now: Callable[[], float] = field(default_factory=lambda: asyncio.get_running_loop().time)
    begun: bool = False
    unsendable: bool = False
    """Whether the SDK is still making the request: what goes wrong now is the request's own fault."""
    _start: float = 0.0

    def deltas(self, client: Client) -> AsyncGenerator[Delta, None]:
        """Send the request. An SDK that had to be imported first has not used up the provider's time."""
        self._start = self.now()
        self.unsendable = True
        connections.sending.set(self._sent)
        return client.deltas(self.model, self.request, self.count, temperature=self.temperature)

    async def next(self, deltas: AsyncGenerator[Delta, None]) -> Delta | None:
        """The next piece, or None at the end. Raises `TimeoutError`, and what the provider's client raises."""
        if self.count.overflowing:
            return None
        if self.begun:
            until = min(self.now() + self.patience.between, self._start + self.patience.whole)
        else:
            until = min(self._start + self.patience.first, self.give_up)
        async with asyncio.timeout_at(until):
            delta = await anext(deltas, None)
        if delta is not None:
            if delta.tool_calls:
                delta.tool_calls = checked(delta.tool_calls)
            delta.text = valid(delta.text)
            if not self.begun:
                self.begun = True
                self.metrics.first.add(self.now() - self._start)
            self.count.said(delta.text, delta.tool_calls)
        return delta

    def ended(self) -> Delta:
        """The answer is complete: its last delta."""
        self.metrics.used(self.count.tokens())
        self.metrics.whole.add(self.now() - self._start)
        return Delta(finish=self.count.ending, tokens=self.count.tokens())

    def failed(self, error: ProviderFailed) -> ProviderFailed | None:
        """The provider has failed, unless it had told the end already: what goes wrong after that is no matter."""
        if self.count.finish is not None:
            return None
        self.metrics.failures[error.code] += 1
        if not self.begun:
            self.count.sent = False  # and charges nothing
        error.tokens = self.count.tokens()
        self.metrics.used(error.tokens)
        return error

    def abandoned(self) -> None:
        """Nobody listens any more."""
        self.metrics.used(self.count.tokens())

    def _sent(self) -> None:
        if not self.count.sent:
            self.metrics.requests += 1
        self.count.sent, self.unsendable = True, False


@dataclass(frozen=True, slots=True)
class _Health:
    """Whether to ask a model at an endpoint, for one tenant: of what a request can cause, others notice nothing."""

    own: Breaker
    common: Breaker
    """Of all tenants; it counts only that nobody was reached, which no request can cause."""

    def admit(self) -> None:
        """Raises `Unavailable` (circuit_open); else tell how it ended."""
        self.own.admit()
        try:
            self.common.admit()
        except Unavailable:
            self.own.undecided()
            raise

    def succeeded(self) -> None:
        self.own.succeeded()
        self.common.succeeded()

    def undecided(self) -> None:
        self.own.undecided()
        self.common.undecided()

    def failed(self, code: str) -> None:
        """After the last attempt."""
        if code in OUR_OWN_FAULT:
            self.undecided()
        elif code == "provider_unreachable":
            self.common.failed()
            self.own.undecided()
        else:
            self.own.failed()
            self.common.succeeded()


@dataclass(slots=True)
class _Kept:
    client: Client
    users: int = 0


class Chats:
    """All language models that this process talks to; for one event loop."""

    def __init__(self, patience: Patience | None = None, reach: Reach | None = None) -> None:
        self._patience = patience or Patience()
        self._reach = reach or Reach()
        self._kept: OrderedDict[Endpoint, _Kept] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()
        self._breakers: OrderedDict[tuple[Endpoint, str, str | None], Breaker] = OrderedDict()
        self._temperate: OrderedDict[tuple[Endpoint, str], None] = OrderedDict()
        self._metrics = Metrics()

    def stream(self, choices: Sequence[tuple[Endpoint, str]], request: Request, tenant: str = "") -> Answer:
        """Ask the first of `choices` (endpoint and model); the next ones if it does not begin to answer.

        Who keeps failing for a `tenant` is left alone for that tenant, who cannot be reached for all of them.

        The last delta has `finish` and `tokens`. Raises here `BadInput` (prompt_too_long, messages_invalid,
        parameter_invalid), and while iterating `BadInput` for what this provider has no form for, `ProviderFailed` or,
        when all choices are left alone because they kept failing, `Unavailable` (circuit_open); or, without choices,
        `Unavailable` (no_provider). These and `CancelledError` have the attribute `tokens`, which is also that of the
        answer.
        """
        answer = Answer()
        answer._deltas = self._stream(choices, request, measure(request), answer, tenant)
        return answer

    def metrics(self) -> list[ChatMetrics]:
        """What was asked, by provider and model."""
        return self._metrics.all()

    async def load(self, providers: Iterable[str]) -> None:
        """Load what these providers need: at the first question, everything beside it would wait for up to a second."""
        for provider in providers:
            with suppress(ImportError):  # which whoever asks it is told
                await asyncio.to_thread(_load, provider)

    async def close(self) -> None:
        """Close all connections. Answers on their way fail."""
        kept, self._kept = self._kept, OrderedDict()
        await asyncio.gather(*self._closing, *(each.client.close() for each in kept.values()))

    async def _stream(
        self, choices: Sequence[tuple[Endpoint, str]], request: Request, size: int, answer: Answer, tenant: str
    ) -> AsyncGenerator[Delta, None]:
        give_up = asyncio.get_running_loop().time() + self._patience.begin
        failure: AvbError = Unavailable("No language model is configured; choose one.", code="no_provider")
        for endpoint, model in choices:
            health = self._health(endpoint, model, tenant)
            try:
                health.admit()
            except Unavailable as error:
                failure = error
                continue
            for number in range(1, self._patience.attempts + 1):
                attempt = answer._attempt = self._attempt(endpoint, model, size, request, give_up)
                failed: ProviderFailed | None = None
                try:
                    async with self._client(endpoint) as client, aclosing(attempt.deltas(client)) as deltas:
                        while (delta := await attempt.next(deltas)) is not None:
                            yield delta
                except (asyncio.CancelledError, GeneratorExit) as error:
                    (health.succeeded if attempt.begun else health.undecided)()
                    attempt.abandoned()
                    error.tokens = attempt.count.tokens()  # type: ignore[union-attr]
                    raise
                except BadInput:  # it could not be translated for this provider
                    health.undecided()
                    raise
                except Exception as error:
                    if attempt.unsendable and not isinstance(error, TimeoutError):
                        health.undecided()
                        log.warning("a request is none for %s: %s", endpoint.provider, type(error).__name__)
                        raise _unsendable() from None
                    failed = attempt.failed(named(error))
                if failed is None:
                    health.succeeded()
                    yield attempt.ended()
                    return
                if attempt.begun:
                    health.failed(failed.code)
                    raise failed
                failure = failed
                if failed.about == "temperature" and attempt.temperature is not None:
                    _remember(self._temperate, (endpoint, model), None)  # some models know only their own
                    continue
                pause = self._pause(failed, number)
                if pause is None or number == self._patience.attempts or attempt.now() + pause >= give_up:
                    break
                try:
                    await asyncio.sleep(pause)
                except asyncio.CancelledError:
                    health.undecided()
                    raise
            health.failed(failure.code)
        failure.tokens = Tokens(0, 0)  # type: ignore[attr-defined]
        raise failure

    def _health(self, endpoint: Endpoint, model: str, tenant: str) -> _Health:
        def of(whom: str | None) -> Breaker:
            key = endpoint, model, whom
            return self._breakers.get(key) or _remember(self._breakers, key, Breaker())

        return _Health(of(tenant), of(None))

    def _attempt(self, endpoint: Endpoint, model: str, size: int, request: Request, give_up: float) -> _Attempt:
        return _Attempt(
            endpoint,
            model,
            request,
            None if (endpoint, model) in self._temperate else request.temperature,
            Count(size, request.max_tokens),
            self._metrics.of(endpoint.provider, model),
            self._patience,
            give_up,
        )

    def _pause(self, failed: ProviderFailed, attempt: int) -> float | None:
        """Seconds until the next attempt with the same choice, or None when there should be none."""
        if failed.code not in WORTH_A_RETRY:
            return None
        if failed.retry_after is not None:
            return failed.retry_after if failed.retry_after <= self._patience.longest_pause else None
        whole = min(self._patience.pause * 2.0 ** (attempt - 1), self._patience.longest_pause)
        return whole * random.uniform(0.5, 1)  # noqa: S311  (chance, not a secret)

    @asynccontextmanager
    async def _client(self, endpoint: Endpoint) -> AsyncGenerator[Client, None]:
        """The client for `endpoint`, which is not closed while it is used."""
        kept = self._kept.get(endpoint)
        if kept is None:
            make = await asyncio.to_thread(_load, endpoint.provider)
            if self._reach.tls is None:  # once for all: reading the world's certificates takes long
                self._reach = replace(self._reach, tls=await asyncio.to_thread(_certificates))
            # Another task may have been faster.
            kept = self._kept.get(endpoint) or self._kept.setdefault(endpoint, _Kept(make(endpoint, self._reach)))
            self._make_room()
        self._kept.move_to_end(endpoint)
        kept.users += 1
        try:
            yield kept.client
        finally:
            kept.users -= 1

    def _make_room(self) -> None:
        """Close clients that nobody has used for the longest time and nobody uses now."""
        for endpoint in [each for each, kept in self._kept.items() if not kept.users][: -CLIENTS_KEPT or None]:
            task = asyncio.create_task(self._kept.pop(endpoint).client.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def _unsendable() -> BadInput:
    return BadInput(
        "The model's provider has no form for this request; check the messages and the tools.",
        code="messages_invalid",
        param="messages",
    )


def _load(provider: str) -> Callable[[Endpoint, Reach], Client]:
    module, name = CLASSES[provider]
    found: Callable[[Endpoint, Reach], Client] = getattr(import_module(f"agentvoicebox.plugins.chat.{module}"), name)
    return found


def _certificates() -> ssl.SSLContext:
    import httpx

    return httpx.create_ssl_context()


def _remember(known: OrderedDict[K, V], key: K, value: V) -> V:
    """Keep `value`, and the latest of the others."""
    known[key] = value
    if len(known) > KEPT:
        known.popitem(last=False)
    return value
