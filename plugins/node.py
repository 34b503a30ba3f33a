"""The node as a plugin sees it: a question goes there, and the answer comes back piece by piece.

Plain HTTP/1.1 on asyncio streams, one connection for each question: no pool in which an answer would queue, and a
third of the CPU that a client library takes (0.9 against 3.0 ms for an answer in 20 pieces). Core's is everybody's.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CONNECT = 2.0
"""Seconds in which the node must take the call."""

SILENCE = 30.0
"""Seconds in which it must say something, if only that it is still there."""

TELL = 3.0
"""Seconds that whoever asks a short question waits for its answer."""

MOST = 1024 * 1024
"""Bytes of one event, or of an error."""

_CODE = re.compile(r"[a-z][a-z_]{1,48}")
_HEADER = re.compile(r"[ -~]+")


class Failed(Exception):
    """There is no answer, or no rest of it; `code` says why, and nothing else is told of the reason."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, slots=True)
class Node:
    """Where the node's door is, and the key that opens it."""

    url: str
    key: str = field(repr=False)

    async def ask(self, turn: str, question: str, language: str) -> AsyncGenerator[str]:
        """Ask as the persona of a turn; yields the text of the answer as it comes. Raises `Failed`.

        Closing the generator hangs up, which ends the work at the node.
        """
        writer: asyncio.StreamWriter | None = None
        try:
            address = urlsplit(self.url)
            request = self._request(address.netloc, address.path, turn, question, language)
            async with asyncio.timeout(CONNECT):
                reader, writer = await asyncio.open_connection(
                    address.hostname, address.port, ssl=True if address.scheme == "https" else None
                )
            writer.write(request)
            async with aclosing(_answer(reader)) as answer:
                async for text in answer:
                    yield text
        except (ValueError, TypeError, LookupError, AttributeError, asyncio.LimitOverrunError) as error:
            raise Failed("node_garbage") from error
        except EOFError as error:
            raise Failed("provider_broke_off") from error
        except TimeoutError as error:
            raise Failed("node_unreachable" if writer is None else "provider_timeout") from error
        except OSError as error:
            raise Failed("node_unreachable" if writer is None else "provider_broke_off") from error
        finally:
            if writer is not None:
                writer.close()

    def tell(self, method: str, path: str, turn: str, body: Any = None) -> dict[str, Any]:
        """Put a short question about a turn, on the caller's thread; `path` begins behind `/v1`. Raises `Failed`."""
        until = time.monotonic() + TELL
        address = urlsplit(self.url)
        headers = {"Authorization": f"Bearer {self.key}", "X-AVB-Turn": turn}
        connection = HTTPConnection(address.hostname or "", address.port, timeout=TELL)
        try:
            connection.request(method, address.path.rstrip("/") + path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            said = b""
            while data := answer.read1(65_536):
                said += data
                left = until - time.monotonic()
                if left <= 0 or len(said) > MOST:
                    raise Failed("node_garbage" if left > 0 else "node_unreachable")
                if connection.sock is not None:
                    connection.sock.settimeout(left)
            told = json.loads(said)
            if answer.status != 200:
                raise failed(told["error"].get("code"))
            if not isinstance(told, dict):
                raise TypeError("not an object")
            return told
        except OSError as error:
            raise Failed("node_unreachable") from error
        except (HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
            raise Failed("node_garbage") from error
        finally:
            connection.close()

    def _request(self, host: str, path: str, turn: str, question: str, language: str) -> bytes:
        if not (_HEADER.fullmatch(turn) and _HEADER.fullmatch(self.key)):
            raise ValueError("a header cannot hold this")
        body = json.dumps(
            {
                "model": "persona",
                "stream": True,
                "messages": [{"role": "user", "content": question}],
                "language": language,
            }
        ).encode()
        head = (
            f"POST {path.rstrip('/')}/chat/completions HTTP/1.1\r\n"
            f"Host: {host}\r\n"
            f"Authorization: Bearer {self.key}\r\n"
            f"X-AVB-Turn: {turn}\r\n"
            "Accept: text/event-stream\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        return head.encode("ascii") + body


def failed(code: object) -> Failed:
    """Of that code; one that is none tells of nonsense."""
    return Failed(code if isinstance(code, str) and _CODE.fullmatch(code) else "node_garbage")


def configured(section: Mapping[str, Any] | None) -> Node | None:
    """The node that the section `agentvoicebox` of a `mycroft.conf` names; None if it names none.

    Raises `OSError` if its key file cannot be read.
    """
    if not section or not section.get("url") or not section.get("key_file"):
        return None
    return Node(str(section["url"]), Path(section["key_file"]).read_text(encoding="ascii").strip())


async def _answer(reader: asyncio.StreamReader) -> AsyncGenerator[str]:
    """The text in the events of an answer, up to the one that says it is whole."""
    async with asyncio.timeout(SILENCE):
        head = await reader.readuntil(b"\r\n\r\n")
    first, *fields = head.decode("latin-1").lower().split("\r\n")
    status = int(first.split(" ", 2)[1])
    chunked = any(line.startswith("transfer-encoding:") and "chunked" in line for line in fields)
    async with aclosing(_body(reader, chunked)) as body:
        if status != 200:
            raise await _refused(status, body)
        rest = b""
        async for data in body:
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > MOST:
                raise ValueError("an event without an end")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                event = line[5:].strip()
                if event == b"[DONE]":
                    return
                if text := _text(json.loads(event)):
                    yield text
    raise EOFError("the end of the answer is missing")


async def _body(reader: asyncio.StreamReader, chunked: bool) -> AsyncGenerator[bytes]:
    """The body of a response as it comes (RFC 9112 §6.3 and §7.1)."""
    while True:
        async with asyncio.timeout(SILENCE):
            if not chunked:
                data = await reader.read(MOST)
            elif (size := int((await reader.readline()).partition(b";")[0] or b"-1", 16)) < 0:
                raise EOFError("the last chunk is missing")
            elif size > MOST:
                raise ValueError("too large a chunk")
            else:
                data = (await reader.readexactly(size + 2))[:-2]
        if not data:
            return
        yield data


async def _refused(status: int, body: AsyncGenerator[bytes]) -> Failed:
    """Why the node does not answer."""
    said = b""
    async for data in body:
        said += data
        if len(said) > MOST:
            break
    try:
        return failed(json.loads(said)["error"].get("code"))
    except (ValueError, LookupError, TypeError, AttributeError):
        return Failed("rate_limit_exceeded" if status == 429 else "node_garbage")


def _text(event: dict[str, Any]) -> str:
    """The words in an event. Raises `Failed` if it is an error."""
    if error := event.get("error"):
        raise failed(error.get("code"))
    return "".join(choice["delta"].get("content") or "" for choice in event.get("choices") or ())
