"""`simulate_batching` against cases that can be computed by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.measure.queueing import simulate_batching

LEVEL = {1: 4.0, 64: 4.0}  # a batch takes 4 ms, whatever is in it


def test_a_lone_client_waits_for_itself_alone():
    found = simulate_batching({1: 2.0}, clients=1, request_ms=0.5)
    assert found == {"requests_per_s": 400, "p50_ms": 2.5, "p99_ms": 2.5, "batch": 1}


def test_a_fixed_wait_hurts_the_lone_client_by_its_length():
    found = simulate_batching({1: 2.0}, clients=1, request_ms=0.5, wait_ms=3.0)
    assert found["p50_ms"] == 5.5
    assert found["requests_per_s"] == pytest.approx(1000 / 5.5)


def test_a_full_batch_does_not_wait():
    settings = {"clients": 8, "most_examples": 8, "request_ms": 0.0}
    assert simulate_batching(LEVEL, **settings, wait_ms=100.0) == simulate_batching(
        LEVEL, **settings
    )


def test_without_batching_the_worker_is_the_limit():
    found = simulate_batching(LEVEL, clients=10, most_examples=1, request_ms=0.0)
    assert found["requests_per_s"] == pytest.approx(250)
    assert found["p50_ms"] == pytest.approx(40)
    assert found["batch"] == 1


def test_with_batching_all_clients_are_computed_together():
    found = simulate_batching(LEVEL, clients=10, request_ms=0.0)
    assert found["requests_per_s"] == pytest.approx(2500)
    assert found["p99_ms"] == pytest.approx(4)
    assert found["batch"] == 10


def test_taking_requests_in_one_after_the_other_is_a_limit_too():
    found = simulate_batching({1: 0.01, 64: 0.01}, clients=32, request_ms=1.0)
    assert found["requests_per_s"] == pytest.approx(1000, rel=0.02)


@given(
    clients=st.integers(1, 100),
    most=st.integers(1, 64),
    wait=st.floats(0, 10),
    request=st.floats(0.01, 2),
    per_example=st.floats(0, 1),
)
def test_no_bound_is_broken(clients, most, wait, request, per_example):
    times = {1: 1.0, 64: 1.0 + 63 * per_example}
    settings = {"most_examples": most, "wait_ms": wait, "request_ms": request}
    found = simulate_batching(times, clients=clients, requests=3000, **settings)
    largest = min(clients, most)
    assert 1 <= found["batch"] <= largest
    time_of_largest = 1 + (largest - 1) * per_example
    assert found["requests_per_s"] <= 1.05 * min(1e3 / request, 1e3 * largest / time_of_largest)
    assert found["p99_ms"] >= found["p50_ms"] >= request + 1 - 1e-5
    # Little's law: clients = throughput * time, where every client always waits for an answer
    assert found["requests_per_s"] * found["p99_ms"] / 1e3 >= 0.8 * clients


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_ms": {}}, "batch_ms is {}"),
        ({"batch_ms": {0: 1.0}}, "batch_ms"),
        ({"batch_ms": {1: 0.0}}, "times above 0"),
        ({"clients": 0}, "clients is 0"),
        ({"wait_ms": -1}, "wait_ms -1"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate_batching(**({"batch_ms": LEVEL, "clients": 1} | arguments))
