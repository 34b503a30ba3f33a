"""`avb device`: make this machine a device of a platform, and say what is live on it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from agentvoicebox.admin_api.cli import plain
from agentvoicebox.config.errors import AvbError, BadInput, Conflict, Unavailable
from agentvoicebox.config.findings import COLOURS
from agentvoicebox.plugins.device import bus, checkup, mycroft, pairing
from agentvoicebox.plugins.device import section as sections
from agentvoicebox.plugins.device.link import Link, State
from agentvoicebox.plugins.device.mycroft import Change
from agentvoicebox.plugins.device.section import Section

REPEAT = 30.0
"""Seconds after which a code is spoken again."""

_KEY = re.compile(r"[!-~]{8,512}")
_RESTART = "systemctl --user restart ovos-core ovos-audio ovos-listener"


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `avb device`."""
    actions = parser.add_subparsers(dest="action", required=True)
    init = actions.add_parser("init", help="write the lines of a device into mycroft.conf")
    init.add_argument("--url", required=True, metavar="U", help="where the platform is: https://voice.example.com")
    key = init.add_mutually_exclusive_group()
    key.add_argument("--key", metavar="K", help="the device key; others on this machine may see it while this runs")
    key.add_argument("--key-file", type=Path, metavar="F", help="a file that holds the device key, and is left there")
    init.add_argument("--tenant", default="", metavar="S", help="slug or id of the tenant whose key it must be")
    init.add_argument("--ca-file", type=Path, metavar="F", help="certificates to trust instead of the system's")
    lines = mycroft.Lines.__dataclass_fields__
    for kind, what in (("stt", "ear"), ("tts", "voice")):
        default = lines[f"{kind}_fallback"].default
        init.add_argument(f"--{kind}-fallback", default=default, metavar="P", help=f"the {what} offline ({default})")
    init.add_argument("--force", action="store_true", help="leave another platform or key, or believe what it says")
    init.set_defaults(run=run)
    pair = actions.add_parser("pair", help="get a key: an admin of the tenant enters the code that is shown and spoken")
    pair.add_argument("--name", default="", metavar="N", help="what the device is called (its host name)")
    pair.add_argument("--silent", action="store_true", help="show the code only")
    pair.add_argument("--force", action="store_true", help="replace the key that there is")
    pair.set_defaults(run=paired)
    status = actions.add_parser("status", help="whose device this is, and what is live on it")
    status.set_defaults(run=live)
    doctor = actions.add_parser("doctor", help="what this device has, lacks and can do, with the remedy")
    doctor.set_defaults(run=examined)
    for action in (init, pair, status, doctor):
        action.add_argument("--config", type=Path, metavar="FILE", help="a mycroft.conf other than the user's")
        action.add_argument("--json", action="store_true", help="print JSON objects instead of text")


# --- init -------------------------------------------------------------------------------------------------------------


def run(found: argparse.Namespace) -> int:
    """Write the lines, and the key if one is given. Nothing is written if anything is wrong."""
    file = _file(found)
    old = sections.read(mycroft.read(file))
    url = found.url.strip().rstrip("/")
    key_file = _key_file(found, old)
    wanted = Section(url, key_file, found.tenant, _absolute(found.ca_file))
    _check_flags(wanted)
    if old is not None and old.url != url and old.key() is not None and not found.force:
        raise BadInput(f"This device belongs to {old.url}: add --force to have it leave that platform.", param="url")
    lines = mycroft.Lines(
        url, key_file, wanted.tenant, wanted.ca_file, stt_fallback=found.stt_fallback, tts_fallback=found.tts_fallback
    )
    changes = mycroft.plan(lines, file, os.environ)
    key = _given_key(found, wanted)
    note = "" if found.force else _check(wanted, key)
    fresh, replaced = not key_file.exists(), _keep_key(wanted, found.key)
    try:
        copy = mycroft.write(file, changes) if changes else None
    except AvbError:
        if fresh and replaced:
            key_file.unlink(missing_ok=True)
        raise
    absent = [each for each in (lines.stt_fallback, lines.tts_fallback) if each and not _is_engine(each)]
    if found.json:
        told = [{"line": each.name, "before": each.before, "after": each.after} for each in changes]
        wrote = {"file": str(file), "copy": copy and str(copy), "changes": told, "key": bool(key)}
        plain.emit({**wrote, "note": note, "absent": absent})
        return 0
    _show(file, changes, copy)
    if replaced:
        print(f"The key is in {key_file} now.")
    if note:
        print(f"Not checked: {note}")
    for name in absent:
        print(f"{name} is not installed here, and cannot stand in: pip install it, or name another engine.")
    for word in mycroft.other_wake_words(mycroft.effective(file, os.environ)):
        print(f'{word} still wakes this device as well: write "active": false beside it if it should not.')
    if changes:
        print(f"OVOS reads this at its next start: {_RESTART}")
    if key is None:
        print("Next, get a key: avb device pair")
    return 0


