import asyncio
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.deploy.batcher import Batcher, Limits, Pace
from workbench.deploy.loading import TensorSpec
from workbench.deploy.protocol import Refused
from workbench.deploy.worker import ModelError, WorkerDied


class FakeWorker:
    """Answers 2x after some time by the event loop's clock; does as it is told in between."""

    record: dict = {}  # noqa: RUF012

    def __init__(self, bench: "Bench", inner: tuple[int, ...] = (2,)):
        self.inputs = (TensorSpec("x", "float32", (bench.first, *inner)),)
        self.outputs = (TensorSpec("y", "float32", (bench.first, *inner)),)
        self.bench, self.pid, self.ended = bench, len(bench.workers), False
        bench.workers.append(self)

    async def run(self, arrays, timeout_s):
        bench = self.bench
        bench.batches.append(arrays[0][:, 0].tolist())
        await asyncio.sleep(bench.seconds * len(arrays[0]) + bench.overhead_s)
        if bench.deaths:
            bench.deaths -= 1
            self.ended = True
            raise WorkerDied("it died")
        if (arrays[0] == 13).any():
            raise ModelError("13 is not a number that this model likes")
        if (arrays[0] == 66).any():
            self.ended = True
            raise WorkerDied("66 kills")
        return [arrays[0] * 2]

    def close(self):
        self.ended = True


class Bench:
    """A batcher on fake workers; ``batches`` has the first number of each example computed."""

    def __init__(self, *, first=-1, seconds=0.0, overhead_s=0.002, **limits):
        self.first, self.seconds, self.overhead_s = first, seconds, overhead_s
        self.workers, self.batches, self.deaths, self.observed = [], [], 0, []
        self.batcher = Batcher(
            self.start, Limits(**limits), lambda *seen: self.observed.append(seen)
        )

    async def start(self):
        return FakeWorker(self)

    async def ask(self, *values, shape=(2,), deadline_s=5.0, gone=lambda: False):
        x = np.stack([np.full(shape, value, np.float32) for value in values])
        deadline = asyncio.get_running_loop().time() + deadline_s
        (y,) = await self.batcher.submit([x], len(x), deadline=deadline, gone=gone)
        np.testing.assert_array_equal(y, 2 * x)
        return y

    async def __aenter__(self):
        await self.batcher.start()
        return self

    async def __aexit__(self, *_):
        await self.batcher.close()


def run(scenario):
    asyncio.run(scenario())


def test_a_lone_request_does_not_wait():
    async def scenario():
        async with Bench() as bench:
            await bench.ask(1)
            await bench.ask(2)
            assert bench.batches == [[1], [2]]

    run(scenario)


def test_what_arrives_together_is_computed_together():
    async def scenario():
        async with Bench() as bench:
            await asyncio.gather(*(bench.ask(n) for n in range(6)))
            assert bench.batches == [[0, 1, 2, 3, 4, 5]]
            assert [examples for examples, _ in bench.observed] == [6]

    run(scenario)


def test_what_arrives_while_a_batch_runs_waits_for_the_next():
    async def scenario():
        async with Bench() as bench:
            first = asyncio.create_task(bench.ask(0))
            await asyncio.sleep(0.001)
            await asyncio.gather(first, *(bench.ask(n) for n in (1, 2, 3)))
            assert bench.batches == [[0], [1, 2, 3]]

    run(scenario)


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=30),
    most=st.integers(5, 12),
    workers=st.integers(1, 3),
)
def test_everyone_gets_the_answers_to_their_own_examples(sizes, most, workers):
    async def scenario():
        limits = {"most_examples": most, "workers": (workers, workers), "queue_ms": 1e6}
        async with Bench(overhead_s=0.0, **limits) as bench:
            numbers = iter(range(100, 1000))
            asked = [[next(numbers) for _ in range(size)] for size in sizes]
            await asyncio.gather(*(bench.ask(*values) for values in asked))
            assert max(map(len, bench.batches)) <= most
            assert sorted(chain(*bench.batches)) == [*chain(*asked)]
            assert bench.batcher.state()["queued_examples"] == 0

    run(scenario)


def test_shapes_are_not_mixed_and_keep_their_order():
    async def scenario():
        async with Bench() as bench:
            shapes = [(2,), (3,), (2,), (3,)]
            await asyncio.gather(*(bench.ask(n, shape=s) for n, s in enumerate(shapes)))
            assert bench.batches == [[0, 2], [1, 3]]

    run(scenario)


