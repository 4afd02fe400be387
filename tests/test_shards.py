import hashlib
import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save, save_file

from workbench import storage, transfer
from workbench.transfer import manifests, shards
from workbench.transfer.manifests import INDEX, MANIFEST, File, IntegrityError, Manifest, Part

KIB = 2**10
DTYPES = (np.float32, np.float16, np.uint8, np.int64, np.bool_)


def weights(count: int = 5, size: int = 700, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"layer{n}.weight": rng.normal(size=size).astype(np.float32) for n in range(count)}


def write(folder: Path, tensors: dict, metadata: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata)
    return folder / "model.safetensors"


def split(path: Path, folder: Path, shard_bytes: int = 5000, chunk_bytes: int = KIB) -> Path:
    return transfer.split(
        path, folder, shard_bytes=shard_bytes, chunk_bytes=chunk_bytes, progress=False
    )


def verify(folder: Path) -> Manifest:
    return transfer.verify(folder, progress=False)


def join(folder: Path, path: Path) -> Path:
    return transfer.join(folder, path, progress=False)


def manifest(path: Path, chunk_bytes: int | None = None) -> Manifest:
    return transfer.manifest(path, chunk_bytes=chunk_bytes, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def corrupted(data: bytes, generator: random.Random) -> bytes:
    """Other bytes, by one of the ways in which files go bad."""
    start = generator.randrange(len(data))
    end = min(len(data), start + generator.choice((1, 8, 300)))
    bit = 1 << generator.randrange(8)
    ways = (
        lambda: data[:start] + bytes([data[start] ^ bit]) + data[start + 1 :],
        lambda: data[:start],
        lambda: data[:start] + data[end:],
        lambda: data[:end] + data[start:],
        lambda: data[:start] + bytes(end - start) + data[end:],
        lambda: data[:start] + generator.randbytes(end - start) + data[end:],
        lambda: data + generator.randbytes(end - start),
    )  # fmt: skip
    while (other := generator.choice(ways)()) == data:
        pass
    return other


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three shards: of two tensors, two, and one."""
    return split(write(tmp_path, weights(), {"format": "pt"}), tmp_path / "shards", 6000)


@settings(max_examples=60)
@given(st.data())
def test_shards_hold_the_tensors_and_join_to_the_same_file(tmp_path_factory, data):
    tmp_path = tmp_path_factory.mktemp("split")
    names = data.draw(st.lists(st.text(min_size=1, max_size=9), max_size=7, unique=True))
    tensors = {}
    for name in set(names) - {"__metadata__"}:
        shape = data.draw(st.lists(st.integers(0, 40), max_size=2))
        dtype = data.draw(st.sampled_from(DTYPES))
        tensors[name] = np.random.default_rng(len(tensors)).integers(0, 2, shape).astype(dtype)
    metadata = data.draw(
        st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1)
    )
    shard_bytes = data.draw(st.integers(1, 5000))
    path = write(tmp_path, tensors, metadata)
    folder = split(path, tmp_path / "shards", shard_bytes, data.draw(st.integers(KIB, 3 * KIB)))
    verify(folder)
    index = json.loads((folder / INDEX).read_text())
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    assert names == [
        f"model-{n:05}-of-{len(names):05}.safetensors" for n in range(1, len(names) + 1)
    ]
    found = {}
    for name in names:
        shard = load_file(folder / name)
        found |= shard
        assert {tensor: name for tensor in shard}.items() <= index["weight_map"].items()
        assert sum(tensor.nbytes for tensor in shard.values()) <= shard_bytes or len(shard) == 1
        assert shard or not tensors
        with safe_open(folder / name, "np") as opened:
            assert (opened.metadata() or {}) == (metadata or {})
        assert int.from_bytes((folder / name).read_bytes()[:8], "little") % 8 == 0
    assert found.keys() == tensors.keys() == index["weight_map"].keys()
    assert all(
        np.array_equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in tensors.items()
    )
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert join(folder, tmp_path / "joined").read_bytes() == path.read_bytes()


def test_shards_are_filled_in_the_order_of_the_file_and_a_large_tensor_is_alone(tmp_path):
    sizes = {"a": 3000, "b": 2000, "c": 1, "d": 9000, "e": 5000, "f": 1}
    header, offset = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    data = random.Random(0).randbytes(offset)
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    folder = split(tmp_path / "x.safetensors", tmp_path / "shards", 5000)
    held = [list(load_file(path)) for path in sorted(folder.glob("*.safetensors"))]
    assert [sorted(names) for names in held] == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]
    assert join(folder, tmp_path / "y").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def test_the_same_file_gives_the_same_bytes_and_no_trace_is_left(folder, tmp_path):
    again = split(tmp_path / "model.safetensors", tmp_path / "again", 6000)
    assert contents(folder) == contents(again)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "shards", "again"}


def test_the_manifest_agrees_with_hashlib_and_with_the_file(folder, tmp_path):
    found = manifest(folder)
    whole = (tmp_path / "model.safetensors").read_bytes()
    assert found.whole.sha256 == hashlib.sha256(whole).hexdigest()
    assert found.whole.size_bytes == len(whole)
    assert whole[8:].startswith(found.whole.header.encode())
    assert {file.name for file in found.files} == {path.name for path in folder.iterdir()} - {
        MANIFEST
    }
    assert found.size_bytes == sum(file.size_bytes for file in found.files)
    for file in found.files:
        data = (folder / file.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size_bytes, file.sha256)
        mine = [chunk for chunk in found.chunks() if chunk.file == file.name]
        pieces = [data[c.offset : c.offset + c.size_bytes] for c in mine]
        assert b"".join(pieces) == data
        assert [hashlib.sha256(piece).hexdigest() for piece in pieces] == [c.sha256 for c in mine]
        assert max(map(len, pieces)) <= found.chunk_bytes
    assert [part.name for part in found.files[0].parts] == [
        "header",
        "layer0.weight",
        "layer1.weight",
    ]


def test_the_manifest_knows_what_a_coded_file_holds(tmp_path):
    state = {"a.weight": torch.zeros(50, 40).bernoulli(0.1), "b": torch.arange(6, dtype=torch.int8)}
    for codec in ("rans", "huffman"):
        storage.save(state, tmp_path / f"{codec}.safetensors", codec=codec, progress=False)
        folder = split(tmp_path / f"{codec}.safetensors", tmp_path / codec)
        assert manifest(folder).whole.codec == codec
        copy = join(folder, tmp_path / "copy.safetensors")
        assert manifest(folder).whole.decoded_sha256 == storage.Artifact(copy).sha256()
    fingerprint = storage.Artifact(copy).sha256()
    assert fingerprint == storage.Artifact(tmp_path / "rans.safetensors").sha256()
    for other in ({**state, "b": state["b"] + 1}, {**state, "c": state["b"]}, {"b": state["b"]}):
        storage.save(other, copy, progress=False)
        assert storage.Artifact(copy).sha256() != fingerprint
    for metadata in (None, {"format": "pt"}):
        plain = split(write(tmp_path, weights(1), metadata), tmp_path / f"plain-{metadata is None}")
        assert (manifest(plain).whole.codec, manifest(plain).whole.decoded_sha256) == (None, None)


def test_a_folder_or_a_file_without_a_manifest_gets_one(folder, tmp_path):
    before = manifest(folder, chunk_bytes=KIB)
    (folder / MANIFEST).unlink()
    made = manifest(folder, chunk_bytes=KIB)
    assert made == replace(before, whole=None)
    made.write(folder)
    assert verify(folder) == made
    with pytest.raises(ValueError, match="was not made by split"):
        join(folder, tmp_path / "joined")
    (single,) = manifest(tmp_path / "model.safetensors").files
    assert single.size_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert [part.name for part in single.parts][:2] == ["header", "layer0.weight"]
    (tmp_path / "any.bin").write_bytes(b"x" * 3000)
    (other,) = manifest(tmp_path / "any.bin", KIB).files
    assert [(part.name, len(part.chunks)) for part in other.parts] == [("content", 3)]


def test_a_manifest_of_other_chunks_is_made_anew(folder):
    assert manifest(folder).chunk_bytes == KIB
    assert manifest(folder, 2 * KIB).chunk_bytes == 2 * KIB
    assert manifest(folder, KIB) == manifest(folder)


@pytest.mark.parametrize(
    ("change", "parts", "most_bytes"),
    [
        (lambda new: None, [], 0),
        (lambda new: new["layer2.weight"].__setitem__(5, 9), ["layer2.weight"], KIB),
        (lambda new: new.pop("layer1.weight"), ["header", "content"], 3 * KIB),
        (
            lambda new: new.update({"a": np.ones(10, np.float32)}),
            ["header", "a", "content"],
            3 * KIB,
        ),
    ],
    ids=["nothing", "one value", "a tensor less", "a tensor more"],
)
def test_a_difference_is_what_has_changed_and_not_what_has_moved(
    tmp_path, change, parts, most_bytes
):
    old, new = weights(), weights()
    change(new)
    folders = [
        split(write(tmp_path / name, tensors), tmp_path / f"{name}-shards")
        for name, tensors in {"old": old, "new": new}.items()
    ]
    difference = transfer.diff(*folders)
    assert set(difference.parts) <= set(parts)
    assert difference.changed_bytes <= most_bytes
    assert bool(difference.chunks) == bool(parts)
    assert difference.size_bytes == manifest(folders[1]).size_bytes
    # A single file has the same chunks, from its own header on.
    single = transfer.diff(tmp_path / "old" / "model.safetensors", manifest(folders[1]))
    assert single.changed_bytes <= most_bytes + 3 * KIB


def test_a_longer_tensor_keeps_the_chunks_at_its_front(tmp_path):
    old = {"table": np.arange(2000, dtype=np.float32), "z": np.ones(500, np.float32)}
    new = {**old, "table": np.arange(2100, dtype=np.float32)}
    paths = [write(tmp_path / name, tensors) for name, tensors in {"o": old, "n": new}.items()]
    difference = transfer.diff(*(manifest(path, KIB) for path in paths))
    changed = [(chunk.part, chunk.number) for chunk in difference.chunks]
    assert changed == [("header", 0), ("table", 7), ("table", 8)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder of a few kilobytes, of which thousands of damaged copies are tried."""
    tmp_path = tmp_path_factory.mktemp("small")
    path = write(tmp_path, weights(3, 400))
    return split(path, tmp_path / "shards", 3000), path


def test_two_thousand_damaged_shards_are_all_refused(small, tmp_path):
    folder, _ = small
    generator = random.Random(1)
    files = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
    for n in range(2000):
        path = generator.choice(files)
        good = path.read_bytes()
        path.unlink()  # a new file is written faster than an old one is replaced
        path.write_bytes(corrupted(good, generator))
        try:
            with pytest.raises(IntegrityError, match=path.name):
                verify(folder)
            if path.suffix == ".safetensors" and n % 4 == 0:
                with pytest.raises(IntegrityError, match=path.name):
                    join(folder, tmp_path / "joined")
        finally:
            path.unlink()
            path.write_bytes(good)
    assert list(tmp_path.iterdir()) == []
    verify(folder)


def test_four_thousand_damaged_manifests_are_all_refused(small):
    folder, _ = small
    good = (folder / MANIFEST).read_bytes()
    assert manifests.parse(good, "x") == manifest(folder)
    generator = random.Random(2)
    for _ in range(4000):
        with pytest.raises(IntegrityError, match="the manifest"):
            manifests.parse(corrupted(good, generator), "the manifest")


def test_a_thousand_damaged_files_are_refused_or_split_as_they_are(small, tmp_path):
    """safetensors itself cannot notice a flipped bit in a tensor; all else must be noticed."""
    good, generator = small[1].read_bytes(), random.Random(3)
    path, refused = tmp_path / "model.safetensors", 0
    for n in range(1000):
        path.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(corrupted(good, generator))
        try:
            folder = split(path, tmp_path / f"shards{n}")
        except IntegrityError:
            refused += 1
        else:
            if n % 10 == 0:
                assert join(folder, tmp_path / "joined").read_bytes() == path.read_bytes()
    assert 400 < refused < 1000
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_chunk_is_named(folder):
    path = folder / "model-00002-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-700] ^= 1  # in the last tensor of 2800 bytes, that is at 2100, in its third chunk
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=rf"{path.name}: chunk 2 of 'layer3.weight' \(bytes"):
        verify(folder)
    data[-700] ^= 1
    path.write_bytes(data[:-700])
    with pytest.raises(IntegrityError, match=r"chunk 2 of 'layer3.weight' .* is cut short"):
        verify(folder)
    path.write_bytes(data + b"x")
    with pytest.raises(IntegrityError, match=rf"{path.name} goes on after its {len(data)} bytes"):
        verify(folder)
    path.unlink()
    with pytest.raises(IntegrityError, match=r"model-00002-of-00003.safetensors is missing"):
        verify(folder)


