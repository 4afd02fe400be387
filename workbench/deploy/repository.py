"""The models that a server offers: which versions are loaded, and who of them answers.

Files lie in ``FOLDER/NAME/VERSION/``, one model file in each, or are single files. A version is
swapped in while requests run: its worker loads it and answers a first request, then, where the
model has ``FOLDER/NAME/samples.npz``, its answers to these are compared with those stored there or
with those of the version before. Only then does traffic move. The version before stands by for a
minute: if more answers fail than before, traffic moves back.
"""

import asyncio
import logging
import random
import re
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from workbench.deploy.batcher import Batcher, Limits
from workbench.deploy.loading import ANY
from workbench.deploy.protocol import NAME_OF, Refused
from workbench.deploy.worker import ModelError, Nursery, Worker, WorkerDied

logger = logging.getLogger(__name__)

SUFFIXES = (".onnx", ".zip", ".pt2")
AGREEMENT = 0.95  # least share of sample answers that a new version gives like the one before
_ERRORS_MORE = 0.05  # share of answers that may fail beyond those of the version before
_JUDGED_AFTER = 20  # answers
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LONG_S = 60.0  # for what happens rarely
_STAND_BY_S = 60.0


class Version:
    """One loaded version of a model.

    Attributes:
        batcher: computes for it.
        requests: answered so far, failed ones included.
    """

    def __init__(self, model: str, number: str, batcher: Batcher, content: bytes, trusted: bool):
        self.model, self.number, self.batcher = model, number, batcher
        self.requests = 0
        self._failed: deque[bool] = deque(maxlen=100)
        self._content, self._trusted = content, trusted
        self._explainer: Worker | None = None
        self._explaining = asyncio.Lock()

    @property
    def signature(self):
        return self.batcher.signature

    @property
    def record(self) -> dict:
        return self.batcher.record

    def count(self, failed: bool) -> None:
        self.requests += 1
        self._failed.append(failed)

    def failures(self) -> tuple[int, int]:
        """Failed, and all, of the last answers."""
        return sum(self._failed), len(self._failed)

    async def explain(self, nursery: Nursery, arrays: list[np.ndarray], **how) -> np.ndarray:
        """What each number of the first input adds to one output.

        A worker of its own does it, so that nobody waits for it; it starts with the first question.
        """
        if self._explaining.locked():
            raise Refused(429, "another explanation is being computed", {"Retry-After": "1"})
        async with self._explaining:
            try:
                if self._explainer is None or self._explainer.ended:
                    threads = self.batcher.limits.threads
                    self._explainer = await Worker.start(
                        nursery, self._content, threads=threads, trusted=self._trusted
                    )
                return await self._explainer.explain(arrays, _LONG_S, **how)
            except ModelError as error:
                raise Refused(422, f"the model cannot be explained: {error}") from error
            except WorkerDied as error:
                raise Refused(504, "the explanation took too long") from error

    async def close(self) -> None:
        if self._explainer is not None:
            self._explainer.close()
        await self.batcher.close()


