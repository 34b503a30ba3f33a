"""The chat door of a node, over asking the provider directly: what it adds to a streamed answer, in time and in CPU.

The provider is a server in a process of its own that streams 20 pieces, a few milliseconds apart, in OpenAI's protocol.
The same client of the unmodified `openai` package asks it directly, and through the node: a process of its own, with
uvloop as in `avb up`, that checks a tenant's key, resolves persona, models and keys on a real PostgreSQL, and has the
call and its tokens in the ledger before it tells the end. The two ways alternate in small blocks, one question at a
time. The added time is the difference of the 95th percentiles. The added CPU is that of the node's process, less what
it takes when nobody asks, minus that of this process for as many questions asked directly, which is what a program
would have spent anyway: the median over the blocks. PostgreSQL and the provider are not in it. Other work on the
machine shows in all of it, in the 95th percentiles most: see `load_average`.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
import uvloop
from openai import AsyncOpenAI

sys.path.insert(0, str(Path(__file__).parents[1]))

from parts.reports import percentile, report, store, tell

from agentvoicebox.admin_api.http import BoundedProtocol
from agentvoicebox.admin_api.node import Node
from agentvoicebox.bus_bridge.answers import Answers
from agentvoicebox.bus_bridge.chat import ChatDoor
from agentvoicebox.bus_bridge.door import Door
from agentvoicebox.config import settings
from agentvoicebox.plugins.chat import Chats
from agentvoicebox.plugins.chat.solvers import Solvers
from agentvoicebox.tenancy import keys, personas, roles, tenants
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keyring import Keyring
from agentvoicebox.tenancy.limits import Limiter
from agentvoicebox.tenancy.masterkeys import FileKeys
from agentvoicebox.tenancy.metering import Ledger
from agentvoicebox.tenancy.personas import Character

PIECES = 20
PAUSE = 0.002
"""Seconds between two of them."""
BLOCKS = 40
QUESTIONS = 10
"""Of a block, each way."""
WARM_UP = 50
IDLE = 3.0
QUESTION = [{"role": "user", "content": "Tell me something about quasars, please."}]

_EVENT = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":'
    b'%s,"finish_reason":%s}]}\n\n'
)
_END = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[],"usage":'
    b'{"prompt_tokens":60,"completion_tokens":20,"total_tokens":80}}\n\ndata: [DONE]\n\n'
)


async def measure() -> None:
    """Added latency and CPU of a streamed answer."""
    async with store() as (address, database), _process("provider", {}) as provider:
        tenant = await tenants.create(database, "bench", "Bench", "enterprise")
        persona = await personas.create(
            database, tenant.id, Character(name="Ada", system_prompt="You know the stars.", knowledge="fact. " * 200)
        )
        await personas.make_default(database, tenant.id, persona.id)
        issued = await keys.issue(database, tenant.id, "bench", rate_class="unlimited")
        url = f"http://127.0.0.1:{provider.port}/v1"
        given = {"url": url, "store": {role: address(role) for role in roles.ALL}}
        async with (
            _process("node", given) as node,
            AsyncOpenAI(api_key="none", base_url=url) as direct,
            AsyncOpenAI(api_key=issued.key, base_url=f"http://127.0.0.1:{node.port}/v1") as through,
        ):
            await _ask_often(direct, WARM_UP)
            await _ask_often(through, WARM_UP)
            await _compare(node, direct, through)


async def _compare(node: _Child, direct: AsyncOpenAI, through: AsyncOpenAI) -> None:
    before = await node.cpu()
    await asyncio.sleep(IDLE)
    idle = (await node.cpu() - before) / IDLE
    tell(f"chat: asking {BLOCKS * QUESTIONS} times each way")
    directly: list[float] = []
    by_node: list[float] = []
    theirs, ours = [], []
    for _ in range(BLOCKS):
        before = time.process_time()
        directly += await _ask_often(direct, QUESTIONS)
        theirs.append((time.process_time() - before) / QUESTIONS * 1000)
        before, begin = await node.cpu(), time.monotonic()
        by_node += await _ask_often(through, QUESTIONS)
        spent = await node.cpu() - before - idle * (time.monotonic() - begin)
        ours.append(spent / QUESTIONS * 1000)
    load = round(os.getloadavg()[0], 1)
    details = {}
    for name, times in (("direct", directly), ("node", by_node)):
        details[f"{name}_p50_ms"] = round(statistics.median(times), 2)
        details[f"{name}_p95_ms"] = round(percentile(times, 0.95), 2)
    report(
        "speech.chat_overhead_p95",
        percentile(by_node, 0.95) - percentile(directly, 0.95),
        "ms",
        5.0,
        "the provider asked directly",
        questions=len(by_node),
        pieces=PIECES,
        added_p50_ms=round(statistics.median(by_node) - statistics.median(directly), 2),
        load_average=load,
        **details,
    )
    report(
        "speech.chat_overhead_cpu",
        statistics.median(node - sdk for node, sdk in zip(ours, theirs, strict=True)),
        "ms",
        1.0,
        "the same SDK asking directly",
        node_ms=round(statistics.median(ours), 3),
        direct_sdk_ms=round(statistics.median(theirs), 3),
        node_idle_ms_per_second=round(idle * 1000, 2),
        questions=len(by_node),
        load_average=load,
    )


async def _ask_often(client: AsyncOpenAI, count: int) -> list[float]:
    return [await _ask(client) for _ in range(count)]


async def _ask(client: AsyncOpenAI) -> float:
    """Milliseconds from question to the end of the answer."""
    begin = time.perf_counter()
    pieces = 0
    async for chunk in await client.chat.completions.create(model="default", messages=QUESTION, stream=True):
        pieces += bool(chunk.choices and chunk.choices[0].delta.content)
    took = (time.perf_counter() - begin) * 1000
    assert pieces == PIECES, "an answer was not whole"
    return took


class _Child:
    """A process that tells its port, then its CPU whenever it is sent a line, and ends with its standard input."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._given, self._told = process.stdin, process.stdout
        self.port = 0

    async def begin(self, given: dict[str, object]) -> None:
        self._given.write(json.dumps(given).encode() + b"\n")
        self.port = int(await self._told.readline())

    async def cpu(self) -> float:
        """Seconds of CPU so far."""
        self._given.write(b"\n")
        return float(await self._told.readline())

    async def end(self) -> None:
        self._given.close()
        await self._process.wait()


