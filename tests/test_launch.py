"""`parallel.run`: several processes for one function, and none of them left, whatever happens."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import psutil
import pytest
import torch
import torch.distributed as dist
from jupyter_client.manager import start_new_kernel

from workbench.parallel import RankError, run


@pytest.fixture(autouse=True)
def nothing_left():
    """No child of this process may be left but the server and the tracker, which run no code."""
    yield
    assert ranks_of(os.getpid()) == []


def ranks_of(pid: int) -> list[int]:
    """Processes that the fork server of a process has forked."""
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a killed kernel's, not yet reaped
            if "forkserver" in " ".join(child.cmdline()):
                found += [rank.pid for rank in child.children()]
    return found


def gone(pids: list[int], seconds: float = 10) -> bool:
    stop_at = time.monotonic() + seconds
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < stop_at:
        time.sleep(0.05)
    return not any(map(psutil.pid_exists, pids))


def test_ranks_return_in_order_and_share_a_group():
    def weigh(tensor, factor):
        tensor = tensor * factor * (1 + dist.get_rank())
        dist.all_reduce(tensor)
        return dist.get_rank(), dist.get_world_size(), tensor

    for world_size in (1, 2, 3):
        found = run(weigh, torch.arange(3.0), 2, world_size=world_size)
        total = torch.arange(3.0) * 2 * sum(range(1, world_size + 1))
        assert [(rank, size) for rank, size, _ in found] == [
            (r, world_size) for r in range(world_size)
        ]
        assert all(torch.equal(tensor, total) for *_, tensor in found)


def test_each_rank_has_the_threads_asked_for_and_a_process_of_its_own():
    found = run(lambda: (torch.get_num_threads(), os.getpid()), threads=3)
    assert [threads for threads, _ in found] == [3, 3]
    assert len({pid for _, pid in found} | {os.getpid()}) == 3


def test_a_warning_names_the_rank_and_no_file():
    def warn():
        with contextlib.redirect_stderr(io.StringIO()) as written:
            warnings.warn("slow link", UserWarning, stacklevel=1)
        return written.getvalue()

    assert run(warn) == [f"rank {rank}: UserWarning: slow link\n" for rank in range(2)]


def test_an_exception_comes_back_with_its_rank_and_traceback():
    def fail_on_one():
        if dist.get_rank() == 1:
            raise KeyError("no such weight")
        dist.barrier()

    with pytest.raises(
        RankError, match=r"rank 1 of 2 raised(?s:.*)fail_on_one(?s:.*)no such"
    ) as info:
        run(fail_on_one)
    assert info.value.rank == 1
    assert isinstance(info.value.__cause__, KeyError)
    assert "worker.py" not in str(info.value)


def test_an_exception_of_a_class_made_on_the_spot_is_the_cause():
    class Mine(ValueError):
        pass

    def fail():
        raise Mine("of my own")

    with pytest.raises(RankError, match="of my own") as info:
        run(fail, world_size=1)
    assert type(info.value.__cause__).__name__ == "Mine"


def test_an_exception_that_cannot_travel_is_told():
    def fail():
        class Odd(Exception):
            def __reduce__(self):
                raise TypeError("stays here")

        raise Odd("but told")

    with pytest.raises(RankError, match="but told"):
        run(fail, world_size=1)


def test_a_result_that_cannot_travel_is_an_error():
    with pytest.raises(RankError, match="pickle"):
        run(threading.Lock, world_size=1)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named(victim):
    def die():
        if dist.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    with pytest.raises(RankError, match=f"rank {victim} of 2 died: killed by SIGKILL") as info:
        run(die)
    assert info.value.rank == victim


def test_a_rank_that_leaves_is_named():
    with pytest.raises(RankError, match=r"rank 0 of 1 died: .* exit code 7"):
        run(lambda: os._exit(7), world_size=1)


def test_a_rank_that_hangs_is_stopped_and_says_where():
    def hang():
        if dist.get_rank() == 1:
            time.sleep(600)
        dist.barrier()

    start = time.monotonic()
    with pytest.raises(RankError) as info:
        run(hang, timeout=4)
    assert time.monotonic() - start < 30
    assert "had not ended after 4 s" in str(info.value)
    assert "rank 0 was here" in str(info.value)
    assert str(info.value).count("in hang") == 2


def test_a_rank_that_will_not_end_is_killed():
    def stubborn():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)

    with pytest.raises(RankError, match="had not ended"):
        run(stubborn, world_size=1, timeout=3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"world_size": 0}, "world_size is 0"),
        ({"threads": 0}, "threads 0"),
        ({"timeout": 0}, "timeout 0"),
        ({"backend": "nccl", "world_size": 99}, "99 ranks, and there are"),
    ],
)
def test_bad_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        run(os.getpid, **wrong)


SCRIPT = """
    import os, time
    import torch.distributed as dist
    from workbench.parallel import run

    def hang():
        os.write(1, f"rank {os.getpid()}\\n".encode())
        time.sleep(600)

    run(hang)  # without `if __name__ == "__main__"`
