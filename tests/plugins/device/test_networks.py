"""Links over bad networks, to platforms that are ill, and to what is no platform: each survived, in one line."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agentvoicebox.plugins.device import connection, mycroft, wire
from agentvoicebox.plugins.device import link as links
from agentvoicebox.plugins.device.choices import Choices
from agentvoicebox.plugins.device.link import Away, Failed, Link, State

Until = Callable[..., Any]
PATIENCE = 30.0
"""Seconds for an answer that comes at some time."""
HTML = "<html><body>Welcome to our hotel. Please log in.</body></html>"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other without a rest worth the name."""
    for name, seconds in (("SOONEST", 0.01), ("LATEST", 0.05), ("LOOK", 0.01)):
        monkeypatch.setattr(links, name, seconds)


@pytest.fixture(autouse=True)
def _no_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else than what is tested ends a connection."""
    monkeypatch.setattr(connection, "PING", None)


def is_up(link: Link) -> Callable[[], bool]:
    return lambda: link.state is State.UP


# --- what is no platform ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 302, 401, 403, 511])
def test_a_captive_portal_is_known_for_one(
    status: int, new_link: Any, platform: Any, until: Until, lines: list[str], at_once: None
) -> None:
    platform.refusal = (status, "text/html", HTML)
    link = new_link()
    until(lambda: link.state is State.AWAY)
    assert "log in" in link.reason or status == 511
    assert "\n" not in link.reason
    with pytest.raises(Away) as away:
        link.listen()
    assert away.value.message == link.reason
    until(lambda: len(platform.requests) >= 3)
    assert lines == [link.reason]
    platform.refusal = None
    until(is_up(link))
    until(lambda: len(lines) >= 2)  # which is said after it is so
    assert len(lines) == 2


def test_a_device_does_not_go_where_a_portal_sends_it(new_link: Any, platform: Any, until: Until) -> None:
    platform.refusal = (302, "text/html", HTML)
    platform.elsewhere = f"{platform.url}/login"
    link = new_link()
    until(lambda: link.state is State.AWAY)
    assert "log in" in link.reason
    assert {request.path for request in platform.requests} == {wire.PATH}


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", b"\0" * 5000, b""]
)
def test_another_server_on_the_port_is_no_platform(answer: bytes, new_link: Any, until: Until, at_once: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    visitor, _ = server.accept()
                    with visitor:
                        visitor.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        link = new_link(url=f"http://127.0.0.1:{server.getsockname()[1]}")
        until(lambda: link.state is State.AWAY)
        assert link.reason
        link.close()
        server.shutdown(socket.SHUT_RDWR)
        thread.join(30)


def test_a_name_that_is_not_found(new_link: Any, until: Until, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    link = new_link(url="https://voice.example.com")
    until(lambda: link.state is State.AWAY)
    assert link.reason == "The name voice.example.com is not found: check the network, and the url in mycroft.conf."


def test_a_port_where_nobody_listens(new_link: Any, platform: Any, until: Until) -> None:
    platform.stop()
    link = new_link()
    until(lambda: link.state is State.AWAY)
    assert "refuses the connection" in link.reason


@pytest.mark.parametrize("url", ["http://voice.example.com", "nonsense", "https://user:word@host"])
def test_a_url_that_will_not_do_is_said_and_goes_nowhere(url: str, new_link: Any, until: Until) -> None:
    link = new_link(url=url)
    until(lambda: link.state is State.AWAY)
    assert "mycroft.conf" in link.reason


# --- certificates and clocks ------------------------------------------------------------------------------------------


class Authority:
    """Signs certificates for this machine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Test authority")])
        self.file = directory / "ca.pem"
        self.file.write_bytes(self._sign(self.name, self.key, -10, 10, ca=True))

    def context(self, begin: float = -1, end: float = 1, host: str = "localhost") -> ssl.SSLContext:
        """Of a server whose certificate is good from and to so many days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        chain, secret = self.directory / "chain.pem", self.directory / "key.pem"
        chain.write_bytes(self._sign(name, key, begin, end, host=host))
        secret.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain, secret)
        return context

    def _sign(
        self,
        name: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        begin: float,
        end: float,
        ca: bool = False,
        host: str = "",
    ) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=begin))
            .not_valid_after(now + datetime.timedelta(days=end))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(own, critical=False)
            .add_extension(signer, critical=False)
        )
        if host:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def serve_tls(platform: Any, context: ssl.SSLContext) -> str:
    platform.stop()
    platform.start(context)
    return f"https://localhost:{platform.port}"


def test_a_platform_of_ones_own_authority(new_link: Any, platform: Any, until: Until, authority: Authority) -> None:
    link = new_link(url=serve_tls(platform, authority.context()), ca_file=authority.file)
    until(is_up(link))
    assert link.about(timeout=PATIENCE) == {"skill": ""}


@pytest.mark.parametrize(
    ("begin", "end", "host", "known", "said"),
    [
        (400, 800, "localhost", True, "not valid yet; the clock of this device says {today}"),
        (-800, -400, "localhost", True, "has expired; the clock of this device says {today}"),
        (-1, 1, "localhost", False, "ca_file"),
        (-1, 1, "login.hotel.example", True, "for another name"),
    ],
)
def test_a_certificate_that_will_not_do(
    begin: float,
    end: float,
    host: str,
    known: bool,
    said: str,
    new_link: Any,
    platform: Any,
    until: Until,
    authority: Authority,
    at_once: None,
) -> None:
    url = serve_tls(platform, authority.context(begin, end, host))
    today = {_today()}
    link = new_link(url=url, ca_file=authority.file if known else None)
    until(lambda: link.state is State.AWAY)
    today.add(_today())  # it may be midnight
    assert any(said.format(today=day) in link.reason for day in today)
    if known:
        # The clock has been set, or the certificate renewed: that is all it takes.
        serve_tls(platform, authority.context())
        until(is_up(link))
        assert link.reason == ""


def _today() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"


def test_a_ca_file_that_is_missing_or_none(new_link: Any, until: Until, tmp_path: Path) -> None:
    missing = new_link(url="https://localhost:9", ca_file=tmp_path / "missing.pem")
    until(lambda: missing.state is State.AWAY)
    assert "missing.pem" in missing.reason
    (tmp_path / "none.pem").write_text("none")
    none = new_link(url="https://localhost:9", ca_file=tmp_path / "none.pem")
    until(lambda: none.state is State.AWAY)
    assert "none.pem" in none.reason


def test_a_platform_without_tls_where_it_is_expected(new_link: Any, platform: Any, until: Until) -> None:
    link = new_link(url=f"https://localhost:{platform.port}")
    until(lambda: link.state is State.AWAY)
    assert "https" in link.reason


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_key_that_appears_is_used_at_once(
    new_link: Any, platform: Any, until: Until, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "LOOK", 0.01)
    key = tmp_path / "later.key"
    link = new_link(key_file=key)
    until(lambda: link.state is State.REFUSED)
    assert "avb device pair" in link.reason
    with pytest.raises(Away) as away:
        link.ask("Why?")
    assert away.value.code == "key_refused"
    assert platform.requests == []
    key.write_text("avb_" + "n" * 43)
    until(is_up(link))
    assert platform.requests[0].headers["Authorization"] == "Bearer avb_" + "n" * 43


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [(401, "invalid_api_key", "avb device pair"), (403, "permission_denied", "This key is not of the tenant")],
)
def test_a_key_that_is_refused_is_tried_again_when_it_changes(
    status: int,
    code: str,
    said: str,
    new_link: Any,
    platform: Any,
    until: Until,
    tmp_path: Path,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(links, "LOOK", 0.01)
    body = f'{{"error": "{code}", "message": "This key is not of the tenant that X-Tenant-ID names."}}'
    platform.refusal = (status, "application/json", body)
    link = new_link()
    until(lambda: link.state is State.REFUSED)
    assert said in link.reason
    platform.refusal = None
    # At once, as pairing does it: a file that is still empty would be another reason, and another line.
    mycroft.write_key(tmp_path / "device.key", "avb_" + "n" * 43)
    until(is_up(link))
    until(lambda: len(lines) >= 2)  # which is said after it is so
    assert len(lines) == 2
    # The rest after a refusal is half a minute: it was cut short, and nobody knocked meanwhile.
    assert len(platform.requests) == 2


@pytest.mark.parametrize(("code", "said"), [(4001, "avb device pair"), (4005, "tenant")])
def test_a_key_that_is_revoked_while_somebody_speaks(
    code: int, said: str, link: Link, platform: Any, until: Until
) -> None:
    listening = link.listen()
    listening.send(bytes(1000))
    until(lambda: platform.told(wire.Listen))

    async def close(socket: Any) -> None:
        await socket.close(code, "key_revoked")

    platform.push(wire.Problem(0, "invalid_api_key", "This key has been revoked."), close)
    with pytest.raises(Away) as away:
        listening.result()
    assert away.value.code == "key_refused"
    assert link.state is State.REFUSED
    assert said in link.reason


def test_a_key_that_is_on_several_devices_is_said_and_not_fought_over(
    link: Link, platform: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []

    async def rest(self: Link, seconds: float, mark: object) -> None:
        rests.append(seconds)

    async def close(socket: Any) -> None:
        await socket.close(4009, "replaced")

    monkeypatch.setattr(Link, "_rest", rest)
    monkeypatch.setattr(links, "STEADY", 0)
    platform.push(close)
    until(lambda: rests)
    assert rests[0] >= 15
    until(is_up(link))


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, "", "older than this device"),
        (503, "", "HTTP 503"),
        (503, '{"error": "store_unavailable", "message": "The store is away."}', "The store is away."),
        (429, "", "too often"),
    ],
)
def test_a_platform_that_cannot_serve(
    status: int, body: str, said: str, new_link: Any, platform: Any, until: Until, at_once: None
) -> None:
    platform.refusal = (status, "application/json", body)
    link = new_link()
    until(lambda: link.state is State.AWAY)
    assert said in link.reason
    platform.refusal = None
    until(is_up(link))


def listen_to_the_end(link: Link) -> wire.Transcript:
    listening = link.listen()
    listening.send(bytes(1000))
    listening.finish()
    return listening.result()


# --- platforms that go, and come back ---------------------------------------------------------------------------------


def test_a_platform_that_starts_again_is_found_again(link: Link, platform: Any, until: Until, at_once: None) -> None:
    for _ in range(3):
        platform.stop()
        until(lambda: link.state is State.AWAY)
        platform.start()
        until(is_up(link))
        assert link.about(timeout=PATIENCE) == {"skill": ""}


def test_what_was_asked_of_a_platform_that_dies_is_let_go(link: Link, platform: Any, until: Until) -> None:
    platform.answers[wire.Speak] = lambda said: [wire.Sound(said.id, 24_000), wire.audio(said.id, b"\1\2")]
    platform.answers[wire.Ask] = lambda said: [wire.Text(said.id, "It ")]
    listening, speaking, asking = link.listen(), link.speak("Hello."), link.ask("Why?")
    listening.send(bytes(1000))
    assert (next(speaking), next(asking)) == ((b"\1\2", 24_000), "It ")
    platform.stop()
    for wait in (listening.result, lambda: next(speaking), lambda: next(asking)):
        with pytest.raises(Away) as away:
            wait()
        assert away.value.code == "platform_away"
    with pytest.raises(Away):
        link.listen()


def ask_about_it(link: Link) -> dict[str, Any]:
    return link.about(timeout=PATIENCE)  # longer than the platform may be silent: that is what ends it


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("ask", [listen_to_the_end, ask_about_it, lambda link: next(link.ask("Why?"))])
def test_a_platform_that_stands_still_is_let_go(
    ask: Callable[[Link], Any], link: Link, platform: Any, until: Until, at_once: None
) -> None:
    """The port is there, the connection too, and not a byte comes: a process that was stopped, or a black hole."""
    platform.freeze()
    with pytest.raises(Away):
        ask(link)
    until(lambda: link.state is State.AWAY)
    with pytest.raises(Away):
        link.listen()
    platform.thaw()
    until(is_up(link))
    assert link.about(timeout=PATIENCE) == {"skill": ""}


def test_what_a_platform_says_before_it_closes_is_the_reason(link: Link, platform: Any, until: Until) -> None:
    async def close(socket: Any) -> None:
        await socket.close(1013, "store_unavailable")

    platform.push(wire.Problem(0, "store_unavailable", "The store does not answer."), close)
    until(lambda: link.state is State.AWAY)
    assert "The store does not answer." in link.reason


def test_a_platform_that_never_says_welcome(
    new_link: Any, platform: Any, until: Until, monkeypatch: pytest.MonkeyPatch, at_once: None
) -> None:
    monkeypatch.setattr(connection, "WELCOME", 0.05)
    platform.greet = lambda hello: []
    link = new_link()
    until(lambda: link.state is State.AWAY)
    assert "does not answer" in link.reason
    del platform.greet


def test_a_platform_that_welcomes_and_leaves_is_not_besieged(
    new_link: Any, platform: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []

    async def rest(self: Link, seconds: float, mark: object) -> None:
        rests.append(seconds)

    async def leave(socket: Any) -> None:
        await socket.close(1011)

    monkeypatch.setattr(Link, "_rest", rest)
    platform.greet = lambda hello: [wire.Welcome("t", "Acme", "d", 1.0), leave]
    link = new_link()
    until(lambda: len(rests) >= 9)
    link.close()
    assert all(0.5 * 0.25 * 2**n <= rest <= 0.25 * 2**n for n, rest in enumerate(rests[:7]))
    assert max(rests) <= 30


@pytest.mark.parametrize(
    "first", [[wire.Problem(0, "tenant_busy", "Too many devices.")], [wire.Done(1)], ["x"], [b"ab"]]
)
def test_a_platform_that_says_something_else_than_welcome(
    first: list[Any], new_link: Any, platform: Any, until: Until, at_once: None
) -> None:
    platform.greet = lambda hello: first
    link = new_link()
    until(lambda: link.state is State.AWAY)
    assert link.reason
    assert not isinstance(first[0], wire.Problem) or "Too many devices." in link.reason


# --- platforms that talk nonsense -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nonsense",
    [
        ["not json"],
        ["{}"],
        ['{"type":"sound","id":"x","rate":1}'],
        [b"\0"],
        [b"\0\0\0\1\5"],
        [wire.Welcome("t", "Acme", "d", 1.0)],
        ["x" * (wire.LARGEST_FRAME + 1)],
        ['{"type":"mood"}'] * 100,
    ],
    ids=["text", "nothing", "types", "short", "odd", "welcome", "large", "unknown"],
)
def test_a_frame_that_makes_no_sense_ends_what_is_asked_but_not_the_link(
    nonsense: list[Any], link: Link, platform: Any, until: Until, at_once: None
) -> None:
    platform.answers[wire.Speak] = lambda said: [wire.Sound(said.id, 24_000), wire.audio(said.id, b"\1\2"), *nonsense]
    speaking = link.speak("Hello.")
    assert next(speaking) == (b"\1\2", 24_000)
    with pytest.raises(Away):
        next(speaking)
    until(lambda: len(platform.told(wire.Hello)) == 2)
    until(is_up(link))
    assert link.about(timeout=PATIENCE) == {"skill": ""}


@pytest.mark.parametrize(
    "wrong", [[wire.audio(1, b"\1\2")], [wire.Text(1, "x")], [wire.Sound(1, 3)], [wire.Transcript(1, "x")]]
)
def test_an_answer_to_another_question_fails_and_the_link_stays(wrong: list[Any], link: Link, platform: Any) -> None:
    platform.answers[wire.Speak] = lambda said: wrong
    with pytest.raises(Failed) as failed:
        list(link.speak("Hello."))
    assert failed.value.code == "platform_garbled"
    assert link.about(timeout=PATIENCE) == {"skill": ""}
    assert link.state is State.UP


def test_answers_to_what_nobody_has_asked_are_passed_over(link: Link, platform: Any) -> None:
    platform.push(wire.Done(9), wire.Text(9, "x"), wire.audio(9, b"\1\2"), wire.Problem(9, "x", "X."), wire.Working(9))
    assert link.about(timeout=PATIENCE) == {"skill": ""}


@pytest.mark.usefixtures("silence")
def test_half_a_reply_and_then_nothing(link: Link, platform: Any, until: Until, at_once: None) -> None:
    platform.beats = False
    platform.answers[wire.Speak] = lambda said: [wire.Sound(said.id, 24_000), wire.audio(said.id, bytes(12_000))]
    speaking = link.speak("Hello.")
    assert len(next(speaking)[0]) == 12_000
    with pytest.raises(Away):
        next(speaking)
    until(is_up(link))


def test_work_that_leads_nowhere_is_given_up(
    link: Link, platform: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STUCK", 0.5)
    platform.answers[wire.Ask] = lambda said: []
    with pytest.raises(Away, match="come to an end"):
        next(link.ask("Why?"))
    until(lambda: platform.told(wire.Cancel))
    assert link.state is State.UP


def test_a_request_that_is_forgotten_is_given_up(link: Link, platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FORGOTTEN", 0.5)
    platform.answers[wire.Ask] = lambda said: [wire.Working(99), 0.1] * 100
    platform.beats = False
    with pytest.raises(Away, match="come to an end"):
        next(link.ask("Why?"))
    assert link.state is State.UP


def test_a_platform_that_does_not_read_keeps_nobody_waiting(link: Link, platform: Any, until: Until) -> None:
    async def stop_reading(socket: Any) -> None:
        socket.transport.pause_reading()

    platform.answers[wire.Listen] = lambda said: [stop_reading]
    listening = link.listen()
    until(lambda: platform.told(wire.Listen))
    chunk = bytes(32_000)
    for _ in range(2000):
        listening.send(chunk)
    with pytest.raises(Away, match="slow"):
        listening.result()
    assert link.state is State.UP


@pytest.mark.usefixtures("silence")
def test_a_long_silence_before_a_request_is_none_of_death(link: Link, platform: Any) -> None:
    platform.beats = False
    platform.answers[wire.Ask] = lambda said: [0.3, wire.Text(said.id, "ten"), wire.Done(said.id)]
    assert link._connection is not None
    link._connection._socket.heard = -1e6
    assert list(link.ask("Why?")) == ["ten"]


def test_a_large_answer_on_a_slow_network_is_a_sign_of_life(
    link: Link, platform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One frame takes longer than the platform may be silent, and nothing else gets past it meanwhile."""
    monkeypatch.setattr(connection, "SILENT", 0.6)
    platform.beats = False
    frame = wire.audio(1, bytes(200_000))

    async def drip(socket: Any) -> None:
        head = bytes([0x82, 127]) + len(frame).to_bytes(8, "big")
        whole = head + frame
        for begin in range(0, len(whole), 10_000):
            socket.transport.write(whole[begin : begin + 10_000])
            await asyncio.sleep(0.05)

    platform.answers[wire.Speak] = lambda said: [wire.Sound(said.id, 24_000), drip, wire.Done(said.id)]
    assert [len(pcm) for pcm, _ in link.speak("Hello.")] == [200_000]