def _check_flags(wanted: Section) -> None:
    """Raises `BadInput` for an address, a tenant or a file of certificates that is none, in the words of the flags."""
    try:
        _ = wanted.socket
    except BadInput as error:
        where = "of the section agentvoicebox in mycroft.conf"
        message = error.message.replace(f" in the url {where}", "").replace(f"The {error.param} {where}", "That")
        raise BadInput(f"--{error.param}: {message}", code=error.code, param=error.param) from error
    if wanted.ca_file is not None:
        try:
            ssl.create_default_context(cafile=str(wanted.ca_file))
        except OSError as error:
            raise BadInput(
                f"--ca-file: there are no certificates in {wanted.ca_file}: name a file of them, in PEM.",
                param="ca_file",
            ) from error


def _key_file(found: argparse.Namespace, old: Section | None) -> Path:
    """Where the key is, or will be."""
    if found.key_file is not None:
        return Path(os.path.abspath(found.key_file.expanduser()))
    if old is not None and old.key_file is not None:
        return old.key_file
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "agentvoicebox" / "device.key"


def _given_key(found: argparse.Namespace, wanted: Section) -> str | None:
    """The key that the device will have; None while there is none. Raises `BadInput`."""
    there = wanted.key()
    if found.key_file is not None and there is None:
        raise BadInput(f"{wanted.key_file} holds no device key: name a file with nothing else in it.", param="key_file")
    if found.key is None:
        return there
    if not _KEY.fullmatch(found.key):
        raise BadInput("This is no device key: it begins with avb_ and has 47 characters.", param="key")
    if there not in (None, found.key) and not found.force:
        raise BadInput(f"There is another key in {wanted.key_file}: add --force to replace it.", param="key")
    return str(found.key)


def _keep_key(wanted: Section, key: str | None) -> bool:
    """Write a key that was given; whether it is another one than before."""
    assert wanted.key_file is not None
    if key is None or key == wanted.key():
        return False
    mycroft.write_key(wanted.key_file, key)
    return True


def _check(wanted: Section, key: str | None) -> str:
    """Ask the platform whether it is one, and whether the key is good; returns why it cannot be asked now, if so.

    Raises `BadInput` for a wrong address or key.
    """
    with _quiet():
        try:
            pairing.check(wanted)
        except Unavailable as error:
            if error.code == "platform_away":
                return error.message
            raise BadInput(error.message, code=error.code, param="url") from error
        if key is None:
            return ""
        with tempfile.TemporaryDirectory(prefix="avb-device-", ignore_cleanup_errors=True) as directory:
            aside = Section(wanted.url, Path(directory) / "key", wanted.tenant, wanted.ca_file, Path(directory))
            mycroft.write_key(Path(directory) / "key", key)
            link = Link(aside, "command")
            try:
                checkup.wait_for(link)
                if link.state is State.REFUSED:
                    whose = f" Name the tenant of the key, or leave --tenant {wanted.tenant} out." * bool(wanted.tenant)
                    raise BadInput(link.reason + whose, code="key_refused", param="key")
                return "" if link.state is State.UP else link.reason
            finally:
                link.close()