@asynccontextmanager
async def _process(part: str, given: dict[str, object]) -> AsyncIterator[_Child]:
    pipe = asyncio.subprocess.PIPE
    child = _Child(await asyncio.create_subprocess_exec(sys.executable, __file__, part, stdin=pipe, stdout=pipe))
    try:
        await child.begin(given)
        yield child
    finally:
        await child.end()


async def _live(port: int) -> None:
    """In a child: tell the port, then the CPU for every line, until there are no more."""
    print(port, flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(time.process_time(), flush=True)


# --- the provider -----------------------------------------------------------------------------------------------------


async def _provide() -> None:
    server = await asyncio.start_server(_answer_all, "127.0.0.1", 0)
    await _live(server.sockets[0].getsockname()[1])
    server.close()


async def _answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0]))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            begin = loop.time()
            for number in range(PIECES):
                # At fixed times: a model is not slower because its reader shares our processors.
                await asyncio.sleep(begin + (number + 1) * PAUSE - loop.time())
                writer.write(_chunk(_EVENT % (b'{"content":"word %d "}' % number, b"null")))
            writer.write(_chunk(_EVENT % (b"{}", b'"stop"') + _END) + b"0\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


# --- the node ---------------------------------------------------------------------------------------------------------


async def _serve(url: str, addresses: dict[str, str], directory: Path) -> None:
    """A node that does nothing but answer, until standard input ends."""
    database = Database(addresses.__getitem__)
    feed = Feed(database)
    await feed.start()
    keyring, limiter, ledger = Keyring(database, feed), Limiter(), Ledger(database)
    await keyring.start()
    chats, solvers = Chats(), Solvers()
    chosen = settings.load({"data": directory, "openai_key": "sk-bench", "openai_url": url}, environ={"HOME": "/"})
    answers = Answers(database, FileKeys(directory / "master.keys"), chats, solvers, ledger, chosen)
    chat = ChatDoor(Door(chosen, keyring, limiter), answers, ledger)
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(
        Node(None, None, chat),
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve([listening]))
    await _live(listening.getsockname()[1])
    server.should_exit = True
    await serving
    listening.close()
    await chats.close()
    solvers.close()
    await ledger.close()
    await keyring.close()
    await feed.close()
    await database.close()


def _main() -> None:
    import tempfile

    given = json.loads(sys.stdin.readline())
    if sys.argv[1] == "provider":
        uvloop.run(_provide())
        return
    with tempfile.TemporaryDirectory(prefix="avb-bench-") as name:
        uvloop.run(_serve(given["url"], given["store"], Path(name)))


if __name__ == "__main__":
    _main()
