"""The same function on several machines: `launch`, on torchrun, which restarts what fails.

One process a node, the agent, is torchrun's own: it meets the agents of the other nodes at the
rendezvous, starts this node's ranks, and after a failure meets the others again and starts all
ranks anew. A training that keeps checkpoints (`workbench.parallel.data_parallel.train`) goes on
from there.

As torchrun comes, some restarts hang. The agents keep one store for all rounds, so that a restarted
rank can find in it the address that another had before the restart, and waits there for nobody.
`launch` has a store made for each round, and bounds every wait.
"""

import contextlib
import faulthandler
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import cloudpickle
import psutil

from workbench.data import write_whole
from workbench.parallel.launch import RankError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def launch(
    function: Callable | str | os.PathLike,
    *args: object,
    nnodes: int = 1,
    nproc_per_node: int = 2,
    rendezvous: str | None = None,
    max_restarts: int = 0,
    backend: str | None = None,
    threads: int = 1,
    patience: float = 60.0,
    timeout: float = 600.0,
) -> list:
    """Run a function, or a script, in several processes of each of several machines (nodes).

    Every node makes the same call. In the function `torch.distributed` is ready for use, and torch
    is told which GPU is this rank's. A script calls ``init_process_group`` itself.

    Args:
        function: a function, which may come from a notebook's cell; or the path of a script.
        args: of the function; of the script, as strings.
        nnodes: how many nodes there are.
        nproc_per_node: ranks on each.
        rendezvous: "address:port" at which the nodes meet, of the node that is to host it; all the
            others have to reach it. A single node needs none.
        max_restarts: how often all ranks are started again after one has failed.
        backend: "nccl", one GPU for each rank, or "gloo"; by default nccl where there are as many
            GPUs as ranks.
        threads: of torch in each process.
        patience: seconds that a rank waits for the others, then it counts as failed; a script sets
            that itself. Agents wait so long for each other.
        timeout: seconds until all is stopped on this node, restarts included.

    Returns:
        What each rank of this node returned; of a script, what each printed since the last restart.

    Raises:
        RankError: a rank failed once more than there were restarts, or did not end in time, or the
            nodes did not meet. It has the rank's traceback, or the last it wrote.
        ValueError: a setting out of range, no rendezvous for several nodes, or no such script.

    No process of this node is left afterwards, however the call ends.
    """
    counts = {"nnodes": nnodes, "nproc_per_node": nproc_per_node, "threads": threads}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    for name, value in {"patience": patience, "timeout": timeout}.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; give some seconds")
    if max_restarts < 0:
        raise ValueError(f"max_restarts is {max_restarts}; give 0 or more")
    is_script = not callable(function)
    if is_script and not Path(function).is_file():
        raise ValueError(f"there is no script {os.fspath(function)!r}; give a file, or a function")
    meeting = _Meeting(rendezvous, nnodes)
    with tempfile.TemporaryDirectory(prefix="torchrun-") as folder:
        if is_script:
            program = [sys.executable, "-u", os.fspath(function), *map(str, args)]
        else:
            settings = {"backend": backend, "threads": threads, "patience": patience}
            Path(folder, "settings.json").write_text(json.dumps(settings))
            Path(folder, "call").write_bytes(cloudpickle.dumps((function, args)))
            program = [sys.executable, "-c", _python(_work), folder]
        options = {
            "nnodes": nnodes, "nproc-per-node": nproc_per_node, "max-restarts": max_restarts,
            "rdzv-backend": "c10d", "monitor-interval": 0.1, "log-dir": folder, "redirects": 3,
            **meeting.options(patience),
        }  # fmt: skip
        listed = [f"--{name}={value}" for name, value in options.items()]
        command = [sys.executable, "-c", _python(_agent), folder, *listed, "--no-python", *program]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": str(threads),
            # For a store of its own for each round, see above.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "GLOO_SOCKET_IFNAME": meeting.interface,
            "NCCL_SOCKET_IFNAME": meeting.interface,
        }
        _run(command, environment, Path(folder), timeout)
        if is_script:
            return [path.read_text() for path in _outputs(Path(folder), "stdout")]
        results = sorted(Path(folder).glob("result-*"))
        return [cloudpickle.loads(path.read_bytes()) for path in results]


class _Meeting:
    """Where the nodes meet, and which address and network interface of this node lead there.

    torchrun looks this machine up by its name, which on many networks finds nothing.
    """

    def __init__(self, rendezvous: str | None, nnodes: int):
        if rendezvous is None and nnodes > 1:
            raise ValueError(
                f"nnodes is {nnodes}, and rendezvous is None; give all nodes the same "
                "'address:port', of the node that is to host it"
            )
        self.endpoint = rendezvous or "127.0.0.1:0"
        self.name = f"workbench-{self.endpoint}" if rendezvous else uuid.uuid4().hex
        host, _, port = self.endpoint.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65_535:
            raise ValueError(f"rendezvous is {rendezvous!r}; give 'address:port'")
        try:
            self.host = socket.gethostbyname(host)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((self.host, int(port) or 1))  # sends nothing: asks for the way
                self.address = probe.getsockname()[0]
        except OSError as error:
            raise ValueError(f"rendezvous {rendezvous!r} is out of reach: {error}") from error
        found = [
            name
            for name, entries in psutil.net_if_addrs().items()
            if any(entry.address == self.address for entry in entries)
        ]
        self.interface = found[0] if found else "lo"

    def options(self, patience: float) -> dict[str, str]:
        conf = {"join_timeout": max(1, round(patience)), "read_timeout": max(1, round(patience))}
        if not ipaddress.ip_address(self.host).is_loopback:  # there, whoever comes first hosts it
            conf["is_host"] = int(self.address == self.host)
        return {
            "rdzv-endpoint": self.endpoint,
            "rdzv-id": self.name,
            "rdzv-conf": ",".join(f"{name}={value}" for name, value in conf.items()),
            "local-addr": self.address,
        }


