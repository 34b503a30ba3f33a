"""Which addresses a tenant's own URL may lead to: public ones, so that nobody asks our own machines through us."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

NAT64 = IPv6Network("64:ff9b::/96")


def public(address: str) -> bool:
    """Whether `address` is a host's in the public internet, also where it wraps another address."""
    try:
        parsed = ip_address(address)
    except ValueError:  # with a zone ("fe80::1%eth0"), or no address at all
        return False
    return all(each.is_global and not _special(each) for each in _meant(parsed))


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of `host`, in the order in which the system would try them. Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))


def _special(address: IPv4Address | IPv6Address) -> bool:
    old = isinstance(address, IPv6Address) and address.is_site_local
    return address.is_multicast or address.is_reserved or old


def _meant(address: IPv4Address | IPv6Address) -> list[IPv4Address | IPv6Address]:
    """The address itself, or those that an IPv6 address stands for."""
    if isinstance(address, IPv4Address):
        return [address]
    if address.ipv4_mapped:
        return [address.ipv4_mapped]
    if address in NAT64:  # reserved by its form, public by its meaning
        return [IPv4Address(int(address) & 0xFFFF_FFFF)]
    inner = [address.sixtofour, *(address.teredo or ())]
    return [address, *(each for each in inner if each)]
