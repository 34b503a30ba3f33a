"""Asks DNS whether a host name is a tenant's."""

from __future__ import annotations

from collections.abc import Sequence

import dns.asyncresolver
import dns.exception
import dns.resolver

from agentvoicebox.config.errors import Unavailable

PATIENCE = 5.0
"""Seconds for an answer, all servers and tries together."""


class Dns:
    """The name servers of this machine, or those that are given; nothing is remembered between questions."""

    def __init__(self, servers: Sequence[str] | None = None, port: int = 53) -> None:
        self._servers = servers
        self._port = port

    async def txt(self, name: str) -> Sequence[str]:
        """The texts at `name`, none where there is no such name. Raises `Unavailable` when DNS does not answer."""
        try:
            resolver = dns.asyncresolver.Resolver(configure=self._servers is None)
            if self._servers is not None:
                resolver.nameservers = list(self._servers)
            resolver.port = self._port
            answer = await resolver.resolve(name, "TXT", lifetime=PATIENCE, search=False)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            return []
        except dns.exception.DNSException as error:
            raise Unavailable(
                "DNS does not answer; try again, or ask the operator about this machine's name servers."
            ) from error
        return [b"".join(record.strings).decode("utf-8", "replace") for record in answer]
