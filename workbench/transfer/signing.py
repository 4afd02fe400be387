"""Who made this model: signatures in the OpenSSF model-signing format, with keys that stay offline.

A signature is a small file that lists the sha256 of every file of a model, signed with an elliptic
curve key (ECDSA on P-256). ``python -m model_signing verify key`` reads it too. No network is used,
and there is no log: that the public key belongs to whom you think must come by another way.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from workbench.transfer.manifests import LIMIT_BYTES, SIGNATURE, IntegrityError
from workbench.transfer.sealing import write_secret

if TYPE_CHECKING:
    from model_signing import hashing


class SigningKey(NamedTuple):
    """Paths of the two halves in PEM: ``private`` signs and stays secret, ``public`` is shared."""

    private: Path
    public: Path


def new_signing_key(folder: str | os.PathLike, *, name: str = "signing") -> SigningKey:
    """Draw a key pair and write it to ``NAME.key`` (for its owner only) and ``NAME.pub``.

    Raises:
        ValueError: one of the files exists.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    paths = SigningKey(Path(folder, f"{name}.key"), Path(folder, f"{name}.pub"))
    if paths.public.exists():
        raise ValueError(f"{paths.public} exists; give another name")
    key = ec.generate_private_key(ec.SECP256R1())
    write_secret(
        paths.private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    paths.public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return paths


def sign(
    path: str | os.PathLike,
    *,
    private_key: str | os.PathLike,
    signature: str | os.PathLike | None = None,
) -> Path:
    """Sign a file, or all files of a folder; returns the path of the signature.

    Args:
        private_key: an elliptic curve key in PEM without a password, as `new_signing_key` writes.
        signature: where to write it; ``model.sig`` in the folder, or ``FILE.sig``, unless told.
            `fetch` brings the ``model.sig`` of a folder along.

    Raises:
        ValueError: nothing at ``path``, a link in the folder, or a file that is no such key.

    Reference: OpenSSF (2025), "Model signing specification".
    """
    from cryptography.exceptions import UnsupportedAlgorithm

    from workbench.data import write_whole

    path, signature, files = _check(path, signature)
    from model_signing import signing

    try:
        signer = signing.Config().use_elliptic_key_signer(private_key=private_key)
    except (ValueError, TypeError, OSError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{private_key} is no private key that can sign: {error}") from None
    signer.set_hashing_config(files)
    write_whole(signature, lambda temporary: signer.sign(path, temporary))
    return signature


def verify_signature(
    path: str | os.PathLike,
    *,
    public_key: str | os.PathLike,
    signature: str | os.PathLike | None = None,
) -> None:
    """Compare a file, or all files of a folder, with what the holder of a key has signed.

    In a folder, a file that is altered, missing, added or renamed is refused; the name of the
    folder, or of a single file, is not part of what was signed.

    Args:
        public_key: the public half of the key in PEM; take it from someone you trust, not from
            where the model came from.
        signature: where it is, if not where `sign` puts it.

    Raises:
        IntegrityError: the model is not the one that was signed, or another key signed it, or the
            signature is damaged.
        ValueError: nothing at ``path``, no signature, or a file that is no such key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm

    path, signature, files = _check(path, signature)
    if not signature.is_file():
        raise ValueError(f"there is no signature {signature}; sign(...) makes one")
    if signature.stat().st_size > LIMIT_BYTES:
        raise IntegrityError(f"{signature} has more than {LIMIT_BYTES} bytes")
    from model_signing import verifying

    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (ValueError, TypeError, AttributeError, OSError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{public_key} is no public key that can verify: {error}") from None
    verifier.set_hashing_config(files)
    try:
        verifier.verify(path, signature)
    except Exception as error:  # a damaged signature makes the library raise errors of many kinds
        reason = str(error) or type(error).__name__
        raise IntegrityError(
            f"{path.name} is not what was signed with this key, or {signature.name} is damaged: "
            f"{reason}"
        ) from None


def _check(
    path: str | os.PathLike, signature: str | os.PathLike | None
) -> "tuple[Path, Path, hashing.Config]":
    """Absolute paths, and how files are hashed: all but the signature."""
    from model_signing import hashing

    path = Path(path).absolute()
    if not path.exists():
        raise ValueError(f"{path} does not exist; give the path of a model")
    default = path / SIGNATURE if path.is_dir() else path.with_name(f"{path.name}.sig")
    signature = default if signature is None else Path(signature).absolute()
    # The library leaves out .git and the like unless told; here every file counts.
    files = hashing.Config().set_ignored_paths(paths=[signature], ignore_git_paths=False)
    return path, signature, files