@pytest.mark.usefixtures("silence")
def test_a_device_that_stood_still_itself_blames_nobody(link: Link, platform: Any, until: Until) -> None:
    """The link's thread does not run for a while, as when a model is loaded or the lid is closed."""
    go_on = threading.Event()
    platform.answers[wire.Ask] = lambda said: [0.2, wire.Text(said.id, "ten"), 1.5, wire.Done(said.id)]
    asking = link.ask("Why?")
    until(lambda: platform.told(wire.Ask))
    link._loop.call_soon_threadsafe(go_on.wait, 1.2)
    assert list(asking) == ["ten"]


@pytest.mark.usefixtures("silence")
def test_a_device_that_stood_still_with_its_platform_blames_nobody(link: Link, platform: Any, until: Until) -> None:
    """As on one machine that was suspended; the platform comes to itself a little later."""
    go_on = threading.Event()
    platform.answers[wire.Ask] = lambda said: [0.2, wire.Text(said.id, "ten"), wire.Done(said.id)]
    asking = link.ask("Why?")
    until(lambda: platform.told(wire.Ask))
    link._loop.call_soon_threadsafe(go_on.wait)
    platform.freeze()
    time.sleep(1.0)
    go_on.set()
    time.sleep(0.2)
    platform.thaw()
    assert list(asking) == ["ten"]


def test_choices_come_with_the_first_word_after_a_long_time(
    link: Link, platform: Any, until: Until, at_once: None
) -> None:
    platform.stop()
    until(lambda: link.state is State.AWAY)
    platform.choices = Choices(tenant="Acme")
    platform.start()
    until(lambda: link.choices.tenant == "Acme")


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    """No thread of a test outlives it by much."""
    yield
    assert threading.active_count() < 60
