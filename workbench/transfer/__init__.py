"""Bytes from one machine to another: shards, verified and resumable transfer, seals, signatures."""

from workbench.transfer.fetching import Fetched, fetch
from workbench.transfer.manifests import IntegrityError, Manifest, diff, manifest, verify
from workbench.transfer.sealing import (
    Key,
    key_from_environment,
    key_from_file,
    new_key,
    passphrase,
    seal,
    unseal,
    unseal_bytes,
)
from workbench.transfer.serving import serve
from workbench.transfer.shards import join, split
from workbench.transfer.signing import new_signing_key, sign, verify_signature

__all__ = [
    "Fetched",
    "IntegrityError",
    "Key",
    "Manifest",
    "diff",
    "fetch",
    "join",
    "key_from_environment",
    "key_from_file",
    "manifest",
    "new_key",
    "new_signing_key",
    "passphrase",
    "seal",
    "serve",
    "sign",
    "split",
    "unseal",
    "unseal_bytes",
    "verify",
    "verify_signature",
]