"""


def test_no_rank_outlives_a_killed_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        lines = [parent.stdout.readline() for _ in range(2)]
        pids = [int(line.split()[1]) for line in lines]
        assert all(map(psutil.pid_exists, pids))
        everything = [p.pid for p in psutil.Process(parent.pid).children(recursive=True)]
        assert set(pids) <= set(everything)
        parent.kill()
    assert gone(everything)


@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel()
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


CELL = """
import os, time, psutil
import torch, torch.distributed as dist
from workbench.parallel import run

scale = 10
(torch.ones(200, 200, requires_grad=True) @ torch.ones(200, 200)).sum().backward()

def step(seconds=0):
    time.sleep(seconds)
    return scale * dist.get_rank()
"""


def execute(client, code: str, timeout: float = 60) -> tuple[list[str], list[str] | None]:
    """What a cell prints, and its traceback if it fails."""
    printed, error = [], None
    message = client.execute(code)
    while True:
        found = client.get_iopub_msg(timeout=timeout)
        if found["parent_header"].get("msg_id") != message:
            continue
        content = found["content"]
        if found["msg_type"] == "stream":
            printed.append(content["text"])
        elif found["msg_type"] == "error":
            error = content["traceback"]
        elif content.get("execution_state") == "idle":
            return printed, error


def test_in_a_notebook(kernel):
    """A function of a cell runs, again too; an interrupt and a killed kernel leave no process."""
    manager, client = kernel
    assert execute(client, CELL) == ([], None)
    printed, error = execute(client, "print(run(step), run(step, world_size=3))")
    assert error is None
    assert "[0, 10] [0, 10, 20]" in "".join(printed)

    def ranks() -> list[int]:
        return ranks_of(manager.provisioner.process.pid)

    def while_it_runs(action) -> list[int]:
        stop_at = time.monotonic() + 60
        while len(ranks()) < 2 and time.monotonic() < stop_at:
            time.sleep(0.05)
        pids = ranks()
        time.sleep(1)  # until they are in the function
        action()
        return pids

    # After an error a kernel refuses what comes at once, unless it was told not to.
    message = client.execute("run(step, 600)", stop_on_error=False)
    interrupted = while_it_runs(manager.interrupt_kernel)
    reply = client.get_shell_msg(timeout=60)
    while reply["parent_header"].get("msg_id") != message:
        reply = client.get_shell_msg(timeout=60)
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    assert "rank 1 was here" in "".join(reply["content"]["traceback"])
    assert len(interrupted) == 2
    assert gone(interrupted)
    client.execute("run(step, 600)")
    killed = while_it_runs(lambda: manager.provisioner.process.kill())
    assert len(killed) == 2
    assert gone(killed)
