"""What batching does to throughput and to waiting, computed request by request: *modelled*.

One process takes requests in, one after the other; one worker computes batches. Clients are a
closed loop, as in `workbench.measure.load`: each asks again when it has its answer.
"""

import heapq
from collections import deque
from collections.abc import Mapping

import numpy as np


def simulate_batching(
    batch_ms: Mapping[int, float],
    *,
    clients: int,
    most_examples: int = 64,
    wait_ms: float = 0.0,
    request_ms: float = 0.3,
    requests: int = 4_000,
) -> dict[str, float]:
    """Throughput and waiting of a service that computes up to so many requests together.

    Args:
        batch_ms: examples of a batch -> what computing it takes; linear between these.
        clients: at once, each with one request of one example.
        most_examples: of a batch.
        wait_ms: how long a batch that is not full waits for more requests; 0 is *greedy*: an idle
            worker takes what there is.
        request_ms: to receive a request and to send its answer.
        requests: how many to follow; the first tenth is not counted.

    Returns:
        ``requests_per_s``, ``p50_ms``, ``p99_ms``, and the mean ``batch``.

    Raises:
        ValueError: an empty table, or a number out of range.

    >>> lone = simulate_batching({1: 2.0, 64: 8.0}, clients=1, request_ms=0.5)
    >>> lone["p50_ms"], lone["requests_per_s"]
    (2.5, 400.0)
    """
    if not batch_ms or min(batch_ms) < 1 or min(batch_ms.values()) <= 0:
        raise ValueError(f"batch_ms is {dict(batch_ms)}; give examples from 1 -> times above 0")
    if min(clients, most_examples, requests) < 1 or min(wait_ms, request_ms) < 0:
        raise ValueError(
            f"clients is {clients}, most_examples {most_examples}, requests {requests}, wait_ms "
            f"{wait_ms}, request_ms {request_ms}; give counts from 1 and times from 0"
        )
    sizes = sorted(batch_ms)
    times = [batch_ms[size] for size in sizes]
    asking = [0.0] * clients  # a heap: when each client that has its answer asks again
    queue: deque[tuple[float, float]] = deque()  # when it was asked, when it was taken in
    taken_in_until = free_at = 0.0
    answers, batches = [], 0  # (when, milliseconds since it was asked)
    while len(answers) < requests:
        # Take in what comes before the next batch must start.
        while asking and (len(queue) < most_examples or asking[0] <= free_at):
            starts = max(free_at, queue[0][1] + wait_ms) if queue else np.inf
            taken_in = max(taken_in_until, asking[0]) + request_ms
            if taken_in > starts:
                break
            queue.append((heapq.heappop(asking), taken_in))
            taken_in_until = taken_in
        full = len(queue) >= most_examples
        ready = queue[most_examples - 1][1] if full else queue[0][1] + wait_ms
        start = max(free_at, ready)
        batch = [queue.popleft() for _ in range(min(most_examples, len(queue)))]
        free_at = start + float(np.interp(len(batch), sizes, times))
        batches += 1
        for asked, _ in batch:
            answers.append((free_at, free_at - asked))
            heapq.heappush(asking, free_at)
    first = len(answers) // 10
    when, took = np.array(answers[first:]).T
    p50, p99 = np.percentile(took, (50, 99))
    span_ms = when[-1] - (answers[first - 1][0] if first else 0.0)
    return {
        "requests_per_s": float(round(1e3 * len(took) / span_ms, 6)),
        "p50_ms": float(round(p50, 6)),
        "p99_ms": float(round(p99, 6)),
        "batch": len(answers) / batches,
    }
