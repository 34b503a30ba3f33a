"""What the node counts of its requests to language models, by provider and model."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from agentvoicebox.plugins.chat.tokens import Tokens

BOUNDS: Final = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets of durations, in seconds (MET-18)."""
MOST_MODELS: Final = 256
"""Models told apart; tenants name them, so all above count as one called "other"."""


@dataclass(slots=True)
class Durations:
    """A histogram: `buckets` count what took at most each of `BOUNDS`, and the last one what took longer."""

    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.buckets)

    def add(self, seconds: float) -> None:
        """One took so long."""
        self.buckets[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds


@dataclass(slots=True)
class ChatMetrics:
    """One provider's model: requests (each attempt is one), failures by code, tokens, and seconds to first and last."""

    provider: str
    model: str
    requests: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    input_tokens: int = 0
    output_tokens: int = 0
    first: Durations = field(default_factory=Durations)
    whole: Durations = field(default_factory=Durations)

    def used(self, tokens: Tokens) -> None:
        """An attempt cost so much."""
        self.input_tokens += tokens.input
        self.output_tokens += tokens.output


class Metrics:
    """All that were asked."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], ChatMetrics] = {}

    def of(self, provider: str, model: str) -> ChatMetrics:
        """Where to count for a provider's model."""
        if (provider, model) not in self._known and len(self._known) >= MOST_MODELS:
            model = "other"
        return self._known.setdefault((provider, model), ChatMetrics(provider, model))

    def all(self) -> list[ChatMetrics]:
        """Everything counted since the start."""
        return list(self._known.values())
