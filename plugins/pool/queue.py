"""Who is next at an engine: tenants take turns, however much each of them asks for. It knows no clock and waits for
nothing."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Generic, TypeVar

Job = TypeVar("Job")


class Turns(Generic[Job]):
    """Jobs by tenant: the next one is of the tenant whose last turn was longest ago, its oldest job first.

    So one tenant's hundred jobs delay another's first by none but those that are at work already, and who asks often
    for little has no advantage over who asks seldom for much.
    """

    def __init__(self) -> None:
        self._new: OrderedDict[str, deque[Job]] = OrderedDict()
        # Those who had their turn, the one whose turn was longest ago first; also who asks for nothing at present,
        # until the row comes to it: after that it is as good as new.
        self._row: OrderedDict[str, deque[Job]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Job]:
        """All jobs, in no order that matters."""
        for line in (*self._new.values(), *self._row.values()):
            yield from line

    def add(self, tenant: str, job: Job) -> None:
        """The job goes behind the tenant's others."""
        line = self._row.get(tenant)
        if line is None:
            line = self._new.setdefault(tenant, deque())
        line.append(job)
        self._count += 1

    def drop(self, tenant: str, job: Job) -> None:
        """Nobody wants it any more; nothing happens when it has left already."""
        line = self._row.get(tenant) or self._new.get(tenant)
        with suppress(ValueError):
            if line is not None:
                line.remove(job)
                self._count -= 1

    def next(self) -> Job | None:
        """Take the job whose turn it is; None when there is none."""
        while self._new or self._row:
            tenant, line = (self._new or self._row).popitem(last=False)
            if line:
                self._row[tenant] = line
                self._count -= 1
                job = line.popleft()
                if not self._count:
                    # Nobody waits: that this one had the last turn is all that need be known of the past.
                    self._new.clear()
                    self._row = OrderedDict({tenant: line})
                return job
        return None


class Queue(Generic[Job]):
    """What waits for one engine: `certain` jobs, and `tentative` ones, whose turn comes when nothing else waits."""

    def __init__(self) -> None:
        self.certain: Turns[Job] = Turns()
        self.tentative: Turns[Job] = Turns()

    def __len__(self) -> int:
        return len(self.certain) + len(self.tentative)

    def take(self, most: int) -> list[Job]:
        """Up to `most` jobs that are done at once, across tenants; tentative ones only among themselves."""
        turns = self.certain or self.tentative
        return [job for _ in range(most) if (job := turns.next()) is not None]