def _is_engine(name: str) -> bool:
    """Whether OVOS finds an ear or a voice of this name."""
    groups = ("opm.stt", "opm.tts", "mycroft.plugin.stt", "mycroft.plugin.tts")
    return any(metadata.entry_points(group=group, name=name) for group in groups)


def _show(file: Path, changes: list[Change], copy: Path | None) -> None:
    if not changes:
        print(f"{file} says all this already: nothing was changed.")
        return
    for each in changes:
        was = "" if each.before is None else f" (was {_short(each.before, each.after)})"
        plain.paragraph(each.name + ("" if each.after is None else f": {_short(each.after, each.before)}") + was)
    print(f"Written to {file}" + (f"; what it was is in {copy}" if copy else ""))


def _short(value: Any, other: Any) -> str:
    """A value as JSON; of a list only what the other one lacks, among its neighbours."""
    if isinstance(value, list) and isinstance(other, list):
        new = [number for number, each in enumerate(value) if each not in other]
        near = sorted({number + step for number in new for step in (-1, 0, 1)} & set(range(len(value))))
        parts, last = [], -1
        for number in near:
            parts += ["…"] if number > last + 1 else []
            parts.append(str(value[number]))
            last = number
        return ", ".join([*parts, *(["…"] if last < len(value) - 1 else [])])
    return json.dumps(value, ensure_ascii=False)


# --- pair -------------------------------------------------------------------------------------------------------------


def paired(found: argparse.Namespace) -> int:
    """Show and speak a code until an admin has entered it; the key is kept only then."""
    configuration, device = _device(found)
    if device.key() is not None and not found.force and not _is_refused(device):
        raise Conflict(f"This device has a key, in {device.key_file}: add --force to pair it anew.")
    language = str(configuration.get("lang") or "en-US")
    herald = _Herald(configuration, language, silent=found.silent)

    def show(code: pairing.Code) -> None:
        herald.digits = code.digits
        if found.json:
            plain.emit({"state": "waiting", "code": code.digits})
        elif sys.stdout.isatty():
            print(f"\n{plain.colour(plain.large(code.digits), 'bold')}\n", flush=True)
        digits = f"{code.digits[:4]} {code.digits[4:]}"
        print(f"An admin of the tenant enters the code {digits} within ten minutes.", file=sys.stderr, flush=True)

    standing = pairing.pair(device, found.name or socket.gethostname(), show, wait=herald.wait)
    if found.json:
        plain.emit({"state": "paired", "tenant": standing.tenant, "key_file": str(device.key_file)})
    else:
        print(f"Paired: this is a device of {standing.tenant} now. Its key is in {device.key_file}.")
    herald.say(pairing.greeting(standing.tenant, language))
    return 0


def _is_refused(device: Section) -> bool:
    """Whether the platform says that the key is good no more: then nobody needs it."""
    with _quiet():
        link = Link(device, "command")
        try:
            checkup.wait_for(link)
            return link.state is State.REFUSED
        finally:
            link.close()


class _Herald:
    """Speaks the code over the device's own messagebus, again and again, while somebody waits."""

    def __init__(self, configuration: Mapping[str, Any], language: str, *, silent: bool) -> None:
        self.digits = ""
        self._configuration, self._language, self._silent = configuration, language, silent
        self._spoken = ""
        self._next = 0.0

    def wait(self, seconds: float) -> None:
        """Sleep, and speak when it is time: at once for a new code."""
        until = time.monotonic() + seconds
        if self._spoken != self.digits or time.monotonic() >= self._next:
            self._spoken, self._next = self.digits, time.monotonic() + REPEAT
            self.say(pairing.asking(self.digits, self._language))
        time.sleep(max(until - time.monotonic(), 0.0))

    def say(self, text: str) -> None:
        """Say it, if there is a bus."""
        if not self._silent:
            bus.say(self._configuration, text, self._language)


