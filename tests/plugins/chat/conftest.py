"""Providers of language models to talk to: real HTTP servers that speak each protocol, well or badly, as told."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest

# ---- A provider for tests: one self-contained section ------------------------------------------------------------


@dataclass
class Script:
    """What a provider does with a request. `fail` names one of `Provider`'s methods that begin with `fail_`."""

    text: str | Callable[[dict[str, Any]], str] = "Good morning. How can I help you?"
    """The answer, or what makes it from the body of the request; it is sent word by word."""
    tools: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Calls made after the text: names and arguments."""
    tokens: tuple[Any, Any] | None = (12, 8)
    """What the provider claims for the prompt and the answer, as JSON or as text of it; None: nothing."""
    finish: str = ""
    """OpenAI's word for how it ended; else "stop", or "tool_calls"."""
    delay: float = 0.0
    """Seconds before each word."""
    hold: asyncio.Event | None = None
    """After `after` words, the provider waits for this."""
    after: int = 2
    """Words said (or pings) before it holds, or fails in the middle."""
    fail: str = ""
    times: int = 1_000_000
    """So many requests fail; the next ones are answered."""
    retry_after: str = ""


@dataclass
class Asked:
    """A request that came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    connection: int


class Stop(Exception):
    """Ends a connection at once."""


class Provider:
    """One server that speaks like OpenAI and Groq, Anthropic, and Ollama, at the paths where they do.

    `script` is what it does, `scripts` the same for single models. `asked` are the requests so far, `open` the number
    of connections open now; `left` is set when a client goes away before its answer has ended.
    """

    def __init__(self) -> None:
        self.script = Script()
        self.scripts: dict[str, Script] = {}
        self.models = ["small", "large"]
        self.asked: list[Asked] = []
        self.connections = 0
        self.open = 0
        self.left = asyncio.Event()
        self.said = asyncio.Event()
        """Set after `after` words, and before holding or failing; when it hangs, once it has been asked."""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """Where it listens, on 127.0.0.1."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def url(self, provider: str = "compatible") -> str:
        """The URL that an endpoint of this kind of provider needs."""
        base = f"http://127.0.0.1:{self.port}"
        return f"{base}/v1" if provider in ("openai", "compatible") else base

    async def start(self, tls: ssl.SSLContext | None = None) -> Provider:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=tls)
        return self

    async def stop(self) -> None:
        """Close everything."""
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    # how answers look, by protocol

    async def openai(self, script: Script, body: dict[str, Any]) -> AsyncGenerator[str, None]:
        """Chunks of chat completions."""
        yield self._chunk({"role": "assistant", "content": ""})
        async for word in self._words(script, body):
            yield self._chunk({"content": word})
        for index, (name, arguments) in enumerate(script.tools):
            text = json.dumps(arguments)
            head = {"index": index, "id": f"call_{index}", "type": "function"}
            yield self._chunk({"tool_calls": [{**head, "function": {"name": name, "arguments": ""}}]})
            for part in (text[:3], text[3:]):
                yield self._chunk({"tool_calls": [{"index": index, "function": {"arguments": part}}]})
        finish = script.finish or ("tool_calls" if script.tools else "stop")
        yield self._chunk({}, finish)
        if script.tokens is not None:
            taken, given = script.tokens
            usage = f'{{"prompt_tokens": {taken}, "completion_tokens": {given}}}'
            if body.get("stream_options"):
                yield f'data: {{"id": "c", "object": "chat.completion.chunk", "choices": [], "usage": {usage}}}\n\n'
            else:  # Groq's way
                yield f'data: {{"id": "c", "choices": [], "x_groq": {{"usage": {usage}}}}}\n\n'
        yield "data: [DONE]\n\n"

    async def anthropic(self, script: Script, body: dict[str, Any]) -> AsyncGenerator[str, None]:
        """Events of messages."""
        taken, given = script.tokens or ("null", "null")
        message = '{"id": "m", "type": "message", "role": "assistant", "content": [], "model": "x", "usage": '
        yield self._event("message_start", f'"message": {message}{{"input_tokens": {taken}, "output_tokens": 1}}}}')
        yield self._event("content_block_start", '"index": 0, "content_block": {"type": "text", "text": ""}')
        yield self._event("ping")
        async for word in self._words(script, body):
            delta = json.dumps({"type": "text_delta", "text": word})
            yield self._event("content_block_delta", f'"index": 0, "delta": {delta}')
        yield self._event("content_block_stop", '"index": 0')
        for index, (name, arguments) in enumerate(script.tools, 1):
            block = json.dumps({"type": "tool_use", "id": f"toolu_{index}", "name": name, "input": {}})
            yield self._event("content_block_start", f'"index": {index}, "content_block": {block}')
            text = json.dumps(arguments)
            for part in (text[:3], text[3:]):
                delta = json.dumps({"type": "input_json_delta", "partial_json": part})
                yield self._event("content_block_delta", f'"index": {index}, "delta": {delta}')
            yield self._event("content_block_stop", f'"index": {index}')
        reason = {"length": "max_tokens"}.get(script.finish, "tool_use" if script.tools else "end_turn")
        ended = f'"delta": {{"stop_reason": "{reason}"}}, "usage": {{"output_tokens": {given}}}'
        yield self._event("message_delta", ended)
        yield self._event("message_stop")

    async def ollama(self, script: Script, body: dict[str, Any]) -> AsyncGenerator[str, None]:
        """Lines of a chat."""
        async for word in self._words(script, body):
            yield self._line({"message": {"role": "assistant", "content": word}, "done": False})
        if script.tools:
            calls = [{"function": {"name": name, "arguments": arguments}} for name, arguments in script.tools]
            yield self._line({"message": {"role": "assistant", "content": "", "tool_calls": calls}, "done": False})
        taken, given = script.tokens or ("null", "null")
        counts = f'"prompt_eval_count": {taken}, "eval_count": {given}'
        end = json.dumps({"model": "m", "done": True, "done_reason": script.finish or "stop"})
        yield f'{end[:-1]}, "message": {{"role": "assistant", "content": ""}}, {counts}}}\n'

    # how they fail

    async def fail_refuse(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """The key is wrong; the message repeats it."""
        key = asked.headers.get("authorization") or asked.headers.get("x-api-key")
        await self._whole(writer, "401 Unauthorized", {"error": {"message": f"Incorrect API key provided: {key}"}})

    async def fail_overload(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """Too many requests; with `retry_after`, if the script has one."""
        more = {"Retry-After": script.retry_after} if script.retry_after else {}
        await self._whole(writer, "429 Too Many Requests", {"error": {"message": "slow down"}}, more)

    async def fail_error(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """An error of the server, which repeats the prompt."""
        await self._whole(writer, "500 Internal Server Error", {"error": {"message": json.dumps(asked.body)}})

    async def fail_reject(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """No such model."""
        await self._whole(writer, "404 Not Found", {"error": {"message": "model not found"}})

    async def fail_temperature(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """A model that takes no temperature."""
        if "temperature" in asked.body:
            error = {"message": "Unsupported value: 'temperature'", "param": "temperature"}
            await self._whole(writer, "400 Bad Request", {"error": error})
        else:
            await self._answer(script, writer, asked)

    async def fail_redirect(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """It is elsewhere, it says."""
        location = f"http://localhost:{self.port}/elsewhere{asked.path}"
        await self._whole(writer, "307 Temporary Redirect", {}, {"Location": location})

    async def fail_html(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """A page for people."""
        await self._head(writer, "text/html")
        await self._say(writer, "<html>Welcome</html>\n")
        await self._end(writer)

    async def fail_garbage(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """The right content type, and then no JSON."""
        await self._head(writer, _kind(asked.path))
        await self._say(writer, 'data: {"choices": [{"delta": {"content": 7]}\n\n')
        await self._end(writer)

    async def fail_scribble(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """The right content type, and then bytes that are no lines of anything."""
        await self._head(writer, _kind(asked.path))
        await self._say(writer, "\x00\x01 lorem ipsum\n\n")
        await self._end(writer)

    async def fail_noise(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """Not even HTTP."""
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        raise Stop

    async def fail_close(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """Gone without a word."""
        raise Stop

    async def fail_hang(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """Says nothing, for ever."""
        self.said.set()
        await asyncio.Event().wait()

    async def fail_drip(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """Keeps the connection alive, and says nothing."""
        await self._head(writer, _kind(asked.path))
        for number in count():
            await self._say(writer, ": ping\n\n")
            if number == script.after:
                self.said.set()
            await asyncio.sleep(0.02)

    async def fail_hang_later(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """Says half a sentence, and then nothing more."""
        await self._begin(script, writer, asked)
        await asyncio.Event().wait()

    async def fail_break_off(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """Says half a sentence and is gone."""
        await self._begin(script, writer, asked)
        raise Stop

    async def fail_end_early(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """Says half a sentence and ends the body as if that was all."""
        await self._begin(script, writer, asked)
        await self._end(writer)

    async def fail_later(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """Says half a sentence, and then that it has failed, repeating the prompt."""
        await self._begin(script, writer, asked)
        error = json.dumps({"error": {"type": "overloaded_error", "message": json.dumps(asked.body)}})
        if asked.path.endswith("/api/chat"):
            await self._say(writer, error.replace('{"type": "overloaded_error", "message": ', "")[:-1] + "\n")
        else:
            await self._say(writer, f'event: error\ndata: {{"type": "error", {error[1:]}\n\n')
        await self._end(writer)

    async def fail_endless(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """A line without an end (100 MB are enough)."""
        await self._head(writer, _kind(asked.path))
        await self._say(writer, "data: ")
        for _ in range(1600):
            await self._say(writer, "a" * 65_536)

    async def fail_babble(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """Talks and talks."""
        await self._begin(script, writer, asked)
        words = Script(text=" ".join(["again"] * 100), after=0)
        while True:
            async for part in self._protocol(asked.path)(words, asked.body):
                if "again" in part:
                    await self._say(writer, part)

    async def fail_zip(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """Compressed, though we did not ask for it."""
        await self._head(writer, _kind(asked.path), {"Content-Encoding": "gzip"})
        await self._end(writer)

    # the server

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        number = self.connections
        try:
            while (asked := await _read(reader, number)) is not None:
                self.asked.append(asked)
                doing = asyncio.ensure_future(self._handle(writer, asked))
                gone = asyncio.ensure_future(reader.read(1))  # no client of ours sends two requests at once
                try:
                    await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
                    if not doing.done():
                        self.left.set()
                        return
                    await doing
                finally:
                    for each in (doing, gone):
                        each.cancel()
                    await asyncio.gather(doing, gone, return_exceptions=True)
        except OSError:  # found while writing
            self.left.set()
        except (Stop, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()
            with suppress(OSError, asyncio.CancelledError, ssl.SSLError):
                await writer.wait_closed()

    async def _handle(self, writer: asyncio.StreamWriter, asked: Asked) -> None:
        if asked.method == "GET":
            if asked.path.endswith("/api/tags"):
                await self._whole(writer, "200 OK", {"models": [{"model": each} for each in self.models]})
            else:
                made = {"object": "model", "type": "model", "created": 0, "owned_by": "us"}
                made |= {"display_name": "", "created_at": "2026-01-01T00:00:00Z"}
                listed = [{"id": each, **made} for each in self.models]
                await self._whole(writer, "200 OK", {"object": "list", "data": listed, "has_more": False})
            return
        script = self.scripts.get(asked.body.get("model", ""), self.script)
        if script.fail and script.times > 0:
            script.times -= 1
            await getattr(self, f"fail_{script.fail}")(script, writer, asked)
        else:
            await self._answer(script, writer, asked)

    async def _answer(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        await self._head(writer, _kind(asked.path))
        async for part in self._protocol(asked.path)(script, asked.body):
            await self._say(writer, part)
        await self._end(writer)

    async def _begin(self, script: Script, writer: asyncio.StreamWriter, asked: Asked) -> None:
        """Say the first words of an answer."""
        await self._head(writer, _kind(asked.path))
        said = 0
        parts = self._protocol(asked.path)(script, asked.body)
        async for part in parts:
            await self._say(writer, part)
            said += ('"content": "' in part and '"content": ""' not in part) or "text_delta" in part
            if said == script.after:
                break
        await parts.aclose()
        self.said.set()

    def _protocol(self, path: str) -> Callable[[Script, dict[str, Any]], AsyncGenerator[str, None]]:
        if path.endswith("/messages"):
            return self.anthropic
        return self.ollama if path.endswith("/api/chat") else self.openai

    async def _words(self, script: Script, body: dict[str, Any]) -> AsyncGenerator[str, None]:
        text = script.text if isinstance(script.text, str) else script.text(body)
        for index, word in enumerate(text.split(" ")):
            if index == script.after and script.hold is not None:
                self.said.set()
                await script.hold.wait()
            if script.delay:
                await asyncio.sleep(script.delay)
            yield f" {word}" if index else word

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        made = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
        return f"data: {json.dumps(made)}\n\n"

    def _event(self, kind: str, rest: str = "") -> str:
        return f'event: {kind}\ndata: {{"type": "{kind}"{", " if rest else ""}{rest}}}\n\n'

    def _line(self, made: dict[str, Any]) -> str:
        return json.dumps({"model": "m", "created_at": "2026-01-01T00:00:00Z", **made}) + "\n"

    async def _whole(
        self, writer: asyncio.StreamWriter, status: str, body: dict[str, Any], more: dict[str, str] | None = None
    ) -> None:
        text = json.dumps(body)
        heads = {"Content-Type": "application/json", "Content-Length": str(len(text)), **(more or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in heads.items())
        writer.write(f"HTTP/1.1 {status}\r\n{head}\r\n{text}".encode())
        await writer.drain()

    async def _head(self, writer: asyncio.StreamWriter, kind: str, more: dict[str, str] | None = None) -> None:
        heads = {"Content-Type": kind, "Transfer-Encoding": "chunked", **(more or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in heads.items())
        writer.write(f"HTTP/1.1 200 OK\r\n{head}\r\n".encode())

    async def _say(self, writer: asyncio.StreamWriter, text: str) -> None:
        data = text.encode()
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await writer.drain()

    async def _end(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def _kind(path: str) -> str:
    return "application/x-ndjson" if path.endswith("/api/chat") else "text/event-stream; charset=utf-8"


async def _read(reader: asyncio.StreamReader, connection: int) -> Asked | None:
    """The next request, or None at the end of the connection."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.rstrip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    method, path, _ = first.split(" ")
    return Asked(method, path.partition("?")[0], headers, json.loads(body or b"{}"), connection)


NewProvider = Callable[..., Awaitable[Provider]]


@pytest.fixture
async def providers() -> AsyncIterator[NewProvider]:
    """`await providers()` starts a `Provider` (see there); keyword arguments make its `Script`."""
    running: list[Provider] = []

    async def start(*, tls: ssl.SSLContext | None = None, **script: Any) -> Provider:
        provider = await Provider().start(tls)
        provider.script = Script(**script)
        running.append(provider)
        return provider

    yield start
    for provider in running:
        await provider.stop()


# ---- end of the section --------------------------------------------------------------------------------------------
