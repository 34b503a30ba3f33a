"""Why a device has no link to its platform, in one line that names the remedy."""

from __future__ import annotations

import json
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from socket import gaierror
from urllib.parse import urlsplit

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus, InvalidUpgrade

from agentvoicebox.config.errors import AvbError
from agentvoicebox.plugins.device.section import Section

UNAUTHORISED, SUSPENDED = 4001, 4005
"""Close codes of a platform that refuses the key: it is not good any more, or its tenant is not active."""

REPLACED = 4009
"""The close code for a device that has more sockets than one should have."""

_NOT_YET, _EXPIRED = 9, 10
_UNKNOWN_CA = (2, 18, 19, 20, 21)
_OTHER_HOST = (62, 64)
"""Of OpenSSL, as `ssl.SSLCertVerificationError.verify_code` has them."""

_LONGEST = 300


class State(StrEnum):
    """How the link stands."""

    CONNECTING = "connecting"
    """Not known yet: the first try has not ended."""
    UP = "up"
    AWAY = "away"
    """The platform cannot be reached, or is not able to serve."""
    REFUSED = "refused"
    """It can be reached, and does not want this device's key; or there is none."""


class NoKey(Exception):
    """There is no device key."""


class Silent(Exception):
    """The platform says nothing any more, or never has."""


class Nonsense(Exception):
    """What came over the socket is not what a platform says."""


class TurnedAway(Exception):
    """The platform has told why it does not serve."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code)
        self.code, self.message = code, message


@dataclass(frozen=True, slots=True)
class Trouble:
    """What a person is told."""

    state: State
    reason: str
    stubborn: bool = False
    """Whether trying again soon would only make it worse."""


def of(error: BaseException, section: Section, now: datetime | None = None) -> Trouble:
    """What the error of a try to connect, or of a connection that ended, means; `now` is the time of this device."""
    place = urlsplit(section.url).netloc or section.url
    match error:
        case NoKey():
            where = f"in {section.key_file}" if section.key_file else "in mycroft.conf (key_file)"
            return _refused(f"There is no device key {where}: pair this device with `avb device pair`.")
        case AvbError():
            return _away(error.message)
        case TurnedAway():
            return _away(f"{place} does not serve this device ({error.code}): {error.message}")
        case InvalidStatus():
            return _status(error, place)
        case ConnectionClosed():
            return _closed(error, place)
        case ssl.SSLCertVerificationError():
            return _away(_certificate(error, section, place, now or datetime.now(UTC)))
        case ssl.SSLError():
            return _away(f"No secure connection to {place} ({error.reason}): check the url, and that it serves https.")
        case gaierror():
            host = urlsplit(section.url).hostname
            return _away(f"The name {host} is not found: check the network, and the url in mycroft.conf.")
        case TimeoutError() | Silent():
            return _away(f"{place} does not answer: check the network; the platform may be down.")
        case ConnectionRefusedError():
            return _away(f"{place} refuses the connection: the platform is down there, or the url is wrong.")
        case ConnectionError():
            return _away(f"{place} breaks the connection off: check the network, and whether the url is https or http.")
        case Nonsense():
            return _away(f"What {place} says makes no sense here: update agentvoicebox there, and on this device.")
        case InvalidMessage() | InvalidUpgrade():
            return _away(
                f"Something else than a platform answers at {place}: check the url, or log in to the network if it "
                "asks for that."
            )
        case InvalidHandshake():
            return _away(f"{place} does not open a socket ({type(error).__name__}): check the url.")
        case FileNotFoundError() if section.ca_file:
            return _away(f"There is no file {section.ca_file}: correct ca_file in mycroft.conf.")
        case OSError():
            return _away(f"{place} cannot be reached ({error.strerror or type(error).__name__}): check the network.")
    return _away(f"The link to {place} failed ({type(error).__name__}): it is tried again.")


def _away(reason: str) -> Trouble:
    return Trouble(State.AWAY, _line(reason))


def _refused(reason: str) -> Trouble:
    return Trouble(State.REFUSED, _line(reason), stubborn=True)


def _line(text: str) -> str:
    """One line of bounded length, of which what the other side said may be a part."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _status(error: InvalidStatus, place: str) -> Trouble:
    """What the HTTP status in place of a socket means."""
    status = error.response.status_code
    body = bytes(error.response.body or b"")
    code, message = _told(body)
    if status in (401, 403) and body.lstrip()[:1] == b"<":
        # Portals and proxies answer so as well, but in HTML.
        return _away(f"Something before {place} refuses the way ({status}): log in to the network, or ask who runs it.")
    if status == 401:
        return _refused(f"{place} does not accept this device's key: pair the device again with `avb device pair`.")
    if status == 403:
        return _refused(f"{place} refuses this device ({code or status}): {message or 'ask who runs the platform.'}")
    if status == 404:
        return _away(f"{place} knows no devices: its platform is older than this device, or the url is wrong.")
    if status == 429:
        return _away(f"{place} is asked too often: it is tried again later.")
    if code:
        return _away(f"{place} cannot serve now ({code}): {message}")
    if status >= 500:
        return _away(f"{place} cannot serve now (HTTP {status}): the platform starts, or is down; it is tried again.")
    return _away(
        f"Something else than a platform answers at {place} (HTTP {status}): log in to the network if it asks for "
        "that, or check the url."
    )


def _told(body: bytes) -> tuple[str, str]:
    """Code and message of a platform's error; empty if it is not one."""
    try:
        found = json.loads(body)
        code, message = found["error"], found["message"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return "", ""
    return (code, message) if isinstance(code, str) and isinstance(message, str) else ("", "")


def _closed(error: ConnectionClosed, place: str) -> Trouble:
    code = error.rcvd.code if error.rcvd else None
    said = error.rcvd.reason if error.rcvd else ""
    if code == UNAUTHORISED:
        return _refused(f"{place} does not accept this device's key any more: pair it again with `avb device pair`.")
    if code == SUSPENDED:
        return _refused(f"{place} does not serve this device's tenant ({said}): ask who runs the platform.")
    if code == REPLACED:
        reason = "This device's key is in use on others as well: pair each of them for itself with `avb device pair`."
        return Trouble(State.AWAY, reason, stubborn=True)
    if code is None:
        return _away(f"The connection to {place} broke off: it is tried again.")
    return _away(f"{place} closed the connection ({code}): it is tried again.")


def _certificate(error: ssl.SSLCertVerificationError, section: Section, place: str, now: datetime) -> str:
    clock = f"the clock of this device says {now:%Y-%m-%d}: set it if that is wrong"
    if error.verify_code == _NOT_YET:
        return f"The certificate of {place} is not valid yet; {clock}."
    if error.verify_code == _EXPIRED:
        return f"The certificate of {place} has expired; {clock}, else renew the certificate."
    if error.verify_code in _UNKNOWN_CA:
        trusted = (
            f"{section.ca_file} does not sign for it" if section.ca_file else "this device does not know who signed it"
        )
        return f"The certificate of {place} is not trusted ({trusted}): name the signer's certificate as ca_file."
    if error.verify_code in _OTHER_HOST:
        return f"The certificate of {place} is for another name: check the url, or log in to the network if it asks."
    return f"The certificate of {place} is not accepted ({error.verify_message}): {clock}."
