"""`launch`: torchrun with a time limit, restarts that go on from a checkpoint, and no leftovers."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import namespaces
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from workbench import data
from workbench.parallel import RankError, run
from workbench.parallel.torchrun import _Meeting, _run, launch

LIMITS = {"patience": 40, "timeout": 200}


def trained(folder, fatal_step=None):
    """Train, and kill this rank once, in a step before the first restart."""
    from workbench.parallel.data_parallel import train  # here, as it is slow to import

    torch.manual_seed(0)
    x, y = torch.randn(60, 1, 8, 8), torch.arange(60) % 10
    task = data.task(train=(x, y), test=(x, y), validation=(x, y))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout(0.2), nn.Flatten(), nn.Linear(144, 10))
    steps = 0

    class Fatal(torch.optim.AdamW):
        def step(self):
            nonlocal steps
            steps += 1
            first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
            if first and dist.get_rank() == 1 and steps == fatal_step:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().step()

    optimizer = partial(Fatal, lr=0.01)
    settings = {"epochs": 3, "batch_size": 8, "every": 3, "progress": False}
    result = train(model, task, optimizer=optimizer, folder=folder, **settings)
    return result.state_dict(), steps


def assert_gone(pids):
    stop_at = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < stop_at, f"still there: {pids}"
        time.sleep(0.05)


def test_a_rank_that_raises_is_reported_and_all_are_stopped(tmp_path):
    def fail():
        Path(tmp_path, str(dist.get_rank())).write_text(f"{os.getpid()} {os.getppid()}")
        dist.barrier()
        if dist.get_rank() == 1:
            raise KeyError("the reason")
        time.sleep(300)

    with pytest.raises(RankError, match=r"(?s)rank 1 raised .*KeyError: 'the reason'$") as caught:
        launch(fail, **LIMITS)
    assert caught.value.rank == 1
    pids = {int(pid) for path in tmp_path.iterdir() for pid in path.read_text().split()}
    assert len(pids) == 3  # two ranks and their agent
    assert_gone(pids)


def test_nothing_outlives_the_caller(tmp_path):
    program = f"""
import os, time
from pathlib import Path
from workbench.parallel.torchrun import launch

def rest():
    path = Path({str(tmp_path)!r}, os.environ["RANK"])
    path.with_suffix(".part").write_text(f"{{os.getpid()}} {{os.getppid()}}")
    path.with_suffix(".part").rename(path)
    time.sleep(300)

launch(rest, timeout=300)
"""
    with subprocess.Popen([sys.executable, "-c", program]) as caller:
        paths = [tmp_path / "0", tmp_path / "1"]
        stop_at = time.monotonic() + 60
        while not all(path.exists() for path in paths):
            assert time.monotonic() < stop_at
            time.sleep(0.05)
        caller.kill()
    assert_gone({int(pid) for path in paths for pid in path.read_text().split()})


def test_a_script_is_restarted_and_its_output_returned(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, workbench\n"
        "attempt, rank = os.environ['TORCHELASTIC_RESTART_COUNT'], os.environ['RANK']\n"
        "print('attempt', attempt, 'rank', rank, *sys.argv[1:])\n"
        "print('old store', os.environ['TORCHELASTIC_USE_AGENT_STORE'])\n"
        "print('threads', os.environ['OMP_NUM_THREADS'])\n"
        "if rank == '1' and attempt < sys.argv[2]: sys.exit('bad luck')\n"
    )
    found = launch(script, "text", 1, max_restarts=1, threads=2, **LIMITS)
    common = "old store False\nthreads 2\n"  # that of the attempt before has old addresses
    assert found == [f"attempt 1 rank {rank} text 1\n{common}" for rank in (0, 1)]
    message = "(?s)rank 1 ended with exit code 1\nlocal rank 1 wrote last:\nbad luck$"
    with pytest.raises(RankError, match=message):
        launch(script, "text", 9, **LIMITS)


def test_what_does_not_end_is_stopped_and_asked_where_it_was(tmp_path):
    folder = tmp_path / "run" / "attempt_0" / "0"
    folder.mkdir(parents=True)
    child = (
        "import faulthandler, os, signal, sys, time\n"
        f"log = open({str(folder / 'stderr.log')!r}, 'w')\n"
        "faulthandler.register(signal.SIGUSR1, log)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(300)\n"
    )
    call = f"subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    program = f"import subprocess, sys; {call}"
    message = '(?s)had not ended after 4 s\nlocal rank 0 wrote last:\n.*"<string>", line 5'
    with pytest.raises(RankError, match=message):
        _run([sys.executable, "-c", program], dict(os.environ), tmp_path, 4)
    assert_gone([int((tmp_path / "pid").read_text())])
    with pytest.raises(RankError, match=r"(?s)torchrun ended with exit code 1\n.*ValueError: odd"):
        _run([sys.executable, "-c", "raise ValueError('odd')"], dict(os.environ), tmp_path, 60)


def test_an_interrupt_stops_all(tmp_path):
    program = "import os; print(os.getpid(), flush=True); os.read(0, 1)"
    log, over = tmp_path / "agent.log", threading.Event()

    def interrupt():
        while not over.wait(0.05):
            if log.exists() and log.read_text().endswith("\n"):
                os.kill(os.getpid(), signal.SIGINT)
                return

    # A shell that starts tests in the background makes them deaf to interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            _run([sys.executable, "-c", program], dict(os.environ), tmp_path, 60)
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert_gone([int(log.read_text())])


NODE = """
import sys
from safetensors.torch import save_file
from test_torchrun import LIMITS, trained
from workbench.parallel.torchrun import launch

