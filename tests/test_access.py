"""Keys, scopes, rates, the audit log, TLS, and models that are not what they claim to be."""

import base64
import hashlib
import json
import os
import random
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import transfer
from workbench.deploy import access
from workbench.deploy.access import Audit, Grant, Keys, Refused
from workbench.transfer import IntegrityError, Key

SEALING_KEY = Key(bytes(range(32)))


class Clock:
    """Time that passes only when told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(access.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def audit(tmp_path) -> Audit:
    return Audit(tmp_path / "audit.jsonl")


def lines(audit: Audit) -> list[dict]:
    return [json.loads(line) for line in audit.path.read_text().splitlines()]


def refused(keys: Keys, *args, **kwargs) -> Refused:
    with pytest.raises(Refused) as caught:
        keys.check(*args, **kwargs)
    return caught.value


# Keys


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "keys.json"


def test_a_key_lets_its_owner_in(file):
    token = access.create_key(file, "alice", ["infer", "metrics"], models=["resnet"])
    keys = Keys.load(file)
    for scope in ("infer", "metrics"):
        assert keys.check(token, scope) == access.Caller("alice", ("resnet",))
    assert keys.check(token, "infer", "resnet").name == "alice"


def test_the_file_holds_no_key_and_only_its_owner_reads_it(file):
    tokens = [access.create_key(file, name, ["infer"]) for name in ("alice", "bob")]
    text = file.read_text()
    assert len(set(tokens)) == 2
    assert not any(token in text or token.removeprefix("wb_") in text for token in tokens)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == [file.name]
    assert "wb_" not in repr(Keys.load(file).grants)


def test_no_key_a_wrong_key_and_almost_the_right_key(file, audit):
    token = access.create_key(file, "alice", ["infer"])
    keys = Keys.load(file, audit=audit)
    wrong = [None, "", "wb_", token[:-1], token + "x", token.swapcase(), token.encode().hex(),
             keys.grants[0].sha256, "é\udc80\n", "x" * 100_000]  # fmt: skip
    for attempt in wrong:
        error = refused(keys, attempt, "infer", client="10.0.0.7")
        assert error.status == 401
        assert error.headers["WWW-Authenticate"].startswith("Bearer")
    written = lines(audit)
    assert [line["status"] for line in written] == [401] * len(wrong)
    assert all(line["name"] is None and line["client"] == "10.0.0.7" for line in written)
    assert "Authorization: Bearer" in refused(keys, None, "infer").reason


def test_wrong_scope_and_wrong_model_are_forbidden_and_logged(file, audit):
    infer = access.create_key(file, "alice", ["infer"], models=["resnet"])
    admin = access.create_key(file, "root", ["admin"])
    keys = Keys.load(file, audit=audit)
    assert refused(keys, infer, "admin", "resnet").status == 403
    assert refused(keys, infer, "metrics").status == 403
    assert refused(keys, admin, "infer", "resnet").status == 403  # no scope holds another
    assert refused(keys, infer, "infer", "mlp").status == 403
    assert "insufficient_scope" in refused(keys, infer, "infer", "mlp").headers["WWW-Authenticate"]
    assert keys.check(admin, "admin", "mlp").name == "root"
    found = [(line["event"], line["name"], line["scope"], line["model"]) for line in lines(audit)]
    assert found[:2] == [("refused", "alice", "admin", "resnet"),
                         ("refused", "alice", "metrics", None)]  # fmt: skip


def test_an_expired_key_is_refused_from_that_moment_on(file, audit, monkeypatch):
    token = access.create_key(file, "alice", ["infer"], expires_in=timedelta(days=30))
    keys = Keys.load(file, audit=audit)
    expires = datetime.fromisoformat(keys.grants[0].expires)
    assert timedelta(days=29.9) < expires - datetime.now(UTC) <= timedelta(days=30)

    class Later(datetime):
        @classmethod
        def now(cls, zone):
            return moment

    monkeypatch.setattr(access, "datetime", Later)
    moment = expires - timedelta(seconds=1)
    assert keys.check(token, "infer").name == "alice"
    moment = expires
    error = refused(keys, token, "infer")
    assert error.status == 401
    assert "expired" in error.reason
    assert lines(audit)[-1]["name"] == "alice"


def test_every_key_is_compared_whole(file, monkeypatch):
    """The time of a check must not depend on which key it is, nor on how much of it is right."""
    tokens = [access.create_key(file, name, ["infer"]) for name in "abc"]
    keys, compared = Keys.load(file), []

    def compare(a: str, b: str) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(access.hmac, "compare_digest", compare)
    for token in tokens:
        compared.clear()
        keys.check(token, "infer")
        assert compared == [(64, 64)] * 3


def test_unknown_scope_is_a_mistake_of_the_server(file):
    token = access.create_key(file, "alice", ["infer"])
    with pytest.raises(ValueError, match=r"scope is 'root'; choose from \('infer'"):
        Keys.load(file).check(token, "root")


# Rates


def test_a_second_of_requests_at_once_then_the_rate(file, audit, clock):
    token = access.create_key(file, "alice", ["infer"], rate_per_s=4)
    other = access.create_key(file, "bob", ["infer"])
    keys = Keys.load(file, audit=audit)
    for _ in range(4):
        keys.check(token, "infer")
    error = refused(keys, token, "infer")
    assert (error.status, error.headers) == (429, {"Retry-After": "1"})
    assert keys.check(other, "infer").name == "bob"  # others do not suffer
    clock.now += 0.25
    keys.check(token, "infer")
    assert refused(keys, token, "infer").status == 429
    clock.now += 3600  # unused time is not saved up
    assert sum(_passes(keys, token) for _ in range(10)) == 4
    assert "more than 4 requests a second" in lines(audit)[-1]["reason"]


def _passes(keys: Keys, token: str) -> bool:
    try:
        keys.check(token, "infer")
    except Refused:
        return False
    return True


def test_a_slow_rate_says_how_long_to_wait_and_keeps_its_word(file, clock):
    token = access.create_key(file, "alice", ["infer"], rate_per_s=0.1)
    keys = Keys.load(file)
    keys.check(token, "infer")
    clock.now += 2.5
    error = refused(keys, token, "infer")
    assert error.headers == {"Retry-After": "8"}
    clock.now += int(error.headers["Retry-After"])
    keys.check(token, "infer")


@settings(max_examples=30)
@given(
    st.floats(0.2, 50),
    st.lists(st.floats(0, 3), min_size=1, max_size=80),
)
def test_never_more_than_the_rate_and_one_burst(rate, pauses):
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        keys = Keys([Grant("alice", hashlib.sha256(b"t").hexdigest(), ("infer",),
                           rate_per_s=rate)])  # fmt: skip
        start, passed = clock.now, 0
        for pause in pauses:
            clock.now += pause
            passed += _passes(keys, "t")
            assert passed <= max(1, rate) + rate * (clock.now - start) + 1e-6


def test_requests_that_are_refused_for_another_reason_do_not_count(file, clock):
    token = access.create_key(file, "alice", ["infer"], rate_per_s=1)
    keys = Keys.load(file)
    for _ in range(5):
        assert refused(keys, token, "admin").status == 403
    keys.check(token, "infer")


# The file of keys while the server runs


def test_revoked_and_new_keys_take_effect_within_a_second(file, audit, clock):
    token = access.create_key(file, "alice", ["infer"])
    keys = Keys.load(file, audit=audit)
    keys.check(token, "infer")
    access.revoke_key(file, "alice")
    new = access.create_key(file, "bob", ["infer"])
    clock.now += 1
    assert refused(keys, token, "infer").status == 401
    assert keys.check(new, "infer").name == "bob"
    assert lines(audit)[0] | {"time": ""} == {"time": "", "event": "keys read again", "count": 1}


@pytest.mark.parametrize("damage", [lambda file: file.write_text("{"), Path.unlink])
def test_a_broken_file_changes_nothing_and_is_logged_once(file, audit, clock, damage):
    token = access.create_key(file, "alice", ["infer"])
    keys = Keys.load(file, audit=audit)
    damage(file)
    for _ in range(3):
        clock.now += 1
        assert keys.check(token, "infer").name == "alice"
    assert [line["event"] for line in lines(audit)] == ["keys not read"]


def test_a_rate_goes_on_when_the_file_is_read_again(file, clock):
    token = access.create_key(file, "alice", ["infer"], rate_per_s=0.1)
    keys = Keys.load(file)
    keys.check(token, "infer")
    access.create_key(file, "bob", ["infer"])
    clock.now += 1
    assert refused(keys, token, "infer").status == 429


def test_names_are_unique_and_revoking_needs_one(file):
    access.create_key(file, "alice", ["infer"])
    before = file.read_bytes()
    with pytest.raises(ValueError, match="has a key of the name 'alice'; revoke it"):
        access.create_key(file, "alice", ["admin"])
    with pytest.raises(ValueError, match=r"no key of the name 'bob'; it has \['alice'\]"):
        access.revoke_key(file, "bob")
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scopes": ["root"]}, r"scopes of 'alice' are \('root',\); choose from"),
        ({"scopes": []}, "choose from"),
        ({"scopes": "infer"}, "have to be lists"),
        ({"models": "resnet"}, "have to be lists"),
        ({"models": ["../etc"]}, "model is '../etc'; give 1 to 100 letters"),
        ({"name": "a b"}, "name is 'a b'; give 1 to 100 letters"),
        ({"name": None}, "name is None"),
        ({"sha256": "abc"}, "sha256 of 'alice' is not 64 hexadecimal digits"),
        ({"expires": "2030-01-01T00:00:00"}, "add a time zone"),
        ({"expires": "soon"}, "soon"),
        ({"expires": 3}, "no file of keys"),
        ({"rate_per_s": 0}, "rate_per_s is 0; give a number above 0"),
        ({"rate_per_s": "9"}, "rate_per_s is '9'"),
        ({"rate": 5}, r"unknown fields \['rate'\]"),
    ],
)
def test_a_file_with_a_mistake_is_refused_by_name(file, change, message):
    access.create_key(file, "alice", ["infer"])
    content = json.loads(file.read_text())
    content["keys"][0] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Keys.load(file)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[" * 100_000, "\x00", f'{{"format": "{access._FORMAT}"}}',
     f'{{"format": "{access._FORMAT}", "keys": [3]}}'],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused(file, text):
    file.write_text(text)
    with pytest.raises(ValueError, match="is no file of keys"):
        Keys.load(file)


def test_a_missing_file_says_how_to_make_one(file):
    with pytest.raises(ValueError, match=r"python -m workbench.deploy.access create --keys"):
        Keys.load(file)


def test_two_keys_of_one_name_are_refused(file):
    access.create_key(file, "alice", ["infer"])
    content = json.loads(file.read_text())
    content["keys"] *= 2
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="two keys have the same name"):
        Keys.load(file)


def test_a_key_that_would_never_work_is_not_made(file):
    with pytest.raises(ValueError, match="expires_in is 0:00:00; give more than 0"):
        access.create_key(file, "alice", ["infer"], expires_in=timedelta(0))
    with pytest.raises(ValueError, match="rate_per_s is -1"):
        access.create_key(file, "alice", ["infer"], rate_per_s=-1)
    assert not file.exists()


@pytest.mark.parametrize(
    ("header", "token"),
    [("Bearer abc", "abc"), ("bearer  abc ", "abc"), ("Basic abc", None), ("Bearer", None),
     ("Bearer ", None), ("", None), (None, None)],
)  # fmt: skip
def test_the_key_is_taken_from_the_header(header, token):
    assert access.bearer(header) == token


# The command


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "workbench.deploy.access", *arguments],
        capture_output=True, text=True,
    )  # fmt: skip


def test_the_command_prints_the_key_alone_and_once(file):
    made = command("create", "--keys", str(file), "--name", "alice", "--scope", "infer",
                   "--scope", "metrics", "--model", "resnet", "--expires", "30d",
                   "--rate", "100")  # fmt: skip
    token = made.stdout.strip()
    assert made.returncode == 0, made.stderr
    assert "not shown again" in made.stderr
    assert token not in made.stderr
    keys = Keys.load(file)
    assert keys.check(token, "metrics").models == ("resnet",)
    assert keys.grants[0].rate_per_s == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "--name", "a", "--scope", "root"], "invalid choice: 'root'"),
        (["create", "--name", "a", "--scope", "infer", "--expires", "soon"], "such as 30d"),
        (["create", "--name", "a b", "--scope", "infer"], "name is 'a b'"),
        (["revoke", "--name", "a"], "there is no file of keys"),
    ],
)
def test_mistakes_on_the_command_line_are_told_without_a_traceback(
    file, capsys, arguments, message
):
    with pytest.raises(SystemExit) as ended:
        access.main([arguments[0], "--keys", str(file), *arguments[1:]])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_the_command_lists_and_revokes(file, capsys):
    token = access.create_key(file, "alice", ["infer"])
    access.main(["list", "--keys", str(file)])
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"name": "alice", "scopes": ["infer"],
                     "sha256": hashlib.sha256(token.encode()).hexdigest()[:8]}  # fmt: skip
    access.main(["revoke", "--keys", str(file), "--name", "alice"])
    assert Keys.load(file).grants == ()


def test_the_command_makes_a_certificate(tmp_path, capsys):
    access.main(["certificate", "--folder", str(tmp_path), "--host", "example.org"])
    certificate, key = capsys.readouterr().out.splitlines()
    server = access.tls_context(certificate, key)
    client = ssl.create_default_context(cafile=certificate)
    assert handshake(server, client, "example.org") == "TLSv1.3"


# The audit log


@given(st.text(max_size=600), st.text(max_size=300))
def test_whatever_a_client_sends_one_event_is_one_line(event, text):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        audit = Audit(Path(folder, "log"))
        audit.write(event, path=text)
        audit.write("next")
        raw = audit.path.read_bytes()
    assert raw.count(b"\n") == 2
    assert all(32 <= byte < 127 or byte == 10 for byte in raw)  # no terminal escapes either
    first, second = (json.loads(line) for line in raw.splitlines())
    assert first["path"][:256] == access._TOKEN.sub("wb_...", text)[:256]
    assert len(first["path"]) <= 259
    assert second["event"] == "next"


def test_a_forged_line_stays_inside_its_field(audit):
    audit.write("refused", path='/x"}\n{"time": "now", "event": "model read", "name": "evil"}')
    assert [line["event"] for line in lines(audit)] == ["refused"]


def test_keys_are_blotted_out_wherever_they_come(file, audit):
    token = access.create_key(file, "alice", ["infer"])
    audit.write("request", path=f"/v2?key={token}&x=1", agent=token)
    assert token not in audit.path.read_text()
    assert lines(audit)[0]["path"] == "/v2?key=wb_...&x=1"


@pytest.mark.parametrize("payload", [b"bytes", [1.0], {"a": 1}, object()])
def test_a_payload_is_not_a_field(audit, payload):
    with pytest.raises(TypeError, match=r"body is a .*; the log takes text and numbers only"):
        audit.write("request", body=payload)
    assert audit.path.read_text() == ""


def test_the_time_cannot_be_told_by_the_caller(audit):
    with pytest.raises(TypeError, match="a field is called 'time'"):
        audit.write("request", time="yesterday")
    audit.write("request")
    written = datetime.fromisoformat(lines(audit)[0]["time"])
    assert abs(datetime.now(UTC) - written) < timedelta(minutes=1)


def test_the_log_is_its_owner_s_and_does_not_fill_the_disk(tmp_path):
    audit = Audit(tmp_path / "log", limit_bytes=1000)
    for number in range(100):
        audit.write("request", number=number)
    assert stat.S_IMODE(audit.path.stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1"]
    both = (tmp_path / "log.1").read_text() + audit.path.read_text()
    numbers = [json.loads(line)["number"] for line in both.splitlines()]
    assert numbers == list(range(numbers[0], 100))  # the newest, without a gap
    assert all((tmp_path / name).stat().st_size <= 1000 for name in ("log", "log.1"))


def test_many_threads_write_whole_lines(audit):
    def work(name: str) -> None:
        for number in range(50):
            audit.write("request", name=name, number=number)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(audit)) == 200


def test_a_log_that_cannot_be_written_fails_at_the_start_but_not_later(tmp_path, capfd):
    with pytest.raises(OSError, match="No such file"):
        Audit(tmp_path / "missing" / "log")
    (tmp_path / "logs").mkdir()
    audit = Audit(tmp_path / "logs" / "log")
    shutil.rmtree(tmp_path / "logs")
    audit.write("request", number=7)
    assert json.loads(capfd.readouterr().err)["number"] == 7


def test_a_dash_is_standard_error(capfd):
    Audit(Path("-")).write("request")
    assert json.loads(capfd.readouterr().err)["event"] == "request"


# Model files


@pytest.fixture(scope="module")
def signers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signers")
    return {name: transfer.new_signing_key(folder, name=name) for name in ("ours", "theirs")}


def model_at(folder: Path, data: bytes | None = None) -> Path:
    path = folder / "models" / "resnet" / "2" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(random.Random(0).randbytes(5000) if data is None else data)
    return path


@pytest.fixture
def signed(tmp_path, signers) -> Path:
    path = model_at(tmp_path)
    access.sign_model(path, private_key=signers["ours"].private)
    return path


def seal(path: Path, name: str = "resnet", version: str = "2") -> None:
    """In place."""
    whole = path.with_name("whole")
    path.rename(whole)
    transfer.seal(whole, path, key=SEALING_KEY, name=name, version=version, progress=False)
    whole.unlink()


def rejected(path: Path, audit: Audit, reason: str, **keys) -> None:
    """Refused with this reason, logged, and nothing of it left behind."""
    before = sorted(os.listdir(path.parent))
    with pytest.raises(IntegrityError, match=reason):
        access.read_model(path, audit=audit, **keys)
    entry = lines(audit)[-1]
    assert entry["event"] == "model refused"
    assert entry["model"]
    assert sorted(os.listdir(path.parent)) == before


def test_a_signed_model_is_read_and_logged(signed, signers, audit):
    data = access.read_model(signed, verify_key=signers["ours"].public, audit=audit)
    assert data == signed.read_bytes()
    assert sorted(os.listdir(signed.parent)) == ["model.onnx", "model.onnx.sig"]
    entry = lines(audit)[0]
    assert entry.pop("time")
    assert entry == {
        "event": "model read", "model": "resnet", "version": "2", "signed": True, "sealed": False,
        "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip


def test_without_keys_any_file_is_read(tmp_path):
    path = model_at(tmp_path, b"anything")
    assert access.read_model(path) == b"anything"


def test_unsigned(tmp_path, signers, audit):
    path = model_at(tmp_path)
    rejected(path, audit, "has no signature model.onnx.sig", verify_key=signers["ours"].public)


def test_signed_again_by_another_key(signed, signers, audit):
    access.sign_model(signed, private_key=signers["theirs"].private)
    rejected(signed, audit, "not what was signed", verify_key=signers["ours"].public)
    assert access.read_model(signed, verify_key=signers["theirs"].public)


@settings(max_examples=10)
@given(st.integers(0, 4999), st.integers(0, 7))
def test_a_flipped_bit(tmp_path_factory, signers, byte, bit):
    folder = tmp_path_factory.mktemp("flip")
    path, audit = model_at(folder), Audit(folder / "log")
    access.sign_model(path, private_key=signers["ours"].private)
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)
    rejected(path, audit, "not what was signed", verify_key=signers["ours"].public)


@pytest.mark.parametrize("to", ["resnet/3", "mlp/2"])
def test_renamed(signed, signers, audit, to):
    """An old version is no new one, and one model no other, though nothing in the file changed."""
    moved = signed.parents[2] / to
    shutil.copytree(signed.parent, moved)
    label = to.replace("/", "@")
    rejected(
        moved / "model.onnx", audit, f"signed as 'resnet@2', but lies here as '{label}'",
        verify_key=signers["ours"].public,
    )  # fmt: skip


def test_a_link_is_named_by_where_it_lies(signed, signers, audit):
    other = signed.parents[2] / "mlp" / "1" / "model.onnx"
    other.parent.mkdir(parents=True)
    for name in ("model.onnx", "model.onnx.sig"):
        os.symlink(signed.with_name(name), other.with_name(name))
    rejected(other, audit, "lies here as 'mlp@1'", verify_key=signers["ours"].public)


def test_a_linked_folder_of_the_right_name_is_read(signed, signers, tmp_path):
    """Kubernetes mounts files as links."""
    there = tmp_path / "mounted" / "resnet" / "2"
    there.mkdir(parents=True)
    for name in ("model.onnx", "model.onnx.sig"):
        os.symlink(signed.with_name(name), there / name)
    assert access.read_model(there / "model.onnx", verify_key=signers["ours"].public)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "{}",
        lambda text: "[" * 100_000,
        lambda text: text.replace("ey", "ez", 1),
        lambda text: text * 1000,
    ],
)
def test_a_damaged_signature(signed, signers, audit, change):
    signature = signed.with_name("model.onnx.sig")
    signature.write_text(change(signature.read_text()))
    rejected(signed, audit, "sig", verify_key=signers["ours"].public)


def test_the_signature_of_another_model(signed, signers, audit, tmp_path):
    other = model_at(tmp_path / "other", b"other")
    signature = access.sign_model(other, private_key=signers["ours"].private)
    shutil.copy(signature, signed.with_name("model.onnx.sig"))
    rejected(signed, audit, "not what was signed", verify_key=signers["ours"].public)


def test_bytes_that_are_swapped_after_they_were_read_gain_nothing(signed, signers, monkeypatch):
    """What is returned is what was verified, even if the file is a good one by then."""
    good, evil = signed.read_bytes(), b"evil" * 1250
    verify = transfer.verify_signature

    def swap_then_verify(path, **rest):
        signed.write_bytes(good)
        verify(path, **rest)

    monkeypatch.setattr(transfer, "verify_signature", swap_then_verify)
    signed.write_bytes(evil)
    with pytest.raises(IntegrityError, match="changed while it was read"):
        access.read_model(signed, verify_key=signers["ours"].public)


def test_a_signature_that_is_swapped_meanwhile_gains_nothing(signed, signers, monkeypatch):
    """What was signed is read from the very bytes that were verified.

    An attacker puts their own file and a statement about it there, and the good ones back before
    the signature is verified.
    """
    signature = signed.with_name("model.onnx.sig")
    good, good_signature = signed.read_bytes(), signature.read_text()
    evil = b"evil" * 1250
    bundle = json.loads(good_signature)
    envelope = bundle["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["predicate"]["resources"][0]["digest"] = hashlib.sha256(evil).hexdigest()
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    verify = transfer.verify_signature

    def put_back_then_verify(path, **rest):
        signed.write_bytes(good)
        signature.write_text(good_signature)
        verify(path, **rest)

    monkeypatch.setattr(transfer, "verify_signature", put_back_then_verify)
    signed.write_bytes(evil)
    signature.write_text(json.dumps(bundle))
    with pytest.raises(IntegrityError, match="not what was signed"):
        access.read_model(signed, verify_key=signers["ours"].public)


def test_a_public_key_that_is_none_stops_it(signed, audit, tmp_path):
    with pytest.raises(ValueError, match="is no public key"):
        access.read_model(signed, verify_key=tmp_path / "missing.pub", audit=audit)
    assert lines(audit)[-1]["event"] == "model refused"


def test_other_tools_read_the_signature(signed, signers):
    """It is an OpenSSF signature like any other."""
    made = subprocess.run(
        [sys.executable, "-m", "model_signing", "verify", "key", str(signed), "--signature",
         str(signed.with_name("model.onnx.sig")), "--public_key", str(signers["ours"].public)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr


def test_signing_nothing_says_so(tmp_path, signers):
    with pytest.raises(ValueError, match="is not a file; give the path of a model"):
        access.sign_model(tmp_path / "missing", private_key=signers["ours"].private)
    with pytest.raises(ValueError, match="is not a file; give the path of a model"):
        access.read_model(tmp_path / "missing")


# Sealed models


@pytest.mark.parametrize("size", [0, 1, 5000, 2**20, 2**20 + 1])
def test_a_sealed_model_is_opened_in_memory_only(tmp_path, audit, size, monkeypatch):
    data = random.Random(1).randbytes(size)
    path = model_at(tmp_path, data)
    seal(path)
    assert size < 100 or data not in path.read_bytes()  # few bytes may be there by chance

    def no_writing(*arguments, **settings):
        mode = arguments[1] if len(arguments) > 1 else settings.get("mode", "r")
        assert "w" not in mode
        return opened(*arguments, **settings)

    opened = open
    monkeypatch.setattr("builtins.open", no_writing)
    assert access.read_model(path, decryption_key=SEALING_KEY, audit=audit) == data
    assert os.listdir(path.parent) == ["model.onnx"]
    assert lines(audit)[0]["sealed"]


def test_it_opens_what_unseal_opens(tmp_path):
    words = transfer.passphrase("correct horse battery", cost=10)
    path = model_at(tmp_path, b"weights")
    sealed = path.with_name("sealed.onnx")
    transfer.seal(path, sealed, key=words, name="resnet", version="2", progress=False)
    assert access.read_model(sealed, decryption_key=words) == b"weights"


def test_a_sealed_file_may_not_ask_for_more_memory_than_its_passphrase_allows(tmp_path, audit):
    path = model_at(tmp_path)
    sealed = path.with_name("sealed.onnx")
    high, low = (transfer.passphrase("correct horse battery", cost=cost) for cost in (12, 11))
    transfer.seal(path, sealed, key=high, name="resnet", version="2", progress=False)
    rejected(sealed, audit, "cost", decryption_key=low)
    assert access.read_model(sealed, decryption_key=high) == path.read_bytes()


def test_sealed_without_the_key_with_another_and_under_another_name(tmp_path, audit):
    path = model_at(tmp_path)
    seal(path)
    rejected(path, audit, "is sealed; give the key")
    rejected(
        path, audit, "cannot be opened as 'resnet', version '2'", decryption_key=Key(bytes(32))
    )
    words = transfer.passphrase("correct horse battery", cost=10)
    rejected(path, audit, "give the other kind of key", decryption_key=words)
    moved = path.parents[1] / "3" / "model.onnx"
    moved.parent.mkdir()
    path.rename(moved)
    rejected(moved, audit, "cannot be opened as 'resnet', version '3'", decryption_key=SEALING_KEY)


def test_a_plain_file_in_place_of_a_sealed_one(tmp_path, audit):
    path = model_at(tmp_path)
    rejected(path, audit, "is not sealed", decryption_key=SEALING_KEY)
    path.write_bytes(access.sealing._MAGIC)
    rejected(path, audit, "its header is another", decryption_key=SEALING_KEY)


@settings(max_examples=30)
@given(st.integers(0, 2**16), st.integers(0, 7))
def test_a_flipped_bit_of_a_sealed_file(tmp_path_factory, byte, bit):
    folder = tmp_path_factory.mktemp("sealed")
    path, audit = model_at(folder, bytes(200)), Audit(folder / "log")
    seal(path)
    data = bytearray(path.read_bytes())
    data[byte % len(data)] ^= 1 << bit
    path.write_bytes(data)
    rejected(path, audit, "sealed|cannot be opened", decryption_key=SEALING_KEY)


def test_sealed_and_signed(tmp_path, signers, audit):
    path = model_at(tmp_path, b"weights")
    seal(path)
    access.sign_model(path, private_key=signers["ours"].private)
    both = {"verify_key": signers["ours"].public, "decryption_key": SEALING_KEY}
    assert access.read_model(path, audit=audit, **both) == b"weights"
    seal(path)  # by someone who has the key of the seal, but not that of the signature
    rejected(path, audit, "not what was signed", **both)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("models/resnet/2/model.onnx", ("resnet", "2")),
        ("resnet.onnx", ("resnet", "1")),
        ("2/model.onnx", None),  # named by the folder above, whatever that is
        ("models/resnet/v2/model.onnx", ("model", "1")),
        ("/2/model.onnx", ("model", "1")),
    ],
)
def test_identity(tmp_path, monkeypatch, path, found):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert access.identity(path) == (found or ("here", "2"))


# TLS


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "127.0.0.1") -> str:
    """The version that both agree on; what fails is raised."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            plain, _ = listener.accept()
            with plain:
                plain.settimeout(10)
                try:
                    with server.wrap_socket(plain, server_side=True) as connection:
                        connection.recv(1)
                except OSError:
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=10) as plain,
                client.wrap_socket(plain, server_hostname=name) as connection,
            ):
                return connection.version()
        finally:
            thread.join()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return access.self_signed(tmp_path_factory.mktemp("tls"))


