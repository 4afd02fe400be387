"""A process that holds one model and computes; the server's own process only talks to it.

`Nursery` is one bare process with the runtime imported, from which workers are forked: a new one is
there in milliseconds, and shares that memory. It is written here, in twenty lines, because Python's
own fork server would import the server's modules once more in every worker, and pickles.

Front and worker speak over a pair of sockets. A message is a header of JSON, after its length in
four bytes, then the bytes of its arrays. Nobody has to stop a worker: when the front's end of the
socket closes, even because the front was killed, the worker reads the end of the stream and ends.
"""

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from workbench.deploy.loading import TensorSpec

_LENGTH = struct.Struct("<I")
_BUFFER_BYTES = 2**21  # of a socket: a batch passes without waiting
_START_S = 60.0  # to load a model


class WorkerDied(Exception):
    """A worker ended, or was stopped because it did not answer; its work can be done by another."""


class ModelError(Exception):
    """The model cannot be loaded, or cannot compute these inputs; the message says why."""


class Nursery:
    """Where workers come from. It ends when this process does."""

    def __init__(self) -> None:
        self._line: socket.socket | None = None
        self._process: subprocess.Popen | None = None

    def fork(self) -> socket.socket:
        """This end of the line to a new worker."""
        here, there = socket.socketpair()
        with there:
            try:
                self._ask(there)
            except OSError:  # it was killed
                self.close()
                self._ask(there)
        return here

    def close(self) -> None:
        """End it; workers that run go on."""
        if self._line is not None:
            self._line.close()
            self._process.wait()
            self._line = None

    def _ask(self, there: socket.socket) -> None:
        if self._line is None:
            self._line, line = socket.socketpair()
            with line:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "workbench.deploy.worker", str(line.fileno())],
                    pass_fds=[line.fileno()],
                    stdin=subprocess.DEVNULL,
                )
        socket.send_fds(self._line, [b"+"], [there.fileno()])


class Worker:
    """The front's side of one worker; make it by `Worker.start`.

    Attributes:
        pid: of the process.
        inputs, outputs, record: of the model that it holds, as in `loading.Loaded`.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    record: dict
    pid: int

    @classmethod
    async def start(
        cls, nursery: Nursery, model: bytes, *, threads: int = 1, trusted: bool = False
    ) -> "Worker":
        """A new process with this model in it.

        Raises:
            ModelError: the model does not load.
            WorkerDied: the process ended while it loaded.
        """
        worker = cls()
        line = nursery.fork()
        line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        worker._reader, worker._writer = await asyncio.open_connection(
            sock=line, limit=_BUFFER_BYTES
        )
        worker.pid = 0
        header = {"threads": threads, "trusted": trusted}
        found, _ = await worker._ask(header, [np.frombuffer(model, np.uint8)], _START_S)
        worker.inputs = tuple(_spec(entry) for entry in found["inputs"])
        worker.outputs = tuple(_spec(entry) for entry in found["outputs"])
        worker.record = found["record"]
        return worker

    async def run(self, arrays: Sequence[np.ndarray], timeout_s: float) -> list[np.ndarray]:
        """The model's outputs for one batch.

        Raises:
            ModelError: the model cannot compute these inputs.
            WorkerDied: there is no answer, and will be none; start another worker.
        """
        _, outputs = await self._ask({}, arrays, timeout_s)
        return outputs

    async def explain(self, arrays: Sequence[np.ndarray], timeout_s: float, **how) -> np.ndarray:
        """What each number of the first input adds to an output; see `attribution.attribute`."""
        _, (attribution,) = await self._ask({"explain": how}, arrays, timeout_s)
        return attribution

    @property
    def ended(self) -> bool:
        """Whether the process is gone, or asked to go."""
        return self._writer.is_closing() or self._reader.at_eof()

    def close(self) -> None:
        """Let the process end, after what it is computing."""
        self._writer.close()

    def kill(self) -> None:
        """End the process at once."""
        self._writer.close()
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    async def _ask(
        self, header: dict, arrays: Sequence[np.ndarray], timeout_s: float
    ) -> tuple[dict, list[np.ndarray]]:
        try:
            async with asyncio.timeout(timeout_s):
                if not self.pid:
                    self.pid = int.from_bytes(await self._reader.readexactly(8), "little")
                self._writer.writelines(_pack(header, arrays))
                await self._writer.drain()
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                answer = json.loads(await self._reader.readexactly(length))
                outputs = []
                for dtype, shape in answer["arrays"]:
                    size_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
                    raw = await self._reader.readexactly(size_bytes)
                    outputs.append(np.frombuffer(raw, dtype).reshape(shape))
        except (OSError, EOFError, TimeoutError) as error:
            self.kill()
            raise WorkerDied(f"worker {self.pid}: {type(error).__name__}") from error
        if "error" in answer:
            raise ModelError(answer["error"])
        return answer, outputs


def serve(line: socket.socket) -> None:
    """The life of a worker: load what comes first, then compute until the line ends."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    line.sendall(os.getpid().to_bytes(8, "little"))
    stream = line.makefile("rb", buffering=2**16)
    loaded = None
    with suppress(OSError, EOFError):
        while True:
            header, arrays = _receive(stream)
            answer, outputs = {}, []
            try:
                if loaded is None:
                    loaded = _load(arrays[0].tobytes(), header)
                    answer = _described(loaded)
                elif "explain" in header:
                    from workbench.deploy.attribution import attribute

                    outputs = [attribute(loaded, arrays, **header["explain"])]
                else:
                    outputs = loaded.run(arrays)
            except Exception as error:  # whatever a runtime raises is for the client to hear
                answer, outputs = {"error": f"{type(error).__name__}: {error}"[:2000]}, []
            del arrays
            line.sendall(b"".join(_pack(answer, outputs)))


