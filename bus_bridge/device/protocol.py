"""What a device may say, and when. Pure: takes frames, and returns what they mean."""

from __future__ import annotations

from dataclasses import dataclass

from agentvoicebox.bus_bridge.models import BYTES_PER_SECOND
from agentvoicebox.plugins.device import wire

MOST_REQUESTS = 8
"""Requests of one socket that are worked on at once."""

MOST_LISTENING = 3
"""Requests to listen among them: each keeps what it has heard until it is answered."""

LONGEST_AUDIO = 60.0
"""Seconds of audio of one request, however fast they come."""

MOST_GARBLED = 20
"""Frames without sense on one socket, before it is closed."""

POLICY = 1008
"""The close code of RFC 6455 for whoever does not keep to the protocol."""

_DEAF = -1
_FULL = -2

_REQUESTS = (wire.Listen, wire.Speak, wire.Ask, wire.About, wire.Choose, wire.Report)

Request = wire.Listen | wire.Speak | wire.Ask | wire.About | wire.Choose | wire.Report


@dataclass(frozen=True, slots=True)
class Audio:
    """A piece of what a request is to hear."""

    id: int
    pcm: bytes


@dataclass(frozen=True, slots=True)
class Over:
    """The connection is to be closed."""

    code: int
    reason: str


Meaning = wire.Hello | Request | Audio | wire.Finish | wire.Cancel | wire.Problem | Over
"""What follows from a frame. A `Problem` is to be told to the device, everything else to be done."""


class Protocol:
    """The state of one socket: whether the device has said who it is, and which of its requests are open.

    What comes for a request that is over is passed over: it was on its way when that ended.
    """

    __slots__ = ("_garbled", "_greeted", "_highest", "_open")

    def __init__(self) -> None:
        self._greeted = False
        self._garbled = 0
        self._highest = 0
        self._open: dict[int, int] = {}
        """Open requests, and how many bytes of audio each may still send; `_DEAF` for those that hear nothing, `_FULL`
        for those that have heard all."""

    def receive(self, frame: str | bytes) -> list[Meaning]:
        """What a frame means, in order."""
        try:
            if len(frame) > wire.LARGEST_FRAME:
                raise wire.Garbled(f"a frame has at most {wire.LARGEST_FRAME} bytes")
            if isinstance(frame, bytes):
                return self._heard(*wire.split(frame))
            said = wire.decode(frame, wire.FROM_DEVICE)
            if "\\u" in frame:  # half a character, which no text that goes out can hold
                wire.encode(said).encode()
            return self._said(said)
        except wire.Garbled as error:
            return self._not_understood(str(error))
        except UnicodeEncodeError:
            return self._not_understood("half of a surrogate pair is no text")

    def answered(self, number: int) -> None:
        """The request is over."""
        self._open.pop(number, None)

    def _said(self, said: wire.Said) -> list[Meaning]:
        if not self._greeted:
            if not isinstance(said, wire.Hello):
                return [wire.Problem(0, "hello_expected", "Say hello first."), Over(POLICY, "hello_expected")]
            self._greeted = True
            return [said]
        match said:
            case wire.Hello():
                raise wire.Garbled("hello has been said")
            case wire.Finish(number) | wire.Cancel(number):
                return self._ended(said, number)
            case _:
                assert isinstance(said, _REQUESTS)
                return self._asked(said)

    def _asked(self, asked: Request) -> list[Meaning]:
        if asked.id == 0 or asked.id in self._open:
            raise wire.Garbled("the number of a request is 1 or greater, and of no other open one")
        self._highest = max(self._highest, asked.id)
        listens = isinstance(asked, wire.Listen)
        listening = sum(left != _DEAF for left in self._open.values())
        if len(self._open) >= MOST_REQUESTS or (listens and listening >= MOST_LISTENING):
            message = (
                f"{MOST_REQUESTS} requests are worked on at once, {MOST_LISTENING} of them to listen; ask again when "
                "one is answered."
            )
            return [wire.Problem(asked.id, "too_many_requests", message)]
        self._open[asked.id] = int(LONGEST_AUDIO * BYTES_PER_SECOND) if listens else _DEAF
        return [asked]

    def _ended(self, said: wire.Finish | wire.Cancel, number: int) -> list[Meaning]:
        if number not in self._open:
            return self._late(number)
        if isinstance(said, wire.Cancel):
            del self._open[number]
        elif self._open[number] != _DEAF:
            self._open[number] = _FULL
        return [said]

    def _heard(self, number: int, pcm: bytes) -> list[Meaning]:
        if not self._greeted:
            return [wire.Problem(0, "hello_expected", "Say hello first."), Over(POLICY, "hello_expected")]
        left = self._open.get(number)
        if left is None:
            return self._late(number)
        if left < 0:
            raise wire.Garbled("audio is for a request to listen that is not finished")
        if len(pcm) <= left:
            self._open[number] = left - len(pcm)
            return [Audio(number, pcm)] if pcm else []
        del self._open[number]
        message = f"One request hears at most {LONGEST_AUDIO:.0f} s of audio."
        return [wire.Cancel(number), wire.Problem(number, "audio_too_long", message)]

    def _late(self, number: int) -> list[Meaning]:
        if not 0 < number <= self._highest:
            raise wire.Garbled("there was no such request")
        return []

    def _not_understood(self, why: str) -> list[Meaning]:
        self._garbled += 1
        problem = wire.Problem(0, "garbled", f"A frame was not understood: {why}.")
        return [problem] if self._garbled <= MOST_GARBLED else [problem, Over(POLICY, "garbled")]
