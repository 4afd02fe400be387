"""Requests become batches: what waits is computed together as soon as a worker is free.

There is no timer that a lone request would wait for. While a worker computes, requests gather; when
it is free it takes what has gathered. Three numbers follow the load, each by a rule that
`Batcher.state` shows:

* the most examples of a batch grows by one after a full batch, and shrinks by a tenth after a batch
  that took longer than ``batch_ms`` (Crankshaw et al., 2017, "Clipper");
* the queue is bounded in time, not in length: a request is taken in if the wait for its batch to
  start, estimated from measured batches, is at most ``queue_ms``. Once that is passed, more load
  arrives than can be served, and a long queue helps nobody: all but the newest are refused, and for
  two seconds the bound is half of what a single example takes: those who come just before a worker
  is free fill its batch (Maurer, 2015, "Fail at scale"). If the queue is soon full again, that time
  doubles;
* one more worker starts when the ones there are busy for over 80 % of a second, and one ends after
  ten seconds in which the others would have been busy for less than half.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from workbench.deploy.protocol import Refused, Signature
from workbench.deploy.worker import ModelError, Worker, WorkerDied

logger = logging.getLogger(__name__)

_FIRST_LIMIT = 8  # examples, before anything is measured
_SHED_S, _LONGEST_SHED_S = 2.0, 64.0  # for which the queue is kept short
_TICK_S, _IDLE_TICKS = 1.0, 10
_BUSY, _SPARE = 0.8, 0.5  # of the time
_STUCK_S = 60.0  # a worker that needs longer for a batch is killed
# Workers that end while they compute a request, before it is given up. For the first, another of
# its batch may be to blame, and the second may have been killed by chance.
_DEATHS = 3


@dataclass(frozen=True)
class Limits:
    """What one version of a model may use.

    Attributes:
        most_examples: of a batch, and of one request.
        batch_ms: longest that a batch should take.
        queue_ms: longest that a request should wait for its batch to start.
        workers: fewest and most processes.
        threads: of each process.
    """

    most_examples: int = 64
    batch_ms: float = 100.0
    queue_ms: float = 1000.0
    workers: tuple[int, int] = (1, 1)
    threads: int = 1

    def __post_init__(self) -> None:
        fewest, most = self.workers
        if min(self.most_examples, fewest, self.threads) < 1 or most < fewest:
            raise ValueError(
                f"most_examples is {self.most_examples}, workers {self.workers}, threads "
                f"{self.threads}; give 1 or more, and as workers the fewest and the most"
            )
        if not (self.batch_ms > 0 and self.queue_ms > 0):
            raise ValueError(
                f"batch_ms is {self.batch_ms}, queue_ms {self.queue_ms}; give more than 0"
            )


class Pace:
    """What batches take, as measured, and how large they may be.

    Attributes:
        limit: most examples of the next batch.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.limit = min(_FIRST_LIMIT, limits.most_examples)
        self._measured: dict[int, tuple[float, float]] = {}  # examples and seconds, by power of two

    def learn(self, examples: int, seconds: float) -> None:
        """Take in one batch. One that was held up by chance counts as twice the usual at most."""
        key = examples.bit_length()
        usual, typical_s = self._measured.get(key, (examples, seconds))
        weight = 0.2 if seconds > typical_s else 0.5  # the first of all may be slow
        smooth_s = (1 - weight) * typical_s + weight * min(seconds, 2 * typical_s)
        self._measured[key] = (0.8 * usual + 0.2 * examples, smooth_s)
        if smooth_s * 1e3 > self.limits.batch_ms:
            self.limit = max(1, min(self.limit, examples) * 9 // 10)
        elif examples == self.limit < self.limits.most_examples:
            self.limit += 1

    def seconds(self, examples: int) -> float:
        """What a batch of this size takes, from the nearest size measured; 0 before any is."""
        if not self._measured:
            return 0.0
        key = min(self._measured, key=lambda known: abs(known - examples.bit_length()))
        typical, seconds = self._measured[key]
        return seconds * max(1.0, examples / typical)


class _Waiting:
    """One request in the queue."""

    __slots__ = ("alone", "arrays", "deaths", "examples", "future", "gone", "shapes", "timer")

    def __init__(self, arrays: list[np.ndarray], examples: int, gone: Callable[[], bool]):
        self.arrays, self.examples, self.gone = arrays, examples, gone
        self.shapes = [(array.shape[1:], array.dtype) for array in arrays]
        self.alone = False  # it was in a batch that failed, so it is computed by itself
        self.deaths = 0  # of workers, while they computed it
        self.future = asyncio.get_running_loop().create_future()

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def expire(self) -> None:
        self.fail(Refused(504, "the deadline passed before the answer was there"))


class Batcher:
    """The queue of one model version, and the workers that empty it.

    Args:
        start_worker: starts one worker with the model.
        limits: what it may use.
        observe: is told the examples and seconds of each batch.
    """

    def __init__(
        self,
        start_worker: Callable[[], Awaitable[Worker]],
        limits: Limits,
        observe: Callable[[int, float], None] = lambda examples, seconds: None,
    ):
        self.limits, self.pace = limits, Pace(limits)
        self._start_worker, self._observe = start_worker, observe
        self._queue: deque[_Waiting] = deque()
        self._queued_examples = 0
        self._workers: set[Worker] = set()
        self._idle: list[Worker] = []
        self._busy_until: dict[Worker, float] = {}
        self._tasks: set[asyncio.Task] = set()
        self._wanted = limits.workers[0]
        self._shed_until, self._shed_s = -math.inf, _SHED_S
        self._busy_s, self._spare_ticks = 0.0, 0
        self._scheduled = self.closed = False
        self._quiet = asyncio.Event()

    async def start(self) -> None:
        """Start the first workers; `signature` is known then. Raises ModelError, WorkerDied."""
        self._loop = asyncio.get_running_loop()
        first = await self._start_worker()
        tensors = (*first.inputs, *first.outputs)
        batched = all(spec.shape[:1] == (-1,) for spec in tensors)
        self.signature = Signature(
            first.inputs, first.outputs, self.limits.most_examples if batched else 1
        )
        self.record = first.record
        self._join(first)
        self._keep(self._tick())
        for _ in range(self._wanted - 1):
            self._join(await self._start_worker())

    async def submit(
        self,
        arrays: list[np.ndarray],
        examples: int,
        *,
        deadline: float,
        gone: Callable[[], bool] = lambda: False,
    ) -> list[np.ndarray]:
        """The model's outputs for one request.

        Args:
            deadline: by the event loop's clock; nothing is computed after it.
            gone: whether the client has left, so that nobody needs an answer.

        Raises:
            Refused: 429 too much waits, 504 the deadline passed, 422 the model cannot compute it.
        """
        if self.closed:
            raise Refused(503, "the model is being unloaded")
        self.check_room()
        waiting = _Waiting(arrays, examples, gone)
        timer = self._loop.call_at(deadline, waiting.expire)
        self._queue.append(waiting)
        self._queued_examples += examples
        self._schedule()
        try:
            return await waiting.future
        finally:
            timer.cancel()

    def check_room(self) -> None:
        """Refuse a request with 429 if it would have to wait too long."""
        now = self._loop.time()
        wait_s = self._wait_s(now)
        calm = now > self._shed_until
        bound_s = self.limits.queue_ms / 1e3 if calm else self.pace.seconds(1) / 2
        if wait_s > bound_s:
            refused = Refused(
                429,
                f"too much is waiting: about {wait_s * 1e3:.0f} ms; try again",
                {"Retry-After": str(max(1, math.ceil(wait_s)))},
            )
            if calm:
                soon = now < self._shed_until + _SHED_S
                self._shed_s = min(2 * self._shed_s, _LONGEST_SHED_S) if soon else _SHED_S
                self._shed_until = now + self._shed_s
                self._shorten(refused)
            raise refused

    def state(self) -> dict[str, float]:
        """Where the rules stand, for metrics and notebooks."""
        now = self._loop.time()
        return {
            "queued_examples": self._queued_examples,
            "wait_seconds": self._wait_s(now),
            "batch_limit": self.pace.limit,
            "workers": len(self._workers),
            "workers_busy": len(self._busy_until),
            "shedding": float(now <= self._shed_until),
        }

    @property
    def pids(self) -> list[int]:
        """Of the workers."""
        return sorted(worker.pid for worker in self._workers)

    async def close(self, timeout_s: float = 30.0) -> None:
        """Compute what waits, then let the workers end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._queue or self._busy_until:
                    self._quiet.clear()
                    await self._quiet.wait()
        self.closed = True
        for task in self._tasks:
            task.cancel()
        for waiting in self._queue:
            waiting.fail(Refused(503, "the model is being unloaded"))
        for worker in self._workers:
            worker.close()

    def _wait_s(self, now: float) -> float:
        """How long a request that comes now would wait for its batch to start."""
        free_at = now if self._idle else min(self._busy_until.values(), default=now)
        batches_ahead = self._queued_examples // self.pace.limit
        batch_s = self.pace.seconds(self.pace.limit)
        return max(0.0, free_at - now) + batches_ahead * batch_s / max(1, len(self._workers))

    def _shorten(self, refused: Refused) -> None:
        """Leave only the newest in the queue, as many as a batch holds.

        Those before have waited so long that they would be late; with them everybody would be.
        """
        while self._queue and self._queued_examples > self.pace.limit:
            waiting = self._queue.popleft()
            self._queued_examples -= waiting.examples
            waiting.fail(refused)

    def _schedule(self) -> None:
        """Look at the queue once the requests that have arrived by now are all in it."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._scheduled = False
        while self._idle and self._queue:
            worker = self._idle.pop()
            if worker.ended:
                self._leave(worker)
                continue
            batch = self._take()
            if not batch:
                self._idle.append(worker)
                break
            examples = sum(waiting.examples for waiting in batch)
            self._busy_until[worker] = self._loop.time() + self.pace.seconds(examples)
            self._keep(self._compute(worker, batch, examples))
        if not self._queue and not self._busy_until:
            self._quiet.set()

    def _take(self) -> list[_Waiting]:
        """The next batch: from the front of the queue, all of the same shapes."""
        batch, left, examples = [], [], 0
        while self._queue and examples < self.pace.limit:
            waiting = self._queue.popleft()
            if waiting.future.done() or waiting.gone():
                waiting.future.cancel()
                self._queued_examples -= waiting.examples
                continue
            fits = not batch or (
                self.signature.has_batch
                and not (waiting.alone or batch[0].alone)
                and waiting.shapes == batch[0].shapes
                and examples + waiting.examples <= self.pace.limit
            )
            (batch if fits else left).append(waiting)
            examples += waiting.examples if fits else 0
        self._queue.extendleft(reversed(left))
        self._queued_examples -= examples
        return batch

    async def _compute(self, worker: Worker, batch: list[_Waiting], examples: int) -> None:
        began = self._loop.time()
        try:
            arrays = batch[0].arrays
            if len(batch) > 1:
                parts = zip(*(waiting.arrays for waiting in batch), strict=True)
                arrays = [np.concatenate(part) for part in parts]
            outputs = await worker.run(arrays, _STUCK_S)
            if self.signature.has_batch and any(len(output) != examples for output in outputs):
                raise ModelError("its outputs have another number of examples than its inputs")
        except WorkerDied:
            for waiting in batch:
                waiting.deaths += 1
                if waiting.deaths == _DEATHS:
                    waiting.fail(Refused(500, f"{_DEATHS} workers ended while they computed this"))
            self._try_again([waiting for waiting in batch if waiting.deaths < _DEATHS])
        except ModelError as error:
            reason = Refused(422, f"the model cannot compute these inputs: {error}")
            if len(batch) > 1:
                self._try_again(batch)
            else:
                batch[0].fail(reason)
        else:
            seconds = self._loop.time() - began
            self.pace.learn(examples, seconds)
            self._observe(examples, seconds)
            _share_out(outputs, batch)
        finally:
            self._busy_s += self._loop.time() - began
            del self._busy_until[worker]
            if worker.ended or len(self._workers) > self._wanted:
                self._leave(worker)
            else:
                self._idle.append(worker)
            self._schedule()

    def _try_again(self, batch: list[_Waiting]) -> None:
        """Compute each request of a failed batch by itself: one of them may be to blame."""
        for waiting in reversed(batch):
            waiting.alone = True
            self._queue.appendleft(waiting)
            self._queued_examples += waiting.examples

    def _join(self, worker: Worker) -> None:
        self._workers.add(worker)
        self._idle.append(worker)
        self._schedule()

    def _leave(self, worker: Worker) -> None:
        """A worker ends; another takes its place if it is wanted."""
        worker.close()
        self._workers.discard(worker)
        if len(self._workers) < self._wanted and not self.closed:
            self._keep(self._add())

    async def _add(self) -> None:
        pause_s = 0.1
        while len(self._workers) < self._wanted:
            try:
                self._join(await self._start_worker())
            except (ModelError, WorkerDied) as error:
                logger.error("a worker does not start: %s", error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 5.0)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._adjust(self._busy_s / _TICK_S)
            self._busy_s = 0.0

    def _adjust(self, busy: float) -> None:
        """One worker more or fewer, after a second in which ``busy`` workers were at work."""
        for worker in [worker for worker in self._idle if worker.ended]:
            self._idle.remove(worker)
            self._leave(worker)
        fewest, most = self.limits.workers
        spare = self._wanted > fewest and busy < _SPARE * (self._wanted - 1)
        self._spare_ticks = self._spare_ticks + 1 if spare else 0
        if busy > _BUSY * self._wanted and self._wanted < most:
            self._wanted += 1
            self._keep(self._add())
        elif self._spare_ticks >= _IDLE_TICKS:
            self._wanted -= 1
            self._spare_ticks = 0
            if self._idle:
                self._leave(self._idle.pop())

    def _keep(self, work: Coroutine) -> None:
        """Run beside everything else; the loop itself keeps no reference to its tasks."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _share_out(outputs: list[np.ndarray], batch: list[_Waiting]) -> None:
    """Give each request of a batch its examples' answers."""
    start = 0
    for waiting in batch:
        end = start + waiting.examples
        if not waiting.future.done():
            own = outputs if len(batch) == 1 else [output[start:end] for output in outputs]
            waiting.future.set_result(own)
        start = end