def main(line: socket.socket) -> None:
    """The life of the nursery: for each socket that is sent, one worker."""
    import onnxruntime  # noqa: F401  # every worker needs it; forked, it is there at once

    import workbench.deploy.loading  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers that end leave nothing behind
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the front, which ends the rest
    while True:
        message, descriptors, _, _ = socket.recv_fds(line, 1, 1)
        if not message:
            return
        worker = socket.socket(fileno=descriptors[0])
        if os.fork() == 0:
            line.close()
            try:
                serve(worker)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        worker.close()


def _load(model: bytes, header: dict):
    from workbench.deploy import loading

    return loading.load_bytes(model, threads=header["threads"], trusted=header["trusted"])


def _described(loaded) -> dict:
    specs = {
        key: [[spec.name, spec.dtype, spec.shape] for spec in getattr(loaded, key)]
        for key in ("inputs", "outputs")
    }
    return {**specs, "record": loaded.record}


def _spec(entry: list) -> TensorSpec:
    name, dtype, shape = entry
    return TensorSpec(name, dtype, tuple(shape))


def _pack(header: dict, arrays: Sequence[np.ndarray]) -> list[bytes | memoryview]:
    listed = [[array.dtype.str, array.shape] for array in arrays]
    text = json.dumps({**header, "arrays": listed}).encode()
    flat = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays)
    return [_LENGTH.pack(len(text)), text, *(array.data for array in flat)]


def _receive(stream) -> tuple[dict, list[np.ndarray]]:
    """One message; EOFError at the end of the stream."""
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    header = json.loads(_exactly(stream, length))
    arrays = []
    for dtype, shape in header["arrays"]:
        array = np.empty(shape, dtype)
        if stream.readinto(array.reshape(-1).view(np.uint8).data) < array.nbytes:
            raise EOFError
        arrays.append(array)
    return header, arrays


def _exactly(stream, size_bytes: int) -> bytes:
    data = stream.read(size_bytes)
    if len(data) < size_bytes:
        raise EOFError
    return data


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
