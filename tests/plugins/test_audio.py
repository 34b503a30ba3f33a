"""Audio files of every kind that is taken, of kinds that are not, and of kinds that somebody broke."""

from __future__ import annotations

import io
import socketserver
import threading
import wave
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from agentvoicebox.config.errors import AvbError, BadInput, TooLarge
from agentvoicebox.plugins import audio

KINDS = (
    ("wav", "pcm_u8", 8_000, "mono"),
    ("wav", "pcm_s16le", 44_100, "stereo"),
    ("wav", "pcm_s24le", 48_000, "5.1"),
    ("wav", "pcm_s32le", 16_000, "mono"),
    ("wav", "pcm_f32le", 22_050, "stereo"),
    ("wav", "pcm_f64le", 96_000, "mono"),
    ("wav", "pcm_alaw", 8_000, "mono"),
    ("wav", "pcm_mulaw", 8_000, "mono"),
    ("flac", "flac", 44_100, "stereo"),
    ("mp3", "libmp3lame", 44_100, "stereo"),
    ("mp3", "libmp3lame", 16_000, "mono"),
    ("ogg", "libopus", 48_000, "mono"),
    ("ogg", "vorbis", 44_100, "stereo"),
)


def file(container: str, codec: str, rate: int, layout: str = "mono", seconds: float = 1.0) -> bytes:
    """A tone of 440 Hz in a file."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as target:
        stream = target.add_stream(codec, rate=rate, layout=layout, options={"strict": "-2"})
        wave_form = 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)
        samples = np.repeat((wave_form * 32_767).astype(np.int16), stream.layout.nb_channels)
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        for whole in (frame, None):
            for packet in stream.encode(whole):
                target.mux(packet)
    return out.getvalue()


FILES = {"-".join(map(str, kind)): file(*kind) for kind in KINDS}


def samples_of(pcm: bytes) -> NDArray[np.float64]:
    return np.frombuffer(pcm, "<i2") / 32_768


def pitch(pcm: bytes) -> float:
    samples = samples_of(pcm)
    return float(np.abs(np.fft.rfft(samples)).argmax() * audio.RATE / samples.size)


@pytest.mark.parametrize("name", FILES)
def test_every_format_rate_and_number_of_channels_gives_the_same_sound(name: str):
    pcm = audio.decode(FILES[name], longest=10)
    assert len(pcm) / 2 / audio.RATE == pytest.approx(1.0, abs=0.06)
    assert pitch(pcm) == pytest.approx(440, abs=2)
    assert np.sqrt(np.mean(samples_of(pcm) ** 2)) == pytest.approx(0.21, abs=0.02)


def test_an_id3_tag_before_it_does_not_hide_what_it_is():
    tag = b"ID3\x04\x00\x00\x00\x00\x01\x00" + bytes(128)
    for name in ("mp3-libmp3lame-44100-stereo", "flac-flac-44100-stereo"):
        assert pitch(audio.decode(tag + FILES[name], longest=10)) == pytest.approx(440, abs=2)


def test_a_file_put_together_from_two_rates_is_decoded_whole():
    both = file("mp3", "libmp3lame", 44_100) + file("mp3", "libmp3lame", 16_000)
    pcm = audio.decode(both, longest=10)
    assert len(pcm) / 2 / audio.RATE == pytest.approx(2.0, abs=0.2)
    assert pitch(pcm) == pytest.approx(440, abs=2)


@pytest.mark.parametrize(
    "data",
    [
        b"x" * 1_000,
        b"RIFF\x00\x00\x00\x00AVI LIST",
        b"#EXTM3U\nhttp://127.0.0.1/speech.mp3\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
        b"<?xml version='1.0'?><MPD/>",
        file("matroska", "flac", 16_000),
        file("mp4", "aac", 44_100),
        file("adts", "aac", 44_100),
        FILES["flac-flac-44100-stereo"][:20],
        b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f",
    ],
)
def test_what_is_none_of_them_is_refused_by_name(data: bytes):
    with pytest.raises(BadInput, match=r"WAV, MP3, FLAC or OGG") as caught:
        audio.decode(data, longest=10)
    assert caught.value.code == "audio_unreadable"


def test_a_film_is_refused_though_it_has_sound():
    out = io.BytesIO()
    with av.open(out, "w", format="ogg") as target:
        sound = target.add_stream("flac", rate=16_000, layout="mono")
        film = target.add_stream("libvpx", rate=10)
        film.width, film.height, film.pix_fmt = 64, 64, "yuv420p"
        seen = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        heard = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.int16), format="s16", layout="mono")
        heard.sample_rate, heard.pts, seen.pts = 16_000, 0, 0
        for packet in [*film.encode(seen), *sound.encode(heard), *film.encode(None), *sound.encode(None)]:
            target.mux(packet)
    with pytest.raises(BadInput) as caught:
        audio.decode(out.getvalue(), longest=10)
    assert caught.value.code == "audio_unreadable"


def test_the_cover_of_an_album_does_no_harm():
    cover = io.BytesIO()
    with av.open(cover, "w", format="image2pipe") as target:
        stream = target.add_stream("png")
        stream.width, stream.height, stream.pix_fmt = 8, 8, "rgb24"
        frame = av.VideoFrame.from_ndarray(np.zeros((8, 8, 3), np.uint8), format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            target.mux(packet)
    picture = b"\x00image/png\x00\x03\x00" + cover.getvalue()
    field = b"APIC" + len(picture).to_bytes(4, "big") + b"\x00\x00" + picture
    tag = b"ID3\x03\x00\x00" + bytes([0, 0, len(field) >> 7, len(field) & 127]) + field
    assert pitch(audio.decode(tag + FILES["mp3-libmp3lame-16000-mono"], longest=10)) == pytest.approx(440, abs=2)


def test_a_title_in_an_old_encoding_does_no_harm():
    title = b"INAM\x04\x00\x00\x00\xe9t\xe9\x00"
    chunk = b"LIST" + (4 + len(title)).to_bytes(4, "little") + b"INFO" + title
    data = FILES["wav-pcm_mulaw-8000-mono"].replace(b"data", chunk + b"data", 1)
    assert pitch(audio.decode(data, longest=10)) == pytest.approx(440, abs=2)


def test_nothing_is_said_to_be_nothing():
    for data in (b"", audio.wav(b"", audio.RATE)):
        with pytest.raises(BadInput) as caught:
            audio.decode(data, longest=10)
        assert caught.value.code == "audio_empty"


def test_no_file_makes_us_ask_somebody_else():
    asked = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked.set()

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/a.mp3".encode()
        for playlist in (b"#EXTM3U\n" + url, b"#EXTM3U\n#EXTINF:1,\n" + url, b"ffconcat version 1.0\nfile " + url, url):
            for start in (b"", b"ID3\x04\x00\x00\x00\x00\x00\x00", b"RIFF\x00\x00\x00\x00WAVE", b"OggS", b"\xff\xfb"):
                with pytest.raises(BadInput):
                    audio.decode(start + playlist, longest=10)
        server.shutdown()
        thread.join()
    assert not asked.is_set()


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_breaks_off_gives_what_there_is_of_it(name: str):
    # Ogg's pages are a second long: what is left of the last one is nothing.
    whole = file(*next(kind for kind in KINDS if "-".join(map(str, kind)) == name), seconds=4)
    pcm = audio.decode(whole[: len(whole) * 3 // 4], longest=10)
    assert 1.5 < len(pcm) / 2 / audio.RATE < 3.5
    assert pitch(pcm) == pytest.approx(440, abs=2)


def test_three_hours_are_refused_after_as_much_as_is_taken():
    hours = file("flac", "flac", 8_000, seconds=600)
    taken = len(audio.decode(hours, longest=601)) / 2 / audio.RATE
    assert taken == pytest.approx(600, abs=1)
    seen: list[float] = []
    frames = audio._frames(hours)

    def counted():
        for frame in frames:
            seen.append(frame.samples / frame.sample_rate)
            yield frame

    with pytest.raises(TooLarge) as caught:
        list(audio._converted(counted(), 20))
    assert caught.value.code == "audio_too_long"
    assert sum(seen) < 25
    frames.close()
    with pytest.raises(TooLarge):
        audio.decode(hours, longest=20)


def test_a_header_that_lies_about_its_length_changes_nothing():
    data = bytearray(FILES["wav-pcm_s16le-44100-stereo"])
    for claim in (0, 0xFFFFFFFF, 0x7FFFFFFF):
        data[4:8] = claim.to_bytes(4, "little")
        place = data.index(b"data") + 4
        data[place : place + 4] = claim.to_bytes(4, "little")
        try:
            assert len(audio.decode(bytes(data), longest=10)) / 2 / audio.RATE == pytest.approx(1.0, abs=0.01)
        except BadInput as error:
            assert claim == 0 and error.code == "audio_empty"  # noqa: PT018, PT017


def test_a_rate_that_no_device_has_is_refused():
    for rate in (1, 100, 384_000, 2_000_000_000):
        with pytest.raises(BadInput) as caught:
            audio.decode(audio.wav(bytes(4_000), rate), longest=1e9)
        assert caught.value.code == "audio_unreadable"


def silence(channels: int, rate: int, seconds: float) -> bytes:
    """A WAV file."""
    out = io.BytesIO()
    with wave.open(out, "wb") as made:
        made.setparams((channels, 2, rate, 0, "NONE", ""))
        made.writeframes(bytes(int(rate * seconds) * channels * 2))
    return out.getvalue()


def test_many_channels_are_one_and_too_many_are_refused():
    assert len(audio.decode(silence(8, 16_000, 0.5), longest=1)) == 16_000
    with pytest.raises(BadInput, match="8 channels") as caught:
        audio.decode(silence(9, 16_000, 0.5), longest=1)
    assert caught.value.code == "audio_unreadable"


def test_a_small_file_of_much_work_is_refused_before_it_is_done(monkeypatch: pytest.MonkeyPatch):
    """Silence in eight channels at 192 kHz packs to next to nothing: seconds alone are no bound of the work."""
    heard = []
    mono = audio._mono

    def seen(frame: Any) -> Any:
        heard.append(frame.samples * frame.layout.nb_channels)
        return mono(frame)

    monkeypatch.setattr(audio, "_mono", seen)
    with pytest.raises(TooLarge, match="mono at 16 kHz") as caught:
        audio.decode(silence(8, 192_000, 4), longest=10)
    assert caught.value.code == "audio_too_long"
    assert sum(heard) <= 10 * 2 * 96_000
    assert len(audio.decode(silence(8, 192_000, 0.5), longest=10)) == 16_000, "little of it is welcome"


def test_what_is_no_number_is_no_sound():
    data = bytearray(file("wav", "pcm_f32le", 16_000))
    start = data.index(b"data") + 8
    data[start : start + 16_000] = np.tile(np.array([np.nan, np.inf, -np.inf, 3e38], "<f4"), 1_000).tobytes()
    pcm = audio.decode(bytes(data), longest=10)
    assert len(pcm) == 32_000
    assert pitch(pcm[16_000:]) == pytest.approx(440, abs=2)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(FILES)), st.data())
def test_whatever_is_done_to_a_file_it_is_decoded_or_refused(name: str, data: st.DataObject):
    broken = bytearray(FILES[name][: data.draw(st.integers(0, len(FILES[name])), "length")])
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 255)), max_size=20)):
        if place < len(broken):
            broken[place] = byte
    refused_or_short(bytes(broken))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(
        [b"", b"RIFF\x00\x00\x00\x00WAVEfmt ", b"fLaC", b"OggS", b"\xff\xfb\x90", b"ID3\x04", b"#EXTM3U\n"]
    ),
    st.binary(max_size=2_000),
)
def test_bytes_of_no_meaning_are_decoded_or_refused(start: bytes, data: bytes):
    refused_or_short(start + data)


def refused_or_short(data: bytes) -> None:
    try:
        pcm = audio.decode(data, longest=5)
    except AvbError as error:
        assert error.code in ("audio_empty", "audio_unreadable", "audio_too_long")  # noqa: PT017
    else:
        assert 0 < len(pcm) <= 2 * audio.RATE * 5.1


@pytest.fixture
def tone() -> Callable[[float, float], NDArray[np.int16]]:
    """`tone(seconds, loudness)`, 440 Hz at 16 kHz."""

    def play(seconds: float, loudness: float) -> NDArray[np.int16]:
        times = np.arange(int(seconds * audio.RATE)) / audio.RATE
        return (loudness * 32_767 * np.sin(2 * np.pi * 440 * times)).astype("<i2")

    return play


def test_the_quiet_become_loud_and_the_loud_become_quiet(tone: Callable[[float, float], NDArray[np.int16]]):
    for loudness in (0.01, 0.1, 1.0):
        louder = samples_of(audio.normalised(tone(1, loudness).tobytes()))
        assert np.sqrt(np.mean(louder**2)) == pytest.approx(0.1, abs=0.01)
    click = np.zeros(16_000, "<i2")
    click[8_000] = 20_000
    assert np.abs(samples_of(audio.normalised(click.tobytes()))).max() < 0.9
    assert audio.normalised(bytes(200)) == bytes(200)
    assert audio.normalised(b"") == b""


def test_noise_goes_and_what_was_said_stays(tone: Callable[[float, float], NDArray[np.int16]]):
    noise = np.random.default_rng(0).standard_normal(48_000) * 300
    noise[16_000:32_000] += tone(1, 0.3)
    clean = samples_of(audio.denoised(noise.astype("<i2").tobytes()))
    assert clean.size == noise.size
    assert clean[4_000:12_000].std() < noise[4_000:12_000].std() / 32_768 / 2
    assert clean[20_000:28_000].std() == pytest.approx(0.21, abs=0.02)
    for nothing in (b"", bytes(10), bytes(3_200)):
        assert audio.denoised(nothing) == nothing


def test_long_audio_is_cut_where_nobody_speaks(tone: Callable[[float, float], NDArray[np.int16]]):
    noise = np.random.default_rng(1)
    speech = [noise.normal(0, 3_000, int(audio.RATE * seconds)) for seconds in (7.0, 8.0, 6.0)]
    pause = np.zeros(audio.RATE // 2)
    pcm = np.concatenate([speech[0], pause, speech[1], pause, speech[2]]).astype("<i2").tobytes()
    pieces = audio.split(pcm, 10)
    assert b"".join(pieces) == pcm
    assert [len(piece) / 2 / audio.RATE for piece in pieces] == pytest.approx([7.25, 8.5, 6.25], abs=0.2)
    assert audio.split(b"", 10) == []
    assert audio.split(pcm, 60) == [pcm]
    unbroken = noise.normal(0, 3_000, audio.RATE * 21).astype("<i2").tobytes()
    pieces = audio.split(unbroken, 5)
    assert b"".join(pieces) == unbroken
    assert all(len(piece) <= 5 * 2 * audio.RATE for piece in pieces)
    assert b"".join(audio.split(unbroken[:4_000], 0.01)) == unbroken[:4_000]


def test_a_wav_file_is_one():
    with wave.open(io.BytesIO(audio.wav(b"\x01\x00" * 10, 24_000))) as found:
        assert (found.getframerate(), found.getnchannels(), found.getsampwidth()) == (24_000, 1, 2)
        assert found.readframes(99) == b"\x01\x00" * 10