def test_shards_in_each_others_place_are_refused(folder, tmp_path):
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    with pytest.raises(IntegrityError, match="chunk 0 of 'header'"):
        verify(folder)


def rewrite(folder: Path, **changes) -> None:
    """A manifest with a checksum that is right, as an attacker would write it."""
    (folder / MANIFEST).write_text(replace(manifest(folder), **changes).text())


BAD_NAMES = ["../x", "/etc/passwd", "a/b", "a\\b", "..", ".", "", ".hidden", "C:x", "a\0b", "x\n",
             MANIFEST, "model.sig", "x.part", "ü", "a" * 201]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_leave_the_folder_are_refused(folder, name):
    rewrite(folder, files=(File(name, 0, hashlib.sha256().hexdigest(), ()),))
    with pytest.raises(IntegrityError, match="not safe to use on another machine"):
        verify(folder)


SHA = "0" * 64


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([File("a", 5, SHA, ())], "do not add up"),
        ([File("a", -1, SHA, (Part("p", -1, ()),))], "do not add up"),
        ([File("a", True, SHA, (Part("p", 1, (SHA,)),))], "do not add up"),
        ([File("a", 2.0, SHA, (Part("p", 2.0, (SHA,)),))], "do not add up"),
        ([File("a", 1, SHA, (Part("p", 1, ()),))], "has 0 chunks"),
        ([File("a", 1, SHA, (Part("p", 1, (SHA, SHA)),))], "has 2 chunks"),
        ([File("a", 1, SHA, (Part(7, 1, (SHA,)),))], "a part named 7"),
        ([File("a", 1, SHA, (Part("p", 1, ("0" * 63 + "G",)),))], "is no sha256"),
        ([File("a", 0, "../x", ())], "is no sha256"),
        ([File("a", 0, 7, ())], "refused|damaged"),
        ([File("b", 0, SHA, ()), File("a", 0, SHA, ())], "not in order"),
        ([File("A", 0, SHA, ()), File("a", 0, SHA, ())], "two have one name"),
    ],
)
def test_manifests_that_lie_are_refused(folder, files, message):
    rewrite(folder, files=tuple(files))
    with pytest.raises(IntegrityError, match=message):
        manifest(folder)


