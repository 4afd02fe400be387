"""Several processes for one function, from a notebook cell: `run`.

Each process is a *rank* of a `torch.distributed` process group. A function of a notebook has no
module to be imported from, so it travels by value. The processes are forked from a server that has
torch imported and nothing running: to fork the kernel itself hangs once it has trained something.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import cloudpickle
import torch

from workbench.parallel import worker

_GRACE_S = 0.3  # that other ranks have, after a failure, to say what failed before
_MERCY_S = 2.0  # that a process has to end when asked, before it is killed


class RankError(RuntimeError):
    """One of several processes failed; the message has its traceback.

    Attributes:
        rank: which process.
    """

    def __init__(self, rank: int, what: str):
        super().__init__(what)
        self.rank = rank


def run(
    function: Callable,
    *args: object,
    world_size: int = 2,
    backend: str | None = None,
    threads: int = 1,
    timeout: float = 300.0,
) -> list:
    """Call a function in several processes at once, and give what each returned, by rank.

    In the function `torch.distributed` is ready for use: ``dist.get_rank()`` tells the ranks apart.
    It, its arguments and its results are sent by value, so that they may come from a notebook's
    cell; tensors of the results should be on the CPU.

    Args:
        world_size: how many processes.
        backend: "nccl", one GPU for each rank, or "gloo"; by default nccl where there are as many
            GPUs as ranks.
        threads: of torch in each process.
        timeout: seconds until all is stopped, start included.

    Raises:
        RankError: a rank raised an exception, died, or did not end in time. It has the traceback,
            or says where the ranks were.
        ValueError: no process, no thread, no time, or more ranks than GPUs for nccl.

    The first call takes some seconds, for torch to be imported once more; others follow quickly. No
    process is left afterwards: not if a rank fails, not if the call is interrupted, and not if the
    notebook's kernel itself is killed.

    >>> import torch.distributed as dist
    >>> run(lambda: dist.get_rank() ** 2, world_size=2)
    [0, 1]
    """
    if world_size < 1 or threads < 1 or not timeout > 0:
        raise ValueError(
            f"world_size is {world_size}, threads {threads}, timeout {timeout}; give at least "
            "one process, one thread, and some time"
        )
    gpus = torch.cuda.device_count()
    backend = backend or ("nccl" if gpus >= world_size else "gloo")
    if backend == "nccl" and gpus < world_size:
        raise ValueError(f"nccl needs a GPU for each of {world_size} ranks, and there are {gpus}")
    call = cloudpickle.dumps((function, args))
    stop_at = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        group = worker.Group(folder, world_size, backend, threads, timeout)
        processes, lines = [], []
        try:
            for rank in range(world_size):
                here, there = multiprocessing.Pipe()
                lines.append(here)
                processes.append(_context().Process(target=worker.serve, args=(there, rank, group)))
                with _without_main(), there:
                    processes[-1].start()
                here.send_bytes(call)
            results = _collect(processes, lines, Path(folder), stop_at, timeout)
            for line in lines:
                line.close()  # lets a rank end
            for process in processes:
                process.join(_MERCY_S)
            return results
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(_stacks(processes, Path(folder)))
            raise
        finally:
            _stop(processes)
            for line in lines:
                line.close()


def _context() -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["workbench.parallel.preload"])
    return context


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """A new process would run the main script once more; no rank needs it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _collect(
    processes: list[BaseProcess],
    lines: list[Connection],
    folder: Path,
    stop_at: float,
    timeout: float,
) -> list:
    """What each rank returned; raises for the rank that failed first."""
    results: dict[int, object] = {}
    failures: list[tuple[float, int, worker.Failure]] = []
    while len(results) + len(failures) < len(lines):
        if failures:
            stop_at = min(stop_at, failures[0][0] + _GRACE_S)
        failed = {rank for _, rank, _ in failures}
        waiting = [r for r in range(len(lines)) if r not in results and r not in failed]
        ready = wait([lines[r] for r in waiting], max(0.0, stop_at - time.monotonic()))
        if not ready:
            break
        for rank in waiting:
            if lines[rank] in ready:
                answer = _answer(lines[rank], processes[rank])
                if isinstance(answer, worker.Failure):
                    failures.append((time.monotonic(), rank, answer))
                else:
                    results[rank] = answer
    if failures:
        _, rank, first = min(failures, key=lambda failure: failure[2].when)
        others = "" if first.error else f"\n{_stacks(processes, folder)}"
        raise RankError(rank, f"rank {rank} of {len(lines)} {first.what}{others}") from first.error
    if len(results) < len(lines):
        late = min(set(range(len(lines))) - set(results))
        where = _stacks(processes, folder)
        raise RankError(late, f"rank {late} had not ended after {timeout:g} s\n{where}")
    return [results[rank] for rank in range(len(lines))]


def _answer(line: Connection, process: BaseProcess) -> object:
    """What a rank returned, or how it failed."""
    try:
        answer = line.recv_bytes()
    except (EOFError, OSError):
        process.join(_MERCY_S)
        code = process.exitcode
        if code is not None and code < 0:
            how = f"died: killed by {signal.Signals(-code).name}, process {process.pid}"
            if code == -signal.SIGKILL:
                how += " (the system does so too where memory runs out)"
        else:
            how = f"died: process {process.pid} ended with exit code {code}"
        return worker.Failure(0.0, how, None)  # before any that missed it
    return cloudpickle.loads(answer)


def _stacks(processes: list[BaseProcess], folder: Path) -> str:
    """Where each rank that runs is in its code."""
    files = {
        rank: worker.stack_file(folder, process.pid)
        for rank, process in enumerate(processes)
        if process.pid and process.is_alive()
    }
    for rank, file in files.items():
        if file.exists():  # it listens
            os.kill(processes[rank].pid, signal.SIGUSR1)
    time.sleep(0.1)
    found = []
    for rank, file in files.items():
        stack = file.read_text() if file.exists() else ""
        lines = [*itertools.takewhile(lambda x: worker.__file__ not in x, stack.splitlines())]
        if any(str(Path(multiprocessing.__file__).parent) not in line for line in lines[1:]):
            found.append("\n".join([f"rank {rank} was here:", *lines]))
    return "\n".join(found)


def _stop(processes: list[BaseProcess]) -> None:
    """End what still runs: asked to first, then killed."""
    processes = [process for process in processes if process.pid]
    for process in processes:
        process.terminate()
    stop_at = time.monotonic() + _MERCY_S
    for process in processes:
        process.join(max(0.0, stop_at - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