def test_a_model_without_a_batch_gets_one_request_at_a_time():
    async def scenario():
        async with Bench(first=1) as bench:
            await asyncio.gather(*(bench.ask(n) for n in range(3)))
            assert bench.batches == [[0], [1], [2]]
            assert bench.batcher.signature.most_examples == 1

    run(scenario)


def test_a_request_whose_deadline_passed_is_not_computed():
    async def scenario():
        async with Bench(overhead_s=0.05) as bench:
            first = asyncio.create_task(bench.ask(0))
            await asyncio.sleep(0.01)
            with pytest.raises(Refused, match="deadline passed") as refused:
                await bench.ask(1, deadline_s=0.01)
            assert refused.value.status == 504
            assert not first.done()  # it does not wait for the batch that runs
            await first
            await bench.ask(2)
            assert bench.batches == [[0], [2]]

    run(scenario)


def test_a_client_that_left_costs_nothing():
    async def scenario():
        async with Bench(overhead_s=0.02) as bench:
            first = asyncio.create_task(bench.ask(0))
            await asyncio.sleep(0.005)
            left = asyncio.create_task(bench.ask(1, gone=lambda: True))
            cancelled = asyncio.create_task(bench.ask(2))
            await asyncio.sleep(0.005)
            cancelled.cancel()
            await asyncio.gather(first, bench.ask(3))
            assert bench.batches == [[0], [3]]
            with pytest.raises(asyncio.CancelledError):
                await left
            assert bench.batcher.state()["queued_examples"] == 0

    run(scenario)


def test_work_of_a_worker_that_dies_is_done_by_another():
    async def scenario():
        async with Bench() as bench:
            bench.deaths = 1
            await asyncio.gather(*(bench.ask(n) for n in range(3)))
            assert bench.batches == [[0, 1, 2], [0], [1], [2]]
            assert len(bench.workers) == 2
            assert bench.batcher.pids == [1]

    run(scenario)


def test_two_workers_may_die_of_a_request_by_chance():
    async def scenario():
        async with Bench() as bench:
            bench.deaths = 2
            await bench.ask(0)
            assert bench.batches == [[0], [0], [0]]

    run(scenario)


def test_a_request_that_kills_workers_is_given_up_and_takes_no_other_along():
    async def scenario():
        async with Bench() as bench:
            answers = await asyncio.gather(
                bench.ask(1), bench.ask(66), bench.ask(2), return_exceptions=True
            )
            assert isinstance(answers[1], Refused)
            assert answers[1].status == 500
            assert "3 workers ended" in answers[1].reason
            assert [type(answers[n]) for n in (0, 2)] == [np.ndarray] * 2
            await bench.ask(3)

    run(scenario)


def test_a_request_that_the_model_refuses_takes_no_other_along():
    async def scenario():
        async with Bench() as bench:
            answers = await asyncio.gather(
                bench.ask(1), bench.ask(13), bench.ask(2), return_exceptions=True
            )
            assert answers[1].status == 422
            assert "13 is not a number" in answers[1].reason
            assert [type(answers[n]) for n in (0, 2)] == [np.ndarray] * 2
            assert len(bench.workers) == 1

    run(scenario)


def test_idle_workers_that_died_are_replaced_before_they_are_given_work():
    async def scenario():
        async with Bench(workers=(2, 2)) as bench:
            for worker in bench.workers[:2]:
                worker.ended = True
            await bench.ask(1)
            assert bench.batcher.pids[-1] >= 2
            assert Counter(map(tuple, bench.batches)) == {(1,): 1}

    run(scenario)


def test_a_queue_is_bounded_by_the_wait():
    async def scenario():
        async with Bench(seconds=0.01, overhead_s=0, most_examples=1, queue_ms=60) as bench:
            bench.batcher.pace.learn(1, 0.01)
            # Seven wait for 60 ms at most. At the eighth, those who have waited longest are refused
            # too: they would be late, and make all others late.
            answers = await asyncio.gather(*map(bench.ask, range(20)), return_exceptions=True)
            refused = [answer for answer in answers if isinstance(answer, Refused)]
            assert {answer.status for answer in refused} == {429}
            assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
            assert bench.batches == [[6]]
            assert bench.batcher.state()["shedding"] == 1

            # Then the queue stays short: nobody waits for a whole one.
            answers = await asyncio.gather(*map(bench.ask, range(20)), return_exceptions=True)
            assert sum(isinstance(answer, Refused) for answer in answers) == 20 - 1

    run(scenario)


