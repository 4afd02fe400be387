"""A model file that only the holder of a key can read, and that no one else can change.

A sealed file is a header and segments of 1 MiB, each encrypted and authenticated with AES-256-GCM
(the STREAM construction of Hoang et al.). A nonce holds the number of its segment and whether it is
the last, so segments that are lost, repeated, swapped or cut off are noticed. What the file is, its
name and version, is authenticated with every segment but not stored: whoever opens it says what
they expect, and an old version cannot be passed off as a new one.

    header 32: magic 8 | scrypt cost 1, 0 for a key | salt 16 | nonce prefix 7
    segment:   at most 1 MiB encrypted | tag 16         nonce: prefix 7 | number 4 | last 1

The key of a file is drawn from the given key and the salt, so one key serves for any number of
files. A sealed file takes 32 bytes more, and 16 for each MiB begun (for an empty file, 16).
"""

import base64
import binascii
import io
import os
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from workbench.transfer.manifests import IntegrityError, byte_bar

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
SEGMENT_BYTES = 2**20
TAG_BYTES = 16
COSTS = range(10, 23)  # memory of scrypt is 2**cost KiB: 1 MiB to 4 GiB


@dataclass(frozen=True)
class Key:
    """A secret of 32 bytes or, with ``cost``, a passphrase that scrypt turns into one.

    Make it with `new_key`, `key_from_file`, `key_from_environment` or `passphrase`.
    """

    secret: bytes = field(repr=False)
    cost: int = 0


def new_key(path: str | os.PathLike) -> Key:
    """Draw a key and write it to a new file that only its owner may read.

    Raises:
        ValueError: the file exists; what was sealed with that key would be lost.
    """
    secret = os.urandom(KEY_BYTES)
    write_secret(path, secret)
    return Key(secret)


def key_from_file(path: str | os.PathLike) -> Key:
    """The key in a file: 32 bytes, as `new_key` writes them.

    Raises:
        ValueError: there is no such file, or it has another size.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no key file {path}; new_key(path) makes one")
    with open(path, "rb") as file:
        secret = file.read(KEY_BYTES + 1)
    if len(secret) != KEY_BYTES:
        raise ValueError(f"{path} is not a key file: it does not have {KEY_BYTES} bytes")
    return Key(secret)


def key_from_environment(variable: str = "WORKBENCH_KEY") -> Key:
    """The key in an environment variable: 32 bytes in base64, such as ``base64 < key`` prints.

    Raises:
        ValueError: the variable is not set, or does not hold 32 bytes in base64.
    """
    text = os.environ.get(variable)
    if text is None:
        raise ValueError(f"the environment variable {variable} is not set; set it to the key")
    try:
        secret = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        secret = b""
    if len(secret) != KEY_BYTES:  # the message must not show the value
        raise ValueError(f"the environment variable {variable} is not {KEY_BYTES} bytes in base64")
    return Key(secret)


def passphrase(text: str, *, cost: int = 17) -> Key:
    """A key made from words that people remember, slowly, so that guessing is slow too.

    Args:
        text: at least 8 characters.
        cost: scrypt needs 2**cost KiB of memory, 128 MiB unless told; 10 to 22. When a file is
            opened, its header may ask for this cost at most.

    Raises:
        ValueError: the text is too short, or the cost out of range.

    Reference: Percival (2009), "Stronger key derivation via sequential memory-hard functions".
    """
    if len(text) < 8:
        raise ValueError(f"the passphrase has {len(text)} characters; give 8 or more")
    if cost not in COSTS:
        raise ValueError(f"cost is {cost}; give {COSTS[0]} to {COSTS[-1]}")
    # The same word can be typed as different code points; NFC makes them one.
    return Key(unicodedata.normalize("NFC", text).encode(), cost)


def seal(
    path: str | os.PathLike,
    to: str | os.PathLike,
    *,
    key: Key,
    name: str,
    version: str,
    progress: bool = True,
) -> Path:
    """Encrypt a file of any kind and size; needs the memory of two segments.

    Each seal draws a fresh salt, so the same file never gives the same bytes twice.

    Args:
        to: where the sealed file shall be; it appears whole or not at all.
        name, version: what this is. They are not in the sealed file; `unseal` needs the same.

    Raises:
        ValueError: ``path`` is not a file, or ``name`` or ``version`` is empty or too long.

    Reference: Hoang, Reyhanitabar, Rogaway and Vizár (2015), "Online authenticated-encryption and
    its nonce-reuse misuse-resistance".
    """
    path, bound = Path(path), _bound(key, name, version)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of one")
    header = _MAGIC + bytes([key.cost]) + os.urandom(_SALT_BYTES + _PREFIX_BYTES)
    cipher = _cipher(key, header)
    with open(path, "rb") as source, byte_bar(path.stat().st_size, "seal", progress) as bar:

        def write(out: BinaryIO) -> None:
            out.write(header)
            for nonce, segment in _segments(source, header, SEGMENT_BYTES):
                out.write(cipher.encrypt(nonce, segment, header + bound))
                bar.update(len(segment))

        return _write(to, write)


def unseal(
    path: str | os.PathLike,
    to: str | os.PathLike,
    *,
    key: Key,
    name: str,
    version: str,
    progress: bool = True,
) -> Path:
    """Decrypt a sealed file. Nothing appears at ``to`` before the last byte was authenticated.

    Raises:
        IntegrityError: this is no sealed file, or key, name, version and content do not belong
            together; which of them is wrong cannot be known.
        ValueError: as for `seal`; or the file was sealed with another kind of key, or its header
            asks for more memory than the cost of the passphrase allows.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file; give the path of one")
    size_bytes = os.path.getsize(path)
    with open(path, "rb") as source, byte_bar(size_bytes, "unseal", progress) as bar:
        segments = _open(source, os.fspath(path), key, name, version)
        bar.update(_HEADER_BYTES)

        def write(out: BinaryIO) -> None:
            for segment in segments:
                out.write(segment)
                bar.update(len(segment) + TAG_BYTES)

        return _write(to, write)


