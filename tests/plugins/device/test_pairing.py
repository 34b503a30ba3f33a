"""A device gets its key: from a platform that serves, through a network that does not always, and never half."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import ssl
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agentvoicebox.config.errors import AvbError, BadInput, Conflict, Unavailable
from agentvoicebox.plugins.device import pairing
from agentvoicebox.plugins.device.pairing import Code
from agentvoicebox.plugins.device.section import Section

Reply = tuple[int, bytes]
WAITING = (200, b'{"state": "waiting", "tenant": ""}')
PAIRED = (200, b'{"state": "paired", "tenant": "Acme"}')
EXPIRED = (200, b'{"state": "expired", "tenant": ""}')
PORTAL = (200, b"<html>Welcome to the hotel</html>")


class Platform:
    """Says what it is told to say, in order, the last for ever; remembers what it was asked."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.looks: list[Reply] = [PAIRED]
        self.interval = 5
        self.begins: list[Reply] = []
        self.asked: list[str] = []
        self.headers: dict[str, str] = {}
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                owner.begun.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                made = {"id": "a-b-c", "code": f"4271903{len(owner.begun)}", "interval": owner.interval}
                self._answer(owner.begins.pop(0) if owner.begins else (201, json.dumps(made).encode()))

            def do_GET(self) -> None:
                owner.asked.append(self.path)
                self._answer(owner.looks.pop(0) if len(owner.looks) > 1 else owner.looks[0])

            def _answer(self, reply: Reply) -> None:
                status, body = reply
                self.send_response(status)
                for name, value in owner.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def platform() -> Iterator[Platform]:
    made = Platform()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def device(platform: Platform, tmp_path: Path) -> Section:
    return Section(platform.url, tmp_path / "keys" / "device.key")


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waited: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.waited.append(seconds)
        self.now += seconds


def pair(device: Section, clock: Clock | None = None) -> tuple[pairing.Standing, list[Code]]:
    shown: list[Code] = []
    clock = clock or Clock()
    return pairing.pair(device, "kitchen", shown.append, wait=clock.wait, now=clock), shown


def test_the_key_is_made_here_and_only_its_digest_travels(platform: Platform, device: Section) -> None:
    standing, [code] = pair(device)
    assert standing.tenant == "Acme"
    key = device.key()
    assert key is not None
    assert re.fullmatch(r"avb_[\w-]{43}", key)
    assert platform.begun == [
        {"key_digest": hashlib.sha256(key.encode()).hexdigest(), "key_prefix": key[:12], "name": "kitchen"}
    ]
    assert code.digits == "42719031"
    assert key not in repr(code)
    assert device.key_file is not None
    assert stat.S_IMODE(device.key_file.stat().st_mode) == 0o600


def test_it_asks_as_often_as_the_platform_wants_and_keeps_nothing_before_the_code_is_entered(
    platform: Platform, device: Section
) -> None:
    platform.looks = [WAITING, WAITING, PAIRED]
    clock = Clock()

    def wait(seconds: float) -> None:
        assert device.key() is None
        clock.wait(seconds)

    pairing.pair(device, "kitchen", lambda code: None, wait=wait, now=clock)
    assert clock.waited == [5.0, 5.0, 5.0]
    assert set(platform.asked) == {"/api/v2/pairings/a-b-c"}


def test_a_network_that_goes_and_comes_does_not_end_it(platform: Platform, device: Section) -> None:
    down = (503, b'{"error": "service_unavailable", "message": "No."}')
    platform.looks = [PORTAL, (502, b"<html>"), down, WAITING, PAIRED]
    assert pair(device)[0].state == "paired"


@pytest.mark.parametrize("gone", [EXPIRED, (404, b'{"error": "not_found", "message": "No."}')])
def test_a_code_that_is_over_is_followed_by_a_new_one_with_a_new_key(
    gone: Reply, platform: Platform, device: Section
) -> None:
    platform.looks = [gone, PAIRED]
    _, [first, second] = pair(device)
    assert first.digits != second.digits
    assert device.key() == second.key != first.key


def test_a_device_gives_up_when_nobody_comes(platform: Platform, device: Section) -> None:
    platform.looks = [EXPIRED]
    with pytest.raises(Conflict, match="Nobody has entered"):
        pair(device)
    assert len(platform.begun) == pairing.ROUNDS
    assert device.key() is None


def test_a_code_lives_ten_minutes_even_if_the_platform_never_says_so(platform: Platform, device: Section) -> None:
    platform.looks = [WAITING]
    platform.interval = 60
    clock = Clock()
    with pytest.raises(Conflict):
        pair(device, clock)
    assert set(clock.waited) == {30.0}
    assert clock.now <= pairing.ROUNDS * (pairing.LIFETIME + 30)