@pytest.mark.parametrize("value", [0, 1023, 2**26 + 1, 1e6, True, None])
def test_hostile_chunk_sizes_are_refused(folder, value):
    rewrite(folder, chunk_bytes=value)
    with pytest.raises(IntegrityError, match="chunk"):
        manifest(folder)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "7", "[" * 10**5, "9" * 5000, "\xff"])
def test_other_json_is_no_manifest(text):
    with pytest.raises(IntegrityError, match="damaged, or no"):
        manifests.parse(text.encode("latin-1"), "x")


@pytest.mark.parametrize(
    "index",
    ['{"weight_map": {"a": "../../etc/passwd"}}', '{"weight_map": {"a": "gone.safetensors"}}',
     '{"weight_map": {"a": 7}}', '{"weight_map": {"a": [1]}}', "[]", "{", '{"weight_map": 7}'],
)  # fmt: skip
def test_an_index_that_points_elsewhere_is_refused(folder, index):
    (folder / INDEX).write_text(index)
    (folder / MANIFEST).unlink()
    manifest(folder, KIB).write(folder)
    with pytest.raises(IntegrityError, match=r"points to|no index"):
        verify(folder)


def test_sizes_are_limited_before_a_file_is_read(folder, monkeypatch):
    monkeypatch.setattr(manifests, "LIMIT_BYTES", 100)
    with pytest.raises(IntegrityError, match="more than 100 bytes"):
        manifest(folder)


