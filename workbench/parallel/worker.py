"""What each process does that `workbench.parallel.run` starts: join the group, call, answer."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import cloudpickle
import torch
import torch.distributed as dist

_LOOPBACK = {"linux": "lo", "darwin": "lo0"}


class Group(NamedTuple):
    """How ranks find each other; ``folder`` is theirs alone."""

    folder: str
    world_size: int
    backend: str
    threads: int
    timeout: float


class Failure(NamedTuple):
    """When a rank failed, in seconds of the system's clock; how; the exception if it can travel."""

    when: float
    what: str
    error: BaseException | None


def stack_file(folder: Path, pid: int) -> Path:
    """Where a process writes, at SIGUSR1, at which line of code it is."""
    return folder / f"stack-{pid}"


def serve(line: Connection, rank: int, group: Group) -> None:
    """Receive a call, make it as a member of the group, and send what came of it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and stops all ranks
    with _stack_on_signal(Path(group.folder)):
        try:
            function, args = cloudpickle.loads(line.recv_bytes())
            _join(rank, group)
            answer = cloudpickle.dumps(function(*args))
        except BaseException as error:
            answer = cloudpickle.dumps(_failure(error))
        line.send_bytes(answer)
    with contextlib.suppress(EOFError, OSError):
        line.recv()  # others may still want what this rank has sent: stay until told to end


def _join(rank: int, group: Group) -> None:
    # The line of code is often one of torch, and its path differs from machine to machine.
    warnings.formatwarning = lambda message, kind, *_: f"rank {rank}: {kind.__name__}: {message}\n"
    torch.set_num_threads(group.threads)
    if group.backend == "nccl":
        torch.cuda.set_device(rank)
    if sys.platform in _LOOPBACK:  # by its name a machine may be found on no network at all
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK[sys.platform])
    dist.init_process_group(
        group.backend,
        init_method=f"{Path(group.folder, 'store').as_uri()}",
        rank=rank,
        world_size=group.world_size,
        timeout=timedelta(seconds=group.timeout),
    )


def _failure(error: BaseException) -> Failure:
    when = time.monotonic()
    lines = traceback.format_exception(error)
    text = "".join(line for line in lines if f'"{__file__}"' not in line)
    try:
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:
        error = None
    else:
        error.__traceback__ = None
    return Failure(when, f"raised {text.strip()}", error)


@contextlib.contextmanager
def _stack_on_signal(folder: Path) -> Iterator[None]:
    if not hasattr(faulthandler, "register"):  # Windows
        yield
        return
    with open(stack_file(folder, os.getpid()), "w") as file:
        faulthandler.register(signal.SIGUSR1, file, all_threads=False)
        yield
        faulthandler.unregister(signal.SIGUSR1)


def _end_with_parent() -> None:
    """No process outlives the one that asked for it, however that ended."""
    wait([parent_process().sentinel])
    os._exit(1)
