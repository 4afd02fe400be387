"""Who may ask a server for what, which model files it believes, and what it writes down.

`Keys` checks the key that a request brings: known, not expired, of the right scope, not too fast.
`read_model` gives the bytes of a model file only if their signature, name and version are right,
and opens a sealed file in memory only. `Audit` writes one line for each event. Nothing here needs
torch.

    python -m workbench.deploy.access create --keys keys.json --name alice --scope infer

The file of keys holds only their sha256. A password needs a slow hash such as scrypt, since people
choose words that can be guessed; a key of 256 random bits cannot be guessed at any speed, and a
slow hash would let a stranger with wrong keys keep the server busy.
"""

import argparse
import base64
import hashlib
import hmac
import ipaddress
import json
import math
import os
import re
import secrets
import ssl
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path

from workbench import transfer
from workbench.deploy.protocol import Refused
from workbench.transfer import IntegrityError, sealing

SCOPES = ("infer", "admin", "metrics")  # ask a model; load and unload models; read the counters
RELOAD_SECONDS = 1.0  # how soon a revoked key is refused
FIELD_CHARACTERS = 256  # of the audit log; what clients write may be long
SIGNATURE_BYTES = 2**20  # that of one file has about 2,000


@dataclass(frozen=True)
class Caller:
    """Whom a key belongs to, and the models it is good for (None: all)."""

    name: str
    models: tuple[str, ...] | None = None


