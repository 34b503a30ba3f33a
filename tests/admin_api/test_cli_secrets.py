"""`avb secrets` on a store of its own."""

from __future__ import annotations

import base64
import json
import os
import uuid
from pathlib import Path

import pytest

from agentvoicebox.admin_api import cli
from agentvoicebox.admin_api.cli import store
from agentvoicebox.config import settings
from agentvoicebox.tenancy import secrets
from agentvoicebox.tenancy.masterkeys import EnvironmentKeys, FileKeys, SecretUnreadable


def test_a_new_master_key_wraps_all_and_secrets_stay_readable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    found = settings.load({"data": data}, {"HOME": str(tmp_path)})

    def avb(*arguments: str) -> dict[str, object]:
        assert cli.main([*arguments, "--data", str(data), "--json"]) == 0
        told: dict[str, object] = json.loads(capsys.readouterr().out)
        return told

    tenant_id = uuid.UUID(str(avb("tenant", "create", "--slug", "acme", "--name", "Acme")["id"]))
    file = FileKeys(data / "master.keys")
    first, _ = file.current()
    store.use(found, lambda db: secrets.put(db, file, tenant_id, "llm", "openai", b"sk-very-secret-value"))

    told = avb("secrets", "rotate")
    assert (told["master_key"], told["wrapped"]) == (file.current()[0], 1)
    assert told["master_key"] != first
    assert store.use(found, lambda db: secrets.get(db, file, tenant_id, "llm", "openai")) == b"sk-very-secret-value"

    given = f"env-1:{base64.b64encode(os.urandom(32)).decode()}"
    old = ",".join(f"{name}:{base64.b64encode(file.get(name)).decode()}" for name in (file.current()[0],))
    monkeypatch.setenv("AVB_SECRETS_KEYS", f"{given},{old}")
    assert avb("secrets", "rotate") == {"master_key": "env-1", "wrapped": 1}
    moved = EnvironmentKeys(given)
    assert store.use(found, lambda db: secrets.get(db, moved, tenant_id, "llm", "openai")) == b"sk-very-secret-value"
    with pytest.raises(SecretUnreadable):
        store.use(found, lambda db: secrets.get(db, file, tenant_id, "llm", "openai"))
