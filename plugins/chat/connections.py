"""How we connect to providers: what their SDKs' HTTP clients may do, and must not.

Two generations of one HTTP client are in use (`httpx` by groq and ollama, `httpx2` by openai and anthropic), with the
same classes; what is said here is said to either.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from agentvoicebox.plugins.chat import addresses
from agentvoicebox.plugins.chat.errors import ProviderFailed
from agentvoicebox.plugins.chat.request import Endpoint

LONGEST_LINE: Final = 1 << 20
"""Bytes without a line's end, in any answer."""
LONGEST_ANSWER: Final = 16 << 20
"""Bytes of an answer with all that wraps it."""
ADDRESSES_TRIED: Final = 3
NEVER_SENT: Final = ("openai-organization", "openai-project")
"""Headers that SDKs take from the environment of the process, whoever the endpoint belongs to."""
KEYS: Final = ("authorization", "x-api-key")
sending: ContextVar[Callable[[], None]] = ContextVar("sending")
"""Is called when an SDK has made the request that it was asked for: what goes wrong before is no provider's fault."""
CONNECTIONS_KEPT: Final = 64
DRAINING: Final = 0.05
"""Seconds for the rest of an answer that has ended, before its connection is given up."""

# Below warnings, SDKs repeat what was sent and to whom.
for _name in ("openai", "anthropic", "groq"):
    logging.getLogger(_name).setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True)
class Reach:
    """How names become addresses, and which addresses a tenant's own URL may lead to; `connect` is in seconds."""

    resolve: Callable[[str, int], Awaitable[list[str]]] = addresses.resolve
    allowed: Callable[[str], bool] = addresses.public
    connect: float = 5.0
    tls: ssl.SSLContext | None = None
    """Whose certificates are believed; None: those that HTTP clients believe."""


def options(httpx: Any, endpoint: Endpoint, reach: Reach) -> dict[str, Any]:
    """The arguments for an `AsyncClient` of `httpx` (either generation) that talks to `endpoint`.

    It follows no redirects, wants no compression, and gives up reading lines and answers that do not end. Times between
    bytes are watched where answers are read.
    """
    chosen: dict[str, Any] = {
        "verify": reach.tls or httpx.create_ssl_context(),
        "timeout": httpx.Timeout(None, connect=reach.connect, write=10.0, pool=reach.connect),
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=CONNECTIONS_KEPT, keepalive_expiry=60.0),
        "headers": {"Accept-Encoding": "identity"},
        "follow_redirects": False,
        "event_hooks": {"request": [_cleaner(endpoint)], "response": [_checker(httpx)]},
    }
    if not endpoint.trusted:
        # With a transport of its own, a client also ignores the proxies that the environment names.
        chosen["transport"] = _checked(httpx)(reach, verify=chosen["verify"], limits=chosen["limits"])
    return chosen


def expect(headers: Mapping[str, str], kind: str = "text/event-stream") -> None:
    """Raises `ProviderFailed` when an answer is not of the content type `kind`."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
        raise ProviderFailed("provider_garbage")


class Lines:
    """Cuts the bytes of an event stream into what its `data:` lines hold."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of the lines that `chunk` completes. Raises `ProviderFailed` for what is no event stream."""
        if b"\n" not in chunk:
            self._rest += chunk
            return []
        lines = (bytes(self._rest) + chunk).split(b"\n")
        self._rest = bytearray(lines.pop())
        return [data for line in lines if (data := _data(line)) is not None]

    def end(self) -> list[bytes]:
        """The data of a last line that nothing ended."""
        return self.feed(b"\n")


async def drain(rest: AsyncGenerator[bytes, None]) -> None:
    """Read what follows the end of an answer, so that its connection can be used again; not for long."""
    try:
        async with asyncio.timeout(DRAINING):
            async for _ in rest:
                pass
    except TimeoutError:
        pass


def _data(line: bytes) -> bytes | None:
    if line.startswith(b"data:"):
        return line[5:].strip()
    line = line.strip()
    if line and not line.startswith((b":", b"event:", b"id:", b"retry:")):
        raise ProviderFailed("provider_garbage")
    return None


def _cleaner(endpoint: Endpoint) -> Callable[[Any], Awaitable[None]]:
    """Takes from requests what the SDK found in the environment, and the key where we have none."""
    unwanted = NEVER_SENT if endpoint.key else (*NEVER_SENT, *KEYS)

    async def clean(request: Any) -> None:
        for name in unwanted:
            request.headers.pop(name, None)
        sending.get()()

    return clean


def _checker(httpx: Any) -> Callable[[Any], Awaitable[None]]:
    bounded = _bounded(httpx)

    async def check(response: Any) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":  # we asked for none: a bomb, perhaps
            raise ProviderFailed("provider_garbage")
        response.stream = bounded(response.stream)

    return check


@cache
def _bounded(httpx: Any) -> type[Any]:
    class Bounded(httpx.AsyncByteStream):  # type: ignore[misc]
        """A body that ends at some time."""

        def __init__(self, stream: Any) -> None:
            self._stream = stream

        async def __aiter__(self) -> AsyncGenerator[bytes, None]:
            whole = line = 0
            async for chunk in self._stream:
                whole += len(chunk)
                cut = chunk.rfind(b"\n")
                line = line + len(chunk) if cut < 0 else len(chunk) - cut - 1
                if line > LONGEST_LINE or whole > LONGEST_ANSWER:
                    raise ProviderFailed("provider_garbage")
                yield chunk

        async def aclose(self) -> None:
            await self._stream.aclose()

    return Bounded


@cache
def _checked(httpx: Any) -> type[Any]:
    class Checked(httpx.AsyncHTTPTransport):  # type: ignore[misc]
        """Connects to addresses that have been looked at, never to a name that may mean another one by then."""

        def __init__(self, reach: Reach, **more: Any) -> None:
            super().__init__(**more)
            self._reach = reach

        async def handle_async_request(self, request: Any) -> Any:
            host = request.url.raw_host.decode("ascii")
            found = await self._look_up(host.strip("[]"), request.url.port or 443)
            if not all(map(self._reach.allowed, found)):
                raise ProviderFailed("provider_forbidden_address")
            failure: Exception = ProviderFailed("provider_unreachable")
            for address in found[:ADDRESSES_TRIED]:
                # The certificate must be the name's, and the header Host is the name's already.
                there = httpx.Request(
                    request.method,
                    request.url.copy_with(host=address),
                    headers=request.headers,
                    stream=request.stream,
                    extensions={**request.extensions, "sni_hostname": host},
                )
                try:
                    return await super().handle_async_request(there)
                except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                    failure = error
            raise failure

        async def _look_up(self, host: str, port: int) -> list[str]:
            try:
                async with asyncio.timeout(self._reach.connect):
                    return await self._reach.resolve(host, port)
            except (OSError, UnicodeError):  # a timeout is an OSError
                raise ProviderFailed("provider_unreachable") from None

    return Checked