class Audit:
    """A log of events, one JSON object a line, that no client can forge lines in.

    Values are numbers or short text, so that no payload gets in; anything that looks like a key is
    blotted out. At ``limit_bytes`` the file becomes ``NAME.1``, in place of the one before.

    Args:
        path: the file, readable by its owner only; "-" is standard error.
    """

    def __init__(self, path: str | os.PathLike, *, limit_bytes: int = 2**26):
        self.path = None if os.fspath(path) == "-" else Path(path)
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        if self.path is not None:  # what cannot be written to should fail at the start
            os.close(self._open())

    def write(self, event: str, **fields: str | float | bool | None) -> None:
        """Add one line with the time (UTC), the event and the fields.

        Raises:
            TypeError: a field is neither text nor a number; ``time`` names one.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = {"time": now, "event": _clean("event", event)}
        for name, value in fields.items():
            if name in entry:
                raise TypeError(f"a field is called {name!r}, like one of every line; rename it")
            entry[name] = _clean(name, value)
        # JSON writes a line break as \n, so that one entry stays one line whatever a client sends.
        line = (json.dumps(entry) + "\n").encode()
        with self._lock:
            try:
                self._append(line)
            except OSError:  # a full disk is no reason to stop, nor to lose the line
                os.write(2, line)

    def _append(self, line: bytes) -> None:
        if self.path is None:
            os.write(2, line)
            return
        handle = self._open()
        try:
            status = os.fstat(handle)
            if stat.S_ISREG(status.st_mode) and status.st_size + len(line) > self.limit_bytes:
                os.replace(self.path, f"{self.path}.1")
                os.close(handle)
                handle = self._open()
            os.write(handle, line)
        finally:
            os.close(handle)

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


@dataclass(frozen=True)
class Grant:
    """What one key is good for; the key itself is known only by its hash.

    Attributes:
        name: of the person or program it was made for.
        sha256: of the key, in hexadecimal.
        scopes: some of `SCOPES`. None contains another: an administrator's key cannot infer.
        models: names of the models it is good for; None for all.
        expires: in ISO 8601 with a time zone; None for never.
        rate_per_s: requests a second in the long run. A second's worth may come at once.
    """

    name: str
    sha256: str
    scopes: tuple[str, ...]
    models: tuple[str, ...] | None = None
    expires: str | None = None
    rate_per_s: float | None = None

    def __post_init__(self):
        _check_name("name", self.name)
        if not isinstance(self.sha256, str) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 of {self.name!r} is not 64 hexadecimal digits")
        if not self.scopes or not set(self.scopes) <= set(SCOPES):
            raise ValueError(f"scopes of {self.name!r} are {self.scopes}; choose from {SCOPES}")
        for model in self.models or ():
            _check_name("model", model)
        if self.expires is not None and datetime.fromisoformat(self.expires).tzinfo is None:
            raise ValueError(f"expires is {self.expires!r}; add a time zone, such as +00:00")
        rate = self.rate_per_s
        if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate < math.inf):
            raise ValueError(f"rate_per_s is {rate!r}; give a number above 0")

    def expired(self) -> bool:
        return self.expires is not None and datetime.now(UTC) >= datetime.fromisoformat(
            self.expires
        )


class Keys:
    """The keys that a server accepts; make one with `Keys.load`.

    The file is read again when it changes, so a key can be revoked while the server runs. If it
    cannot be read then, the keys stay as they are, and the audit log says so.
    """

    def __init__(self, grants: Sequence[Grant], *, audit: Audit | None = None):
        self.grants, self.audit = tuple(grants), audit
        self._path: Path | None = None
        self._version: tuple[int, ...] | None = None
        self._looked_at = 0.0
        self._buckets: dict[str, tuple[float, float]] = {}  # sha256 -> requests left, at what time
        self._lock = threading.Lock()

    @classmethod
    def load(cls, path: str | os.PathLike, *, audit: Audit | None = None) -> "Keys":
        """Read a file of keys.

        Args:
            audit: where each refusal is written.

        Raises:
            ValueError: there is no such file, or it is not one that this module writes.
        """
        version = _version(path)  # before it is read: a change meanwhile is then seen
        keys = cls(_read(path), audit=audit)
        keys._path, keys._version, keys._looked_at = Path(path), version, time.monotonic()
        return keys

    def check(
        self, token: str | None, scope: str, model: str | None = None, *, client: str | None = None
    ) -> Caller:
        """Who is asking; each call counts as one request.

        Args:
            token: the key that came with the request, None without one; see `bearer`.
            scope: one of `SCOPES`, what the request needs.
            model: the model it is about, if it is about one.
            client: address, for the audit log only.

        Raises:
            Refused: 401 (no key, an unknown or an expired one), 403 (a key for something else), or
                429 (too many requests, with Retry-After).
            ValueError: ``scope`` is unknown.
        """
        if scope not in SCOPES:
            raise ValueError(f"scope is {scope!r}; choose from {SCOPES}")
        grant = None
        try:
            with self._lock:
                self._reload()
                grant = self._find(token)
                return self._permit(grant, scope, model)
        except Refused as refused:
            if self.audit is not None:
                self.audit.write(
                    "refused",
                    status=refused.status,
                    reason=refused.reason,
                    name=grant and grant.name,
                    scope=scope,
                    model=model,
                    client=client,
                )
            raise

    def _reload(self) -> None:
        now = time.monotonic()
        if self._path is None or now - self._looked_at < RELOAD_SECONDS:
            return
        self._looked_at = now
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self.grants = _read(self._path)
            event = {"event": "keys read again", "count": len(self.grants)}
        except ValueError as error:
            event = {"event": "keys not read", "reason": str(error)}
        if self.audit is not None:
            self.audit.write(**event)

    def _find(self, token: str | None) -> Grant:
        if not token:
            raise Refused(401, f"no key came with the request; {_HOW}", {_ASK: "Bearer"})
        digest = hashlib.sha256(token.encode(errors="replace")).hexdigest()
        found = None
        for grant in self.grants:  # all of them, so that time tells nothing about where it stopped
            if hmac.compare_digest(grant.sha256, digest):
                found = grant
        if found is None:
            raise Refused(401, "the key is unknown", {_ASK: 'Bearer error="invalid_token"'})
        return found

    def _permit(self, grant: Grant, scope: str, model: str | None) -> Caller:
        if grant.expired():
            headers = {_ASK: 'Bearer error="invalid_token"'}
            raise Refused(401, f"the key has expired at {grant.expires}", headers)
        headers = {_ASK: 'Bearer error="insufficient_scope"'}
        if scope not in grant.scopes:
            raise Refused(403, f"the key is not for {scope!r}", headers)
        if model is not None and grant.models is not None and model not in grant.models:
            raise Refused(403, "the key is not for this model", headers)
        wait_seconds = self._wait_seconds(grant)
        if wait_seconds > 0:
            headers = {"Retry-After": str(math.ceil(wait_seconds))}
            raise Refused(429, f"more than {grant.rate_per_s:g} requests a second", headers)
        return Caller(grant.name, grant.models)

    def _wait_seconds(self, grant: Grant) -> float:
        """A token bucket: it holds a second's worth of requests and fills at the key's rate."""
        if grant.rate_per_s is None:
            return 0.0
        now, size = time.monotonic(), max(1.0, grant.rate_per_s)
        left, then = self._buckets.get(grant.sha256, (size, now))
        left = min(size, left + (now - then) * grant.rate_per_s)
        enough = left >= 1
        self._buckets[grant.sha256] = (left - enough, now)
        return 0.0 if enough else (1 - left) / grant.rate_per_s


def bearer(header: str | None) -> str | None:
    """The key in an ``Authorization`` header, None without one.

    >>> bearer("Bearer wb_secret"), bearer("Basic YTpi"), bearer(None)
    ('wb_secret', None, None)
    """
    kind, _, token = (header or "").partition(" ")
    return token.strip() or None if kind.lower() == "bearer" else None


def create_key(
    path: str | os.PathLike,
    name: str,
    scopes: Sequence[str],
    *,
    models: Sequence[str] | None = None,
    expires_in: timedelta | None = None,
    rate_per_s: float | None = None,
) -> str:
    """Draw a key, add it to the file of keys, and return it; it is not written anywhere else.

    Args:
        path: is made if it does not exist, for its owner only.
        name, scopes, models, rate_per_s: as in `Grant`.

    Raises:
        ValueError: a key of this name exists, an argument is out of range, or the file is no file
            of keys.
    """
    grants = _read(path) if os.path.exists(path) else ()
    if any(grant.name == name for grant in grants):
        raise ValueError(f"{path} has a key of the name {name!r}; revoke it or give another name")
    if expires_in is not None and expires_in <= timedelta(0):
        raise ValueError(f"expires_in is {expires_in}; give more than 0")
    token = _PREFIX + secrets.token_urlsafe(32)
    expires = expires_in and (datetime.now(UTC) + expires_in).isoformat(timespec="seconds")
    digest = hashlib.sha256(token.encode()).hexdigest()
    models = None if models is None else tuple(models)
    grant = Grant(name, digest, tuple(scopes), models, expires, rate_per_s)
    _write(path, (*grants, grant))
    return token


def revoke_key(path: str | os.PathLike, name: str) -> None:
    """Take a key out of the file of keys; a running server refuses it within a second.

    Raises:
        ValueError: there is no key of this name.
    """
    grants = _read(path)
    left = tuple(grant for grant in grants if grant.name != name)
    if len(left) == len(grants):
        names = [grant.name for grant in grants]
        raise ValueError(f"{path} has no key of the name {name!r}; it has {names}")
    _write(path, left)


def sign_model(path: str | os.PathLike, *, private_key: str | os.PathLike) -> Path:
    """Sign a model file as what its path says it is; returns the path of the signature, FILE.sig.

    The name and version (see `identity`) are signed with the bytes, so that the file cannot be
    passed off as another model or as a newer version of it.

    Args:
        path: a file, sealed or not; sign it last, as it will lie there.
        private_key: as for `workbench.transfer.sign`.

    Raises:
        ValueError: nothing at ``path``, or a key that cannot sign.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of a model")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # The format takes the name of what is signed from the name of the file.
        named = Path(folder, _label(*identity(path)))
        named.write_bytes(path.read_bytes())
        return transfer.sign(named, private_key=private_key, signature=_signature_of(path))


