"""The devices that are connected to a node: their sockets, and how they are told what their tenant has changed."""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import dataclass, field
from functools import partial

from agentvoicebox.bus_bridge.connection import Receive
from agentvoicebox.bus_bridge.device import house
from agentvoicebox.bus_bridge.device.house import House, Manner
from agentvoicebox.bus_bridge.device.requests import Desk, Station
from agentvoicebox.bus_bridge.device.socket import Socket, Spawn
from agentvoicebox.bus_bridge.device.talks import Talks
from agentvoicebox.bus_bridge.outbox import Outbox
from agentvoicebox.bus_bridge.talk import Talk
from agentvoicebox.config.errors import AvbError, NotFound
from agentvoicebox.config.tasks import begin, end
from agentvoicebox.tenancy import devices, personas
from agentvoicebox.tenancy.changes import Change
from agentvoicebox.tenancy.keyring import Grant
from agentvoicebox.tenancy.models import ChangeKind, Persona

log = logging.getLogger(__name__)

MOST_SOCKETS = 8
"""Of one device: each of its processes has one, and those of a network that broke are noticed late.

How many devices a tenant has is limited by its keys.
"""

REPLACED = 4009
"""The close code for a socket whose place a newer one of the same device took."""

AT_ONCE = 4
"""Readings from the store at once, however many devices come and tenants change something: requests find it too."""

AGAIN = 1.0
"""Seconds after which choices are read again that could not be; twice as many each time, ..."""
LATEST = 30.0
"""... and never more than these."""

SWEEP = 60.0
"""Seconds between looks at conversations that are over."""

_BATCH = 100
"""Devices that are told before others have their turn."""

_MOST_MANNERS = 1_000


@dataclass(slots=True, eq=False)
class _Place:
    """A device that is connected here."""

    station: Station
    sockets: list[Socket] = field(default_factory=list)


_Wanted = tuple[uuid.UUID | None, uuid.UUID | str | None]
"""Whose default persona, and who is to answer instead."""