@dataclass
class Model:
    """A model and its loaded versions.

    Attributes:
        default: the version that answers when none is named.
        canary, share: another, and the share of those requests that it gets.
        previous: the default before, standing by.
        note: what went wrong last, for the index.
    """

    name: str
    versions: dict[str, Version] = field(default_factory=dict)
    default: Version | None = None
    canary: Version | None = None
    share: float = 0.0
    previous: Version | None = None
    note: str = ""
    swaps: int = 0
    rollbacks: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Repository:
    """All models of a server.

    Args:
        folders: each with ``NAME/VERSION/FILE``.
        files: single models, by name; they are version 1.
        read: gives the bytes of a model file, or raises ValueError.
        trusted: whether ``.pt2`` files may be loaded; see `loading.load_bytes`.
        observe: is told model, examples and seconds of each batch.

    Raises:
        ValueError: a folder or file that is not there, or a name that fits no address.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        files: dict[str, Path],
        *,
        limits: Limits,
        read: Callable[[Path], bytes] = Path.read_bytes,
        trusted: bool = False,
        observe: Callable[[str, int, float], None] = lambda model, examples, seconds: None,
    ):
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"{folder} is no folder; give one with NAME/VERSION/FILE in it")
        for name, path in files.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"a model cannot be called {name!r}; give --model NAME=PATH")
            if not path.is_file():
                raise ValueError(f"{path} is no file; give a model file")
        self.folders, self.files, self.limits = folders, files, limits
        self.models: dict[str, Model] = {}
        self.nursery = Nursery()
        self._read, self._trusted, self._observe = read, trusted, observe
        self._tasks: set[asyncio.Task] = set()

    def found(self) -> dict[str, dict[str, Path]]:
        """Model files on disk, by name and version, the latest version last."""
        found = {name: {"1": path} for name, path in self.files.items()}
        for folder in self.folders:
            for path in sorted(folder.glob("*/*/*")):
                name, number = path.parent.parent.name, path.parent.name
                if path.suffix in SUFFIXES and number.isdecimal() and _NAME.fullmatch(name):
                    found.setdefault(name, {})[number] = path
        return {
            name: dict(sorted(versions.items(), key=lambda item: int(item[0])))
            for name, versions in found.items()
        }

    def pick(self, name: str, number: str | None = None) -> Version:
        """The version that answers a request. Raises `Refused` with 404."""
        model = self.models.get(name)
        if model is None or model.default is None:
            known = [*self.ready()]
            raise Refused(404, f"no model {name[:100]!r} is loaded; these are: {known}")
        if number is None:
            at_canary = model.canary is not None and random.random() < model.share
            return model.canary if at_canary else model.default
        if number not in model.versions:
            raise Refused(
                404, f"{name!r} has no version {number[:20]!r}; loaded are {[*model.versions]}"
            )
        return model.versions[number]

    def ready(self) -> dict[str, Model]:
        """The models that answer."""
        return {name: model for name, model in self.models.items() if model.default is not None}

    async def submit(
        self, version: Version, arrays: list[np.ndarray], examples: int, deadline: float,
        gone: Callable[[], bool] = lambda: False,
    ) -> list[np.ndarray]:  # fmt: skip
        """Compute, and watch the version's errors. Raises `Refused`."""
        try:
            outputs = await version.batcher.submit(arrays, examples, deadline=deadline, gone=gone)
        except Refused as refused:
            if refused.status in (422, 500):
                version.count(failed=True)
                self._judge(version)
            raise
        finite = all(np.isfinite(output).all() for output in outputs if output.dtype.kind == "f")
        version.count(failed=not finite)
        if not finite:
            self._judge(version)
        return outputs

    async def load(self, name: str, number: str | None = None, share: float = 1.0) -> Version:
        """Load a version, by default the latest, and give it this share of the traffic.

        With a share of 1 it becomes the default; with less it is a canary beside the default; with
        0 it answers only where it is named.

        Raises:
            Refused: nothing of the name (404), it does not load (400), or its answers are not those
                of the version before (409). What answered before still does.
        """
        model = self.models.setdefault(name, Model(name)) if name in self.found() else None
        if model is None:
            raise Refused(404, f"no model {name[:100]!r} is in the repository: {[*self.found()]}")
        async with model.lock:
            versions = self.found().get(name, {})
            number = number or next(reversed(versions), "")
            if number not in versions:
                raise Refused(
                    404, f"{name!r} has no version {number[:20]!r}; there are {[*versions]}"
                )
            version = model.versions.get(number)
            if version is not None and version is model.default and share < 1:
                raise Refused(409, f"version {number} is the default; load another as canary")
            if version is None or version is model.default:
                try:
                    version = await self._start(model, number, versions[number])
                except Refused as refused:
                    model.note = refused.reason
                    logger.warning("%s version %s is not loaded: %s", name, number, refused.reason)
                    raise
            self._move(model, version, share)
            return version

    async def unload(self, name: str, number: str | None = None) -> None:
        """End one version, or all; what a canary got goes to the default. Raises `Refused`."""
        model = self.models.get(name)
        if model is None or not model.versions:
            raise Refused(404, f"no model {name[:100]!r} is loaded")
        async with model.lock:
            if number is not None and number not in model.versions:
                raise Refused(404, f"{name!r} has no version {number[:20]!r} loaded")
            for version in [*model.versions.values(), model.previous]:
                if version is not None and number in (None, version.number):
                    self._drop(model, version)

    def index(self) -> list[dict]:
        """All models and versions, loaded or not, as the protocol lists them."""
        listed = []
        for name, versions in self.found().items():
            model = self.models.get(name, Model(name))
            for number in {**versions, **model.versions}:
                loaded = number in model.versions
                state = "READY" if loaded else "UNAVAILABLE"
                reason = "" if loaded else model.note
                listed.append({"name": name, "version": number, "state": state, "reason": reason})
        return listed

    async def close(self) -> None:
        """Finish what was asked, and end all workers."""
        for model in self.models.values():
            for version in {*model.versions.values(), model.previous} - {None}:
                self._drop(model, version)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.nursery.close()

    async def _start(self, model: Model, number: str, path: Path) -> Version:
        """A version that has answered, and answers right."""
        try:
            content = await asyncio.to_thread(self._read, path)
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise Refused(400, f"{model.name!r} version {number}: {reason}") from error

        async def start_worker() -> Worker:
            return await Worker.start(
                self.nursery, content, threads=self.limits.threads, trusted=self._trusted
            )

        def observe(examples: int, seconds: float) -> None:
            self._observe(model.name, examples, seconds)

        batcher = Batcher(start_worker, self.limits, observe)
        version = Version(model.name, number, batcher, content, self._trusted)
        try:
            await batcher.start()
            _check_types(batcher)
            await _warm_up(batcher)
            if model.name not in self.files:
                await _check_samples(version, model.default, path.parent.parent / "samples.npz")
        except (ModelError, WorkerDied) as error:
            await batcher.close()
            raise Refused(400, f"{model.name!r} version {number} does not load: {error}") from error
        except Refused as refused:
            await batcher.close()
            status = refused.status if refused.status == 409 else 400
            raise Refused(status, f"{model.name!r} version {number}: {refused.reason}") from refused
        return version

    def _move(self, model: Model, version: Version, share: float) -> None:
        """Give a loaded version its share. Nothing is awaited here, so no request sees half."""
        if model.canary is version:
            model.canary, model.share = None, 0.0
        model.versions[version.number] = version
        if share >= 1 or model.default is None:
            before, model.default = model.default, version
            if model.previous is not None:
                self._drop(model, model.previous)
            if before is not None:
                model.previous, model.swaps = before, model.swaps + 1
                if model.versions.get(before.number) is before:
                    del model.versions[before.number]
                loop = asyncio.get_running_loop()
                loop.call_later(_STAND_BY_S, self._relieve, model, before)
        elif share > 0:
            if model.canary is not None:
                self._drop(model, model.canary)
            model.canary, model.share = version, share
        model.note = ""
        logger.info("%s version %s gets %.0f %%", model.name, version.number, 100 * share)

    def _relieve(self, model: Model, before: Version) -> None:
        """End the version that stood by, unless it has been needed or has ended."""
        if model.previous is before:
            self._drop(model, before)

    def _judge(self, version: Version) -> None:
        """After an error: move traffic back if this version fails more than the one before."""
        model = self.models[version.model]
        before = {model.canary: model.default, model.default: model.previous}.get(version)
        if before is None:
            return
        failed, answers = version.failures()
        failed_before, answers_before = before.failures()
        allowed = failed_before / max(1, answers_before) + _ERRORS_MORE
        if answers < _JUDGED_AFTER or failed / answers <= allowed:
            return
        if version is model.default:
            model.default, model.previous = before, None
            model.versions[before.number] = before
        self._drop(model, version)
        model.rollbacks += 1
        model.note = (
            f"version {version.number} was rolled back: {failed} of its last {answers} answers "
            f"failed, against {failed_before} of {answers_before} of version {before.number}"
        )
        logger.warning("%s: %s", model.name, model.note)

    def _drop(self, model: Model, version: Version) -> None:
        """Take a version out of the traffic; it finishes what it was given, then ends."""
        if model.versions.get(version.number) is version:
            del model.versions[version.number]
        if model.canary is version:
            model.canary, model.share = None, 0.0
        if model.previous is version:
            model.previous = None
        if model.default is version:
            latest = max(model.versions, key=int, default=None)
            model.default = model.versions.get(latest)
        self._keep(version.close())

    def _keep(self, work: Coroutine) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _check_types(batcher: Batcher) -> None:
    for spec in (*batcher.signature.inputs, *batcher.signature.outputs):
        if spec.dtype not in NAME_OF:
            raise ModelError(f"{spec.name!r} is of type {spec.dtype}, which the protocol lacks")


