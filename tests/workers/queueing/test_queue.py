"""Admission without HTTP: the queue, its deadlines, and cancelled jobs."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from workers.errors import ModelFailed
from workers.model.contract import Cancelled, InvalidRequest, Work
from workers.queueing import job as jobs
from workers.queueing.job import ClientDisconnected, DeadlinePassed, Job, SlowReader
from workers.queueing.queue import QueueClosed, QueueFull, RequestQueue

TIMEOUT = 30.0


class Gate:
    """A call that holds the device until it is opened."""

    def __init__(self) -> None:
        self.running = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> str:
        self.running.set()
        assert self.opened.wait(TIMEOUT)
        return "held"


def with_queue(test: Callable[[RequestQueue], Awaitable[None]], limit: int = 8) -> None:
    """Run ``test`` with a queue of its own, and with a deadline."""
    executor = ThreadPoolExecutor(1)
    try:
        asyncio.run(asyncio.wait_for(_awaited(test(RequestQueue(executor, limit))), TIMEOUT))
    finally:
        executor.shutdown()


async def _awaited(awaitable: Awaitable[None]) -> None:
    await awaitable


async def reaches(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110 (what is waited for happens on another thread)
        await asyncio.sleep(0.005)


async def collected(job: Job) -> list[Any]:
    return [item async for item in job]


def test_a_value_is_the_only_item() -> None:
    async def test(queue: RequestQueue) -> None:
        job = queue.submit(lambda: 7, Work())
        assert await collected(job) == [7]
        assert not job.streams
        assert job.service_seconds > 0
        assert (queue.waiting, queue.running, queue.completed) == (0, 0, 1)

    with_queue(test)


def test_stream_yields_item_by_item() -> None:
    async def test(queue: RequestQueue) -> None:
        job = queue.submit(lambda: iter([1, 2, 3]), Work())
        assert await collected(job) == [1, 2, 3]
        assert job.streams

    with_queue(test)


def test_everything_runs_on_one_thread_in_order() -> None:
    async def test(queue: RequestQueue) -> None:
        ran: list[tuple[int, str]] = []

        def call(number: int) -> Callable[[], None]:
            return lambda: ran.append((number, threading.current_thread().name))

        jobs = [queue.submit(call(number), Work()) for number in range(8)]
        await asyncio.gather(*(collected(job) for job in jobs))
        assert [number for number, _ in ran] == list(range(8))
        assert len({thread for _, thread in ran}) == 1

    with_queue(test)


def test_full_queue_rejects_with_retry_after() -> None:
    async def test(queue: RequestQueue) -> None:
        gate = Gate()
        first = queue.submit(gate, Work())
        await reaches(gate.running.is_set)
        others = [queue.submit(lambda: None, Work()) for _ in range(2)]
        assert (queue.running, queue.waiting) == (1, 2)
        with pytest.raises(QueueFull) as refused:
            queue.submit(lambda: None, Work())
        assert refused.value.retry_after == 3  # three are ahead, and a second each is the guess
        gate.opened.set()
        await asyncio.gather(*(collected(job) for job in [first, *others]))
        await collected(queue.submit(lambda: None, Work()))

    with_queue(test, limit=2)


def test_retry_after_follows_the_observed_service_time() -> None:
    async def test(queue: RequestQueue) -> None:
        queue._job_ended(30.0, None)  # what the device thread reports after a request of 30 s
        queue._admitted = 1
        assert queue.retry_after == 30
        queue._admitted = 5
        assert queue.retry_after == 150
        for _ in range(60):
            queue._job_ended(0.01, None)
        queue._admitted = 3
        assert queue.retry_after == 1
        assert queue.mean_service_seconds == pytest.approx(0.01, abs=0.001)

    with_queue(test)


def test_job_cancelled_in_the_queue_never_runs_and_frees_its_place() -> None:
    async def test(queue: RequestQueue) -> None:
        gate = Gate()
        ran: list[str] = []
        first = queue.submit(gate, Work())
        await reaches(gate.running.is_set)
        second = queue.submit(lambda: ran.append("left"), Work())
        second.cancel()
        with pytest.raises(ClientDisconnected) as left:
            await anext(second)
        assert left.value.stage == "waiting"
        assert queue.waiting == 0
        third = queue.submit(lambda: ran.append("third"), Work())
        gate.opened.set()
        await collected(first)
        await collected(third)
        assert ran == ["third"]

    with_queue(test, limit=1)


def test_deadline_in_the_queue_never_runs() -> None:
    async def test(queue: RequestQueue) -> None:
        gate = Gate()
        ran: list[str] = []
        first = queue.submit(gate, Work())
        await reaches(gate.running.is_set)
        late = queue.submit(lambda: ran.append("late"), Work(time.monotonic() + 0.02))
        with pytest.raises(DeadlinePassed) as passed:
            await anext(late)
        assert passed.value.stage == "waiting"
        assert not gate.opened.is_set()
        gate.opened.set()
        await collected(first)
        await collected(queue.submit(lambda: None, Work()))
        assert ran == []

    with_queue(test)


def test_deadline_passed_on_arrival_never_runs() -> None:
    async def test(queue: RequestQueue) -> None:
        ran: list[str] = []
        job = queue.submit(lambda: ran.append("late"), Work(time.monotonic() - 1))
        with pytest.raises((DeadlinePassed, Cancelled)):
            await anext(job)
        await collected(queue.submit(lambda: None, Work()))
        assert ran == []

    with_queue(test)


def test_deadline_while_running_returns_before_the_call_ends() -> None:
    async def test(queue: RequestQueue) -> None:
        gate = Gate()
        job = queue.submit(gate, Work(time.monotonic() + 0.05))
        with pytest.raises(DeadlinePassed):
            await collected(job)
        if gate.running.is_set():  # the machine may have been too busy to begin in time
            assert queue.running == 1
        gate.opened.set()
        await reaches(lambda: queue.idle)

    with_queue(test)


def test_model_that_checks_stops_at_the_deadline() -> None:
    async def test(queue: RequestQueue) -> None:
        work = Work(time.monotonic() + 0.05)

        def endless() -> None:
            while True:
                work.check()

        with pytest.raises((DeadlinePassed, Cancelled)):
            await collected(queue.submit(endless, work))
        await reaches(lambda: queue.idle)

    with_queue(test)


def test_cancelled_stream_is_closed_on_the_device_thread() -> None:
    async def test(queue: RequestQueue) -> None:
        closed: list[str] = []
        threads: list[str] = []

        def endless() -> Iterator[int]:
            threads.append(threading.current_thread().name)
            try:
                while True:
                    yield 1
            finally:
                closed.append(threading.current_thread().name)

        job = queue.submit(endless, Work())
        assert await anext(job) == 1
        assert job.stage == "streaming"
        job.cancel()
        with pytest.raises(ClientDisconnected):
            await anext(job)
        await reaches(lambda: queue.idle)
        assert closed == threads

    with_queue(test)


def chunks(count: int, made: list[int]) -> Callable[[], Iterator[bytes]]:
    """A stream of 1 KiB items that notes which were made."""

    def stream() -> Iterator[bytes]:
        for number in range(count):
            made.append(number)
            yield bytes([number]) * 1024

    return stream


def test_slow_reader_bounds_the_unread_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_UNREAD", 4 * 1024)

    async def test(queue: RequestQueue) -> None:
        made: list[int] = []
        job = queue.submit(chunks(100, made), Work())
        await reaches(lambda: job.waited > 0)
        assert len(made) <= 6  # the bound, one beyond it, and one in the model's hands
        assert await collected(job) == [bytes([number]) * 1024 for number in range(100)]
        assert 0 < job.busy_seconds < job.service_seconds

    with_queue(test)


def test_device_is_free_after_the_last_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_UNREAD", 4 * 1024)

    async def test(queue: RequestQueue) -> None:
        made: list[int] = []
        unread = queue.submit(chunks(5, made), Work())
        assert await collected(queue.submit(lambda: "next", Work())) == ["next"]
        assert queue.idle
        assert unread.waited == 0
        assert len(await collected(unread)) == 5

    with_queue(test)


def test_reader_below_the_minimum_rate_is_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "MAX_UNREAD", 4 * 1024)
    monkeypatch.setattr(jobs, "SLOW_READER_WINDOW", 0.2)

    async def test(queue: RequestQueue) -> None:
        made: list[int] = []
        dropped: list[bool] = []
        job = queue.submit(chunks(100, made), Work())
        job.on_dropped = lambda: dropped.append(True)
        assert await anext(job) == bytes(1024)
        await reaches(lambda: queue.idle)
        assert dropped == [True]
        with pytest.raises(SlowReader) as slow:  # what it has not read is gone
            await anext(job)
        assert slow.value.stage == "streaming"
        assert slow.value.reason == "slow_reader"
        assert len(made) < 10
        assert await collected(queue.submit(lambda: "next", Work())) == ["next"]

    with_queue(test)


def test_reader_above_the_minimum_rate_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes large items, of which what has left counts before the whole has."""
    monkeypatch.setattr(jobs, "MAX_UNREAD", 1)
    monkeypatch.setattr(jobs, "MIN_BYTES_PER_SECOND", 1024)
    monkeypatch.setattr(jobs, "SLOW_READER_WINDOW", 0.2)
    size = 2**20

    async def test(queue: RequestQueue) -> None:
        job = queue.submit(lambda: iter([bytes(size)] * 3), Work())
        assert len(await anext(job)) == size
        while job.waited < 1:  # several times as long as is measured
            await asyncio.sleep(0.01)
            job.delivered(job.waited / 10)
        assert job.error is None
        assert len(await collected(job)) == 2

    with_queue(test)


