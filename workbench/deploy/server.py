"""Models over HTTP, by one command or from a notebook cell.

    python -m workbench.deploy.server --model lenet-5.onnx

`serve` runs that same command beside a notebook. The server listens on this machine only unless
told otherwise, runs no code that came with a model file unless told to trust it, and ends with the
process that started it. See notebook 14.
"""

import argparse
import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from workbench.data import Task

_START_S = 120.0
_STOP_S = 20.0


class Served:
    """A server that runs beside this process; leave the ``with`` block or call `stop` to end it.

    Attributes:
        url: where it answers.
        pid: of the server; its workers are processes of their own.
    """

    def __init__(self, process: subprocess.Popen, url: str, folder: tempfile.TemporaryDirectory):
        self.url, self.pid = url, process.pid
        self._process, self._folder = process, folder

    def stop(self) -> None:
        """Let it answer what it has been asked, and end it."""
        self._process.stdin.close()  # the server ends with this line
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def serve(
    model: "nn.Module | str | os.PathLike",
    *options: str,
    task: "Task | None" = None,
    name: str = "model",
) -> Served:
    """Offer a model over HTTP on a free port of this machine.

    Args:
        model: a module, which is exported to ONNX first; a model file; or a folder of
            ``NAME/VERSION/FILE``.
        options: of the command, such as ``"--workers", "1:2"``; see its ``--help``.
        task: what a module is for, which its export needs.
        name: of a module or a single file.

    Raises:
        ValueError: a module without a task, or nothing at the path.
        RuntimeError: the server does not start; the message has its log.

    >>> with serve("lenet-5.onnx", name="lenet") as server:  # doctest: +SKIP
    ...     requests.post(f"{server.url}/predict", json={"inputs": images})
    """
    folder = tempfile.TemporaryDirectory(prefix="served-")
    try:
        if isinstance(model, (str, os.PathLike)):
            path = Path(model)
            if not path.exists():
                raise ValueError(f"there is nothing at {path}; give a model file or a folder")
        else:
            path = Path(folder.name, "model.onnx")
            _export(model, path, task)
        source = ["--repository", str(path)] if path.is_dir() else ["--model", f"{name}={path}"]
        command = [sys.executable, "-m", "workbench.deploy.server", "--port", "0", "--attached"]
        log = Path(folder.name, "log")
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [*command, *source, *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        line = process.stdout.readline()
        if not line:
            process.wait(_START_S)
            process.stdin.close()
            process.stdout.close()
            raise RuntimeError(f"the server did not start:\n{log.read_text()[-2000:]}")
        return Served(process, json.loads(line)["url"], folder)
    except BaseException:
        folder.cleanup()
        raise


def main(arguments: Sequence[str] | None = None) -> None:
    """The command ``python -m workbench.deploy.server``; see its ``--help``."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if not (given.model or given.repository):
        parser.error("give --model FILE or --repository FOLDER")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(_run(given))
    except ValueError as error:
        parser.exit(1, f"{error}\n")


def _export(model: "nn.Module", path: Path, task: "Task | None") -> None:
    from workbench.deploy.exporting import export

    if task is None:
        raise ValueError("a module is exported first, which needs task=; or give a model file")
    export(model, path, "onnx", task=task)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workbench.deploy.server", description="Offer models over HTTP.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="[NAME=]FILE", help="one model file")
    add("--repository", action="append", default=[], type=Path, metavar="FOLDER",
        help="models as NAME/VERSION/FILE, NAME/samples.npz beside")  # fmt: skip
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="0 for a free one, which is printed")
    add("--workers", type=_range, default=(1, 1), metavar="FEWEST[:MOST]",
        help="processes of each model")  # fmt: skip
    add("--threads", type=int, default=1, help="of each worker")
    add("--max-batch", type=int, default=64, help="most examples computed at once")
    add("--batch-ms", type=float, default=100.0, help="longest that a batch should take")
    add("--queue-ms", type=float, default=1000.0, help="longest wait that is accepted")
    add("--deadline-ms", type=float, default=10_000.0, help="longest time to an answer")
    add("--body-bytes", type=int, default=2**24, help="longest body of a request")
    add("--receive-s", type=float, default=30.0, help="longest time for a request to arrive")
    add("--keys", type=Path, help="file of API keys; without it everybody may ask")
    add("--audit", type=Path, help="log of refusals and of what administrators do")
    add("--tls-cert", type=Path, help="certificate, in PEM")
    add("--tls-key", type=Path, help="its private key")
    add("--verify-key", type=Path, help="public key that each model file must be signed with")
    add("--decryption-key", type=Path, help="key file for sealed model files")
    add("--trusted", action="store_true", help="load .pt2 files, which can run any code")
    add("--attached", action="store_true", help="end when standard input is closed")
    return parser


def _range(text: str) -> tuple[int, int]:
    fewest, _, most = text.partition(":")
    return int(fewest), int(most or fewest)


async def _run(given: argparse.Namespace) -> None:
    """Load the models, listen, and tidy up."""
    try:
        import uvicorn

        from workbench.deploy import access
        from workbench.deploy.batcher import Limits
        from workbench.deploy.connection import Connection
        from workbench.deploy.metrics import Metrics
        from workbench.deploy.protocol import Refused
        from workbench.deploy.repository import Repository
        from workbench.deploy.routes import Service, Settings
    except ImportError as error:
        message = f"{error.name} is missing; install the workbench again with pip install -e ."
        raise ImportError(message) from error

    audit = access.Audit(given.audit) if given.audit else None
    keys = access.Keys.load(given.keys, audit=audit) if given.keys else None
    if bool(given.tls_cert) != bool(given.tls_key):
        raise ValueError("give --tls-cert and --tls-key together")
    tls = access.tls_context(given.tls_cert, given.tls_key) if given.tls_cert else None
    settings = Settings(given.body_bytes, given.deadline_ms, given.receive_s)
    metrics = Metrics()
    repository = Repository(
        given.repository,
        dict(_named(text) for text in given.model),
        limits=Limits(
            given.max_batch, given.batch_ms, given.queue_ms, given.workers, given.threads
        ),
        read=_reader(given, audit),
        trusted=given.trusted,
        observe=metrics.batch,
    )
    metrics.watch(repository)
    service = Service(repository, metrics, settings, keys, audit)
    with _bound(given.host, given.port) as listener:
        try:
            found = repository.found()
            if not found:
                raise ValueError("there is no model file in the repository")
            for name in found:
                await repository.load(name)
            Connection.receive_s = settings.receive_s
            config = uvicorn.Config(
                service, http=Connection, ws="none", loop="asyncio", lifespan="off",
                log_config=None, access_log=False, server_header=False, proxy_headers=False,
                timeout_keep_alive=30, timeout_graceful_shutdown=10,
                ssl_context_factory=tls and (lambda config, default: tls),
            )  # fmt: skip
            server = uvicorn.Server(config)
            if given.attached:
                asyncio.get_running_loop().add_reader(0, _follow, server)
            kind = "https" if tls else "http"
            host, port = listener.getsockname()[:2]
            url = f"{kind}://{f'[{host}]' if ':' in host else host}:{port}"
            announced = asyncio.create_task(_announce(server, url))
            await server.serve(sockets=[listener])
            announced.cancel()
        except Refused as refused:
            raise ValueError(refused.reason) from refused
        finally:
            await repository.close()


def _named(text: str) -> tuple[str, Path]:
    """Name and path of ``NAME=FILE`` or ``FILE``."""
    name, equals, path = text.rpartition("=")
    path = Path(path)
    return (name, path) if equals else (path.name.split(".")[0], path)


def _reader(given: argparse.Namespace, audit):
    """How model files are read: as they are, or with their signature checked and seal opened."""
    if not (given.verify_key or given.decryption_key):
        return Path.read_bytes
    from workbench import transfer
    from workbench.deploy import access

    key = transfer.key_from_file(given.decryption_key) if given.decryption_key else None

    def read(path: Path) -> bytes:
        return access.read_model(path, verify_key=given.verify_key, decryption_key=key, audit=audit)

    return read


def _bound(host: str, port: int) -> socket.socket:
    """A socket with the address, so that a port that is taken shows before a model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small parts at once only where the protocol is named, not left to the system.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


def _follow(server) -> None:
    """End when whoever started this process has closed its standard input, or has ended."""
    if not os.read(0, 4096):
        asyncio.get_running_loop().remove_reader(0)
        server.should_exit = True


async def _announce(server, url: str) -> None:
    """One line on standard output once the server answers."""
    while not server.started:
        await asyncio.sleep(0.005)
    with suppress(OSError):
        print(json.dumps({"url": url, "pid": os.getpid()}), flush=True)


if __name__ == "__main__":
    main()