def test_broken_off_it_leaves_nothing(platform: Platform, device: Section) -> None:
    platform.looks = [WAITING]

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pairing.pair(device, "kitchen", lambda code: None, wait=interrupt)
    assert device.key_file is not None
    assert list(device.key_file.parent.iterdir()) == []


def test_a_full_disk_is_found_out_before_anybody_enters_a_code(
    platform: Platform, device: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(Unavailable, match="No space left"):
        pair(device)
    assert platform.begun == []


@pytest.mark.parametrize(
    ("reply", "kind", "said"),
    [
        (PORTAL, Unavailable, "Something else than a platform"),
        ((200, b"[1]"), Unavailable, "Something else than a platform"),
        ((201, b'{"id": "x", "code": "12ab", "interval": 5}'), Unavailable, "Something else than a platform"),
        ((404, b"<html>"), Unavailable, "Something else than a platform"),
        ((200, b" " * 100_000), Unavailable, "Something else than a platform"),
        ((429, b'{"error": "rate_limit_exceeded", "message": "Too many wait: try later."}'), Unavailable, "Too many"),
        ((400, b'{"error": "validation_error", "message": "The name\\nis wrong."}'), BadInput, "The name is wrong."),
    ],
)
def test_what_is_no_code_is_one_line(
    reply: Reply, kind: type[AvbError], said: str, platform: Platform, device: Section
) -> None:
    platform.begins = [reply]
    with pytest.raises(kind) as caught:
        pair(device)
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_it_does_not_go_where_a_portal_sends_it(platform: Platform, device: Section) -> None:
    elsewhere = Platform()
    try:
        platform.headers = {"Location": f"{elsewhere.url}/login"}
        platform.begins = [(302, b"")]
        with pytest.raises(Unavailable, match="Something else than a platform"):
            pair(device)
        assert (elsewhere.begun, elsewhere.asked) == ([], [])
    finally:
        elsewhere.server.shutdown()
        elsewhere.server.server_close()


def test_nobody_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="refuses the connection"):
        pairing.check(Section("http://127.0.0.1:9", tmp_path / "key"))


def test_an_answer_that_drips_is_not_waited_for(
    platform: Platform, device: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairing, "TIMEOUT", 0.05)
    platform.looks = [(200, b"{}")]
    platform.headers = {"Transfer-Encoding": "identity"}
    stuck = threading.Event()
    platform.server.RequestHandlerClass.do_GET = lambda handler: stuck.wait(60)  # type: ignore[attr-defined]
    with pytest.raises(Unavailable, match="does not answer"):
        pairing.check(device)
    stuck.set()


@pytest.mark.parametrize("url", ["http://voice.example.com", "ftp://voice.lan", "voice.lan", "https://a/b"])
def test_an_address_that_would_give_the_key_away_or_makes_none_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        pairing.check(Section(url, tmp_path / "key"))


def test_a_certificate_that_nobody_vouches_for_is_refused(
    platform: Platform, tmp_path: Path, make_certificate: Callable[[Path], tuple[Path, Path]]
) -> None:
    certificate, key = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    platform.server.socket = context.wrap_socket(platform.server.socket, server_side=True)
    url = platform.url.replace("http", "https").replace("127.0.0.1", "localhost")
    with pytest.raises(Unavailable, match="not trusted"):
        pairing.check(Section(url, tmp_path / "key"))
    pairing.check(Section(url, tmp_path / "key", ca_file=certificate))
    with pytest.raises(Unavailable, match="no file"):
        pairing.check(Section(url, tmp_path / "key", ca_file=tmp_path / "none.pem"))


@pytest.fixture
def make_certificate() -> Callable[[Path], tuple[Path, Path]]:
    """Makes a certificate for localhost that signs itself."""

    def make(directory: Path) -> tuple[Path, Path]:
        from datetime import UTC, datetime, timedelta

        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(key, hashes.SHA256())
        )
        files = directory / "cert.pem", directory / "key.pem"
        files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files

    return make


def test_a_device_without_a_key_file_is_told_how_to_get_one(platform: Platform) -> None:
    with pytest.raises(BadInput, match="avb device init"):
        pair(Section(platform.url))


@pytest.mark.parametrize(
    ("language", "begin"),
    [("en-US", "To pair"), ("de-de", "Um dieses"), ("FR", "Pour"), ("es-MX", "Para"), ("ca-es", "To pair")],
)
def test_the_digits_are_spoken_one_by_one_in_the_devices_language(language: str, begin: str) -> None:
    said = pairing.asking("42719035", language)
    assert said.startswith(begin)
    assert "4, 2, 7, 1, 9, 0, 3, 5" in said
    assert "Acme" in pairing.greeting("Acme", language)


def test_the_key_file_is_checked_without_leaving_anything(device: Section) -> None:
    pairing.check_writable(device)
    assert device.key_file is not None
    assert os.listdir(device.key_file.parent) == []