def unseal_bytes(data: bytes, *, key: Key, name: str, version: str) -> bytes:
    """Decrypt the content of a sealed file in memory; nothing is written.

    Raises:
        IntegrityError, ValueError: as for `unseal`.
    """
    return b"".join(_open(io.BytesIO(data), "the data", key, name, version))


def is_sealed(data: bytes) -> bool:
    """Whether bytes begin like a sealed file."""
    return data.startswith(_MAGIC)


def write_secret(path: str | os.PathLike, secret: bytes) -> None:
    """Write a new file that only its owner may read, from its first moment on.

    Raises:
        ValueError: the file exists.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ValueError(
            f"{path} exists, and a new key in its place would make the old one lost; give another "
            "path"
        ) from None
    with open(handle, "wb") as file:
        file.write(secret)


_MAGIC = b"WBSEAL\x00\x01"
_SALT_BYTES, _PREFIX_BYTES = 16, 7
_HEADER_BYTES = len(_MAGIC) + 1 + _SALT_BYTES + _PREFIX_BYTES


def _bound(key: Key, name: str, version: str) -> bytes:
    """Name and version as bytes that no other pair gives."""
    if not isinstance(key, Key):
        raise TypeError(f"key is a {type(key).__name__}; make one with key_from_file or passphrase")
    bound = b""
    for label, text in {"name": name, "version": version}.items():
        if not isinstance(text, str):
            raise TypeError(f"{label} is {text!r}; give text")
        data = text.encode()
        if not 1 <= len(data) <= 2**16 - 1:
            raise ValueError(f"{label} has {len(data)} bytes; give 1 to {2**16 - 1}")
        bound += len(data).to_bytes(2, "big") + data
    return bound


def _open(source: BinaryIO, label: str, key: Key, name: str, version: str) -> Iterator[bytes]:
    """The content, segment by segment; the header is checked at once, a segment when it comes."""
    bound = _bound(key, name, version)
    header = source.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or not is_sealed(header):
        raise IntegrityError(f"{label} is no sealed file of this kind: its header is another")
    cost = header[len(_MAGIC)]
    if bool(cost) != bool(key.cost):
        kinds = ("with a key of 32 bytes", "with a passphrase")
        raise ValueError(
            f"{label} says it was sealed {kinds[bool(cost)]}, and this was opened "
            f"{kinds[bool(key.cost)]}; give the other kind of key"
        )
    if cost > key.cost:
        raise ValueError(
            f"{label} asks for a scrypt cost of {cost}, more than the {key.cost} of this "
            f"passphrase; if you trust the file, give passphrase(..., cost={cost})"
        )
    cipher = _cipher(key, header)

    def segments() -> Iterator[bytes]:
        from cryptography.exceptions import InvalidTag

        for nonce, segment in _segments(source, header, SEGMENT_BYTES + TAG_BYTES):
            try:
                yield cipher.decrypt(nonce, segment, header + bound)
            except InvalidTag:
                raise IntegrityError(
                    f"{label} cannot be opened as {name!r}, version {version!r}, with this key: "
                    "one of the three is wrong, or the file is altered or cut short"
                ) from None

    return segments()


def _cipher(key: Key, header: bytes) -> "AESGCM":
    """AES-256-GCM under the key of this one file."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    salt = header[len(_MAGIC) + 1 :][:_SALT_BYTES]
    secret, cost = key.secret, header[len(_MAGIC)]
    if cost:
        secret = Scrypt(salt=salt, length=KEY_BYTES, n=2**cost, r=8, p=1).derive(secret)
    derive = HKDF(SHA256(), length=KEY_BYTES, salt=salt, info=b"workbench seal 1")
    return AESGCM(derive.derive(secret))


def _segments(source: BinaryIO, header: bytes, size_bytes: int) -> Iterator[tuple[bytes, bytes]]:
    """Nonce and content of each segment; reading one ahead tells which is the last."""
    prefix = header[-_PREFIX_BYTES:]
    segment = source.read(size_bytes)
    for number in range(2**32):
        following = source.read(size_bytes)
        yield prefix + number.to_bytes(4, "big") + bytes([not following]), segment
        if not following:
            return
        segment = following
    raise ValueError("the file has more than 2**32 segments; seal it in parts")


def _write(to: str | os.PathLike, write: Callable[[BinaryIO], None]) -> Path:
    from workbench.data import write_whole

    def write_to(temporary: str) -> None:
        with open(temporary, "wb") as out:
            write(out)

    write_whole(to, write_to)
    return Path(to)