async def _warm_up(batcher: Batcher) -> None:
    """Let a version answer before anybody asks, and see what one example takes, and several.

    The first run of a model is its slowest.
    """
    signature = batcher.signature
    if any(ANY in spec.shape[1:] for spec in signature.inputs):
        return  # which lengths the model really takes is not known
    several = min(batcher.pace.limit, signature.most_examples)
    for examples in (1, 1, 1, several, several, several):
        shapes = [[examples if n == ANY else n for n in spec.shape] for spec in signature.inputs]
        arrays = [
            np.zeros(shape, spec.dtype)
            for shape, spec in zip(shapes, signature.inputs, strict=True)
        ]
        await batcher.submit(arrays, examples, deadline=_soon())


async def _check_samples(version: Version, before: Version | None, path: Path) -> None:
    """Compare answers to stored inputs with stored answers, or those of the version before.

    The file has an array for each input and, if answers are stored, each output, by their names.
    """
    if not await asyncio.to_thread(path.is_file):
        return
    with np.load(path, allow_pickle=False) as file:
        stored = dict(file)
    signature = version.signature
    missing = [spec.name for spec in signature.inputs if spec.name not in stored]
    if missing:
        raise Refused(409, f"{path.name} lacks the inputs {missing}")
    arrays = [stored[spec.name] for spec in signature.inputs]
    answers = await _answers(version, arrays)
    if all(spec.name in stored for spec in signature.outputs):
        expected, of = [stored[spec.name] for spec in signature.outputs], "those stored"
    elif before is not None:
        expected, of = await _answers(before, arrays), f"version {before.number}"
    else:
        return
    share = min(_agreement(own, other) for own, other in zip(answers, expected, strict=True))
    if not share >= AGREEMENT:
        raise Refused(
            409, f"on the samples {share:.1%} of its answers are like {of}; at least "
            f"{AGREEMENT:.0%} have to be",
        )  # fmt: skip


async def _answers(version: Version, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Outputs for many examples, in batches that leave room for other requests."""
    step = version.signature.most_examples
    parts = []
    for start in range(0, len(arrays[0]), step):
        some = [array[start : start + step] for array in arrays]
        parts.append(await version.batcher.submit(some, len(some[0]), deadline=_soon()))
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def _agreement(own: np.ndarray, other: np.ndarray) -> float:
    """Share of equal answers: of the largest along the last axis, or of the values."""
    if own.shape != other.shape:
        return 0.0
    if own.dtype.kind == "f" and own.ndim > 1 and own.shape[-1] > 1:
        finite = np.isfinite(own).all(-1)
        return float((finite & (own.argmax(-1) == other.argmax(-1))).mean())
    return float(np.isclose(own, other, rtol=1e-2, atol=1e-3).mean())


def _soon() -> float:
    return asyncio.get_running_loop().time() + _LONG_S
