"""A model as one small file: `save` codes it, `load` gives it back bit for bit, `inspect` accounts
for every byte.

The file is a valid ``.safetensors``. What gains from coding stands under its own name as a uint8
tensor: a stream of `workbench.storage.streams` or, for a weight that is computed (shared, k-bit,
pruned), a record of `workbench.storage.records`, under the name of the dense weight. So every uint8
tensor of the file is coded. Any other is what it seems, for every reader to use.

Its metadata has, for each name that shares the tensor of another, that other name, as the
safetensors package does it; and under "workbench" the version, a CRC-32 of the header, one of each
tensor that is not coded, in the order of the file, and the steps that made the model.
"""

import base64
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import overload

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from workbench.compress.computed import Source, steps
from workbench.compress.parts import KINDS, QUANTIZERS, Entry, put_together, take_apart
from workbench.storage import choice, ledger, records, streams, symbols
from workbench.storage.container import DTYPES, METADATA, Container, Held, header, tensor_of, write
from workbench.storage.ledger import Ledger
from workbench.storage.streams import Section, StreamError

MARK, _VERSION = "workbench", "1"
_INDEX = "model.safetensors.index.json"
_LARGE = 2**24  # bytes of a tensor from which the memory that was read is let go of on the way
_STORED_AS = dict(zip(KINDS, ("shared", "k-bit", "masked", "rounding", "rounding"), strict=True))
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike,
    *,
    codec: str = "auto",
    values_per_s: float = 2e6,
    progress: bool = True,
) -> Ledger:
    """Write a model, or a state dict, as a coded ``.safetensors`` file: wholly or not at all.

    The same model and settings always give the same bytes.

    Args:
        codec: "auto" takes for each tensor the one that gives the fewest bytes; "plain" codes
            nothing; or "run_length", "huffman", "rans", "mixing". A tensor that would only grow
            stays as it is.
        values_per_s: the least decoding speed that "auto" takes, as the codecs state it for one
            thread: by default, a layer of a million weights takes at most half a second.

    Returns:
        Where the bytes are, and how far that is from the entropy of the values.

    Raises:
        TypeError: no model, or one with something in it that is no dense tensor.
        ValueError: an unknown codec, or a speed that is not above 0.

    See notebook 05.
    """
    if codec != "auto" and codec not in streams.CODECS:
        raise ValueError(f"codec is {codec!r}; choose 'auto' or one of {', '.join(streams.CODECS)}")
    if not values_per_s > 0:
        raise ValueError(f"values_per_s is {values_per_s}; give a speed above 0, such as 2e6")
    entries, aliases = take_apart(model)
    if {METADATA, MARK} & {*entries, *aliases}:
        raise ValueError(f"{METADATA!r} and {MARK!r} cannot be names of tensors; rename them")
    held, entropies = {}, {}
    for name, entry in tqdm(entries.items(), desc="coding", unit="tensor", disable=not progress):
        held[name] = _coded(entry, codec, values_per_s)
        entropies[name] = _entropy(entry)
    # Readers view the bytes in place, so the widest come first: then each begins where it may.
    order = sorted(held, key=lambda name: (-DTYPES[held[name].dtype].itemsize, name))
    held = {name: held[name] for name in order}
    checks = b"".join(_crc(h.data) for h in held.values() if h.dtype != "U8")
    done = steps(model) if isinstance(model, nn.Module) else ()
    rest = "\n".join([base64.b64encode(checks).decode().rstrip("="), *done])
    head = header(held, {MARK: f"{_VERSION} - {rest}", **aliases})
    head[METADATA][MARK] = f"{_VERSION} {_header_crc(head)} {rest}"
    write(path, head, held)
    return Ledger(_frame(Artifact(path), entropies))


@overload
def load(path: str | os.PathLike, into: None = None) -> dict[str, Tensor]: ...
@overload
def load(path: str | os.PathLike, into: nn.Module) -> nn.Module: ...
def load(path, into=None):
    """Read all of a file of `save`, or of a plain safetensors file, and check it.

    Args:
        into: the network to fill: its plain form, such as ``models.build("lenet-5")``, or the
            compressed model itself. It is not changed.

    Returns:
        Without ``into``, the state dict of the plain network: tensors by name, computed weights
        dense. With it, a new model in evaluation mode whose layers are what they were when saved,
        so that it gives the same answers to the bit. Buffers that no state dict has are those of
        ``into``.

    Raises:
        FileNotFoundError: there is no such file.
        StreamError: a pickle, another format, or a file that is cut short or altered; says which
            tensor.
        MismatchError: a model of another architecture; says which tensors.

    As many threads decode as ``torch.get_num_threads()``.
    """
    artifact = Artifact(path)
    entries = artifact.entries()
    if into is not None:
        return put_together(into, entries, artifact.aliases, artifact.steps)
    dense = {n: _dense(e) for n, e in entries.items() if not isinstance(e, QUANTIZERS)}
    return dense | {name: dense[kept] for name, kept in artifact.aliases.items()}


