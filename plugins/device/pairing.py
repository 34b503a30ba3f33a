"""Pairing: a device without a key makes one, shows a code, and waits until an admin of a tenant has entered it.

The key never travels: the platform is told its digest, and takes it for the device's once the code is claimed. Nothing
is kept on the device before that, so that pairing can be broken off at any moment.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import ssl
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from websockets.exceptions import InvalidMessage

from agentvoicebox.config.errors import AvbError, BadInput, Conflict, Unavailable
from agentvoicebox.plugins.device import mycroft, trouble, wire
from agentvoicebox.plugins.device.section import Section

PATH = "/api/v2/pairings"
HEALTH = "/health"

ROUNDS = 3
"""Codes that are shown, one after the other, before a device gives up."""

LIFETIME = 660.0
"""Seconds after which a code is over whatever the platform says: it lives ten minutes."""

TIMEOUT = 10.0
"""Seconds for one question to the platform."""

_SENTENCES = {
    "en": ("To pair this device, enter this code: {}.", "This device is paired with {}."),
    "de": ("Um dieses Gerät zu koppeln, geben Sie diesen Code ein: {}.", "Dieses Gerät ist gekoppelt mit {}."),
    "fr": ("Pour associer cet appareil, saisissez ce code : {}.", "Cet appareil est associé à {}."),
    "es": ("Para vincular este dispositivo, introduzca este código: {}.", "Este dispositivo está vinculado con {}."),
}
_SHOWN = 12
_MOST = 64 * 1024
_SLOWEST = 30.0


@dataclass(frozen=True, slots=True)
class Code:
    """What a device waits with: eight digits for people, an id for the platform."""

    id: str
    digits: str
    interval: float
    """Seconds between two questions whether it has been entered."""
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Standing:
    """What has become of a code: `waiting`, `paired` or `expired`; and the name of the tenant."""

    state: str
    tenant: str


def asking(digits: str, language: str) -> str:
    """What the device says while it waits: the digits one by one, in its language if we have that, else in English."""
    return _sentences(language)[0].format(", ".join(digits))


def greeting(tenant: str, language: str) -> str:
    """What the device says when it is paired."""
    return _sentences(language)[1].format(tenant or "AgentVoiceBox")


def _sentences(language: str) -> tuple[str, str]:
    return _SENTENCES.get(language.lower().partition("-")[0], _SENTENCES["en"])


def make_key() -> str:
    """A new device key: 32 random bytes, as the platform makes its keys."""
    return "avb_" + secrets.token_urlsafe(32)


def begin(section: Section, name: str) -> Code:
    """Get a code for a new key. Raises `BadInput`, `Unavailable`."""
    key = make_key()
    digest = hashlib.sha256(key.encode()).hexdigest()
    told = _call(section, PATH, {"key_digest": digest, "key_prefix": key[:_SHOWN], "name": name[:100] or "device"})
    number, digits, interval = told.get("id"), told.get("code"), told.get("interval")
    if not isinstance(number, str) or not _is_code(digits) or not isinstance(interval, int | float):
        raise _nonsense(section)
    return Code(number, str(digits), min(max(float(interval), 1.0), _SLOWEST), key)


def look(section: Section, code: Code) -> Standing:
    """What has become of the code. Raises `Unavailable` when the platform cannot be asked now."""
    try:
        told = _call(section, f"{PATH}/{code.id}")
    except BadInput as error:
        if error.code == "not_found":
            return Standing("expired", "")
        raise
    state, tenant = told.get("state"), told.get("tenant")
    if state not in ("waiting", "paired", "expired"):
        raise _nonsense(section)
    return Standing(str(state), tenant if isinstance(tenant, str) else "")


def pair(
    section: Section,
    name: str,
    show: Callable[[Code], None],
    *,
    wait: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
    rounds: int = ROUNDS,
) -> Standing:
    """Show codes until one has been entered, and keep the key; returns whose the device is now.

    `wait` sleeps some seconds: whatever else is to happen meanwhile happens in there. Raises `BadInput`, `Unavailable`,
    and `Conflict` (`pairing_expired`) when nobody has entered any of the codes.
    """
    check_writable(section)
    for _ in range(rounds):
        code = begin(section, name)
        show(code)
        until = now() + LIFETIME
        while now() < until:
            wait(code.interval)
            try:
                standing = look(section, code)
            except Unavailable:
                continue  # the network comes and goes; the code is good meanwhile
            if standing.state == "paired":
                keep(section, code.key)
                return standing
            if standing.state == "expired":
                break
    raise Conflict(
        f"Nobody has entered any of {rounds} codes: start `avb device pair` again when an admin is at hand.",
        code="pairing_expired",
    )


def keep(section: Section, key: str) -> None:
    """Write the key where the plugins look for it. Raises `BadInput` if no file is named, `Unavailable`."""
    if section.key_file is None:
        raise _no_file()
    mycroft.write_key(section.key_file, key)


def check_writable(section: Section) -> None:
    """Find out before anybody enters a code whether the key could be kept. Raises `BadInput`, `Unavailable`."""
    if section.key_file is None:
        raise _no_file()
    folder = section.key_file.resolve().parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(bytes(4096))
    except OSError as error:
        raise Unavailable(
            f"The key could not be written to {folder} ({error.strerror}): see to the space and the rights there."
        ) from error


def _no_file() -> BadInput:
    return BadInput("The section agentvoicebox of mycroft.conf names no key_file: `avb device init` writes one.")


def _is_code(digits: object) -> bool:
    return isinstance(digits, str) and len(digits) == 8 and digits.isascii() and digits.isdigit()


# --- over the network -------------------------------------------------------------------------------------------------


class _Stay(HTTPRedirectHandler):
    """Portals send elsewhere, a platform does not: nothing is told to whoever that is."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


