"""The model of a step's cost: exact where its formulas are, and near what others have published."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.parallel.cost_model import (
    Layout,
    Link,
    Machine,
    Work,
    best_layout,
    fit_link,
    layouts,
    predict,
    scaling,
)

SLOW = Link.of_bits(100e6, latency_s=1e-3)
WORK = Work(parameters=1e6, blocks=8, forward_flops=1e9, boundary_bytes=1e5, activation_bytes=4e6)
MACHINE = Machine(flops_per_s=1e11, memory_bytes=1e9, far=SLOW)


def test_one_worker_only_computes():
    found = predict(WORK, Layout(), MACHINE, batch=32)
    assert found["step_s"] == found["compute_s"] == pytest.approx(3 * 1e9 * 32 / 1e11)
    assert found["efficiency"] == 1
    assert found["memory_bytes"] == 32 * 4e6 + 16e6


def test_data_parallel_sums_the_gradients_and_sharding_sends_half_as_much_again():
    whole = predict(WORK, Layout(data=4), MACHINE, batch=32)
    parts = predict(WORK, Layout(data=4, sharded=True), MACHINE, batch=32)
    assert whole["gradients_s"] == pytest.approx(6 * 1e-3 + 2 * 3 / 4 * 4e6 / 12.5e6)
    assert parts["gradients_s"] == pytest.approx(1.5 * whole["gradients_s"])
    assert whole["memory_bytes"] - parts["memory_bytes"] == pytest.approx(16e6 * 3 / 4)
    pieces = Layout(data=4, sharded=True, microbatches=4)  # gathered for each, kept of one
    found = predict(WORK, pieces, MACHINE, batch=32)
    assert found["gradients_s"] == pytest.approx(9 / 3 * parts["gradients_s"])
    assert parts["memory_bytes"] - found["memory_bytes"] == pytest.approx((8 - 2) * 4e6)


def test_gradients_hide_behind_computation_where_there_is_enough():
    hidden = predict(WORK, Layout(data=2), dataclasses.replace(MACHINE, overlap=1.0), batch=64)
    assert hidden["gradients_s"] == 0
    fast = dataclasses.replace(MACHINE, overlap=1.0, flops_per_s=1e13)
    sent = SLOW.all_reduce_s(4e6, 2)
    found = predict(WORK, Layout(data=2), fast, batch=64)
    assert found["gradients_s"] == pytest.approx(sent - found["compute_s"])


@given(stages=st.sampled_from([2, 4, 8]), microbatches=st.sampled_from([1, 4, 16]))
def test_the_bubble_is_that_of_theory(stages, microbatches):
    layout = Layout(pipeline=stages, microbatches=microbatches)
    found = predict(WORK, layout, MACHINE, batch=64)
    busy, idle = found["compute_s"], found["bubble_s"]
    assert idle / (busy + idle) == pytest.approx((stages - 1) / (microbatches + stages - 1))


def test_tensor_parallel_sums_four_times_a_block_on_the_near_link():
    near = Link(1e-6, 1e11)
    machine = dataclasses.replace(MACHINE, near=near, near_workers=4)
    found = predict(WORK, Layout(tensor=4), machine, batch=32)
    assert found["activations_s"] == pytest.approx(4 * 8 * near.all_reduce_s(32 * 1e5, 4))
    assert found["gradients_s"] == 0
    wide = predict(WORK, Layout(tensor=8), machine, batch=32)
    assert wide["activations_s"] == pytest.approx(4 * 8 * SLOW.all_reduce_s(32 * 1e5, 8))


@given(workers=st.integers(1, 64), batch=st.sampled_from([8, 48, 64]))
def test_layouts_use_all_workers_and_are_all_possible(workers, batch):
    for layout in layouts(WORK, workers, batch=batch):
        assert layout.workers == workers
        assert predict(WORK, layout, MACHINE, batch=batch)["step_s"] > 0


def test_the_best_layout_is_the_fastest_that_fits():
    best = best_layout(WORK, 8, MACHINE, batch=64)
    found = [predict(WORK, lay, MACHINE, batch=64) for lay in layouts(WORK, 8, batch=64)]
    assert best.step_s == min(one["step_s"] for one in found if one["fits"])
    small = dataclasses.replace(MACHINE, memory_bytes=0.9 * best.memory_bytes)
    other = best_layout(WORK, 8, small, batch=64)
    assert other is None or other.memory_bytes < best.memory_bytes
    assert best_layout(WORK, 1, dataclasses.replace(MACHINE, memory_bytes=1e6), batch=64) is None


def test_a_slow_link_makes_more_workers_useless():
    slow = scaling(WORK, MACHINE, batch=4096)
    fast = scaling(WORK, dataclasses.replace(MACHINE, far=Link(1e-6, 1e11)), batch=4096)
    assert list(fast.workers)[-1] == 4096
    assert (fast.speedup >= slow.speedup).all()
    assert fast.speedup.iloc[7] > 0.9 * 128 > slow.speedup.iloc[7]


@given(latency=st.floats(1e-6, 1e-2), bandwidth=st.floats(1e5, 1e11))
def test_a_link_is_found_again_from_its_times(latency, bandwidth):
    link = Link(latency, bandwidth)
    sizes = [bandwidth * latency * share for share in (0.01, 0.3, 1, 10, 100)]
    found = fit_link(sizes, [link.send_s(size) for size in sizes])
    assert found.latency_s == pytest.approx(latency, rel=1e-3)
    assert found.bandwidth_bytes_s == pytest.approx(bandwidth, rel=1e-3)


# Published figures. What one worker reaches is taken from the first row of each; the others follow.
A100 = Machine(312e12, 80e9, Link.of_bits(200e9, 5e-6), Link(2e-6, 300e9), 8, overlap=1.0)


def test_fully_sharded_llama_on_64_gpus():
    """Llama 3 8B and 70B on 64 A100, FSDP2, one sequence of 8,192 tokens each.

    torchtitan, docs/performance.md (2024): 2,904 tokens a second and GPU at 56.8 % of the FLOP/s
    with some recomputation, and 331 at 51.7 % with all of it.
    """
    for parameters, blocks, width, tokens_per_s, share, again in (
        (8.03e9, 32, 4096, 2904, 0.568, False),
        (70.6e9, 80, 8192, 331, 0.517, True),
    ):
        work = Work.transformer(
            parameters, blocks=blocks, width=width, context=8192, recompute=again
        )
        useful = work.forward_flops * (3 / 4 if again else 1)
        assert 3 * useful * tokens_per_s / 8192 == pytest.approx(share * 312e12, rel=0.12)
        reached = share * 312e12 * (4 / 3 if again else 1)  # recomputing counts as work here
        machine = dataclasses.replace(A100, flops_per_s=reached)
        found = predict(work, Layout(data=64, sharded=True), machine, batch=64)
        assert found["fits"]
        assert 8192 / found["step_s"] == pytest.approx(tokens_per_s, rel=0.25)


def test_strong_scaling_of_gpt_3():
    """175 billion parameters from 96 to 4,608 H100 at a batch of 1,152: 47 to 42 % of the FLOP/s.

    Megatron-LM, README (2024). The layouts are not told there; here they are the best modelled.
    """
    work = Work.transformer(175e9, blocks=96, width=12288, context=2048)
    h100 = Machine(989e12, 80e9, Link.of_bits(400e9, 5e-6), Link(2e-6, 450e9), 8, overlap=1.0)
    few, many = (best_layout(work, count, h100, batch=1152) for count in (96, 4608))
    assert few.step_s > many.step_s
    assert not predict(work, Layout(data=96), h100, batch=1152)["fits"]
    assert 0.6 < many.efficiency / few.efficiency < 1.05  # published: 0.89


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Link(-1, 1), "latency is 0 or more"),
        (lambda: Link(0, 0), "bandwidth above 0"),
        (lambda: dataclasses.replace(MACHINE, overlap=2), "overlap is between"),
        (lambda: Layout(data=0), "whole numbers from 1"),
        (lambda: predict(WORK, Layout(pipeline=9), MACHINE, batch=64), "9 stages of 8 blocks"),
        (lambda: predict(WORK, Layout(data=9), MACHINE, batch=8), "less than one example"),
        (lambda: fit_link([1], [1]), "two or more"),
    ],
)
def test_bad_input(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
