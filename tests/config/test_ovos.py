"""What a cell is told: nothing of the machine but paths, language and time zone."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import tzlocal

from agentvoicebox.config import ovos


def _written(directory: Path) -> dict:
    file = ovos.write(directory, languages=("en-us", "de-de"), port=4711, route="/secret")
    return json.loads(file.read_text())


def test_the_configuration(tmp_path: Path) -> None:
    written = _written(tmp_path / "cell")
    assert (written["lang"], written["secondary_langs"]) == ("en-us", ["de-de"])
    websocket = written["websocket"]
    assert (websocket["host"], websocket["port"], websocket["route"]) == ("127.0.0.1", 4711, "/secret")
    assert written["intents"]["pipeline"][0] == "agentvoicebox-guard"
    assert written["logs"]["max_bytes"] * (1 + written["logs"]["backup_count"]) < 5_000_000
    assert written["log_level"] == "WARNING"


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    cell = tmp_path / "cell"
    cell.mkdir(mode=0o755)
    file = ovos.write(cell, languages=("en-us",), port=1, route="/secret")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert {stat.S_IMODE(d.stat().st_mode) for d in (cell, *cell.rglob("*")) if d.is_dir()} == {0o700}


def test_writing_again_replaces_it(tmp_path: Path) -> None:
    _written(tmp_path)
    ovos.write(tmp_path, languages=("de-de",), port=4712, route="/other")
    written = json.loads((tmp_path / "config" / "mycroft" / "mycroft.conf").read_text())
    assert (written["lang"], written["websocket"]["port"]) == ("de-de", 4712)
    assert not list(tmp_path.rglob("*.new"))


def test_the_environment_leads_nowhere_else(tmp_path: Path) -> None:
    parent = {"PATH": "/bin", "TZ": "Asia/Tokyo", "HOME": "/home/me", "AVB_KEY": "secret", "PYTHONPATH": "/evil"}
    environment = ovos.environment(tmp_path, parent)
    assert environment["PATH"] == "/bin"
    assert environment["TZ"] == "Asia/Tokyo"
    assert not {"AVB_KEY", "PYTHONPATH"} & set(environment)
    places = {name: value for name, value in environment.items() if name == "HOME" or name.startswith("XDG_")}
    assert places
    assert all(Path(place).is_relative_to(tmp_path) for place in places.values())
    assert environment["MYCROFT_SYSTEM_CONFIG"].startswith(str(tmp_path))


def test_all_plugins_of_the_pipeline_are_installed() -> None:
    assert ovos.missing() == ()
    assert {"agentvoicebox-guard", "agentvoicebox-intents"} <= set(ovos.plugins())
    assert not any(name.endswith(("-high", "-medium", "-low")) for name in ovos.plugins())


def test_a_missing_plugin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ovos, "PIPELINE", (*ovos.PIPELINE, "no-such-plugin-high"))
    assert ovos.missing() == ("no-such-plugin",)


@pytest.mark.parametrize(
    ("zone", "expected"), [("Europe/Berlin", "Europe/Berlin"), ("UTC", "UTC"), ("Nowhere/AtAll", "UTC")]
)
def test_the_time_zone_is_the_machines_or_utc(tmp_path: Path, zone: str, expected: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", zone)
        assert _written(tmp_path)["location"]["timezone"]["code"] == expected
    tzlocal.reload_localzone()


def test_the_persona_is_asked_before_whoever_answers_anything() -> None:
    at = ovos.PIPELINE.index("agentvoicebox-persona")
    assert ovos.PIPELINE[at + 1 :] == ("ovos-fallback-pipeline-plugin-low",)
    assert not any("ovos-persona" in stage for stage in ovos.PIPELINE), "its persona is everybody's (hazards H4, H5)"


def test_the_persona_is_told_where_its_node_is(tmp_path: Path) -> None:
    node = ovos.Node("http://127.0.0.1:4712/v1", "a secret")
    assert "secret" not in repr(node)
    file = ovos.write(tmp_path, languages=("en-us",), port=1, route="/secret", node=node)
    assert "a secret" not in file.read_text()
    section = json.loads(file.read_text())["agentvoicebox"]
    key = Path(section["key_file"])
    assert (section["place"], section["url"]) == ("cell", "http://127.0.0.1:4712/v1")
    assert key.read_text() == "a secret"
    assert key.is_relative_to(tmp_path)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert "agentvoicebox" not in _written(tmp_path)
    assert not key.exists(), "a key that nobody needs is not left behind"


def test_a_plugin_is_listed_by_itself_or_with_a_stage() -> None:
    configuration = {"intents": {"pipeline": ["adapt_high", "agentvoicebox-persona", "agentvoicebox-intents-high"]}}
    assert ovos.listed(configuration, "agentvoicebox-persona")
    assert ovos.listed(configuration, "agentvoicebox-intents")
    assert not ovos.listed(configuration, "agentvoicebox-guard")
    assert not ovos.listed({}, "agentvoicebox-guard")
    assert not ovos.listed({"intents": None}, "agentvoicebox-guard")
