import base64
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_shards import corrupted

from workbench import transfer
from workbench.transfer import IntegrityError, Key, sealing

SEGMENT, TAG, HEADER = 1000, 16, 32
KEY = Key(bytes(range(32)))
WORDS = "correct horse battery"


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """A segment is 1 MiB; with shorter ones, small files have several."""
    monkeypatch.setattr(sealing, "SEGMENT_BYTES", SEGMENT)


def seal(path: Path, to: Path, key: Key = KEY, name: str = "lenet", version: str = "1") -> Path:
    return transfer.seal(path, to, key=key, name=name, version=version, progress=False)


def unseal(path: Path, to: Path, key: Key = KEY, name: str = "lenet", version: str = "1") -> Path:
    return transfer.unseal(path, to, key=key, name=name, version=version, progress=False)


def sealed(folder: Path, data: bytes, **settings_) -> Path:
    (folder / "plain").write_bytes(data)
    return seal(folder / "plain", folder / "sealed", **settings_)


@pytest.fixture
def model(tmp_path) -> Path:
    """Four segments, the last one short."""
    return sealed(tmp_path, random.Random(0).randbytes(3500))


@settings(max_examples=60)
@given(st.binary(max_size=2 * SEGMENT), st.integers(0, 5))
@example(b"", 0)
@example(b"x" * SEGMENT, 0)
@example(b"x" * SEGMENT, 3)
def test_what_was_sealed_comes_back_and_the_overhead_is_as_stated(tmp_path_factory, data, segments):
    tmp_path = tmp_path_factory.mktemp("seal")
    data = data + bytes(segments * SEGMENT)
    path = sealed(tmp_path, data)
    assert path.stat().st_size == len(data) + HEADER + TAG * max(1, -(-len(data) // SEGMENT))
    assert unseal(path, tmp_path / "opened").read_bytes() == data
    assert {each.name for each in tmp_path.iterdir()} == {"plain", "sealed", "opened"}


def test_real_segments_and_the_overhead_in_the_documentation(tmp_path, monkeypatch):
    monkeypatch.setattr(sealing, "SEGMENT_BYTES", 2**20)
    for size in (0, 2**20, 2**20 + 1):
        path = sealed(tmp_path, bytes(size))
        assert path.stat().st_size - size == 32 + 16 * max(1, -(-size // 2**20))
        assert unseal(path, tmp_path / "opened").read_bytes() == bytes(size)


def test_each_segment_is_aes_gcm_as_documented(tmp_path):
    """An independent reading of the format that the module describes."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    data = random.Random(1).randbytes(2500)
    raw = sealed(tmp_path, data, name="lé", version="v").read_bytes()
    header, body = raw[:32], raw[32:]
    assert header[:9] == b"WBSEAL\x00\x01\x00"
    key = HKDF(SHA256(), 32, header[9:25], b"workbench seal 1").derive(KEY.secret)
    bound = header + b"\0\3l\xc3\xa9" + b"\0\1v"
    opened = b""
    for number in range(3):
        nonce = header[25:] + number.to_bytes(4, "big") + bytes([number == 2])
        opened += AESGCM(key).decrypt(nonce, body[1016 * number :][:1016], bound)
    assert opened == data


def test_a_file_is_never_sealed_twice_alike(model, tmp_path):
    again = seal(tmp_path / "plain", tmp_path / "again").read_bytes()
    first = model.read_bytes()
    assert first[9:32] != again[9:32]
    assert sum(a == b for a, b in zip(first[32:], again[32:], strict=True)) < 50


def refused(path: Path, target: Path, **settings_) -> None:
    with pytest.raises(ValueError, match=r"one of the three is wrong|no sealed file|says it was"):
        unseal(path, target, **settings_)
    assert not target.exists()
    assert not Path(f"{target}.part").exists()


def test_four_thousand_damaged_seals_are_all_refused(tmp_path):
    generator = random.Random(4)
    files = [sealed(tmp_path, generator.randbytes(size)).read_bytes() for size in (0, 40, 3500)]
    path = tmp_path / "sealed"
    for n in range(4000):
        path.unlink()
        path.write_bytes(corrupted(files[n % 3], generator))
        refused(path, tmp_path / "opened")


def test_segments_that_are_moved_repeated_or_lost_are_refused(model, tmp_path):
    raw = model.read_bytes()
    header, rest = raw[:HEADER], raw[HEADER:]
    parts = [rest[start : start + SEGMENT + TAG] for start in range(0, len(rest), SEGMENT + TAG)]
    a, b, c, d = parts
    other = seal(tmp_path / "plain", tmp_path / "other").read_bytes()
    for number, order in enumerate(
        ([b, a, c, d], [a, c, b, d], [a, a, b, c, d], [a, b, d], [a, b, c], [a], [], [b, c, d],
         [a, b, c, d, d], [a, b, c, d[:-1]], [a, b, c, d, b"x"], [d],
         [a, other[HEADER + SEGMENT + TAG :][: SEGMENT + TAG], c, d])
    ):  # fmt: skip
        model.write_bytes(header + b"".join(order))
        refused(model, tmp_path / f"opened{number}")
    model.write_bytes(other[:HEADER] + rest)
    refused(model, tmp_path / "opened")
    model.write_bytes(header + b"".join(parts))
    unseal(model, tmp_path / "opened")


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": Key(bytes(32))},
        {"name": "lenet2"},
        {"name": "Lenet"},
        {"version": "2"},
        {"name": "lenet1", "version": "1"},
        {"name": "1", "version": "lenet"},
        {"name": "lene", "version": "t1"},
    ],
)
def test_key_name_and_version_must_all_be_right(model, tmp_path, wrong):
    with pytest.raises(IntegrityError, match="with this key: one of the three is wrong, or the f"):
        unseal(model, tmp_path / "opened", **wrong)
    assert not (tmp_path / "opened").exists()


def test_nothing_appears_before_the_last_byte_was_verified(model, tmp_path):
    target = tmp_path / "opened"
    target.write_text("the old file")
    raw = bytearray(model.read_bytes())
    raw[-1] ^= 1
    model.write_bytes(raw)
    with pytest.raises(IntegrityError):
        unseal(model, target)
    assert target.read_text() == "the old file"
    assert not list(tmp_path.glob("*.part"))


def killed(action) -> None:
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die(*_args):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("act", [seal, unseal])
def test_killed_while_writing_or_renaming_leaves_the_old_file(model, tmp_path, monkeypatch, act):
    source, target = tmp_path / ("plain" if act is seal else "sealed"), tmp_path / "target"
    target.write_text("the old file")
    segments = sealing._segments

    def some(*args):
        yield from list(segments(*args))[:2]
        die()

    for name, where, deadly in (("_segments", sealing, some), ("replace", os, die)):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, deadly)
            killed(lambda: act(source, target))
        assert target.read_text() == "the old file"
    act(source, target)
    assert target.read_text(errors="replace") != "the old file"
    assert not list(tmp_path.glob("*.part"))


def test_a_file_may_be_sealed_onto_itself(tmp_path):
    path = tmp_path / "model"
    path.write_bytes(b"abc" * 1000)
    seal(path, path)
    assert b"abcabc" not in path.read_bytes()
    assert unseal(path, path).read_bytes() == b"abc" * 1000


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    import tracemalloc

    monkeypatch.setattr(sealing, "SEGMENT_BYTES", 2**18)
    (tmp_path / "plain").write_bytes(bytes(2**24))
    seal(tmp_path / "plain", tmp_path / "sealed")  # what is imported on first use is not counted
    tracemalloc.start()
    seal(tmp_path / "plain", tmp_path / "sealed")
    unseal(tmp_path / "sealed", tmp_path / "opened")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2**21


# Keys


def test_a_new_key_is_private_and_never_overwritten(tmp_path):
    before = os.umask(0)
    try:
        key = transfer.new_key(tmp_path / "key")
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "key").read_bytes() == key.secret
    assert len(key.secret) == 32
    assert transfer.key_from_file(tmp_path / "key") == key
    assert transfer.new_key(tmp_path / "other") != key
    with pytest.raises(ValueError, match="exists, and a new key in its place"):
        transfer.new_key(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == key.secret


def test_secrets_are_not_printed(monkeypatch):
    for key in (KEY, transfer.passphrase(WORDS)):
        assert WORDS not in repr(key)
        assert "secret" not in repr(key)
        assert "0102" not in repr(key)
    monkeypatch.setenv("WORKBENCH_KEY", "not a key at all")
    with pytest.raises(ValueError, match="WORKBENCH_KEY is not 32 bytes in base64") as caught:
        transfer.key_from_environment()
    assert "not a key at all" not in str(caught.value)


def test_a_key_from_the_environment(model, tmp_path, monkeypatch):
    text = base64.b64encode(KEY.secret).decode()
    monkeypatch.setenv("WORKBENCH_KEY", f"{text}\n")
    assert transfer.key_from_environment() == KEY
    monkeypatch.setenv("MINE", text)
    assert transfer.key_from_environment("MINE") == KEY
    for wrong in ("", text[:-4], text + "AAAA", text.replace("A", "?"), "ü" * 44):
        monkeypatch.setenv("MINE", wrong)
        with pytest.raises(ValueError, match="MINE is not 32 bytes in base64"):
            transfer.key_from_environment("MINE")
    with pytest.raises(ValueError, match="variable GONE is not set"):
        transfer.key_from_environment("GONE")


@pytest.mark.parametrize("size", [0, 31, 33, 1000])
def test_a_key_file_of_another_size_is_refused(tmp_path, size):
    (tmp_path / "key").write_bytes(bytes(size))
    with pytest.raises(ValueError, match="does not have 32 bytes"):
        transfer.key_from_file(tmp_path / "key")
    with pytest.raises(ValueError, match="there is no key file"):
        transfer.key_from_file(tmp_path / "gone")


def test_a_passphrase_opens_what_it_sealed(tmp_path):
    path = sealed(tmp_path, b"weights", key=transfer.passphrase("größe größe", cost=10))
    # Typed on another keyboard: the same letters, as other code points.
    same = transfer.passphrase("gro\u0308ße gro\u0308ße", cost=12)
    assert unseal(path, tmp_path / "opened", key=same).read_bytes() == b"weights"
    refused(path, tmp_path / "no", key=transfer.passphrase("größe größe.", cost=10))


def test_scrypt_is_what_turns_words_into_a_key(tmp_path):
    import hashlib

    path = sealed(tmp_path, b"weights", key=transfer.passphrase(WORDS, cost=10))
    raw = bytearray(path.read_bytes())
    assert raw[8] == 10
    salt = bytes(raw[9:25])
    secret = hashlib.scrypt(WORDS.encode(), salt=salt, n=2**10, r=8, p=1, dklen=32)
    cipher = sealing._cipher(Key(secret), bytes(raw[:8]) + b"\0" + bytes(raw[9:32]))
    bound = bytes(raw[:32]) + b"\0\5lenet\0\0011"
    assert cipher.decrypt(bytes(raw[25:32]) + b"\0\0\0\0\1", bytes(raw[32:]), bound) == b"weights"


def test_a_header_cannot_ask_for_more_memory_than_allowed(tmp_path, monkeypatch):
    path = sealed(tmp_path, b"weights", key=transfer.passphrase(WORDS, cost=11))
    raw = bytearray(path.read_bytes())
    monkeypatch.setattr(sealing, "_cipher", None)  # it must not be reached
    for cost in (12, 22, 63, 255):
        raw[8] = cost
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=f"asks for a scrypt cost of {cost}, more than the 11"):
            unseal(path, tmp_path / "opened", key=transfer.passphrase(WORDS, cost=11))


def test_the_other_kind_of_key_is_named(model, tmp_path):
    with pytest.raises(ValueError, match="says it was sealed with a key of 32 bytes, and this was"):
        unseal(model, tmp_path / "opened", key=transfer.passphrase(WORDS))
    path = sealed(tmp_path, b"x", key=transfer.passphrase(WORDS, cost=10))
    with pytest.raises(ValueError, match="says it was sealed with a passphrase, and this was"):
        unseal(path, tmp_path / "opened")


def test_settings_are_checked(model, tmp_path):
    with pytest.raises(ValueError, match="passphrase has 7 characters; give 8 or more"):
        transfer.passphrase("1234567")
    for cost in (9, 23, 10.5):
        with pytest.raises(ValueError, match=f"cost is {cost}; give 10 to 22"):
            transfer.passphrase(WORDS, cost=cost)
    for act, source in ((seal, tmp_path / "plain"), (unseal, model)):
        with pytest.raises(TypeError, match="key is a bytes; make one with"):
            act(source, tmp_path / "x", key=b"0" * 32)
        with pytest.raises(ValueError, match="name has 0 bytes; give 1 to 65535"):
            act(source, tmp_path / "x", name="")
        with pytest.raises(ValueError, match="version has 70000 bytes"):
            act(source, tmp_path / "x", version="1" * 70_000)
        with pytest.raises(TypeError, match="version is 1; give text"):
            act(source, tmp_path / "x", version=1)
        with pytest.raises(ValueError, match="is not a file"):
            act(tmp_path / "gone", tmp_path / "x")
    with pytest.raises(IntegrityError, match="is no sealed file"):
        unseal(tmp_path / "plain", tmp_path / "x")
    assert not (tmp_path / "x").exists()


# Signatures


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return transfer.new_signing_key(tmp_path_factory.mktemp("keys"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a signature must not use the network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    for name in ("a.safetensors", "b.safetensors", "sub/c.json", ".gitignore"):
        (tmp_path / "model" / name).write_bytes(name.encode() * 100)
    return tmp_path / "model"


def cli(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "model_signing", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def test_a_signed_folder_is_verified_and_only_a_signature_is_added(folder, keys):
    before = threading.active_count()
    signature = transfer.sign(folder, private_key=keys.private)
    assert signature == folder / "model.sig"
    transfer.verify_signature(folder, public_key=keys.public)
    moved = folder.rename(folder.with_name("elsewhere"))
    transfer.verify_signature(moved, public_key=keys.public)
    transfer.sign(moved, private_key=keys.private)  # anew: the old signature is not signed
    transfer.verify_signature(moved, public_key=keys.public)
    assert len(list(moved.rglob("*"))) == 6
    assert threading.active_count() == before


def flip(folder: Path) -> None:
    data = bytearray((folder / "b.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "b.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        flip,
        lambda folder: (folder / "a.safetensors").rename(folder / "d.safetensors"),
        lambda folder: (folder / "sub" / "c.json").unlink(),
        lambda folder: (folder / "extra").touch(),
        lambda folder: (folder / "sub" / "model.sig").touch(),
        lambda folder: (folder / ".gitattributes").touch(),
        lambda folder: (folder / ".gitignore").write_text("*"),
        lambda folder: ((folder / ".git").mkdir(), (folder / ".git" / "config").touch()),
        lambda folder: (folder / "link").symlink_to(folder / "a.safetensors"),
        lambda folder: (folder / "a.safetensors").write_bytes(b""),
    ],
    ids=["bit", "renamed", "missing", "extra", "extra signature", "extra git file",
         "altered git file", "git folder", "link", "emptied"],
)  # fmt: skip
def test_every_change_of_a_signed_folder_is_refused(folder, keys, change):
    transfer.sign(folder, private_key=keys.private)
    change(folder)
    with pytest.raises(IntegrityError, match="is not what was signed with this key"):
        transfer.verify_signature(folder, public_key=keys.public)


def test_one_file_and_a_signature_elsewhere(folder, keys, tmp_path):
    path = folder / "a.safetensors"
    assert transfer.sign(path, private_key=keys.private) == folder / "a.safetensors.sig"
    transfer.verify_signature(path, public_key=keys.public)
    where = tmp_path / "far.sig"
    assert transfer.sign(folder, private_key=keys.private, signature=where) == where
    transfer.verify_signature(folder, public_key=keys.public, signature=where)
    path.write_bytes(b"other")
    for signed, signature in ((path, None), (folder, where)):
        with pytest.raises(IntegrityError):
            transfer.verify_signature(signed, public_key=keys.public, signature=signature)


def test_the_key_of_someone_else_is_refused(folder, keys, tmp_path):
    other = transfer.new_signing_key(tmp_path, name="other")
    transfer.sign(folder, private_key=other.private)
    with pytest.raises(IntegrityError, match="not what was signed with this key"):
        transfer.verify_signature(folder, public_key=keys.public)
    # The signature names its key; a forged name does not help.
    path = folder / "model.sig"
    mine = transfer.sign(folder, private_key=keys.private, signature=tmp_path / "mine.sig")
    hint = json.loads(mine.read_text())["verificationMaterial"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"verificationMaterial": hint}))
    with pytest.raises(IntegrityError, match="not what was signed with this key"):
        transfer.verify_signature(folder, public_key=keys.public)


def test_damaged_signatures_are_refused_or_say_the_same(folder, keys):
    path = transfer.sign(folder, private_key=keys.private)
    good, generator, refused = path.read_bytes(), random.Random(5), 0
    for _ in range(150):
        path.write_bytes(corrupted(good, generator))
        try:
            transfer.verify_signature(folder, public_key=keys.public)
        except IntegrityError:
            refused += 1
    # The rest hit what carries no meaning, such as the spelling of a key that is left out.
    assert refused > 130


def test_the_tool_of_model_signing_reads_ours_and_we_read_its(folder, keys, tmp_path):
    shutil.rmtree(folder / "sub")
    transfer.sign(folder, private_key=keys.private)
    arguments = ("verify", "key", folder, "--signature", folder / "model.sig", "--public_key",
                 keys.public)  # fmt: skip
    done = cli(*arguments, "--no-ignore-git-paths")
    assert done.returncode == 0, done.stderr
    flip(folder)
    assert cli(*arguments).returncode != 0
    theirs = tmp_path / "theirs.sig"
    done = cli("sign", "key", folder, "--signature", theirs, "--private_key", keys.private,
               "--ignore-paths", folder / "model.sig")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "model.sig").unlink()
    transfer.verify_signature(folder, public_key=keys.public, signature=theirs)
    flip(folder)
    with pytest.raises(IntegrityError):
        transfer.verify_signature(folder, public_key=keys.public, signature=theirs)


def test_signing_keys_are_private_and_never_overwritten(tmp_path):
    keys = transfer.new_signing_key(tmp_path, name="mine")
    assert keys == (tmp_path / "mine.key", tmp_path / "mine.pub")
    assert keys.private.stat().st_mode & 0o777 == 0o600
    before = keys.private.read_bytes()
    with pytest.raises(ValueError, match="exists"):
        transfer.new_signing_key(tmp_path, name="mine")
    keys.public.unlink()
    with pytest.raises(ValueError, match="exists"):
        transfer.new_signing_key(tmp_path, name="mine")
    assert keys.private.read_bytes() == before
    assert not keys.public.exists()
    keys.private.rename(keys.public)
    with pytest.raises(ValueError, match="exists"):
        transfer.new_signing_key(tmp_path, name="mine")
    assert not keys.private.exists()


def test_what_is_no_key_no_signature_and_no_model_is_named(folder, keys, tmp_path):
    transfer.sign(folder, private_key=keys.private)
    for wrong in (keys.public, tmp_path / "gone", folder / "a.safetensors"):
        with pytest.raises(ValueError, match="is no private key that can sign"):
            transfer.sign(folder, private_key=wrong)
    for wrong in (keys.private, tmp_path / "gone", folder / "a.safetensors"):
        with pytest.raises(ValueError, match="is no public key that can verify"):
            transfer.verify_signature(folder, public_key=wrong)
    with pytest.raises(ValueError, match="there is no signature"):
        transfer.verify_signature(folder / "a.safetensors", public_key=keys.public)
    with pytest.raises(ValueError, match="does not exist"):
        transfer.sign(tmp_path / "gone", private_key=keys.private)
    (folder / "link").symlink_to(keys.public)
    with pytest.raises(ValueError, match="link"):
        transfer.sign(folder, private_key=keys.private)


def test_a_model_that_is_split_signed_and_fetched_is_verified(tmp_path, keys, monkeypatch):
    from test_shards import weights, write

    folder = transfer.split(write(tmp_path, weights()), tmp_path / "out", progress=False)
    transfer.sign(folder, private_key=keys.private)
    transfer.fetch(folder, tmp_path / "in", progress=False)
    transfer.verify_signature(tmp_path / "in", public_key=keys.public)


@settings(max_examples=30)
@given(st.binary(max_size=2 * SEGMENT))
def test_in_memory_it_is_the_same(tmp_path_factory, data):
    path = sealed(tmp_path_factory.mktemp("memory"), data)
    opened = transfer.unseal_bytes(path.read_bytes(), key=KEY, name="lenet", version="1")
    assert opened == data
    with pytest.raises(IntegrityError, match="the data cannot be opened as 'lenet', version '2'"):
        transfer.unseal_bytes(path.read_bytes(), key=KEY, name="lenet", version="2")
