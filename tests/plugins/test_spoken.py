"""What was spoken is kept for who said it, and for nobody else."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from agentvoicebox.plugins.pool import EngineSpec, Speech
from agentvoicebox.plugins.spoken import Said, Spoken

SAID = Said("acme", EngineSpec("tts", "agentvoicebox-tts-flite"), "slt", 1.0, "en-US", "Your balance is low.")
CHUNKS = (Speech(b"\1\0" * 8_000, 16_000), Speech(b"\2\0" * 4_000, 16_000))


def speech(size: int) -> tuple[Speech, ...]:
    return (Speech(bytes(size), 16_000),)


def test_a_hit_is_what_the_miss_was():
    spoken = Spoken()
    assert spoken.get(SAID) is None
    spoken.put(SAID, iter(CHUNKS))
    hit = spoken.get(SAID)
    assert hit == CHUNKS
    # Metering counts the seconds of what is returned: a repetition costs the tenant what it cost before.
    assert sum(chunk.seconds for chunk in hit) == sum(chunk.seconds for chunk in CHUNKS) == 0.75


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "umbrella"},
        {"engine": EngineSpec("tts", "agentvoicebox-tts-flite", (("voice", "rms"),))},
        {"voice": "rms"},
        {"speed": 1.1},
        {"language": "en-GB"},
        {"text": "Your balance is low!"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_whoever_says_it_otherwise_hears_nothing_of_it(other: dict[str, object]):
    spoken = Spoken()
    spoken.put(SAID, CHUNKS)
    assert spoken.get(replace(SAID, **other)) is None


def test_the_longest_unused_gives_way():
    spoken = Spoken(40_000)
    for text in ("one", "two", "three"):
        spoken.put(replace(SAID, text=text), speech(2_000))
    assert spoken.get(replace(SAID, text="one"))
    spoken.put(replace(SAID, text="four"), speech(2_000))
    kept = [text for text in ("one", "two", "three", "four") if spoken.get(replace(SAID, text=text))]
    assert kept == ["one", "three", "four"]


def test_a_flood_of_one_tenant_pushes_out_its_own():
    spoken = Spoken(100_000)
    quiet = replace(SAID, tenant="umbrella")
    spoken.put(quiet, speech(5_000))
    for number in range(1_000):
        spoken.put(replace(SAID, text=str(number)), speech(5_000))
    assert spoken.get(quiet)
    assert spoken.get(replace(SAID, text="999"))
    assert spoken.size <= 100_000 // 4 + 7_000


def test_the_room_is_never_exceeded():
    spoken = Spoken(50_000)
    for number in range(200):
        spoken.put(replace(SAID, tenant=f"tenant {number % 20}", text=str(number)), speech(3_000))
        assert spoken.size <= 50_000
    assert spoken.size > 40_000


def test_what_exceeds_a_share_is_not_kept():
    spoken = Spoken(40_000)
    spoken.put(replace(SAID, text="short"), speech(1_000))
    spoken.put(SAID, speech(10_000))
    assert spoken.get(SAID) is None
    assert spoken.get(replace(SAID, text="short"))


def test_the_same_again_takes_no_more_room():
    spoken = Spoken()
    spoken.put(SAID, CHUNKS)
    size = spoken.size
    spoken.put(SAID, CHUNKS)
    assert spoken.size == size


def test_threads_may_share_it():
    spoken = Spoken(60_000)

    def work(tenant: str) -> None:
        for number in range(500):
            said = replace(SAID, tenant=tenant, text=str(number % 7))
            spoken.get(said)
            spoken.put(said, speech(1_000))

    threads = [threading.Thread(target=work, args=(f"tenant {number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = [spoken.get(replace(SAID, tenant=f"tenant {n}", text=str(k))) for n in range(6) for k in range(7)]
    one = 1_000 + 1_024 + 4
    assert spoken.size == one * sum(chunks is not None for chunks in kept) <= 60_000


def test_wording_is_not_in_what_might_be_logged():
    assert "balance" not in repr(SAID)