def check(section: Section) -> None:
    """Find out whether a platform is there. Raises `BadInput` for an address that makes none, `Unavailable`."""
    _call(section, HEALTH)


def _call(section: Section, path: str, body: Mapping[str, str] | None = None) -> dict[str, Any]:
    origin = "http" + section.socket.removeprefix("ws").removesuffix(wire.PATH)
    request = Request(origin + path, headers={"Accept": "application/json"})  # noqa: S310 - http or https, as checked
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    try:
        secure = [HTTPSHandler(context=_context(section))] if origin.startswith("https:") else []
        opener = build_opener(_Stay, *secure)
        with opener.open(request, timeout=TIMEOUT) as response:
            told = json.loads(_read(response))
    except HTTPError as error:
        with error:
            raise _refused(section, error) from error
    except URLError as error:
        cause = error.reason if isinstance(error.reason, BaseException) else OSError(error.reason)
        raise Unavailable(trouble.of(cause, section).reason, code="platform_away") from error
    except OSError as error:  # a deadline within the answer, a certificate file that is none
        raise Unavailable(trouble.of(error, section).reason, code="platform_away") from error
    except (ValueError, HTTPException, RecursionError) as error:
        raise _nonsense(section) from error
    if not isinstance(told, dict):
        raise _nonsense(section)
    return told


def _context(section: Section) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(section.ca_file) if section.ca_file else None)


def _read(response: HTTPResponse | HTTPError) -> bytes:
    """A short answer within the time, however slowly it drips. Raises `TimeoutError`, `ValueError`."""
    until, held = time.monotonic() + TIMEOUT, b""
    while piece := response.read1(_MOST):
        held += piece
        if len(held) > _MOST:
            raise ValueError("far too long")
        if time.monotonic() > until:
            raise TimeoutError
    return held


def _refused(section: Section, error: HTTPError) -> AvbError:
    """What an HTTP status that is not 2xx means: a platform names its reason, everybody else does not."""
    try:
        told = json.loads(_read(error))
        code, message = told["error"], told["message"]
    except (OSError, HTTPException, ValueError, LookupError, TypeError, RecursionError):
        return _nonsense(section)
    if not isinstance(code, str) or not isinstance(message, str):
        return _nonsense(section)
    message = " ".join("".join(c if c.isprintable() else " " for c in message).split())[:300]
    if error.code == 429 or error.code >= 500:
        return Unavailable(message, code=code)
    return BadInput(message, code="not_found" if error.code == 404 else code)


def _nonsense(section: Section) -> Unavailable:
    return Unavailable(trouble.of(InvalidMessage("not a platform's"), section).reason, code="platform_garbled")