def test_a_queue_that_is_soon_full_again_is_kept_short_for_longer():
    async def scenario():
        async with Bench(most_examples=1, queue_ms=60) as bench:
            batcher, lengths_s = bench.batcher, []
            batcher.pace.seconds = lambda examples: 1.0
            for left_s in (1000, 0.01, 0.01, 1000):  # ago, it was allowed to be long again
                now = asyncio.get_running_loop().time()
                batcher._shed_until = now - left_s
                await asyncio.gather(*map(bench.ask, range(3)), return_exceptions=True)
                lengths_s.append(round(batcher._shed_until - now))
            assert lengths_s == [2, 4, 8, 2]

    run(scenario)


def test_retry_after_is_the_time_that_the_queue_takes():
    async def scenario():
        async with Bench(most_examples=1, queue_ms=2_000) as bench:
            bench.batcher.pace.learn(1, 1.6)
            bench.overhead_s = 0.01
            *_, last = await asyncio.gather(*map(bench.ask, range(3)), return_exceptions=True)
            assert last.headers["Retry-After"] == "4"  # two wait, 1.6 s each

    run(scenario)


def test_closing_computes_what_waits():
    async def scenario():
        bench = await Bench().__aenter__()
        asked = [asyncio.create_task(bench.ask(n)) for n in range(3)]
        await asyncio.sleep(0)
        await bench.batcher.close()
        await asyncio.gather(*asked)
        assert all(worker.ended for worker in bench.workers)
        with pytest.raises(Refused, match="being unloaded") as refused:
            await bench.ask(4)
        assert refused.value.status == 503

    run(scenario)


def test_workers_follow_the_load():
    async def scenario():
        async with Bench(workers=(1, 3)) as bench:
            batcher = bench.batcher
            for expected in (2, 3, 3):
                batcher._adjust(busy=3.0)
                await asyncio.sleep(0.01)
                assert batcher.state()["workers"] == expected
            for _ in range(9):
                batcher._adjust(busy=0.9)
            assert batcher.state()["workers"] == 3
            batcher._adjust(busy=1.5)  # one busy second starts the count again
            for _ in range(10):
                batcher._adjust(busy=0.9)
            assert batcher.state()["workers"] == 2
            for _ in range(30):
                batcher._adjust(busy=0.0)
            assert batcher.state()["workers"] == 1
            await bench.ask(1)

    run(scenario)


def test_a_batch_grows_while_it_is_quick_and_shrinks_when_it_is_not():
    pace = Pace(Limits(most_examples=16, batch_ms=10))
    for expected in range(8, 16):
        assert pace.limit == expected
        pace.learn(pace.limit, 0.001)
    pace.learn(3, 0.001)  # a batch that is not full says nothing
    assert pace.limit == 16
    pace.learn(16, 0.011)
    assert pace.limit == 14
    for _ in range(200):
        pace.learn(pace.limit, 0.011)
    assert pace.limit == 1
    for _ in range(5):
        pace.learn(pace.limit, 0.001)
    before = pace.limit
    pace.learn(before, 5.0)  # once, by chance
    assert pace.limit > before


def test_time_of_a_batch_is_estimated_from_the_nearest_size():
    pace = Pace(Limits())
    assert pace.seconds(5) == 0
    pace.learn(1, 0.001)
    pace.learn(8, 0.004)
    assert pace.seconds(1) == 0.001
    assert pace.seconds(8) == 0.004
    assert pace.seconds(64) == pytest.approx(0.032)  # more than is known: in proportion
    assert pace.seconds(2) == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"most_examples": 0}, "most_examples is 0"),
        ({"workers": (0, 1)}, r"workers \(0, 1\)"),
        ({"workers": (2, 1)}, "the fewest and the most"),
        ({"threads": 0}, "threads 0"),
        ({"batch_ms": 0}, "batch_ms is 0"),
        ({"queue_ms": -1}, "queue_ms -1"),
    ],
)
def test_limits_out_of_range(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        Limits(**wrong)
