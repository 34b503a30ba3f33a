"""`avb audit` on a store of its own."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from agentvoicebox.admin_api import cli
from agentvoicebox.admin_api.cli.audit import _time
from agentvoicebox.tenancy import roles
from agentvoicebox.tenancy.embedded import Postgres, serving

Avb = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Postgres]]:
    data = tmp_path_factory.mktemp("audit") / "data"
    with serving(data) as postgres:
        yield data, postgres


@pytest.fixture
def avb(server: tuple[Path, Postgres], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Avb:
    """Runs a command on the store: its exit code, and what it said on stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([*arguments, "--data", str(server[0])])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def superuser(server: tuple[Path, Postgres]) -> Iterator[psycopg.Connection]:
    """Somebody who has switched the triggers off."""
    with psycopg.connect(server[1].url(roles.ADMIN), autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        yield connection


def made(avb: Avb, slug: str) -> str:
    code, out, err = avb("tenant", "create", "--slug", slug, "--name", "Somebody", "--json")
    assert code == 0, err
    tenant_id: str = json.loads(out)["id"]
    for name in ("one", "two", "three"):
        assert avb("key", "create", "--tenant", slug, "--name", name)[0] == 0
    return tenant_id


def verdict(avb: Avb, *arguments: str) -> tuple[int, dict[str, Any]]:
    code, out, _ = avb("audit", "verify", "--json", *arguments)
    return code, json.loads(out)


def test_whole_then_broken(avb: Avb, superuser: psycopg.Connection) -> None:
    tenant_id = made(avb, "acme")
    code, out, _ = avb("audit", "verify")
    assert (code, out[:7]) == (0, "Whole: ")
    code, found = verdict(avb)
    assert (code, found["whole"], found["broken"]) == (0, True, [])
    assert found["lines"] >= 4

    row = superuser.execute(
        "UPDATE audit_log SET actor_email = 'x' WHERE tenant_id = %s AND seq = 2 RETURNING at, description",
        (tenant_id,),
    ).fetchone()
    assert row is not None
    code, out, err = avb("audit", "verify")
    assert code == 1
    for told in ("acme", "2", "does not say what it said", row[0].astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")):
        assert told in out, out
    assert "looking at the chains" in err
    code, found = verdict(avb, "--tenant", "acme")
    assert (code, found["chains"]) == (1, 1)
    assert found["broken"] == [
        {
            "tenant_id": tenant_id,
            "tenant": "acme",
            "line": 2,
            "at": row[0].astimezone(UTC).isoformat(),
            "what": "does not say what it said when it was written",
        }
    ]
    made(avb, "other")
    assert verdict(avb, "--tenant", "other")[0] == 0


def test_anchors_find_what_a_superuser_wrote_anew(avb: Avb, superuser: psycopg.Connection, tmp_path: Path) -> None:
    tenant_id = made(avb, "anchored")
    file = tmp_path / "anchors.json"
    code, out, _ = avb("audit", "anchor", "-o", str(file))
    assert (code, out[:9]) == (0, "Anchored ")
    assert json.loads(file.read_text())["heads"][tenant_id]["seq"] >= 4
    assert avb("audit", "verify", "--tenant", "anchored", "--against", str(file))[0] == 0
    for table in ("audit_log", "audit_heads"):
        superuser.execute(f"DELETE FROM {table} WHERE tenant_id = %s", (tenant_id,))
    assert avb("audit", "verify", "--tenant", "anchored")[0] == 0
    code, out, _ = avb("audit", "verify", "--tenant", "anchored", "--against", str(file))
    assert code == 1
    assert "is missing, though it was anchored" in out
    code, found = verdict(avb, "--against", str(file))
    assert (code, "anchored" in [one["tenant"] for one in found["broken"]]) == (1, True)


@pytest.mark.parametrize(
    "content", [None, "", "[]", '{"format": "other"}', '{"format": "avb-audit-anchors-1", "heads": 1}']
)
def test_what_holds_no_anchors(avb: Avb, tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "anchors.json"
    if content is not None:
        file.write_text(content)
    code, out, err = avb("audit", "verify", "--against", str(file))
    assert (code, out) == (2, "")
    assert str(file) in err


def test_exports(avb: Avb, tmp_path: Path) -> None:
    made(avb, "exporter")
    code, out, _ = avb("audit", "export", "--tenant", "exporter")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert rows[-1]["description"] == "export"
    file = tmp_path / "lines.json"
    assert avb("audit", "export", "--tenant", "exporter", "--format", "json", "-o", str(file))[:2] == (0, "")
    assert len(json.loads(file.read_text())) == len(rows) + 1
    assert avb("audit", "export", "--tenant", "exporter", "--until", "2020-01-01", "--format", "json")[1] == "[\n\n]\n"
    assert avb("audit", "export", "-o", str(tmp_path / "no" / "where"))[0] == 2
    assert avb("audit", "export", "--tenant", "nobody")[0] == 2


def test_archives(avb: Avb, superuser: psycopg.Connection, tmp_path: Path) -> None:
    assert avb("audit", "archive", str(tmp_path)) == (0, "There is no month to archive.\n", "")
    code, _, err = avb("audit", "archive", str(tmp_path), "--keep-days", "30")
    assert code == 2
    assert "90" in err
    for name, first, after in (("2024_03", "2024-03-01Z", "2024-04-01Z"), ("2024_04", "2024-04-01Z", "2024-05-01Z")):
        superuser.execute(
            f"CREATE TABLE audit_log_{name} PARTITION OF audit_log FOR VALUES FROM ('{first}') TO ('{after}')"
        )
        superuser.execute(f"ALTER TABLE audit_log_{name} OWNER TO avb_owner")
    code, out, _ = avb("audit", "archive", str(tmp_path), "--json")
    assert code == 0
    assert [(one["month"], one["lines"]) for one in json.loads(out)["archived"]] == [("2024-03", 0), ("2024-04", 0)]
    assert (tmp_path / "audit-2024-03.jsonl.gz").exists()


def test_times_without_a_zone_are_utc() -> None:
    assert _time("2026-01-31") == datetime(2026, 1, 31, tzinfo=UTC)
    assert _time("2026-01-31T12:00+02:00") == datetime(2026, 1, 31, 10, tzinfo=UTC)
