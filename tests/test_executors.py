"""A sweep on any `concurrent.futures.Executor`: processes, Dask's workers, IPython's engines."""

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from torch import nn

from workbench import data
from workbench.compress.recipe import FineTune, Prune, Recipe
from workbench.measure import compare

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(400, 12, generator=GENERATOR)
SPLIT = (INPUTS, (INPUTS[:, :3].argmax(1)))
TASK = data.task(train=SPLIT, validation=SPLIT, test=SPLIT)
FAST = {"repeats": 10, "progress": False}


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3))


@contextlib.contextmanager
def processes() -> Iterator[tuple[Executor, list[int]]]:
    with ProcessPoolExecutor(2, mp_context=get_context("forkserver")) as pool:
        pool.submit(os.getpid).result()
        yield pool, [*pool._processes]


@contextlib.contextmanager
def dask_workers() -> Iterator[tuple[Executor, list[int]]]:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster,
        Client(cluster) as client,
        client.get_executor() as pool,
    ):
        yield pool, [*client.run(os.getpid).values()]


@contextlib.contextmanager
def engines() -> Iterator[tuple[Executor, list[int]]]:
    from ipyparallel import Cluster

    with Cluster(n=2, log_level=40) as client:
        pids = client[:].apply_sync(os.getpid)
        yield client.executor(), pids
        for pid in pids:  # with torch in them they do not always end when they are asked
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Watched(Executor):
    """Passes all on, and remembers what came of it."""

    def __init__(self, pool: Executor):
        self.pool, self.futures = pool, []

    def submit(self, function, /, *args, **kwargs):
        self.futures.append(self.pool.submit(function, *args, **kwargs))
        return self.futures[-1]


@pytest.mark.parametrize("pool", [processes, dask_workers, engines])
def test_models_are_scored_and_recipes_run_elsewhere_even_if_a_worker_dies(pool):
    models = {str(seed): network(seed) for seed in range(4)}
    here = compare(TASK, models, **FAST)
    recipe = Recipe(Prune(sparsity=0.5), FineTune(epochs=1))
    expected = recipe(models["0"], TASK, progress=False)
    with pool() as (executor, pids):
        assert os.getpid() not in pids
        watched = Watched(executor)
        there = compare(TASK, models, executor=watched, **FAST)
        assert [future.exception() for future in watched.futures] == [None] * 4
        found = [executor.submit(recipe, models["0"], TASK, progress=False) for _ in range(2)]
        for future in found:
            assert torch.equal(future.result(timeout=60)[0].weight, expected[0].weight)
        os.kill(pids[0], signal.SIGKILL)
        after = compare(TASK, models, executor=executor, **FAST)
    for frame in (there, after):
        assert frame.score.equals(here.score)
        assert (frame.error == "").all()
