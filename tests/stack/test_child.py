"""What the processes of a cell write besides the stock logs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from agentvoicebox.bus_bridge.child import Bounded, replace


def test_a_log_of_errors_does_not_grow_without_end(tmp_path: Path) -> None:
    stream = Bounded(tmp_path / "core.errors")
    for number in range(50):
        print(f"{number} " + "x" * 100_000, file=stream)
    stream.close()
    files = sorted(tmp_path.iterdir())
    assert sum(file.stat().st_size for file in files) < 2_500_000
    assert files[0].read_text().splitlines()[-1].startswith("49 ")


def test_a_full_disk_is_survived() -> None:
    with Bounded(Path("/dev/full")) as stream:
        assert stream.write("lost") == 4


def test_an_unknown_version_of_ovos_stops() -> None:
    """A patch of something that is no longer there would change nothing, and nobody would notice."""
    stock = SimpleNamespace(known=1)
    replace(stock, "known", 2)
    assert stock.known == 2
    with pytest.raises(RuntimeError, match="constraints"):
        replace(stock, "unknown", 2)
