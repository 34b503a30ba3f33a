"""The lines of a device in its `mycroft.conf`: read beside all else that OVOS reads, and written into the user's.

OVOS itself is not imported: importing its configuration reads files and writes to standard output.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agentvoicebox.config.errors import BadInput, Unavailable

PERSONA = "agentvoicebox-persona"
"""The stage of the pipeline in which the tenant's persona answers."""

INTENTS = "agentvoicebox-intents"
"""The plugin whose stages match the `.intent` files of skills where padatious would have to be compiled."""

PADATIOUS = "ovos-padatious-pipeline-plugin"
READERS = (INTENTS, PADATIOUS, "ovos-padacioso-pipeline-plugin")
"""The plugins that match `.intent` files."""

_LEVEL = re.compile(r"[-_](high|medium|low)$")
_LAST = ("fallback_low", "ovos-fallback-pipeline-plugin-low", "ovos-persona-pipeline-plugin-low")
"""Stages that answer anything: after them there is nothing left to answer."""

_BACKUPS = 99
_LARGEST = 4 * 1024 * 1024

Path_ = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lines:
    """What a device needs. The engines are names of OPM plugins, for when the platform is out of reach."""

    url: str
    key_file: Path
    tenant: str = ""
    ca_file: Path | None = None
    stt_fallback: str = "agentvoicebox-stt-sphinx"
    tts_fallback: str = "agentvoicebox-tts-flite"

    def wanted(self) -> dict[str, Any]:
        """The lines, but for the pipeline, in which ours is one stage of many."""
        section = {"url": self.url, "key_file": str(self.key_file)}
        if self.tenant:
            section["tenant"] = self.tenant
        if self.ca_file is not None:
            section["ca_file"] = str(self.ca_file)
        return {
            "agentvoicebox": section,
            "stt": {
                "module": "agentvoicebox-stt",
                # OVOS has a fallback of its own, which would listen again after ours has.
                "fallback_module": "",
                "agentvoicebox-stt": {"fallback": self.stt_fallback},
            },
            "tts": {
                "module": "agentvoicebox-tts",
                "fallback_module": "",
                "agentvoicebox-tts": {"fallback": self.tts_fallback, "enable_streaming": True},
            },
            # An empty section has a listener load the transformer: core then hears the tenant's language.
            "listener": {"wake_word": "agentvoicebox", "audio_transformers": {"agentvoicebox-language": {}}},
            # One entry hears all phrases of the tenant and changes them without a reload of the listener.
            "hotwords": {"agentvoicebox": {"module": "agentvoicebox-ww", "listen": True, "active": True}},
        }


@dataclass(frozen=True, slots=True)
class Change:
    """A line that becomes another; `before` is None where there was none, `after` where there will be none."""

    place: Path_
    before: Any
    after: Any

    @property
    def name(self) -> str:
        """As people write it: `stt.module`."""
        return ".".join(self.place)


def user_file(environ: Mapping[str, str]) -> Path:
    """The `mycroft.conf` of the user, which need not exist."""
    return _home(environ) / _base(environ) / (environ.get("OVOS_CONFIG_FILENAME") or "mycroft.conf")


def others(environ: Mapping[str, str]) -> tuple[list[Path], list[Path]]:
    """The files that OVOS reads before the user's, and those that it reads after it, which win. Most do not exist."""
    base, name = _base(environ), environ.get("OVOS_CONFIG_FILENAME") or "mycroft.conf"
    found = find_spec("ovos_config")
    stock = [str(Path(place) / "mycroft.conf") for place in (found and found.submodule_search_locations) or ()]
    before: list[str | Path] = [
        *([environ["OVOS_DEFAULT_CONFIG"]] if environ.get("OVOS_DEFAULT_CONFIG") else stock),
        _home(environ) / base / "web_cache.json",
        environ.get("OVOS_DISTRIBUTION_CONFIG") or f"/usr/share/{base}/{name}",
        environ.get("MYCROFT_SYSTEM_CONFIG") or f"/etc/{base}/{name}",
        Path(environ.get("HOME") or Path.home()) / f".{base}" / name,
    ]
    folders = [folder for folder in (environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":") if folder]
    return [Path(each) for each in before], [Path(folder) / base / name for folder in reversed(folders)]


