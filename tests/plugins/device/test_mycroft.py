"""The lines of a device in mycroft.conf: all that it needs, nothing else, and nothing of the user's lost."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.plugins.device import mycroft, section
from agentvoicebox.plugins.device.mycroft import Lines

STOCK = [
    *("stop_high", "converse", "ocp_high", "padatious_high", "adapt_high", "ocp_medium", "fallback_high"),
    *("stop_medium", "adapt_medium", "adapt_low", "common_qa", "fallback_medium"),
]
"""What stock OVOS does before the fallbacks that answer anything."""

PADATIOUS = "ovos-padatious-pipeline-plugin"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The pipeline plugins of the machine: with padatious, as from the installer."""
    found = {*mycroft.installed_stages(), PADATIOUS}
    monkeypatch.setattr(mycroft, "installed_stages", lambda: found)
    return found


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A machine with nothing but stock OVOS on it."""
    nothing = str(tmp_path / "none")
    return {
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "XDG_CONFIG_DIRS": str(tmp_path / "etc-xdg"),
        "OVOS_DISTRIBUTION_CONFIG": nothing,
        "MYCROFT_SYSTEM_CONFIG": str(tmp_path / "etc.conf"),
    }


@pytest.fixture
def file(environ: dict[str, str]) -> Path:
    found = mycroft.user_file(environ)
    found.parent.mkdir(parents=True)
    return found


def lines(tmp_path: Path, **more: object) -> Lines:
    return Lines("https://voice.example.com", tmp_path / "device.key", **more)  # type: ignore[arg-type]


def write(file: Path, environ: dict[str, str], wanted: Lines) -> Path | None:
    return mycroft.write(file, mycroft.plan(wanted, file, environ))


def test_the_file_is_where_ovos_looks_for_it(environ: dict[str, str], tmp_path: Path) -> None:
    assert mycroft.user_file(environ) == tmp_path / "config" / "mycroft" / "mycroft.conf"
    assert mycroft.user_file({"HOME": "/home/ovos"}) == Path("/home/ovos/.config/mycroft/mycroft.conf")
    renamed = {"HOME": "/h", "OVOS_CONFIG_BASE_FOLDER": "neon", "OVOS_CONFIG_FILENAME": "neon.conf"}
    assert mycroft.user_file(renamed) == Path("/h/.config/neon/neon.conf")


def test_stock_ovos_reads_what_is_written(environ: dict[str, str], file: Path, tmp_path: Path) -> None:
    write(file, environ, lines(tmp_path, tenant="acme", ca_file=tmp_path / "ca.pem"))
    program = "import json; from ovos_config import Configuration; print(json.dumps(dict(Configuration())))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environ, "PATH": os.environ["PATH"], "OVOS_DEFAULT_LOG_LEVEL": "CRITICAL"},
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["stt"]["module"] == "agentvoicebox-stt"
    assert told["stt"]["agentvoicebox-stt"] == {"fallback": "agentvoicebox-stt-sphinx"}
    assert told["tts"]["module"] == "agentvoicebox-tts"
    assert told["tts"]["agentvoicebox-tts"] == {"fallback": "agentvoicebox-tts-flite", "enable_streaming": True}
    assert (told["stt"]["fallback_module"], told["tts"]["fallback_module"]) == ("", "")
    assert told["listener"]["wake_word"] == "agentvoicebox"
    assert told["listener"]["audio_transformers"]["agentvoicebox-language"] == {}
    assert told["hotwords"]["agentvoicebox"] == {"module": "agentvoicebox-ww", "listen": True, "active": True}
    assert told["intents"]["pipeline"] == [*STOCK, "agentvoicebox-persona", "fallback_low"]
    found = section.read(told)
    assert found is not None
    assert (found.url, found.key_file) == ("https://voice.example.com", tmp_path / "device.key")
    assert (found.tenant, found.ca_file) == ("acme", tmp_path / "ca.pem")
    assert mycroft.missing(told) == []
    told.pop("system", None)
    assert mycroft.effective(file, environ).items() >= told.items()  # ours reads as OVOS does


def test_what_stock_ovos_says_already_is_not_written(environ: dict[str, str], file: Path, tmp_path: Path) -> None:
    write(file, environ, lines(tmp_path))
    told = json.loads(file.read_text())
    assert set(told) == {"agentvoicebox", "stt", "tts", "listener", "hotwords", "intents"}
    assert set(told["stt"]) == {"module", "agentvoicebox-stt"}
    assert set(told["listener"]) == {"wake_word", "audio_transformers"}
    assert set(told["intents"]) == {"pipeline"}


def test_a_second_time_changes_nothing(environ: dict[str, str], file: Path, tmp_path: Path) -> None:
    write(file, environ, lines(tmp_path))
    assert mycroft.plan(lines(tmp_path), file, environ) == []


def test_everything_else_is_kept_and_a_copy_beside_it(environ: dict[str, str], file: Path, tmp_path: Path) -> None:
    before = """{
      // chosen with care
      "lang": "de-de",
      "stt": {"module": "ovos-stt-plugin-vosk", "fallback_module": "ovos-stt-plugin-server",
              "ovos-stt-plugin-vosk": {"model": "schön"}},
      # and this one too
      "hotwords": {"hey_mycroft": {"active": true, "listen": true}},
      "skills": {"blacklisted_skills": ["a", "b"]}
    }"""
    file.write_text(before)
    file.chmod(0o640)
    copy = write(file, environ, lines(tmp_path))
    told = json.loads(file.read_text())
    assert told["lang"] == "de-de"
    assert told["stt"]["ovos-stt-plugin-vosk"] == {"model": "schön"}
    assert (told["stt"]["module"], told["stt"]["fallback_module"]) == ("agentvoicebox-stt", "")
    assert told["hotwords"]["hey_mycroft"] == {"active": True, "listen": True}
    assert told["skills"] == {"blacklisted_skills": ["a", "b"]}
    assert list(told)[:3] == ["lang", "stt", "hotwords"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert copy is not None
    assert copy.read_text() == before
    assert mycroft.other_wake_words(told) == ["hey_mycroft"]


def test_each_change_leaves_a_copy_of_its_own(environ: dict[str, str], file: Path, tmp_path: Path) -> None:
    file.write_text("{}")
    first = write(file, environ, lines(tmp_path))
    second = write(file, environ, lines(tmp_path, tenant="acme"))
    assert first != second
    assert first is not None
    assert first.read_text() == "{}"


def test_there_is_no_copy_of_nothing(environ: dict[str, str], file: Path, tmp_path: Path) -> None:
    assert write(file, environ, lines(tmp_path)) is None
    assert [path.name for path in file.parent.iterdir()] == ["mycroft.conf"]


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (["converse", "adapt_high", "fallback_low"], ["converse", "adapt_high", "+", "fallback_low"]),
        (
            ["ovos-persona-pipeline-plugin-high", "a-high", "ovos-persona-pipeline-plugin-low", "b-low"],
            ["ovos-persona-pipeline-plugin-high", "a-high", "+", "ovos-persona-pipeline-plugin-low", "b-low"],
        ),
        (["a", "ovos-fallback-pipeline-plugin-low"], ["a", "+", "ovos-fallback-pipeline-plugin-low"]),
        (["adapt_high"], ["adapt_high", "+"]),
    ],
)
def test_the_persona_answers_after_skills_and_before_what_answers_anything(
    stages: list[str], expected: list[str], environ: dict[str, str], file: Path, tmp_path: Path
) -> None:
    file.write_text(json.dumps({"intents": {"pipeline": stages, "adapt": {"conf_high": 0.5}}}))
    write(file, environ, lines(tmp_path))
    intents = json.loads(file.read_text())["intents"]
    assert intents["pipeline"] == [each.replace("+", "agentvoicebox-persona") for each in expected]
    assert intents["adapt"] == {"conf_high": 0.5}


def test_a_pipeline_that_has_the_persona_somewhere_stays_as_it_is(
    environ: dict[str, str], file: Path, tmp_path: Path
) -> None:
    file.write_text(json.dumps({"intents": {"pipeline": ["agentvoicebox-persona", "fallback_low"]}}))
    write(file, environ, lines(tmp_path))
    assert json.loads(file.read_text())["intents"]["pipeline"] == ["agentvoicebox-persona", "fallback_low"]


def test_intent_files_are_read_where_nobody_could_compile_padatious(
    environ: dict[str, str], file: Path, tmp_path: Path, installed: set[str]
) -> None:
    installed.remove(PADATIOUS)
    write(file, environ, lines(tmp_path))
    intents = json.loads(file.read_text())["intents"]
    at = STOCK.index("adapt_medium")
    expected = [*STOCK[:at], "agentvoicebox-intents-medium", *STOCK[at:], "agentvoicebox-persona", "fallback_low"]
    assert intents["pipeline"] == [each.replace("padatious_", "agentvoicebox-intents-") for each in expected]
    assert mycroft.reads_intents(intents["pipeline"], installed)
    assert mycroft.plan(lines(tmp_path), file, environ) == []


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (
            ["ovos-padatious-pipeline-plugin-high", "padatious_medium", "padatious_low"],
            ["agentvoicebox-intents-high", "agentvoicebox-intents-medium", "agentvoicebox-intents-low"],
        ),
        (["padatious_high"], ["agentvoicebox-intents-high", "agentvoicebox-intents-medium"]),
        (["padatious_high", "ovos-padacioso-pipeline-plugin-high"], None),
        (["adapt_high", "fallback_low"], None),
    ],
)
def test_only_what_would_be_passed_over_is_replaced(
    stages: list[str], expected: list[str] | None, installed: set[str]
) -> None:
    assert mycroft.with_intents(stages, installed) == stages
    assert mycroft.with_intents(stages, installed - {PADATIOUS}) == (expected or stages)


def test_a_transformer_that_somebody_has_switched_off_stays_off(
    environ: dict[str, str], file: Path, tmp_path: Path
) -> None:
    theirs = {"agentvoicebox-language": {"active": False}, "another": {}}
    file.write_text(json.dumps({"listener": {"audio_transformers": theirs}}))
    write(file, environ, lines(tmp_path))
    assert json.loads(file.read_text())["listener"]["audio_transformers"] == theirs


def test_the_pipeline_of_the_system_is_the_one_that_is_extended(
    environ: dict[str, str], file: Path, tmp_path: Path
) -> None:
    Path(environ["MYCROFT_SYSTEM_CONFIG"]).write_text('{"intents": {"pipeline": ["adapt_high", "fallback_low"]}}')
    write(file, environ, lines(tmp_path))
    pipeline = json.loads(file.read_text())["intents"]["pipeline"]
    assert pipeline == ["adapt_high", "agentvoicebox-persona", "fallback_low"]


def test_a_file_that_ovos_reads_after_the_users_is_noticed(environ: dict[str, str], file: Path, tmp_path: Path) -> None:
    write(file, environ, lines(tmp_path))
    later = tmp_path / "etc-xdg" / "mycroft" / "mycroft.conf"
    later.parent.mkdir(parents=True)
    later.write_text('{"stt": {"module": "ovos-stt-plugin-server"}}')
    assert mycroft.missing(mycroft.effective(file, environ)) == ["stt.module"]


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (b'{\n  // a comment\n  "lang": "de-de",\n  "stt": {"module" "x"}\n}', "line 4"),
        (b'{"lang": "de-de"', "line 1"),
        (b"[1, 2]", "one JSON object"),
        (b"\xff\xfe\x00", "not text"),
        (b"[" * 200_000, "brackets"),
        (b'{"stt": "vosk"}', "stt in"),
    ],
)
def test_a_broken_file_is_said_in_one_line_and_left_alone(
    held: bytes, said: str, environ: dict[str, str], file: Path, tmp_path: Path
) -> None:
    file.write_bytes(held)
    with pytest.raises(BadInput) as caught:
        mycroft.plan(lines(tmp_path), file, environ)
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert file.read_bytes() == held
    assert [path.name for path in file.parent.iterdir()] == ["mycroft.conf"]


def test_an_empty_file_is_as_good_as_none(environ: dict[str, str], file: Path, tmp_path: Path) -> None:
    file.write_text("\n")
    write(file, environ, lines(tmp_path))
    assert json.loads(file.read_text())["stt"]["module"] == "agentvoicebox-stt"


def test_another_platform_takes_nothing_over_from_the_one_before(
    environ: dict[str, str], file: Path, tmp_path: Path
) -> None:
    write(file, environ, lines(tmp_path, tenant="acme", ca_file=tmp_path / "ca.pem"))
    write(file, environ, Lines("https://other.example.com", tmp_path / "device.key"))
    assert set(json.loads(file.read_text())["agentvoicebox"]) == {"url", "key_file"}


def test_a_full_disk_leaves_the_file_as_it_was(
    environ: dict[str, str], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text('{"lang": "de-de"}')
    changes = mycroft.plan(lines(tmp_path), file, environ)

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unavailable, match="No space left"):
        mycroft.write(file, changes)
    with pytest.raises(Unavailable, match="No space left"):
        mycroft.write_key(tmp_path / "keys" / "device.key", "avb_" + "k" * 43)
    assert file.read_text() == '{"lang": "de-de"}'
    assert [path.name for path in file.parent.iterdir()] == ["mycroft.conf"]
    assert list((tmp_path / "keys").iterdir()) == []


def test_a_link_to_the_file_stays_one(environ: dict[str, str], file: Path, tmp_path: Path) -> None:
    real = tmp_path / "real.conf"
    real.write_text("{}")
    file.symlink_to(real)
    write(file, environ, lines(tmp_path))
    assert file.is_symlink()
    assert "agentvoicebox" in json.loads(real.read_text())


def test_a_key_is_its_owners_alone(tmp_path: Path) -> None:
    key = tmp_path / "new" / "device.key"
    mycroft.write_key(key, "avb_" + "k" * 43)
    assert key.read_text() == "avb_" + "k" * 43 + "\n"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