def test_a_manifest_whose_shards_are_not_of_its_whole_is_refused(folder, tmp_path):
    rewrite(folder, whole=replace(manifest(folder).whole, sha256=SHA))
    (tmp_path / "joined").write_text("the old file")
    with pytest.raises(IntegrityError, match="not those of the file that was split"):
        join(folder, tmp_path / "joined")
    assert (tmp_path / "joined").read_text() == "the old file"
    files = manifest(folder).files
    rewrite(folder, files=(replace(files[0], sha256=SHA), *files[1:]))
    with pytest.raises(IntegrityError, match="contradicts itself"):
        verify(folder)


def killed(action) -> None:
    """Run something in a process of its own that is killed by what ``action`` patches."""
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_while_joining_or_renaming_leaves_the_old_file(folder, tmp_path, monkeypatch):
    target = tmp_path / "joined"
    target.write_text("the old file")
    chunks = shards.read_chunks

    def some_chunks(*args):
        yield from list(chunks(*args))[:2]
        die()

    for name, where, deadly in (("read_chunks", shards, some_chunks), ("replace", os, die)):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, deadly)
            killed(lambda: join(folder, target))
        assert target.read_text() == "the old file"
    join(folder, target)
    assert target.read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_killed_while_splitting_leaves_no_folder(tmp_path, monkeypatch):
    path = write(tmp_path, weights())
    really = os.replace

    def last_rename(old, new):
        die() if Path(new) == tmp_path / "shards" else really(old, new)

    for where, name, deadly in (
        (shards, "_write_header", die),
        (shards, "manifest", die),
        (os, "replace", last_rename),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, deadly)
            killed(lambda: split(path, tmp_path / "shards"))
        assert not (tmp_path / "shards").exists()
    verify(split(path, tmp_path / "shards"))
    assert not list(tmp_path.glob("*.part"))


