import math
import subprocess
from collections.abc import Callable, Iterator

import namespaces
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from workbench import models
from workbench.parallel import gradient_compression, run
from workbench.parallel.gradient_compression import (
    Cast,
    Compressor,
    DeepGradient,
    Exchange,
    Int8,
    PowerSGD,
    Sign,
    Ternary,
    TopK,
    Uncompressed,
    compress_gradients,
    diloco,
    local_sgd,
    pack,
    unpack,
)

CODECS = [Int8(), Int8(chunk=7), Ternary(), Ternary(chunk=7), Sign(), Sign(chunk=7), TopK(),
          TopK(density=0.3), TopK(density=1.0)]  # fmt: skip
WITH_FEEDBACK = [Sign(), TopK(), DeepGradient(momentum=0), PowerSGD(rank=2)]
ALL = [Uncompressed(), Cast(), Cast("bfloat16"), Int8(), Ternary(), Sign(), TopK(),
       DeepGradient(warm_up_steps=2), PowerSGD(rank=2)]  # fmt: skip

# A 127th of the smallest normal numbers has few bits left; no gradient of use is that small.
elements = st.floats(-1e3, 1e3, width=32).map(lambda value: value if abs(value) > 1e-30 else 0.0)
floats = hnp.arrays("float32", st.integers(1, 300), elements=elements)
every_codec = pytest.mark.parametrize("codec", CODECS, ids=str)
every_compressor = pytest.mark.parametrize("compressor", ALL, ids=str)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one, here."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters_of(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape)) for shape in shapes]


