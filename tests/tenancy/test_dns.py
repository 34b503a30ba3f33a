"""Questions to a name server, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.tenancy import dns as module
from agentvoicebox.tenancy.dns import Dns

RECORDS = {
    "_agentvoicebox.one.example.": ['"a-token"', '"something else"'],
    "_agentvoicebox.long.example.": ['"' + "x" * 200 + '" "' + "y" * 100 + '"'],
    "_agentvoicebox.mail.example.": [],
}


class Server(asyncio.DatagramProtocol):
    """Knows `RECORDS`, refuses names that begin with an r, and says nothing to those that begin with an s."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        [question] = query.question
        name = question.name.to_text()
        if name.startswith("s"):
            return
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.RA
        if name.startswith("r"):
            answer.set_rcode(dns.rcode.REFUSED)
        elif name not in RECORDS:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        elif RECORDS[name]:
            answer.answer.append(dns.rrset.from_text(name, 60, "IN", "TXT", *RECORDS[name]))
        self._transport.sendto(answer.to_wire(), address)  # type: ignore[attr-defined]


@pytest.fixture
async def resolver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Dns]:
    monkeypatch.setattr(module, "PATIENCE", 30.0)  # the server here is as slow as the machine
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Server, local_addr=("127.0.0.1", 0))
    yield Dns(["127.0.0.1"], transport.get_extra_info("sockname")[1])
    transport.close()


async def test_the_texts_at_a_name(resolver: Dns) -> None:
    assert sorted(await resolver.txt("_agentvoicebox.one.example")) == ["a-token", "something else"]
    assert await resolver.txt("_agentvoicebox.long.example") == ["x" * 200 + "y" * 100], "pieces are one text"


async def test_no_such_name_and_no_such_record_are_no_texts(resolver: Dns) -> None:
    assert await resolver.txt("_agentvoicebox.nobody.example") == []
    assert await resolver.txt("_agentvoicebox.mail.example") == []


@pytest.mark.parametrize("name", ["refused.example", "silent.example", "a" * 64 + ".example"])
async def test_a_server_that_does_not_answer_is_unavailable(
    resolver: Dns, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    with pytest.raises(Unavailable):
        await resolver.txt(name)