def read_model(
    path: str | os.PathLike,
    *,
    verify_key: str | os.PathLike | None = None,
    decryption_key: transfer.Key | None = None,
    audit: Audit | None = None,
) -> bytes:
    """The bytes of a model file, if they may be trusted.

    What is checked is what is returned: a file that is swapped meanwhile gains nothing.

    Args:
        verify_key: public key in PEM. With it, a file without a signature of this key over its
            bytes, its name and its version (see `sign_model`) is refused.
        decryption_key: with it, only a file sealed with this key for this name and version (see
            `workbench.transfer.seal`) is accepted. The open bytes are kept in memory only.
        audit: where success and refusal are written.

    Raises:
        IntegrityError: the file is refused.
        ValueError: there is no such file, or a key is none.
    """
    path = Path(path).absolute()
    name, version = identity(path)
    told = {"model": name, "version": version}
    try:
        if not path.is_file():
            raise ValueError(f"{path} is not a file; give the path of a model")
        data = path.read_bytes()
        told["sha256"] = hashlib.sha256(data).hexdigest()
        if verify_key is not None:
            _verify(path, told["sha256"], verify_key)
        if decryption_key is not None or sealing.is_sealed(data):
            data = _open_sealed(path, data, decryption_key)
    except ValueError as error:
        if audit is not None:
            audit.write("model refused", **told, reason=str(error))
        raise
    if audit is not None:
        signed, sealed = verify_key is not None, decryption_key is not None
        audit.write("model read", **told, signed=signed, sealed=sealed)
    return data


