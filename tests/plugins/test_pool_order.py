"""Who is served when, and by which engine: turns, batches, guesses, deadlines, fail-over."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar

import pytest
from ovos_plugin_manager.templates.stt import STT

from agentvoicebox.config.errors import AvbError, BadInput, Unavailable
from agentvoicebox.plugins.breaker import FAILURES
from agentvoicebox.plugins.pool import EngineSpec, Heard, Pool, Transcript, cancelled, engine

NUMBERS, BATCHES, FLAKY, FICKLE, DOUBLE = (
    EngineSpec("stt", name) for name in ("numbers", "batches", "flaky", "fickle", "double")
)
MISSING = EngineSpec("stt", "no-such-plugin")


class Plugin(STT):
    """Hears the number that its audio begins with, when the test lets it."""

    begun: ClassVar[list[int]] = []
    started: ClassVar[threading.Semaphore]
    gate: ClassVar[threading.Semaphore]
    deaf: ClassVar[bool] = False
    """Whether it takes no notice of callers that leave."""

    def execute(self, audio: Any, language: str | None = None) -> str:
        number = int.from_bytes(audio.frame_data[:2], "little")
        self.begin(number)
        return str(number)

    def begin(self, *numbers: int) -> None:
        Plugin.begun.extend(numbers)
        Plugin.started.release()
        while not Plugin.gate.acquire(timeout=0.005):
            if cancelled() and not Plugin.deaf:
                return


class Batches(Plugin):
    """Hears up to four at once; whole batches fail for a 13, and a 7 is refused."""

    batch = 4
    sizes: ClassVar[list[int]] = []

    def transcribe_batch(self, jobs: list[Heard]) -> list[tuple[str, float | None, str] | AvbError]:
        numbers = [int.from_bytes(job.pcm16k[:2], "little") for job in jobs]
        Batches.sizes.append(len(jobs))
        self.begin(*numbers)
        if 13 in numbers:
            raise ValueError("thirteen")
        return [BadInput("seven") if number == 7 else (f"{number} ", 2.0, "de-DE") for number in numbers]


class Double(Batches):
    """Does two such calls at once."""

    parallel = 2


class Flaky(Plugin):
    """Fails when it is told."""

    calls = 0
    ill = True

    def execute(self, audio: Any, language: str | None = None) -> str:
        Flaky.calls += 1
        if audio.frame_data[:2] == b"\7\0":
            raise BadInput("seven", code="unsupported_language")
        if Flaky.ill:
            raise RuntimeError("ill")
        return "well"


class Fickle(Plugin):
    """Loads at the second attempt."""

    attempts = 0

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        Fickle.attempts += 1
        if Fickle.attempts == 1:
            raise SystemExit("no model")

    def execute(self, audio: Any, language: str | None = None) -> str:
        return "loaded"


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"numbers": Plugin, "batches": Batches, "flaky": Flaky, "fickle": Fickle, "double": Double}
    monkeypatch.setattr(engine, "plugin_class", lambda kind, name: found.get(name))
    monkeypatch.setattr("agentvoicebox.plugins.pool.installed", lambda kind: frozenset(found))
    Plugin.begun, Plugin.started, Plugin.gate = [], threading.Semaphore(0), threading.Semaphore(0)
    Plugin.deaf = False
    Batches.sizes, Flaky.calls, Flaky.ill, Fickle.attempts = [], 0, True, 0


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    made = Pool()
    yield made
    Plugin.gate.release(10_000)
    await asyncio.to_thread(made.close)


def audio(number: int) -> bytes:
    return number.to_bytes(2, "little") * 160


Ask = Callable[..., "asyncio.Task[Transcript]"]


@pytest.fixture
def ask(pool: Pool) -> Ask:
    def begin(number: int, tenant: str = "a", spec: Any = NUMBERS, **more: Any) -> asyncio.Task[Transcript]:
        return asyncio.create_task(pool.transcribe(spec, audio(number), 16_000, "en-US", tenant=tenant, **more))

    return begin


async def begun() -> None:
    """Return when the engine has begun one call more."""
    assert await asyncio.to_thread(Plugin.started.acquire, timeout=30)


async def waiting(pool: Pool, count: int) -> None:
    """Return when so many jobs wait."""
    async with asyncio.timeout(30):
        while sum(each.waiting for each in pool.metrics()) != count:
            await asyncio.sleep(0.001)


async def error_of(task: asyncio.Task[Transcript]) -> AvbError:
    with pytest.raises(AvbError) as caught:
        await task
    return caught.value


async def test_a_hundred_jobs_of_one_tenant_delay_anothers_first_by_the_one_at_work(pool: Pool, ask: Ask):
    tasks = [ask(0)]
    await begun()
    tasks += [ask(number) for number in range(1, 100)]
    await waiting(pool, 99)
    tasks.append(ask(200, "b"))
    await waiting(pool, 100)
    Plugin.gate.release(200)
    texts = [found.text for found in await asyncio.gather(*tasks)]
    assert texts == [*map(str, range(100)), "200"], "each has its own answer"
    assert Plugin.begun[:3] == [0, 200, 1]


async def test_what_waits_is_heard_in_batches_across_tenants_and_a_lone_job_waits_for_nobody(pool: Pool, ask: Ask):
    tasks = [ask(1, "a", BATCHES)]
    await begun()
    assert Batches.sizes == [1]
    tasks += [ask(number, f"tenant {number}", BATCHES) for number in range(2, 8)]
    await waiting(pool, 6)
    Plugin.gate.release(10)
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert Batches.sizes == [1, 4, 2]
    assert [each.text for each in found[:6] if isinstance(each, Transcript)] == ["1", "2", "3", "4", "5", "6"]
    assert isinstance(found[6], BadInput), "one that is refused is refused alone"
    assert (found[0].language, found[0].confidence, found[0].engine) == ("de-DE", 1.0, "batches")  # type: ignore[union-attr]


async def test_what_makes_a_whole_batch_fail_takes_nobody_with_it(pool: Pool, ask: Ask):
    tasks = [ask(1, "a", BATCHES)]
    await begun()
    tasks += [ask(number, f"tenant {number}", BATCHES) for number in (2, 13, 3)]
    await waiting(pool, 3)
    Plugin.gate.release(10)
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [getattr(each, "text", getattr(each, "code", "")) for each in found] == ["1", "2", "engine_failed", "3"]


async def test_free_places_share_what_waits(pool: Pool, ask: Ask):
    await pool.load(DOUBLE)
    tasks = [ask(number, f"tenant {number}", DOUBLE) for number in range(5)]
    await begun()
    await begun()
    assert sorted(Batches.sizes) == [2, 3]
    Plugin.gate.release(2)
    await asyncio.gather(*tasks)


async def test_one_place_is_kept_from_guesses(pool: Pool, ask: Ask):
    await pool.load(DOUBLE)
    first = ask(1, "a", DOUBLE, tentative=True)
    await begun()
    second = ask(2, "b", DOUBLE, tentative=True)
    await waiting(pool, 1)
    assert Plugin.begun == [1]
    certain = ask(3, "c", DOUBLE)
    await begun()
    assert Plugin.begun == [1, 3]
    Plugin.gate.release(3)
    assert [(await task).text for task in (first, second, certain)] == ["1", "2", "3"]


async def test_guesses_that_fail_are_not_held_against_the_engine(pool: Pool, ask: Ask):
    for _ in range(2 * FAILURES):
        assert (await error_of(ask(1, spec=FLAKY, tentative=True))).code == "engine_failed"
    Flaky.ill = False
    assert (await ask(1, spec=FLAKY)).text == "well"


async def test_guesses_give_way_to_all_other_work(pool: Pool, ask: Ask):
    first = ask(0)
    await begun()
    guess = ask(1, "a", tentative=True)
    await waiting(pool, 1)
    certain = ask(2, "b")
    assert (await error_of(guess)).code == "busy", "it had to wait, and now somebody else does"
    assert (await error_of(ask(3, "c", (NUMBERS, BATCHES), tentative=True))).code == "busy", "and is not failed over"
    Plugin.gate.release(2)
    await asyncio.gather(first, certain)
    Plugin.gate.release()
    assert (await ask(4, tentative=True)).text == "4"
    assert Plugin.begun == [0, 2, 4]


async def test_what_is_too_late_or_not_wanted_any_more_is_never_begun(pool: Pool, ask: Ask, deadlines: Any):
    first = ask(0)
    await begun()
    late, left = ask(1, deadline=10), ask(2)
    await waiting(pool, 2)
    left.cancel()
    deadlines.end(10)
    assert (await error_of(late)).code == "engine_timeout"
    await waiting(pool, 0)
    Plugin.gate.release(5)
    assert ((await first).text, (await ask(3)).text) == ("0", "3")
    assert Plugin.begun == [0, 3]


async def test_a_deadline_reaches_the_engine_at_work(pool: Pool, ask: Ask, deadlines: Any):
    late = ask(0, deadline=10)
    await begun()
    deadlines.end(10)
    assert (await error_of(late)).code == "engine_timeout"
    following = ask(1)
    await begun()  # so its place is free again
    Plugin.gate.release()
    assert (await following).text == "1"


async def test_a_place_is_free_only_when_the_engine_is_at_rest(pool: Pool, ask: Ask):
    Plugin.deaf = True
    left = ask(0)
    await begun()
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    other = ask(1, "b")
    await waiting(pool, 1)
    assert pool.metrics()[0].working == 1
    assert Plugin.begun == [0]
    Plugin.gate.release(2)
    assert (await other).text == "1"


async def test_the_next_engine_serves_where_one_fails_hangs_or_is_missing(pool: Pool, ask: Ask, deadlines: Any):
    Plugin.gate.release()
    assert (await ask(1, spec=(FLAKY, MISSING, NUMBERS))).engine == "numbers"
    await begun()
    Flaky.ill = False
    hanging = ask(2, spec=[NUMBERS, FLAKY], deadline=600)
    await begun()
    assert deadlines.granted[-1] <= 300, "it is given up while there is time for the next one"
    deadlines.end(300)
    hangs = await hanging
    assert (hangs.text, hangs.engine) == ("well", "flaky")
    assert (await error_of(ask(3, spec=(MISSING,)))).code == "engine_missing"
    assert (await error_of(ask(3, spec=()))).code == "engine_missing"


async def test_what_one_engine_refuses_the_next_one_may_take_and_nobody_is_left_alone_for_it(pool: Pool, ask: Ask):
    Plugin.gate.release(2 * FAILURES + 1)
    for _ in range(2 * FAILURES):
        assert (await ask(7, spec=(FLAKY, NUMBERS))).engine == "numbers"
    assert (await ask(7, spec=(FLAKY, NUMBERS), tentative=True)).engine == "numbers"
    for order in ((FLAKY, MISSING), (MISSING, FLAKY)):
        assert (await error_of(ask(7, spec=order))).code == "unsupported_language", "which trying again does not mend"
    Flaky.ill = False
    assert (await ask(1, spec=FLAKY)).text == "well"


async def test_what_keeps_failing_is_left_alone(pool: Pool, ask: Ask):
    for _ in range(FAILURES):
        assert (await error_of(ask(1, spec=FLAKY))).code == "engine_failed"
    assert (await error_of(ask(1, spec=FLAKY))).code == "circuit_open"
    assert Flaky.calls == FAILURES
    Plugin.gate.release()
    assert (await ask(1, spec=(FLAKY, NUMBERS))).text == "1"
    assert {each.plugin: each.open for each in pool.metrics()} == {"flaky": 1, "numbers": 0}


async def test_an_engine_that_is_stuck_is_left_alone_though_nobody_elses_flood_is_held_against_it(pool: Pool, ask: Ask):
    await pool.load(NUMBERS)
    Plugin.deaf = True
    stuck = ask(0)
    await begun()
    for _ in range(FAILURES):
        assert (await error_of(ask(1, deadline=0.01))).code == "engine_timeout"
    assert (await error_of(ask(1))).code == "circuit_open"
    Plugin.gate.release(1)
    assert (await stuck).text == "0"


async def test_a_tenant_whose_jobs_come_too_late_in_its_own_flood_locks_nobody_out(
    pool: Pool, ask: Ask, deadlines: Any
):
    tasks = [ask(0)]
    await begun()
    flood = [ask(1, "flood", deadline=20) for _ in range(2 * FAILURES)]
    await waiting(pool, 2 * FAILURES)
    other = ask(2, "b")
    await waiting(pool, 2 * FAILURES + 1)
    Plugin.gate.release(3)
    await asyncio.gather(*tasks, flood.pop(0), other)
    Plugin.deaf = True
    for _ in range(3):  # the two that are answered, and the next
        await begun()
    deadlines.end(20)
    assert {(await error_of(task)).code for task in flood} == {"engine_timeout"}
    Plugin.gate.release(2)
    assert (await ask(3, "b")).text == "3"


async def test_a_load_that_fails_is_told_to_all_who_wait_and_tried_again_by_the_next(pool: Pool, ask: Ask):
    errors = [await error_of(task) for task in [ask(number, spec=FICKLE) for number in range(10)]]
    assert {error.code for error in errors} == {"engine_failed"}
    assert "avb models pull" in errors[0].message
    assert Fickle.attempts == 1, "one failure, however many waited"
    cause: BaseException | None = errors[0]
    while cause is not None:
        cause, before = cause.__cause__, cause
        assert cause is not before, "nothing is the cause of itself"
    assert (await ask(1, spec=FICKLE)).text == "loaded"


async def test_a_load_that_fails_when_all_have_left_is_no_news(pool: Pool, ask: Ask, monkeypatch: pytest.MonkeyPatch):
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    begun, gate = asyncio.Event(), asyncio.Event()

    async def load(spec: EngineSpec) -> None:
        begun.set()
        await gate.wait()
        raise ConnectionError("nobody there")

    monkeypatch.setattr(pool._runner, "load", load)
    left = ask(1)
    await begun.wait()
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    gate.set()
    while pool._lines[NUMBERS].busy:
        await asyncio.sleep(0)
    pool._lines[NUMBERS].loading = None
    del left  # whose frames hold on to what it waited for
    gc.collect()
    asyncio.get_running_loop().set_exception_handler(None)
    assert told == []


async def test_audio_that_is_none(pool: Pool):
    with pytest.raises(BadInput) as odd:
        await pool.transcribe(NUMBERS, b"\0\0\0", 16_000, "en-US")
    with pytest.raises(BadInput) as nan:
        await pool.transcribe(NUMBERS, bytes(320), float("nan"), "en-US")  # type: ignore[arg-type]
    assert (odd.value.code, nan.value.code) == ("audio_odd", "audio_rate")
    assert await pool.transcribe(NUMBERS, b"", 16_000, "en-US") == Transcript("", None, 0.0)
    assert pool.metrics() == [], "no engine was asked"


async def test_closing_lets_the_work_at_hand_end_and_refuses_the_rest(pool: Pool, ask: Ask):
    first = ask(0)
    await begun()
    second = ask(1)
    await waiting(pool, 1)
    closing = asyncio.create_task(asyncio.to_thread(pool.close))
    assert (await error_of(second)).code == "shutting_down"
    Plugin.gate.release()
    assert (await first).text == "0"
    await closing
    assert (await error_of(ask(2))).code == "shutting_down"
    assert Plugin.begun == [0]


async def test_a_runner_that_fails_in_its_own_way_is_an_error_of_ours(pool: Pool, monkeypatch: pytest.MonkeyPatch):
    async def broken(*_: Any) -> None:
        raise ConnectionError("nobody there")

    await pool.load(NUMBERS)
    monkeypatch.setattr(pool._runner, "transcribe", broken)
    with pytest.raises(Unavailable) as caught:
        await pool.transcribe(NUMBERS, audio(1), 16_000, "en-US")
    assert caught.value.code == "engine_failed"
