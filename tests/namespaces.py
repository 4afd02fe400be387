"""Two hosts on one machine: network namespaces, joined by a cable of a given rate. Root only."""

import contextlib
import ctypes
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from workbench.parallel import run

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of sched.h


def missing() -> str | None:
    """Why there can be no namespaces here, None if there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root"
    lacking = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"needs {' and '.join(lacking)} (iproute2)" if lacking else None


def names() -> list[str]:
    """The namespaces that there are."""
    folder = Path("/run/netns")
    return [path.name for path in folder.iterdir()] if folder.exists() else []


@dataclass(frozen=True)
class Hosts:
    """Two namespaces, each with one end of the cable: its interface and its address."""

    names: tuple[str, str]
    interfaces: tuple[str, str]
    addresses: tuple[str, str] = ("10.77.0.1", "10.77.0.2")

    def command(self, host: int) -> list[str]:
        """What to put before a command that a host shall run."""
        return ["ip", "netns", "exec", self.names[host]]

    def run(self, function: Callable, *args: object, timeout: float = 300.0) -> list:
        """`workbench.parallel.run` with one rank on each host, on gloo."""
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder, "store").as_uri()
            call = (store, timeout, self.names, self.interfaces, function, args)
            return run(_on_its_host, *call, timeout=timeout)

    def sent_bytes(self, host: int) -> int:
        """What a host has put on the cable so far, by the counter of its interface."""
        return sent_bytes(self.interfaces[host], self.names[host])


def sent_bytes(interface: str, namespace: str | None = None) -> int:
    """The counter of an interface, in a namespace or in that of the caller."""
    where = ["-n", namespace] if namespace else []
    command = ["ip", *where, "-s", "-j", "link", "show", interface]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(shown)[0]["stats64"]["tx"]["bytes"]


@contextlib.contextmanager
def two_hosts(rate_mbit_s: float | None = None) -> Iterator[Hosts]:
    """Make two hosts, and take them away whatever happens; the rate limits each direction.

    Those of a process that was killed are taken away by the next call.
    """
    for name in names():
        found = re.fullmatch(r"wb(\d+)-[ab]", name)
        if found and not Path("/proc", found[1]).exists():
            _ip("netns", "del", name)
    tag = f"wb{os.getpid()}"
    hosts = Hosts((f"{tag}-a", f"{tag}-b"), (f"{tag}a", f"{tag}b"))
    with contextlib.ExitStack() as stack:
        for name in hosts.names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
        (a, b), (end_a, end_b) = hosts.names, hosts.interfaces
        _ip("link", "add", end_a, "netns", a, "type", "veth", "peer", "name", end_b, "netns", b)
        for name, end, address in zip(*vars(hosts).values(), strict=True):
            _ip("-n", name, "address", "add", f"{address}/30", "dev", end)
            for interface in ("lo", end):
                _ip("-n", name, "link", "set", interface, "up")
            if rate_mbit_s is not None:
                limit = ["rate", f"{rate_mbit_s}mbit", "burst", "64kb", "latency", "100ms"]
                _call("tc", "-n", name, "qdisc", "add", "dev", end, "root", "tbf", *limit)
        yield hosts


def _on_its_host(
    store: str,
    timeout: float,
    names: tuple[str, str],
    interfaces: tuple[str, str],
    function: Callable,
    args: tuple,
) -> object:
    """Move this process to its host, and make the process group anew from there.

    Ranks find each other through the store, a file; sockets belong to the host of the thread that
    opens them.
    """
    rank = dist.get_rank()
    dist.barrier()  # who leaves while another still arrives breaks its connection
    dist.destroy_process_group()
    with open(f"/run/netns/{names[rank]}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _NEW_NETWORK) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {names[rank]}")
    os.environ["GLOO_SOCKET_IFNAME"] = interfaces[rank]
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    return function(*args)


def _ip(*arguments: str) -> None:
    _call("ip", *arguments)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