def test_model_exceptions_have_no_frames() -> None:
    class Tensor:
        """Stands for memory that a frame would keep alive."""

    async def test(queue: RequestQueue) -> None:
        kept: list[weakref.ref[Tensor]] = []

        def fails() -> None:
            tensor = Tensor()
            kept.append(weakref.ref(tensor))
            raise ValueError("secret")

        with pytest.raises(ModelFailed) as failed:
            await anext(queue.submit(fails, Work()))
        assert failed.value.kind == "ValueError"
        assert "secret" in failed.value.trace
        assert "fails" in failed.value.trace
        assert str(failed.value) == "ValueError"
        await collected(queue.submit(lambda: None, Work()))
        gc.collect()
        assert kept[0]() is None

    with_queue(test)


def test_rejection_by_the_model_keeps_its_message() -> None:
    async def test(queue: RequestQueue) -> None:
        def refuses() -> None:
            raise InvalidRequest("too loud")

        with pytest.raises(InvalidRequest, match="too loud"):
            await anext(queue.submit(refuses, Work()))

    with_queue(test)


def test_items_made_before_a_failure_arrive_before_it() -> None:
    async def test(queue: RequestQueue) -> None:
        def two() -> Iterator[int]:
            yield 1
            raise RuntimeError

        job = queue.submit(two, Work())
        assert await anext(job) == 1
        with pytest.raises(ModelFailed):
            await anext(job)

    with_queue(test)


def test_lost_device_answers_its_request_and_runs_no_other() -> None:
    async def test(queue: RequestQueue) -> None:
        lost: list[bool] = []
        ran: list[str] = []
        queue.on_device_lost = lambda: lost.append(True)
        gate = Gate()

        def sticky() -> None:
            gate()
            raise RuntimeError("CUDA error: device-side assert triggered")

        first = queue.submit(sticky, Work())
        second = queue.submit(lambda: ran.append("second"), Work())
        gate.opened.set()
        with pytest.raises(ModelFailed) as failed:
            await anext(first)
        assert failed.value.sticky
        assert lost == [True]
        with pytest.raises(QueueClosed):
            queue.submit(lambda: None, Work())
        second.cancel()
        assert ran == []

    with_queue(test)