def test_a_client_that_knows_the_certificate_speaks_tls(certificate):
    server = access.tls_context(*certificate)
    client = ssl.create_default_context(cafile=certificate[0])
    assert handshake(server, client) == "TLSv1.3"
    assert handshake(server, client, "localhost") == "TLSv1.3"
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert handshake(server, client) == "TLSv1.2"
    assert stat.S_IMODE(certificate[1].stat().st_mode) == 0o600


def test_strangers_and_other_names_are_not_trusted(certificate):
    server = access.tls_context(*certificate)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, ssl.create_default_context())
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, ssl.create_default_context(cafile=certificate[0]), "example.org")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_old_versions_and_weak_ciphers_are_refused(certificate):
    server = access.tls_context(*certificate)
    old = ssl.create_default_context(cafile=certificate[0])
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    weak = ssl.create_default_context(cafile=certificate[0])
    weak.maximum_version = ssl.TLSVersion.TLSv1_2
    weak.set_ciphers("AES128-SHA")  # no forward secrecy
    for client in (old, weak):
        with pytest.raises(ssl.SSLError):
            handshake(server, client)
    assert server.minimum_version == ssl.TLSVersion.TLSv1_2
    old_names = [c["name"] for c in server.get_ciphers() if not c["name"].startswith("TLS_")]
    assert old_names
    assert all(name.startswith("ECDHE-") and ("GCM" in name or "CHACHA" in name)
               for name in old_names)  # fmt: skip


def test_certificate_mistakes(certificate, tmp_path):
    with pytest.raises(ValueError, match="are no certificate and its key"):
        access.tls_context(tmp_path / "missing.crt", certificate[1])
    other = access.self_signed(tmp_path)
    with pytest.raises(ValueError, match="are no certificate and its key"):
        access.tls_context(certificate[0], other[1])
    with pytest.raises(ValueError, match="exists"):
        access.self_signed(tmp_path)
    with pytest.raises(ValueError, match="days is 0; give 1 or more"):
        access.self_signed(tmp_path, days=0)


def test_the_room_for_access_needs_no_torch():
    """A machine that serves ONNX files has none."""
    code = (
        "import sys; sys.modules['torch'] = None; from workbench.deploy import access; "
        "print(access.SCOPES)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