def read(file: Path) -> dict[str, Any]:
    """What a file says; nothing if there is none. Raises `BadInput` for one that OVOS cannot read either."""
    try:
        with file.open("rb") as opened:
            held = opened.read(_LARGEST + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror}.", code="mycroft_conf_unreadable") from error
    if file.suffix.lower() in (".yml", ".yaml"):
        raise BadInput(
            f"{file} is YAML, which only OVOS itself writes: name a mycroft.conf with --config.",
            code="mycroft_conf_unreadable",
        )
    try:
        if len(held) > _LARGEST:
            raise ValueError("it is far too large")
        text = held.decode("utf-8-sig")
        told = json.loads("\n".join(_uncommented(text))) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise _broken(file, error) from error
    if not isinstance(told, dict):
        raise BadInput(f"{file} must hold one JSON object: mend it, or move it away.", code="mycroft_conf_broken")
    return told


def _broken(file: Path, error: ValueError | RecursionError) -> BadInput:
    where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "it is not text"
    if isinstance(error, RecursionError):
        where = "too many brackets"
    return BadInput(
        f"{file} is broken ({where}), and nothing was changed: mend it, or move it away.", code="mycroft_conf_broken"
    )


def effective(file: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """What OVOS makes of the user's `file` and all others. Raises `BadInput` for a broken one."""
    before, after = others(environ)
    told = _all(before)
    _merge(told, read(file))
    _merge(told, _all(after))
    return told


def plan(lines: Lines, file: Path, environ: Mapping[str, str]) -> list[Change]:
    """What has to change in the user's `file` for the device; what stock OVOS says already is left to it.

    Raises `BadInput` if the file is broken, or has something else where a section must be.
    """
    mine = read(file)
    known = _all(others(environ)[0])
    _merge(known, mine)
    wanted = list(_leaves(lines.wanted()))
    if _at(mine, ("agentvoicebox", "url"), file) != lines.url:
        # What is left of another platform does not hold for this one.
        named = {place for place, _ in wanted}
        stale = (("agentvoicebox", "tenant"), ("agentvoicebox", "ca_file"))
        wanted += [(place, None) for place in stale if place not in named]
    changes = [
        Change(place, before, value)
        for place, value in wanted
        if (before := _at(known, place, file)) != value and not (value == {} and isinstance(before, Mapping))
    ]
    place = ("intents", "pipeline")
    stages = _at(known, place, file)
    stages = [str(stage) for stage in stages] if isinstance(stages, list) else []
    if stages and (ours := with_persona(with_intents(stages, installed_stages()))) != stages:
        changes.append(Change(place, stages, ours))
    return changes


def with_persona(stages: list[str]) -> list[str]:
    """The stages of a pipeline with our persona's among them: after all skills, before what answers anything."""
    if PERSONA in stages:
        return stages
    at = next((number for number, stage in enumerate(stages) if stage in _LAST), len(stages))
    return [*stages[:at], PERSONA, *stages[at:]]


def with_intents(stages: list[str], installed: Collection[str]) -> list[str]:
    """The stages of a pipeline with ours in place of those of padatious, where padatious is not installed.

    Ours of medium confidence comes before the one of adapt, as in a cell: the stock pipeline has none there.
    """
    if reads_intents(stages, installed) or not any(stage_plugin(stage) == PADATIOUS for stage in stages):
        return stages
    found = [
        f"{INTENTS}-{level[1]}" if stage_plugin(stage) == PADATIOUS and (level := _LEVEL.search(stage)) else stage
        for stage in stages
    ]
    medium = f"{INTENTS}-medium"
    if medium not in found:
        places = ("adapt_medium", "ovos-adapt-pipeline-plugin-medium", "common_qa", PERSONA, *_LAST)
        at = next((number for number, stage in enumerate(found) if stage in places), len(found))
        found.insert(at, medium)
    return found


def reads_intents(stages: Collection[str], installed: Collection[str]) -> bool:
    """Whether a stage of the pipeline matches `.intent` files: else skills that have some hear nothing."""
    return any((name := stage_plugin(stage)) in READERS and name in installed for stage in stages)


def installed_stages() -> set[str]:
    """The pipeline plugins that OVOS finds."""
    return {point.name for point in metadata.entry_points(group="opm.pipeline")}


def stage_plugin(stage: str) -> str:
    """The plugin of a stage; stock configurations still write `adapt_high` for `ovos-adapt-pipeline-plugin-high`."""
    if stage == "common_qa":
        return "ovos-common-query-pipeline-plugin"
    name = _LEVEL.sub("", stage)
    return name if "-" in stage else f"ovos-{name.partition('_')[0]}-pipeline-plugin"


def missing(configuration: Mapping[str, Any]) -> list[str]:
    """The lines that a device lacks, or has otherwise, in what OVOS makes of all files."""
    fixed = {
        ("stt", "module"): "agentvoicebox-stt",
        ("tts", "module"): "agentvoicebox-tts",
        ("hotwords", "agentvoicebox", "module"): "agentvoicebox-ww",
        ("listener", "wake_word"): "agentvoicebox",
    }
    absent = [".".join(place) for place, value in fixed.items() if _at(configuration, place) != value]
    stages = _at(configuration, ("intents", "pipeline"))
    return absent if isinstance(stages, list) and PERSONA in stages else [*absent, "intents.pipeline"]


def other_wake_words(configuration: Mapping[str, Any]) -> list[str]:
    """Words beside the tenant's that wake the device too: those that somebody has set active."""
    words = configuration.get("hotwords")
    return [
        str(name)
        for name, word in (words.items() if isinstance(words, Mapping) else ())
        if name != "agentvoicebox" and isinstance(word, Mapping) and word.get("active") and word.get("listen")
    ]


def write(file: Path, changes: list[Change]) -> Path | None:
    """Make the changes in the user's `file`, all or none; returns the copy of what it was, None if there was none.

    OVOS writes the file without its comments too, which is what the copy is for. Raises `BadInput` if the file is
    broken, `Unavailable` if it cannot be written.
    """
    file = file.resolve()
    told = read(file)
    for change in changes:
        _set(told, change)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        copy = _keep_copy(file)
        replace(file, json.dumps(told, indent=2) + "\n", _mode(file))
    except OSError as error:
        raise Unavailable(
            f"{file} cannot be written ({error.strerror}), and is as it was: see to the space and the rights there."
        ) from error
    return copy


def write_key(file: Path, key: str) -> None:
    """Keep a device key where only its owner reads it, whole or not at all. Raises `Unavailable`."""
    file = file.resolve()
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace(file, key + "\n", 0o600)
    except OSError as error:
        raise Unavailable(
            f"The key cannot be written to {file} ({error.strerror}): see to the space and the rights there."
        ) from error


def replace(file: Path, text: str, mode: int) -> None:
    """Write a file so that everybody sees the old one or the new one, even after a power cut. Raises `OSError`."""
    handle, fresh = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as out:
            os.fchmod(out.fileno(), mode)
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(fresh, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(fresh)
        raise


def _keep_copy(file: Path) -> Path | None:
    if not file.exists():
        return None
    names = (file.with_name(f"{file.name}.{number}.bak") for number in range(1, _BACKUPS + 1))
    copy = next((name for name in names if not name.exists()), file.with_name(f"{file.name}.{_BACKUPS}.bak"))
    replace(copy, file.read_text(encoding="utf-8-sig"), _mode(file))
    return copy


def _mode(file: Path) -> int:
    return file.stat().st_mode & 0o777 if file.exists() else 0o644


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME") or Path.home()) / ".config")


def _base(environ: Mapping[str, str]) -> str:
    return environ.get("OVOS_CONFIG_BASE_FOLDER") or "mycroft"


def _all(files: list[Path]) -> dict[str, Any]:
    """What these files say together; OVOS passes over those that are broken."""
    told: dict[str, Any] = {}
    for file in files:
        with suppress(BadInput):
            _merge(told, read(file))
    return told


def _uncommented(text: str) -> Iterator[str]:
    """The lines; comments, which have lines of their own, are empty ones, so that errors are counted right."""
    for line in text.splitlines():
        yield "" if line.lstrip().startswith(("//", "#")) else line


def _leaves(told: Mapping[str, Any], place: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    for name, value in told.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*place, name))
        else:
            yield (*place, name), value


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    """As OVOS does it: sections are merged, everything else, lists too, is replaced."""
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            _merge(base[name], value)
        else:
            base[name] = deepcopy(value)


def _at(told: Mapping[str, Any], place: Path_, file: Path | None = None) -> Any:
    """What is at a place, None if nothing is; with a file, raises `BadInput` where a section must be and is not."""
    for number, name in enumerate(place[:-1]):
        inner = told.get(name)
        if inner is None:
            return None
        if not isinstance(inner, Mapping):
            if file is None:
                return None
            raise BadInput(
                f"{'.'.join(place[: number + 1])} in {file} must be a section, as in {{…}}: mend it, or remove it.",
                code="mycroft_conf_broken",
            )
        told = inner
    return told.get(place[-1])


def _set(told: dict[str, Any], change: Change) -> None:
    for name in change.place[:-1]:
        if not isinstance(told.get(name), dict):
            told[name] = {}
        told = told[name]
    if change.after is None:
        told.pop(change.place[-1], None)
    else:
        told[change.place[-1]] = change.after