def identity(path: str | os.PathLike) -> tuple[str, str]:
    """Name and version of a model file: of its two folders in a repository, or of the file alone.

    >>> identity("models/resnet/3/model.onnx"), identity("downloads/resnet.onnx")
    (('resnet', '3'), ('resnet', '1'))
    """
    path = Path(path).absolute()  # links are not followed: the name is where it was asked for
    if path.parent.name.isdecimal() and path.parent.parent.name:
        return path.parent.parent.name, path.parent.name
    return path.name.split(".")[0], "1"


def tls_context(certificate: str | os.PathLike, key: str | os.PathLike) -> ssl.SSLContext:
    """TLS 1.2 or later for a server, only with ciphers that keep old recordings secret.

    Raises:
        ValueError: the files are missing, or are no certificate and its key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # of TLS 1.2; all of 1.3 do this
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # that of ssl is one
        raise ValueError(
            f"{certificate} and {key} are no certificate and its key: {error}"
        ) from None
    return context


def self_signed(
    folder: str | os.PathLike,
    *,
    hosts: Sequence[str] = ("localhost", "127.0.0.1"),
    days: int = 30,
) -> tuple[Path, Path]:
    """Write ``server.crt`` and ``server.key`` for tests and notebooks; returns their paths.

    Nobody vouches for such a certificate: a client must be given it, and trusts it alone.

    Raises:
        ValueError: the files exist, or ``days`` is below 1.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    if days < 1:
        raise ValueError(f"days is {days}; give 1 or more")
    certificate, key = Path(folder, "server.crt"), Path(folder, "server.key")
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, hosts[0])])
    now = datetime.now(UTC)
    alternatives = x509.SubjectAlternativeName([_alternative(host) for host in hosts])
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(alternatives, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    sealing.write_secret(
        key, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    certificate.write_bytes(built.public_bytes(Encoding.PEM))
    return certificate, key


def main(arguments: Sequence[str] | None = None) -> None:
    """The command ``python -m workbench.deploy.access``; see its ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m workbench.deploy.access", description=_DOES)
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="draw a key and print it, once")
    revoke = commands.add_parser("revoke", help="take a key out")
    listing = commands.add_parser("list", help="show what each key is good for")
    certificate = commands.add_parser("certificate", help="write a certificate for tests")
    certificate.add_argument("--folder", required=True, help="where; it must be there")
    certificate.add_argument("--host", action="append", help="localhost and 127.0.0.1 unless told")
    for command in (create, revoke, listing):
        command.add_argument("--keys", required=True, metavar="FILE", help="the file of keys")
    for command in (create, revoke):
        command.add_argument("--name", required=True, help="whom the key is for")
    create.add_argument("--scope", required=True, action="append", choices=SCOPES)
    create.add_argument("--model", action="append", help="only for this model; may be repeated")
    create.add_argument("--expires", type=_duration, help="after this time: 30d, 12h or 15m")
    create.add_argument("--rate", type=float, help="requests a second in the long run")
    given = parser.parse_args(arguments)
    try:
        if given.command == "create":
            token = create_key(
                given.keys,
                given.name,
                given.scope,
                models=given.model,
                expires_in=given.expires,
                rate_per_s=given.rate,
            )
            print(token)
            print("This is the key. It is not shown again: only its hash is kept.", file=sys.stderr)
        elif given.command == "certificate":
            hosts = given.host or ("localhost", "127.0.0.1")
            print(*self_signed(given.folder, hosts=hosts), sep="\n")
        elif given.command == "revoke":
            revoke_key(given.keys, given.name)
        else:
            for grant in _read(given.keys):
                row = {name: value for name, value in asdict(grant).items() if value is not None}
                row["sha256"] = grant.sha256[:8]
                print(json.dumps(row))
    except ValueError as error:
        parser.error(str(error))


_PREFIX = "wb_"  # so that scanners of published code find a key that got there
_TOKEN = re.compile(_PREFIX + r"[\w-]{20,}")
_ASK, _HOW = "WWW-Authenticate", "send it as 'Authorization: Bearer KEY'"
_FORMAT = "workbench keys 1"
_DOES = "Make, list and revoke the keys that a server accepts; make a certificate for tests."


def _clean(name: str, value: object) -> str | float | bool | None:
    """A value for the audit log: short, and without keys."""
    if value is not None and not isinstance(value, (str, int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; the log takes text and numbers only")
    if isinstance(value, str):
        value = _TOKEN.sub(_PREFIX + "...", value)
        return value if len(value) <= FIELD_CHARACTERS else value[:FIELD_CHARACTERS] + "..."
    return value


def _check_name(label: str, name: object) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII):
        raise ValueError(f"{label} is {name!r}; give 1 to 100 letters, digits, '.', '_' and '-'")


def _read(path: str | os.PathLike) -> tuple[Grant, ...]:
    """The content of a file of keys, every field of it checked."""
    try:
        content = json.loads(Path(path).read_bytes())
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT!r}")
        known = {field.name for field in fields(Grant)}
        grants = []
        for entry in content["keys"]:
            if not set(entry) <= known:  # a misspelt limit must not be taken for none
                raise ValueError(f"unknown fields {sorted(set(entry) - known)}")
            lists = {
                name: entry[name] for name in ("scopes", "models") if entry.get(name) is not None
            }
            if not all(isinstance(value, list) for value in lists.values()):
                raise ValueError("scopes and models have to be lists")
            grants.append(Grant(**entry | {name: tuple(lists[name]) for name in lists}))
        if len({grant.name for grant in grants}) < len(grants):
            raise ValueError("two keys have the same name")
    except FileNotFoundError:
        raise ValueError(
            f"there is no file of keys {path}; make one with: python -m workbench.deploy.access "
            f"create --keys {path} --name NAME --scope infer"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is no file of keys: {error}") from None
    return tuple(grants)


def _write(path: str | os.PathLike, grants: Sequence[Grant]) -> None:
    text = json.dumps({"format": _FORMAT, "keys": [asdict(grant) for grant in grants]}, indent=1)
    temporary = Path(f"{os.fspath(path)}.part")
    temporary.unlink(missing_ok=True)
    try:
        sealing.write_secret(temporary, f"{text}\n".encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _version(path: str | os.PathLike) -> tuple[int, ...] | None:
    """What changes when the file does; None when it is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _signature_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sig")


def _label(name: str, version: str) -> str:
    return f"{name}@{version}"


def _verify(path: Path, sha256: str, verify_key: str | os.PathLike) -> None:
    """Refuse unless the holder of the key signed these very bytes under this name and version."""
    signature = _signature_of(path)
    if not signature.is_file():
        raise IntegrityError(f"{path.name} has no signature {signature.name}; sign_model makes one")
    with open(signature, "rb") as file:
        text = file.read(SIGNATURE_BYTES + 1)
    if len(text) > SIGNATURE_BYTES:
        raise IntegrityError(f"{signature.name} has more than {SIGNATURE_BYTES} bytes")
    with tempfile.TemporaryDirectory() as folder:
        # The library reads files; what it reads here, and what is read from below, is this copy.
        copy = Path(folder, signature.name)
        copy.write_bytes(text)
        transfer.verify_signature(path.resolve(), public_key=verify_key, signature=copy)
    statement = json.loads(base64.b64decode(json.loads(text)["dsseEnvelope"]["payload"]))
    if [file["digest"] for file in statement["predicate"]["resources"]] != [sha256]:
        raise IntegrityError(f"{path.name} was changed while it was read")
    signed, here = statement["subject"][0]["name"], _label(*identity(path))
    if signed != here:
        raise IntegrityError(f"{path.name} was signed as {signed!r}, but lies here as {here!r}")


def _open_sealed(path: Path, data: bytes, key: transfer.Key | None) -> bytes:
    if key is None:
        raise IntegrityError(f"{path.name} is sealed; give the key as decryption_key")
    if not sealing.is_sealed(data):
        raise IntegrityError(f"{path.name} is not sealed, and with a decryption_key it has to be")
    name, version = identity(path)
    try:
        return transfer.unseal_bytes(data, key=key, name=name, version=version)
    except ValueError as error:
        raise IntegrityError(f"{path.name}: {error}") from None


def _alternative(host: str):
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _duration(text: str) -> timedelta:
    found = re.fullmatch(r"(\d{1,6})([dhm])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; give one such as 30d, 12h or 15m")
    unit = {"d": "days", "h": "hours", "m": "minutes"}[found[2]]
    return timedelta(**{unit: int(found[1])})


if __name__ == "__main__":
    main()