# --- status and doctor ------------------------------------------------------------------------------------------------


def live(found: argparse.Namespace) -> int:
    """Print whose device this is, what the tenant has chosen, and what is there without the platform."""
    configuration, device = _device(found)
    with _quiet():
        link = Link(device, "command")
        try:
            checkup.wait_for(link)
            with suppress(AvbError):
                link.about(timeout=checkup.WAIT)  # what the tenant has chosen comes before the answer to anything
            state, reason, chosen, welcome = link.state, link.reason, link.choices, link.welcome
        finally:
            link.close()
        engines = checkup.engines(configuration)
    if state is State.CONNECTING and not reason:
        reason = f"It has not answered within {checkup.WAIT:g} s: check the network; the platform may be down."
    told = {
        "url": device.url,
        "platform": str(state),
        "reason": reason,
        "tenant": welcome.tenant_name if welcome else chosen.tenant,
        "device_id": welcome.device_id if welcome else "",
        "language": chosen.language,
        "voice": chosen.voice,
        "speed": chosen.speed,
        "persona": chosen.persona,
        "personas": list(chosen.personas),
        "wake_words": [{"phrase": each.phrase, "sensitivity": each.sensitivity} for each in chosen.wake_words],
        "engines": [asdict(each) for each in engines],
        "reports_waiting": checkup.pending(device),
    }
    if found.json:
        plain.emit(told)
        return 0
    rows = [
        ["platform", f"{state}, {device.url}" + (f": {reason}" if reason else "")],
        ["tenant", str(told["tenant"]) or "-"],
        ["language", chosen.language],
        ["voice", chosen.voice or "the engine's own choice"],
        ["persona", chosen.persona or "-"],
        ["wake words", ", ".join(f"{each.phrase} ({each.sensitivity:g})" for each in chosen.wake_words) or "none"],
        *(["offline ear" if e.kind == "stt" else "offline voice", e.problem or e.name] for e in engines),
        ["reports waiting", str(told["reports_waiting"])],
    ]
    plain.table(["what", "now"], rows)
    return 0


def examined(found: argparse.Namespace) -> int:
    """Examine everything; exit code 1 when something keeps the device from its work."""
    file = _file(found)
    with _quiet():
        findings = list(checkup.examine(mycroft.effective(file, os.environ), file, os.environ))
    if found.json:
        plain.emit({"findings": [asdict(finding) for finding in findings]})
    else:
        rows = [[f.what, f.state, f.detail + (f" -> {f.remedy}" if f.remedy else "")] for f in findings]
        plain.table(["what", "state", "detail -> remedy"], rows, [COLOURS[f.state] for f in findings])
    return 1 if any(finding.state == "fail" for finding in findings) else 0


# --- what they share --------------------------------------------------------------------------------------------------


def _file(found: argparse.Namespace) -> Path:
    return _absolute(found.config) or mycroft.user_file(os.environ)


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else Path(os.path.abspath(path.expanduser()))


def _device(found: argparse.Namespace) -> tuple[dict[str, Any], Section]:
    """What OVOS makes of all files, and the section of the device in it. Raises `BadInput` without one."""
    file = _file(found)
    configuration = mycroft.effective(file, os.environ)
    device = sections.read(configuration)
    if device is None:
        raise BadInput(f"{file} names no platform: begin with avb device init --url https://…")
    _ = device.socket
    return configuration, device


@contextmanager
def _quiet() -> Iterator[None]:
    """OVOS and its plugins write their log to standard output, ours theirs to the other: it says nothing new here."""
    from ovos_utils.log import LOG

    level, disabled = LOG.level, logging.root.manager.disable
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        LOG.set_level("CRITICAL")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)
            LOG.set_level(level)