@dataclass(slots=True, eq=False)
class _Home:
    """A tenant that has devices connected here."""

    tenant_id: uuid.UUID
    places: dict[uuid.UUID, _Place] = field(default_factory=dict)
    arriving: int = 0
    """Devices that are about to be connected."""
    house: House | None = None
    changes: int = 0
    """How often we have been told that something is different ..."""
    read: int = -1
    """... and how often when `house` was read."""
    manners: dict[_Wanted, Manner] = field(default_factory=dict)
    """What has been composed of it."""
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Whoever wants to know what the tenant has chosen waits for who asks already."""
    task: asyncio.Task[None] | None = None
    """Reads it anew, and tells the devices."""


class Devices:
    """All devices of one node. `desk` is what it serves them with."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._homes: dict[uuid.UUID, _Home] = {}
        self._talks = Talks()
        self._few = asyncio.Semaphore(AT_ONCE)
        self._sweeping: asyncio.TimerHandle | None = None
        self._closed = False

    def __len__(self) -> int:
        """How many are connected."""
        return sum(len(home.places) for home in self._homes.values())

    def socket(self, grant: Grant, receive: Receive, outbox: Outbox, spawn: Spawn) -> Socket:
        """Serves a socket that has been accepted, once it is run."""
        return Socket(self, grant, receive, outbox, spawn)

    async def close(self) -> None:
        """Tell nobody anything any more."""
        self._closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
        tasks = [home.task for home in self._homes.values() if home.task is not None]
        await end(*tasks)

    # --- who comes and goes -------------------------------------------------------------------------------------------

    async def arrive(self, socket: Socket, name: str, version: str) -> Manner:
        """Take the socket in; returns how its device is to be. Raises `AvbError`."""
        grant = socket.grant
        async with self._few:
            device = await devices.arrive(
                self.desk.database, grant.tenant_id, grant.key_id, grant.project_id, name, version
            )
        home = self._homes.get(grant.tenant_id)
        if home is None:
            home = self._homes[grant.tenant_id] = _Home(grant.tenant_id)
        home.arriving += 1
        try:
            while True:
                changes = await self._read(home)
                place = home.places.get(device.id)
                talk = place.station.talk if place is not None else self._talk(grant, device.id)
                manner = await self._manner(home, grant.project_id, talk.persona)
                if home.changes == changes:  # who is not in yet is not told of what changes meanwhile
                    break
            place = home.places.get(device.id)
            if place is None:
                place = home.places[device.id] = _Place(
                    Station(grant.tenant_id, device.id, grant.project_id, talk, manner)
                )
                talk.on_switch = partial(self._switched, home, place)
            elif place.station.project_id != grant.project_id:  # the key has been moved; the other sockets know soon
                place.station.project_id = talk.project_id = grant.project_id
                self._configure(place, manner)
            self._make_room(place, socket)
            place.sockets.append(socket)
            socket.station = place.station
            return place.station.manner
        finally:
            home.arriving -= 1
            self._let_go(home)

    def leave(self, socket: Socket) -> None:
        """The socket is closed; it may never have come in."""
        station = socket.station
        if station is None or (home := self._homes.get(station.tenant_id)) is None:
            return
        place = home.places.get(station.device_id)
        if place is not None and socket in place.sockets:
            place.sockets.remove(socket)
            if not place.sockets:
                del home.places[station.device_id]
        self._let_go(home)

    def keep(self, station: Station) -> None:
        """Something is asked in the device's conversation."""
        now = asyncio.get_running_loop().time()
        self._talks.keep(station.tenant_id, station.device_id, station.talk, now)
        self._sweep_later()

    def _talk(self, grant: Grant, device_id: uuid.UUID) -> Talk:
        now = asyncio.get_running_loop().time()
        self._sweep_later()
        return self._talks.of(grant.tenant_id, device_id, grant.project_id, now)

    def _sweep_later(self) -> None:
        if self._sweeping is None and not self._closed:
            self._sweeping = asyncio.get_running_loop().call_later(SWEEP, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = None
        self._talks.forget(asyncio.get_running_loop().time())
        if len(self._talks):
            self._sweep_later()

    def _make_room(self, place: _Place, socket: Socket) -> None:
        """See to it that the device has room for one more socket: the newest is the one that works."""
        if len(place.sockets) < MOST_SOCKETS:
            return
        oldest = next((each for each in place.sockets if each.process == socket.process), place.sockets[0])
        place.sockets.remove(oldest)
        oldest.close(REPLACED, "replaced")
        log.warning(
            "device %s has more than %d sockets; the oldest is closed: is its key on several devices?",
            place.station.device_id,
            MOST_SOCKETS,
        )

    def _let_go(self, home: _Home) -> None:
        if not home.places and not home.arriving and self._homes.get(home.tenant_id) is home:
            del self._homes[home.tenant_id]
            if home.task is not None:
                home.task.cancel()

    # --- what changes -------------------------------------------------------------------------------------------------

    def heed(self, change: Change) -> None:
        """A line of the log of changes: if it is about what a tenant has chosen, its devices are told soon."""
        if change.kind is ChangeKind.VOICE:
            self.desk.answers.forget(change.tenant_id)
        if change.kind in (ChangeKind.VOICE, ChangeKind.TENANT):
            self._renew(change.tenant_id)

    def heed_all(self) -> None:
        """Anything may have changed."""
        for tenant_id in list(self._homes):
            self._renew(tenant_id)

    def _renew(self, tenant_id: uuid.UUID) -> None:
        home = self._homes.get(tenant_id)
        if home is None or self._closed:
            return
        home.changes += 1
        if home.task is None or home.task.done():
            home.task = begin(self._tell(home), "devices")

    async def _tell(self, home: _Home) -> None:
        """Read what the tenant has chosen, until nothing has changed meanwhile, and tell its devices."""
        wait = AGAIN
        while True:
            try:
                changes = await self._read(home)
                await self._tell_devices(home, changes)
            except NotFound:
                return  # its devices go with it
            except Exception as error:  # only its name: a message may hold what was read
                reason = error.code if isinstance(error, AvbError) else type(error).__name__
                log.warning("devices are told later what has changed: %s", reason)
                await asyncio.sleep(wait)
                wait = min(2 * wait, LATEST)
                continue
            if home.changes == changes:
                return

    async def _read(self, home: _Home) -> int:
        """See to it that the house is as new as what we have been told; returns after how many changes that was."""
        async with home.reading:
            while home.read != home.changes:
                async with self._few:
                    changes = home.changes
                    found = await house.read(self.desk.database, home.tenant_id)
                home.house, home.read = found, changes
                home.manners.clear()
            return home.read

    async def _manner(self, home: _Home, project_id: uuid.UUID | None, wanted: uuid.UUID | str | None) -> Manner:
        """How a device of that project is to be while it wants that persona."""
        assert home.house is not None
        async with home.reading:
            if (known := home.manners.get((project_id, wanted))) is not None:
                return known
            async with self._few:
                persona = await personas.resolve(self.desk.database, home.tenant_id, project_id, wanted)
            if len(home.manners) >= _MOST_MANNERS:
                home.manners.clear()
            made = home.manners[project_id, wanted] = house.compose(home.house, persona, self.desk.engines)
            return made

    async def _tell_devices(self, home: _Home, changes: int) -> None:
        for number, place in enumerate(list(home.places.values()), 1):
            station = place.station
            while True:
                wanted = station.talk.persona
                manner = await self._manner(home, station.project_id, wanted)
                if home.changes != changes:
                    return  # it is read again
                if wanted == station.talk.persona:
                    break
            self._configure(place, manner)
            if number % _BATCH == 0:
                await asyncio.sleep(0)

    def _switched(self, home: _Home, place: _Place, persona: Persona | None) -> None:
        """Somebody else answers on the device now."""
        assert home.house is not None  # what has been read before the device came in, and perhaps again since
        self._configure(place, house.compose(home.house, persona, self.desk.engines))

    @staticmethod
    def _configure(place: _Place, manner: Manner) -> None:
        place.station.manner = manner
        for socket in place.sockets:
            socket.configure(manner.etag, manner.frame)