@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 50), st.integers(0, 2**30))
def test_packing_is_undone(bits, count, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (count,), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == math.ceil(count * bits / 8)
    assert torch.equal(unpack(packed, bits, count), codes)


@every_codec
def test_payload_is_bytes_and_its_length_depends_on_the_count_alone(codec):
    for count in (1, 6, 7, 8, 1000, 70_000):
        first, second = (codec.encode(normal(count, seed=s), torch.Generator()) for s in (1, 2))
        assert first.dtype == torch.uint8
        assert len(first) == len(second)
        assert codec.decode(first, count).shape == (count,)
        zeros = torch.zeros(count)
        assert torch.equal(codec.decode(codec.encode(zeros, torch.Generator()), count), zeros)


@given(floats)
def test_int8_is_off_by_half_a_level_at_most(values):
    values = torch.from_numpy(values)
    decoded = Int8(chunk=100).decode(Int8(chunk=100).encode(values), len(values))
    for exact, found in zip(values.split(100), decoded.split(100), strict=True):
        largest = exact.abs().max()
        assert (exact - found).abs().max() <= largest / 254 * 1.001


@given(floats)
def test_sign_keeps_signs_and_the_mean_size_of_a_chunk(values):
    values = torch.from_numpy(values)
    decoded = Sign(chunk=100).decode(Sign(chunk=100).encode(values), len(values))
    for exact, found in zip(values.split(100), decoded.split(100), strict=True):
        size = exact.abs().mean()
        torch.testing.assert_close(found, torch.where(exact >= 0, size, -size))


@given(floats, st.floats(0.001, 1))
def test_top_k_keeps_the_largest(values, density):
    values = torch.from_numpy(values)
    codec = TopK(density)
    decoded = codec.decode(codec.encode(values), len(values))
    kept = max(1, round(density * len(values)))
    assert (decoded != 0).sum() <= kept
    sent = decoded != 0
    torch.testing.assert_close(decoded[sent], values[sent], rtol=2**-8, atol=0)
    smallest_kept = values.abs().sort(descending=True).values[kept - 1]
    assert (values[~sent].abs() <= smallest_kept).all()


def test_top_k_finds_places_in_every_block_of_65536():
    values = torch.zeros(200_000)
    places = torch.tensor([0, 65_535, 65_536, 131_071, 131_072, 199_999])
    values[places] = torch.arange(1.0, 7.0)
    codec = TopK(density=6 / 200_000)
    assert torch.equal(codec.decode(codec.encode(values), 200_000), values)


def test_ternary_is_right_on_average_within_its_limit():
    values = normal(500) * torch.linspace(0.1, 3, 500)
    codec, generator = Ternary(chunk=100), torch.Generator().manual_seed(0)
    draws = torch.stack([codec.decode(codec.encode(values, generator), 500) for _ in range(4000)])
    for exact, found in zip(values.split(100), draws.split(100, dim=1), strict=True):
        limit = min(exact.abs().max(), 2.5 * exact.square().mean().sqrt())
        assert set((found / limit).round(decimals=4).unique().tolist()) <= {-1.0, 0.0, 1.0}
        off = (found.mean(0) - exact.clamp(-limit, limit)).abs().max()
        assert off < 5 * limit / math.sqrt(4 * 4000)  # five standard errors of a coin


def test_ternary_of_a_short_last_chunk_is_not_clipped_by_what_fills_it():
    codec = Ternary(chunk=1024)
    values = torch.tensor([1.0, -1.0, 1.0])
    assert torch.equal(codec.decode(codec.encode(values, torch.Generator()), 3), values)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("compressor", WITH_FEEDBACK, ids=str)
def test_sent_and_unsent_are_the_sum_of_all_gradients(compressor):
    parameters = parameters_of((30, 20), (20,), (8, 5, 3, 3))
    count = sum(p.numel() for p in parameters)
    exchange, sent, total = Exchange(), torch.zeros(count), torch.zeros(count)
    for step in range(20):
        gradient = normal(count, seed=step)
        total += gradient
        sent += compressor.average(gradient, parameters, exchange)
    unsent = exchange.recall("unsent", parameters)
    assert unsent.abs().max() > 0.1
    torch.testing.assert_close(sent + unsent, total, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("alone")
def test_deep_gradient_follows_the_paper_value_by_value():
    compressor = DeepGradient(density=0.2, momentum=0.9)
    (parameter,) = parameters_of((10,))
    exchange, velocity, waiting = Exchange(), [0.0] * 10, [0.0] * 10
    for step in range(15):
        gradient = normal(10, seed=step)
        velocity = [0.9 * u + g for u, g in zip(velocity, gradient.tolist(), strict=True)]
        waiting = [v + u for v, u in zip(waiting, velocity, strict=True)]
        largest = sorted(range(10), key=lambda i: -abs(waiting[i]))[:2]
        expected = torch.zeros(10)
        for i in largest:
            expected[i] = torch.tensor(waiting[i]).bfloat16().float()
            waiting[i], velocity[i] = waiting[i] - expected[i].item(), 0.0
        found = compressor.average(gradient, [parameter], exchange)
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)


def test_warm_up_falls_from_a_quarter_to_the_density():
    compressor = DeepGradient(density=0.001, warm_up_steps=4)
    densities = [compressor.density_at(step) for step in range(6)]
    assert densities == pytest.approx([0.25, 0.0628717, 0.0158114, 0.00397635, 0.001, 0.001])
    assert DeepGradient(density=0.5, warm_up_steps=4).density_at(0) == 0.5


@pytest.mark.usefixtures("alone")
def test_power_sgd_is_exact_where_the_gradient_has_its_rank():
    parameters = parameters_of((40, 30), (40,), (12, 4, 3, 3))
    matrix = normal(40, 3, seed=1) @ normal(3, 30, seed=2)
    kernel = normal(12, 2, seed=3) @ normal(2, 36, seed=4)
    gradient = torch.cat([matrix.flatten(), normal(40, seed=5), kernel.flatten()])
    exchange = Exchange()
    for _ in range(3):  # that a factor has less than full rank harms no later step
        found = PowerSGD(rank=3).average(gradient, parameters, exchange)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("alone")
def test_power_sgd_comes_to_the_best_factors_of_a_gradient_that_stays():
    (parameter,) = parameters_of((30, 20))
    gradient, exchange = normal(30, 20), Exchange()
    u, s, v = torch.linalg.svd(gradient)
    s[2:] *= 0.5  # a gap, so that the iteration ends
    gradient = u[:, :20] * s @ v
    best = u[:, :2] * s[:2] @ v[:2]
    for _ in range(100):
        exchange.keep("unsent", [parameter], torch.zeros(600))
        found = PowerSGD(rank=2).average(gradient.flatten(), [parameter], exchange)
    torch.testing.assert_close(found.view(30, 20), best, rtol=1e-3, atol=1e-3)


def test_power_sgd_leaves_what_factors_would_not_make_smaller():
    large, small, vector = parameters_of((100, 100), (4, 100), (100,))
    fits = PowerSGD(rank=4).factorizes
    assert (fits(large), fits(small), fits(vector)) == (True, False, False)


@pytest.mark.usefixtures("alone")
@every_compressor
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_an_overflow_is_seen_by_all_and_forgotten(compressor, wrong):
    parameters = parameters_of((40, 30), (40,))
    exchange, gradient = Exchange(), normal(1240)
    compressor.average(gradient, parameters, exchange)
    broken = gradient.clone()
    broken[17] = wrong
    assert not compressor.average(broken, parameters, exchange).isfinite().all()
    for _ in range(2):
        assert compressor.average(gradient, parameters, exchange).isfinite().all()


def _averages(compressor: Compressor) -> tuple[list[Tensor], list[Tensor], float]:
    """Three steps of one rank of several, its own gradients, and what it counted."""
    rank, parameters = dist.get_rank(), parameters_of((30, 20), (20,))
    exchange, found = Exchange(), []
    gradients = [normal(620, seed=10 * step + rank) for step in range(3)]
    for gradient in gradients:
        found.append(compressor.average(gradient, parameters, exchange))
    return gradients, found, exchange.sent_bytes, exchange.recall("unsent", parameters)


def test_three_ranks_have_the_same_bits_and_a_mean_of_what_they_sent():
    def every_one():
        return [_averages(compressor) for compressor in ALL]

    factors_bytes, vector_bytes = 4 * 2 * (30 + 20), 4 * 20
    summed = {
        Uncompressed(): 4 * 620,
        Cast(): 2 * 620,
        Cast("bfloat16"): 2 * 620,
        PowerSGD(rank=2): factors_bytes + vector_bytes,
    }
    gathered = {Int8(): 4 + 620, Ternary(): 4 + 155, Sign(): 4 + 78, TopK(): 4 + 6 * 4}
    ranks = run(every_one, world_size=3, timeout=60)
    for compressor, *results in zip(ALL, *ranks, strict=True):
        gradients, averages, sent_bytes, unsent = zip(*results, strict=True)
        for first, *others in zip(*averages, strict=True):
            assert all(torch.equal(first, other) for other in others), compressor
        if compressor in summed:
            assert sent_bytes == pytest.approx((3 * summed[compressor] * 4 / 3,) * 3)
        elif compressor in gathered:
            assert sent_bytes == (3 * gathered[compressor] * 2,) * 3
        exact = torch.stack([torch.stack(own) for own in gradients]).sum(1).mean(0)  # (620,)
        if compressor in (Sign(), TopK(), PowerSGD(rank=2)):
            total = sum(averages[0]) + torch.stack(unsent).mean(0)
            torch.testing.assert_close(total, exact, rtol=0, atol=1e-5)
        elif isinstance(compressor, Uncompressed | Cast | Int8):
            torch.testing.assert_close(sum(averages[0]), exact, rtol=0, atol=0.03)


def test_ranks_draw_different_noise_and_each_the_same_again():
    def drawn():
        generators = [Exchange().drawn(seed=0, device=torch.device("cpu")) for _ in range(2)]
        return [torch.rand(1, generator=generator).item() for generator in generators]

    (first, again), (second, _) = run(drawn, timeout=60)
    assert first == again != second


def _constant_gradients(compressor: Compressor, steps: int) -> dict:
    """Train with a gradient that does not depend on the weights, in many buckets."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(20, 20) for _ in range(4)))
    start = torch.cat([p.detach().flatten() for p in net.parameters()])
    slopes = [normal(*p.shape, seed=10 + 7 * dist.get_rank() + i)
              for i, p in enumerate(net.parameters())]  # fmt: skip

    class Slopes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self):
            products = [(p * s).sum() for p, s in zip(net.parameters(), slopes, strict=True)]
            return sum(reversed(products))  # in an order that makes DDP rebuild its buckets

    model = DistributedDataParallel(Slopes(), bucket_cap_mb=0.002)
    exchange = compress_gradients(model, compressor)
    buckets, average = [], compressor.average
    object.__setattr__(
        compressor, "average", lambda g, p, e: buckets.append(len(g)) or average(g, p, e)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    object.__delattr__(compressor, "average")
    parameters = [*net.parameters()]
    return {
        "moved": start - torch.cat([p.detach().flatten() for p in parameters]),
        "unsent": exchange.recall("unsent", parameters),
        "slopes": torch.cat([slope.flatten() for slope in slopes]),
        "buckets": buckets,
        "report": exchange.report(),
    }


def test_nothing_is_lost_when_ddp_rebuilds_its_buckets():
    def every_one():
        return [_constant_gradients(c, steps=6) for c in (Uncompressed(), *WITH_FEEDBACK)]

    for first, second in zip(*run(every_one, timeout=60), strict=True):
        assert torch.equal(first["moved"], second["moved"])
        assert first["buckets"][0] != first["buckets"][-1]  # or there was nothing to see
        exact = 6 * (first["slopes"] + second["slopes"]) / 2
        found = first["moved"] + (first["unsent"] + second["unsent"]) / 2
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)
        assert first["report"].steps == 6
        assert first["report"].plain_bytes == 6 * 4 * 4 * 420


def _trained(wrap: Callable) -> Tensor:
    """Weights after three steps on this rank's half of each batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inside, step = wrap(model)
    for batch in range(3):
        x, y = normal(8, 6, seed=batch), normal(8, 3, seed=9 + batch)
        half = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
        model.zero_grad()
        nn.functional.mse_loss(inside(x[half]), y[half]).backward()
        step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _plain(model):
    inside = DistributedDataParallel(model)
    return inside, torch.optim.SGD(model.parameters(), lr=0.1).step


def _counted(model):
    inside, step = _plain(model)
    compress_gradients(inside, Uncompressed())
    return inside, step


def _averaged_each_step(model):
    return model, local_sgd(model, torch.optim.SGD(model.parameters(), lr=0.1), every=1).step


def test_uncompressed_and_weights_averaged_at_each_step_are_plain_ddp():
    ways = (_plain, _counted, _averaged_each_step)
    plain, counted, averaged = run(lambda: [_trained(way) for way in ways], timeout=60)[0]
    torch.testing.assert_close(counted, plain, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(averaged, plain, rtol=1e-5, atol=1e-6)


def _local(make: Callable, steps: int, **settings) -> tuple:
    """Ranks with weights and steps of their own; rank 0's are where all begin."""
    rank = dist.get_rank()
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        model[0].weight.fill_(1.0 + rank)
        model[1].running_mean.fill_(float(rank))
    training = make(model, torch.optim.SGD(model.parameters(), lr=1.0), **settings)
    path = []
    for step in range(steps):
        for p in model.parameters():
            p.grad = torch.full_like(p, (step + 1.0) * (rank + 1))
        model[1].running_mean += rank
        training.step()
        path.append(model[0].weight[0, 0].item())
    training.synchronize()
    training.synchronize()
    buffers = model[1].running_mean, model[1].num_batches_tracked
    return path, model[0].weight.detach(), buffers, training.report()


def test_local_sgd_takes_the_mean_every_few_steps():
    (first, weight, (mean, _), report), (second, other, _, _) = run(
        lambda: _local(local_sgd, 5, every=2), timeout=60
    )
    # Rank 0 takes steps of 1, 2, 3, 4, 5 and rank 1 of 2, 4, 6, 8, 10; means after 2, 4 and 5.
    assert first == [0.0, -3.5, -6.5, -14.0, -19.0]
    assert second == [-1.0, -3.5, -9.5, -14.0, -24.0]
    assert weight[0, 0] == other[0, 0] == -21.5
    assert mean[0] == 0.5 * 5  # rank 1 had added 1 at each step
    parameters_bytes, buffers_bytes = 4 * (6 + 2 + 2 + 2), 4 * 4
    assert report.steps == 5
    assert report.bytes_per_step == 3 * (parameters_bytes + buffers_bytes) / 5
    assert report.plain_bytes == 5 * parameters_bytes


def test_diloco_takes_outer_steps_with_nesterov_momentum():
    settings = dict(every=2, outer_learning_rate=0.5, outer_momentum=0.8)
    (path, weight, _, report), (_, other, _, _) = run(
        lambda: _local(diloco, 6, **settings), timeout=60
    )
    anchor, velocity, expected = 1.0, 0.0, []
    for start in (1, 3, 5):
        moved = 1.5 * (start + start + 1)
        velocity = 0.8 * velocity + moved
        anchor -= 0.5 * (moved + 0.8 * velocity)
        expected.append(anchor)
    assert path[1::2] == pytest.approx(expected)
    assert torch.equal(weight, other)
    assert report.times_smaller == pytest.approx(2 * 48 / 64)  # buffers are sent too


def test_a_compressor_shortens_the_exchange_of_weights():
    def both():
        return [
            _local(diloco, 4, every=4, compressor=c)[3].bytes_per_step
            for c in (None, Cast("bfloat16"))
        ]

    plain, short = run(both, timeout=60)[0]
    assert (plain, short) == (64 / 4, (24 + 16) / 4)


def test_a_gradient_that_is_accumulated_is_sent_once():
    def accumulated():
        model = DistributedDataParallel(nn.Linear(4, 3))
        exchange = compress_gradients(model, Cast())
        for _ in range(3):
            with model.no_sync():
                model(torch.ones(2, 4)).sum().backward()
            model(torch.ones(2, 4)).sum().backward()
        return exchange.report()

    report = run(accumulated, timeout=60)[0]
    assert (report.steps, report.bytes_per_step, report.times_smaller) == (3, 30, 2)


def test_bfloat16_models_get_gradients_in_bfloat16():
    def half():
        results = []
        for compressor in ALL:
            model = DistributedDataParallel(nn.Linear(30, 20).bfloat16())
            exchange = compress_gradients(model, compressor)
            model(torch.ones(2, 30, dtype=torch.bfloat16)).sum().backward()
            gradient = model.module.weight.grad
            results.append((gradient.dtype, bool(gradient.isfinite().all())))
            results.append(exchange.report().plain_bytes == 2 * 620)
        return results

    assert set(run(half, timeout=60)[0]) == {(torch.bfloat16, True), True}


def _wire(compressor: Compressor, model: nn.Module, interface: str) -> tuple[float, float]:
    """Bytes of a step by the counter of the interface, and as reported."""
    wrapped = DistributedDataParallel(model, bucket_cap_mb=25)
    exchange = compress_gradients(wrapped, compressor)

    def step():
        wrapped(torch.ones(1, 1, 28, 28)).sum().backward()

    for _ in range(2):  # DDP rebuilds its buckets, which it tells the ranks about
        step()
    dist.barrier()
    before, counted = namespaces.sent_bytes(interface), exchange.sent_bytes
    step()
    return namespaces.sent_bytes(interface) - before, exchange.sent_bytes - counted


@pytest.mark.skipif(bool(namespaces.missing()), reason=str(namespaces.missing()))
def test_the_interface_counts_what_is_reported():
    # Each collective has about a kilobyte of headers: beside a large gradient that is little.
    every_kind = [Uncompressed(), Cast(), Int8(), Ternary(), Sign(), TopK(), PowerSGD(rank=4)]

    def every_one(interfaces):
        interface, model = interfaces[dist.get_rank()], models.mlp_wide()
        return [_wire(compressor, model, interface) for compressor in every_kind]

    with namespaces.two_hosts() as hosts:
        ranks = hosts.run(every_one, hosts.interfaces, timeout=100)
    for rank in ranks:
        for compressor, (on_wire, reported) in zip(every_kind, rank, strict=True):
            assert reported < on_wire < 1.05 * reported, compressor


@pytest.mark.skipif(bool(namespaces.missing()), reason=str(namespaces.missing()))
def test_hosts_are_taken_away_whatever_happens():
    def fails():
        raise ArithmeticError("on purpose")

    subprocess.run(["ip", "netns", "add", "wb99999999-a"], check=True)  # of one that was killed
    with pytest.raises(RuntimeError, match="on purpose"), namespaces.two_hosts(10) as hosts:
        hosts.run(fails, timeout=60)
    assert {*namespaces.names()}.isdisjoint({*hosts.names, "wb99999999-a"})


def test_settings_out_of_range_say_what_to_give():
    refusals = [
        (lambda: Cast("int8"), "dtype is 'int8'; choose 'float16' or 'bfloat16'"),
        (lambda: Int8(chunk=0), "chunk is 0; give a whole number from 1"),
        (lambda: Sign(chunk=2.5), "chunk is 2.5; give"),
        (lambda: Ternary(chunk=True), "chunk is True; give"),
        (lambda: TopK(density=0), "density is 0; give a number above 0, to 1"),
        (lambda: TopK(density=1.5), "density is 1.5; give"),
        (lambda: DeepGradient(density=math.nan), "density is nan; give"),
        (lambda: DeepGradient(momentum=1.0), "momentum is 1.0; give a number from 0 to below 1"),
        (lambda: DeepGradient(warm_up_steps=-1), "warm_up_steps is -1; give a whole number from 0"),
        (lambda: PowerSGD(rank=0), "rank is 0; give a whole number from 1"),
    ]
    for make, message in refusals:
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.usefixtures("alone")
def test_what_cannot_be_compressed_is_refused():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="expected a DistributedDataParallel, got Linear; wrap"):
        compress_gradients(model, TopK())
    wrapped = DistributedDataParallel(model)
    with pytest.raises(TypeError, match=r"such as PowerSGD\(rank=4\), got 'top-k'"):
        compress_gradients(wrapped, "top-k")
    with pytest.raises(TypeError, match="expected a plain model"):
        local_sgd(wrapped, optimizer)
    for settings, message in [
        ({"every": 0}, "every is 0; give a whole number from 1"),
        ({"outer_learning_rate": 0}, "outer_learning_rate is 0; give a number above 0"),
        ({"outer_momentum": 1}, "outer_momentum is 1; give a number from 0 to below 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            diloco(model, optimizer, **settings)


def test_a_process_group_is_needed():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no process group; call this in a function that"):
        local_sgd(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.usefixtures("alone")
def test_alone_nothing_is_sent():
    model = DistributedDataParallel(nn.Linear(3, 2))
    exchange = compress_gradients(model, TopK())
    model(torch.ones(1, 3)).sum().backward()
    report = exchange.report()
    assert (report.steps, report.bytes_per_step) == (1, 0)
    assert math.isnan(report.times_smaller)
    assert gradient_compression.Report(1, 0, 8).times_smaller == math.inf