def inspect(path: str | os.PathLike, *, entropy: bool = False) -> Ledger:
    """Where the bytes of a model file are.

    Args:
        path: a file of `save`, a plain safetensors file, or a folder of shards with a
            ``model.safetensors.index.json``, as Hugging Face has them.
        entropy: decode the values too, to tell how far their bytes are from their entropy.

    Raises:
        FileNotFoundError: there is no such file.
        StreamError: as `load`.
    """
    path = Path(path)
    if not path.is_dir():
        return Ledger(_inspected(path, entropy))
    index = path / _INDEX
    if not index.exists():
        raise FileNotFoundError(f"{path} is a folder without {_INDEX}; give the file itself")
    shard_of = _weight_map(index)
    frames = [_inspected(path / shard, entropy) for shard in sorted(set(shard_of.values()))]
    frame = pd.concat([*frames, _header_frame(_INDEX, index.stat().st_size)], ignore_index=True)
    differ = set(shard_of) ^ set(frame["tensor"][frame["stored_as"] != ""])
    if differ:
        raise StreamError(f"{index} and its shards differ about {', '.join(sorted(differ)[:8])}")
    return Ledger(frame)


class Artifact(Mapping[str, Tensor]):
    """A model file, opened: each tensor is read, checked and decoded when it is asked for.

    Weights that are computed come dense. Raises as `load`, for the header when it is opened, for
    each tensor when it is read.

    Attributes:
        aliases: names that share the tensor of another name, with that.
        steps: what was done to the model, in order.
    """

    def __init__(self, path: str | os.PathLike):
        self.file = Container(path)
        mark = self.file.metadata.get(MARK)
        self.is_coded = mark is not None
        plain = [name for name in self.file if self.file[name].dtype != "U8"]
        self._checks: dict[str, bytes] = {}
        self.steps: tuple[str, ...] = ()
        if mark is not None:
            checks, self.steps = self._read(mark)
            if len(checks) != 4 * len(plain):
                raise self._damaged("its header is altered: checksums do not match its tensors")
            self._checks = {name: checks[4 * i : 4 * i + 4] for i, name in enumerate(plain)}
        elif any(self.file[n].data[:3] in _MAGICS for n in self.file if n not in set(plain)):
            raise self._damaged(
                "it has coded tensors, but its header does not say so: it is altered, or one part "
                "of several, to be joined first"
            )
        known = {name: kept for name, kept in self.file.metadata.items() if name != MARK}
        self.aliases = {n: kept for n, kept in known.items() if kept in self.file}

    def __getitem__(self, name: str) -> Tensor:
        name = self.aliases.get(name, name)
        if name not in self.file or self._is_quantizer(name):
            raise KeyError(name)
        return _dense(self.entry(name))

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self.file if not self._is_quantizer(name))
        yield from self.aliases

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def sha256(self) -> str:
        """A fingerprint of what is in the file, however it is coded: of the names, dtypes, shapes
        and bits of all its tensors, dense, in the order of their names."""
        digest = hashlib.sha256()
        for name in sorted(self):
            tensor = self[name]
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(symbols.bits_of(tensor))
        return digest.hexdigest()

    def entries(self) -> dict[str, Entry]:
        """All tensors, sources and quantizers, as `workbench.compress.parts` has them."""
        threads = torch.get_num_threads()
        if threads == 1:
            return {name: self.entry(name) for name in self.file}
        # What a thread takes at a time: a chunk of a large tensor, or small ones of as many bytes.
        size_of = {name: len(self.file[name].data) for name in self.file}
        large = [name for name in self.file if size_of[name] > streams.CHUNK]
        small = sorted(set(self.file) - set(large), key=lambda name: (-size_of[name], name))
        ends = accumulate(size_of[name] for name in small)
        batch_of = {name: end // streams.CHUNK for name, end in zip(small, ends, strict=True)}
        batches = [list(batch) for _, batch in groupby(small, batch_of.get)]
        with ThreadPoolExecutor(threads) as pool:
            decoded = pool.map(lambda names: [self.entry(name) for name in names], batches)
            found = {name: self.entry(name, pool) for name in large}
            found |= zip(small, chain.from_iterable(decoded), strict=True)
        return {name: found[name] for name in self.file}

    def entry(self, name: str, executor: Executor | None = None) -> Entry:
        """One of `entries`; ``executor`` decodes its chunks side by side."""
        held = self.file[name]
        try:
            if self.is_coded and held.dtype == "U8":
                if held.data[:3] == records.MAGIC:
                    return records.decode(held.data, executor=executor)
                large = len(held.data) > _LARGE
                release = partial(self.file.release, name) if large else None
                return streams.decode(held.data, executor=executor, release=release)
            return self._verbatim(name, held)
        except StreamError as error:
            raise self._damaged(f"tensor {name}: {error}") from error
        finally:
            self.file.release(name)

    def _verbatim(self, name: str, held: Held) -> Tensor:
        if held.dtype not in DTYPES:
            raise StreamError(f"its dtype {held.dtype} is none that torch has")
        if name in self._checks and _crc(held.data) != self._checks[name]:
            raise StreamError("it is altered: its checksum does not match")
        return tensor_of(held.data, DTYPES[held.dtype], held.shape)

    def _is_quantizer(self, name: str) -> bool:
        data = self.file[name].data
        is_record = self.is_coded and self.file[name].dtype == "U8" and data[:3] == records.MAGIC
        return is_record and records.read(data).kind in QUANTIZERS

    def _read(self, mark: str) -> tuple[bytes, tuple[str, ...]]:
        """Checksums of the tensors that are not coded, and steps, from the file's own mark."""
        version, crc, rest = [*mark.split(" ", 2), "", ""][:3]
        if version != _VERSION:
            raise self._damaged(f"it has version {version!r}; this workbench reads {_VERSION}")
        if _header_crc(self.file.header) != crc:
            raise self._damaged("its header is altered: its checksum does not match")
        checks, *done = rest.split("\n")
        return base64.b64decode(checks + "=" * (-len(checks) % 4)), tuple(done)

    def _damaged(self, why: str) -> StreamError:
        return StreamError(f"{self.file.path}: {why}")


_MAGICS = (streams.encode(torch.empty(0), "plain")[:3], records.MAGIC)


def _crc(data: bytes | memoryview) -> bytes:
    return streams.crc32(data).to_bytes(4, "little")


def _header_crc(head: Mapping) -> str:
    """Of all that the header says, whatever its order, but for this checksum itself."""
    version, _, rest = head[METADATA][MARK].split(" ", 2)
    said = {**head, METADATA: {**head[METADATA], MARK: f"{version} {rest}"}}
    return f"{streams.crc32(json.dumps(said, sort_keys=True).encode()):08x}"


def _coded(entry: Entry, codec: str, values_per_s: float) -> Held:
    """An entry as the file holds it: coded, or as it is where that takes no more."""
    if isinstance(entry, nn.Module):
        data = records.encode(entry, lambda part: choice.encode(part, codec, values_per_s))
        return Held("U8", (len(data),), data)
    dtype = _NAMES.get(entry.dtype, "U8")
    stream = choice.encode(entry, codec, values_per_s)
    if dtype != "U8" and (codec == "plain" or entry.nbytes + _CHECK_BYTES <= len(stream)):
        return Held(dtype, tuple(entry.shape), symbols.bits_of(entry).tobytes())
    return Held("U8", (len(stream),), stream)


_CHECK_BYTES = 6  # that a checksum takes in the metadata, about


def _dense(entry: Entry) -> Tensor:
    return entry().detach() if isinstance(entry, Source) else entry


def _inspected(path: Path, entropy: bool) -> pd.DataFrame:
    artifact = Artifact(path)
    known = {}
    if entropy:
        known = {name: _entropy(artifact.entry(name)) for name in artifact.file}
    return _frame(artifact, known)


def _frame(artifact: Artifact, entropies: Mapping[str, float]) -> pd.DataFrame:
    """The rows of a ledger; everything but the entropies is told from the file."""
    rows = []
    for name in artifact.file:
        try:
            facts = _facts(artifact, name)
        except StreamError as error:
            raise StreamError(f"{artifact.file.path}: tensor {name}: {error}") from error
        rows.append(ledger.row(name, entropy_bits=entropies.get(name, math.nan), **facts))
        artifact.file.release(name)
    last = _header_frame(Path(artifact.file.path).name, artifact.file.header_bytes)
    return pd.concat([pd.DataFrame(rows, columns=list(ledger.COLUMNS)), last], ignore_index=True)


def _header_frame(name: str, size: int) -> pd.DataFrame:
    row = ledger.row(f"(header of {name})", [Section("header", bytes(size))])
    return pd.DataFrame([row], columns=list(ledger.COLUMNS))


def _facts(artifact: Artifact, name: str) -> dict:
    """What the row of a tensor says, told without decoding its values."""
    held = artifact.file[name]
    if not artifact.is_coded or held.dtype != "U8":
        dtype = str(DTYPES.get(held.dtype, held.dtype)).removeprefix("torch.")
        facts = {"stored_as": "plain", "codec": "", "dtype": dtype, "shape": held.shape}
        return {"sections": [Section("values", held.data)], **facts}
    if held.data[:3] == records.MAGIC:
        found = records.read(held.data)
        stored_as, codec = _STORED_AS[found.kind], found.main.codec if found.main else ""
        sections = found.sections()
    else:
        found = streams.header(held.data)
        stored_as, codec, sections = "plain", found.codec, streams.sections(held.data)
    dtype = str(found.dtype).removeprefix("torch.") if found.dtype else ""
    facts = {"stored_as": stored_as, "codec": codec, "dtype": dtype, "shape": found.shape}
    return {"sections": sections, **facts}


def _entropy(entry: Entry) -> float:
    """Of the values or, where they are computed, of the codes; of a quantizer unknown."""
    if isinstance(entry, Tensor):
        return ledger.entropy(entry)
    parts = entry.stored().parts
    main = parts.get("codes", parts.get("weight"))
    return math.nan if main is None else ledger.entropy(main)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        shard_of = json.loads(index.read_bytes())["weight_map"]
        if any(Path(shard).name != shard for shard in shard_of.values()):
            raise ValueError("a shard outside the folder")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StreamError(f"{index} is damaged: {error!r}") from error
    return shard_of