def _python(function: Callable) -> str:
    """A program that calls a function of this module."""
    return f"from {__name__} import {function.__name__}; {function.__name__}()"


def _run(command: list[str], environment: dict[str, str], folder: Path, timeout: float) -> None:
    """Start the agent, wait until it ends, and leave nothing of it."""
    log = folder / "agent.log"
    stop_at = time.monotonic() + timeout
    with open(log, "w") as output:
        agent = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output
        )
    known: set[psutil.Process] = set()
    try:
        while agent.poll() is None and time.monotonic() < stop_at:
            known |= _below(agent.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.wait(min(0.2, max(0.0, stop_at - time.monotonic())))
        in_time = agent.poll() is not None
        if not in_time:
            _ask_where(_below(agent.pid))
    finally:
        _kill(agent, known)
    if not in_time:
        raise RankError(0, f"ranks of this node had not ended after {timeout:g} s\n{_tail(folder)}")
    failure = folder / "failure.json"
    if failure.exists():
        found = json.loads(failure.read_text())
        raise RankError(found["rank"], found["what"])
    if agent.returncode != 0:
        last = _last_lines(log)
        raise RankError(0, f"torchrun ended with exit code {agent.returncode}\n{last}")


def _below(pid: int) -> set[psutil.Process]:
    """The processes that a process started, and those they did."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {*psutil.Process(pid).children(recursive=True)}
    return set()


def _ask_where(ranks: set[psutil.Process]) -> None:
    """Have each rank write at which line of code it is."""
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        for process in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGUSR1)
        time.sleep(0.2)


def _kill(agent: subprocess.Popen, known: set[psutil.Process]) -> None:
    """Kill the agent and its ranks, which have sessions of their own and would outlive it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(agent.pid).suspend()  # so that it starts no more of them
    known = known | _below(agent.pid)
    agent.kill()
    agent.wait()
    agent.stdin.close()
    for process in known:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(known, timeout=10)


def _outputs(folder: Path, stream: str) -> list[Path]:
    """What the ranks of this node wrote since the last restart."""
    attempts = sorted(
        folder.glob("*/attempt_*"), key=lambda path: int(path.name.removeprefix("attempt_"))
    )
    ranks = [path for path in attempts[-1].iterdir() if path.is_dir()] if attempts else []
    return [rank / f"{stream}.log" for rank in sorted(ranks, key=lambda path: int(path.name))]


def _tail(folder: Path, local_rank: int | None = None) -> str:
    """The last that a rank of this node wrote, or all of them."""
    found = []
    for number, path in enumerate(_outputs(folder, "stderr")):
        if local_rank in (None, number) and path.exists() and path.read_text().strip():
            found.append(f"local rank {number} wrote last:\n{_last_lines(path)}")
    return "\n".join(found)


def _last_lines(path: Path, count: int = 20) -> str:
    return "\n".join(path.read_text().strip().splitlines()[-count:])


def _agent() -> None:
    """The program of the agent: torchrun, that ends with the process that asked for it."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import parse_args, run

    def end_with_parent() -> None:
        while os.read(0, 1):  # gives nothing when the other end is gone
            pass
        for process in _below(os.getpid()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    folder = Path(sys.argv[1])
    try:
        run(parse_args(sys.argv[2:]))
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        _report(folder, rank, f"rank {rank} {_how(first, folder)}")
    except RendezvousError as error:
        rest = "make the same call on all of them, with a rendezvous that all can reach"
        _report(folder, 0, f"the nodes did not meet ({type(error).__name__}); {rest}")


def _how(failure: "ProcessFailure", folder: Path) -> str:
    """In what way a rank failed, and the last it said."""
    if isinstance(failure.message, dict):
        return f"raised {failure.message['extraInfo']['py_callstack'].strip()}"
    if failure.exitcode < 0:
        how = f"died: killed by {failure.signal_name()}, process {failure.pid}"
    else:
        how = f"ended with exit code {failure.exitcode}"
    return f"{how}\n{_tail(folder, failure.local_rank)}".strip()


def _report(folder: Path, rank: int, what: str) -> NoReturn:
    """Tell the process that asked for the agent, and end."""
    text = json.dumps({"rank": rank, "what": what})
    write_whole(folder / "failure.json", lambda path: Path(path).write_text(text))
    sys.exit(1)


def _work() -> None:
    """The program of a rank: join the group, call the function, leave the result."""
    from torch.distributed.elastic.multiprocessing.errors import record

    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, all_threads=False)
    record(_call)(Path(sys.argv[1]))


def _call(folder: Path) -> None:
    """The call of one rank, in the process group of all."""
    import torch
    import torch.distributed as dist

    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["threads"])
    local, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    backend = settings["backend"] or ("nccl" if torch.cuda.device_count() >= ranks else "gloo")
    if backend == "nccl":
        torch.cuda.set_device(local)
    dist.init_process_group(backend, timeout=timedelta(seconds=settings["patience"]))
    function, args = cloudpickle.loads((folder / "call").read_bytes())
    result = cloudpickle.dumps(function(*args))
    dist.barrier()  # others may still want what this rank has sent
    write_whole(folder / f"result-{local:05d}", lambda path: Path(path).write_bytes(result))
    dist.destroy_process_group()
