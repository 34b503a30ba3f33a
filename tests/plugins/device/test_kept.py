"""What the tenant has chosen, on the device's disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentvoicebox.plugins.device import kept
from agentvoicebox.plugins.device.choices import Choices
from agentvoicebox.plugins.device.kept import Kept

KEPT = Kept(Choices(tenant="Acme", voice="af_sarah"), "tag", kept.owner("avb_mine"))


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    file = tmp_path / "state" / "choices.json"
    kept.write(file, KEPT)
    assert kept.read(file, "avb_mine") == KEPT
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert os.listdir(file.parent) == [file.name]


def test_it_is_not_for_another_key_but_for_one_that_is_missing(tmp_path: Path) -> None:
    kept.write(tmp_path / "c", KEPT)
    assert kept.read(tmp_path / "c", "avb_other") is None
    assert kept.read(tmp_path / "c", None) == KEPT
    assert "avb_mine" not in (tmp_path / "c").read_text()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\0" * 50, b"[]", b"{}", b"[" * 100_000, b'{"choices": {"speed": 9}, "etag": "", "owner": ""}'),
        json.dumps({"choices": Choices().as_dict(), "etag": "t"}).encode(),
    ],
)
def test_a_file_that_was_spoilt_is_passed_over(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(content)
    assert kept.read(tmp_path / "c", None) is None
    kept.write(tmp_path / "c", KEPT)
    assert kept.read(tmp_path / "c", None) == KEPT


def test_a_directory_that_is_a_file_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(OSError, match="state"):
        kept.write(tmp_path / "state" / "c", KEPT)
    assert kept.read(tmp_path / "state" / "c", None) is None


FULL = """
import resource, signal, sys
from pathlib import Path
from agentvoicebox.plugins.device import kept
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    kept.replace(Path(sys.argv[1]), b"x" * 5000)
except OSError as error:
    print(error.errno)
"""


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    kept.replace(tmp_path / "c", b"before")
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path / "c"], capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert (tmp_path / "c").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["c"]