def test_settings_and_paths_are_checked_before_any_work(folder, tmp_path):
    path = tmp_path / "model.safetensors"
    for shard_bytes in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=r"shard_bytes is .*; give 1 byte or more"):
            split(path, tmp_path / "new", shard_bytes)
    with pytest.raises(ValueError, match="chunk_bytes is 5; give 1024 to"):
        split(path, tmp_path / "new", chunk_bytes=5)
    with pytest.raises(TypeError, match=r"chunk_bytes is 5.5"):
        manifest(folder, chunk_bytes=5.5)
    with pytest.raises(ValueError, match="is not empty; give each version"):
        split(path, folder)
    with pytest.raises(ValueError, match="is not empty"):
        split(path, path)
    with pytest.raises(ValueError, match="not a file"):
        split(tmp_path / "gone", tmp_path / "new")
    with pytest.raises(ValueError, match="no file and no folder"):
        manifest(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"has no manifest.json; make one with manifest"):
        verify(tmp_path)
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    verify(split(path, tmp_path / "empty"))


def test_links_and_folders_in_a_folder_are_refused(tmp_path):
    path = write(tmp_path / "a", weights(1))
    (tmp_path / "a" / "link").symlink_to(path)
    with pytest.raises(ValueError, match="link is no plain file"):
        manifest(tmp_path / "a")
    (tmp_path / "a" / "link").unlink()
    (tmp_path / "a" / "sub").mkdir()
    with pytest.raises(ValueError, match="sub is no plain file"):
        manifest(tmp_path / "a")
    (tmp_path / "a" / "sub").rmdir()
    (tmp_path / "a" / ".hidden").touch()
    with pytest.raises(ValueError, match=r"'.hidden' is not safe"):
        manifest(tmp_path / "a")


def test_memory_does_not_grow_with_the_file(tmp_path):
    import tracemalloc

    path = tmp_path / "model.safetensors"
    path.write_bytes(save({f"t{n}": np.zeros(2**20, np.float32) for n in range(10)}))
    tracemalloc.start()
    join(split(path, tmp_path / "shards", 2**23, 2**18), tmp_path / "joined")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2**23 < path.stat().st_size / 4