folder, result, rendezvous = sys.argv[1:]
settings = {"nnodes": 2, "nproc_per_node": 1, "rendezvous": rendezvous, "max_restarts": 1}
[(state, steps)] = launch(trained, folder, 14, **settings, **LIMITS)
save_file(state, result, {"steps": str(steps)})
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def two_nodes():
    """What to put before a command on each of two nodes, and where they meet."""
    if namespaces.missing() is None:
        with namespaces.two_hosts() as hosts:
            yield [hosts.command(0), hosts.command(1)], f"{hosts.addresses[0]}:29400"
            assert min(hosts.sent_bytes(host) for host in (0, 1)) > 10_000  # over the cable
    else:  # two agents on this machine
        yield [[], []], f"127.0.0.1:{free_port()}"


def test_two_machines_train_and_go_on_after_one_lost_a_rank(tmp_path):
    expected, all_steps = run(trained, tmp_path / "whole", timeout=60)[0]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with two_nodes() as (commands, rendezvous):
        files = [tmp_path / f"{node}.safetensors" for node in (0, 1)]
        nodes = [
            subprocess.Popen(
                [*command, sys.executable, "-c", NODE, tmp_path / "shared", file, rendezvous],
                env=environment,
            )
            for command, file in zip(commands, files, strict=True)
        ]
        try:
            assert [node.wait(timeout=220) for node in nodes] == [0, 0]
        finally:
            for node in nodes:
                node.kill()
                node.wait()
    for file in files:
        state = load_file(file)
        assert all(torch.equal(x, expected[name]) for name, x in state.items())
        with safe_open(file, "pt") as opened:
            assert int(opened.metadata()["steps"]) == all_steps - 12


def test_a_node_that_stays_alone_says_so():
    message = r"the nodes did not meet \(RendezvousTimeoutError\); make the same call on all"
    with pytest.raises(RankError, match=message):
        launch(trained, nnodes=2, rendezvous=f"127.0.0.1:{free_port()}", patience=1, timeout=60)


def test_the_way_to_the_others():
    alone = _Meeting(None, 1)
    assert (alone.address, alone.endpoint) == ("127.0.0.1", "127.0.0.1:0")
    assert alone.interface in psutil.net_if_addrs()
    assert alone.name != _Meeting(None, 1).name
    assert "is_host" not in alone.options(2.6)["rdzv-conf"]
    assert "join_timeout=3,read_timeout=3" in alone.options(2.6)["rdzv-conf"]
    here = _Meeting("localhost:29400", 2)
    assert here.name == _Meeting("localhost:29400", 2).name
    here.host, here.address = "10.0.0.1", "10.0.0.2"
    assert here.options(1)["rdzv-conf"].endswith("is_host=0")
    here.address = "10.0.0.1"
    assert here.options(1)["rdzv-conf"].endswith("is_host=1")
    assert here.options(1)["local-addr"] == "10.0.0.1"


def test_settings_are_checked():
    refusals = {
        "nnodes is 0; give 1 or more": {"nnodes": 0},
        "nproc_per_node is 0; give": {"nproc_per_node": 0},
        "threads is -1; give": {"threads": -1},
        "max_restarts is -1; give 0 or more": {"max_restarts": -1},
        "patience is 0; give some seconds": {"patience": 0},
        "timeout is nan; give": {"timeout": float("nan")},
        "nnodes is 2, and rendezvous is None; give all nodes the same": {"nnodes": 2},
        "rendezvous is 'there'; give 'address:port'": {"rendezvous": "there"},
        "rendezvous is ':80'; give": {"rendezvous": ":80"},
        "rendezvous is '127.0.0.1:99999'; give": {"rendezvous": "127.0.0.1:99999"},
        "rendezvous 'nowhere.invalid:80' is out of reach": {"rendezvous": "nowhere.invalid:80"},
    }
    for message, settings in refusals.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            launch(trained, **settings)
    with pytest.raises(ValueError, match=r"no script 'missing\.py'; give a file, or a function"):
        launch("missing.py")
