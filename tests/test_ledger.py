"""Every byte is accounted for once, and under the right name."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import scipy.stats
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from workbench import compress, data, storage
from workbench.storage import ledger, records, streams
from workbench.storage.ledger import KIND_COLUMNS
from workbench.storage.streams import Section, StreamError


def save(model, path, codec="huffman"):
    return storage.save(model, path, codec=codec, progress=False)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 30), nn.BatchNorm1d(30)).eval()


def compressed() -> nn.Module:
    model = compress.prune(network(), sparsity={"0": 0.8})
    return compress.share_weights(model, clusters={"0": 7})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=3),
        hnp.arrays(st.sampled_from(["f4", "i1", "u1", "f2"]), hnp.array_shapes(min_dims=0)),
        max_size=4,
    ),
    st.sampled_from(["plain", "run_length", "huffman", "rans"]),
)
def test_rows_add_up_to_the_file(tmp_path, arrays, codec):
    path = tmp_path / "m.safetensors"
    account = save({name: torch.from_numpy(a.copy()) for name, a in arrays.items()}, path, codec)
    frame = account.frame
    assert account.size_bytes == frame["size_bytes"].sum() == path.stat().st_size
    kinds = frame[list(KIND_COLUMNS.values())]
    assert (kinds.sum(axis=1) == frame["size_bytes"]).all()
    assert account.by_kind().sum() == account.size_bytes
    assert account.count == sum(array.size for array in arrays.values())
    assert set(frame["tensor"][:-1]) == set(arrays)
    shapes = dict(zip(frame["tensor"], frame["shape"], strict=True))
    assert all(shapes[name] == array.shape for name, array in arrays.items())


def test_kinds_are_those_of_what_is_stored(path):
    model = compressed()
    save(model, path)
    rows = storage.inspect(path).frame.set_index("tensor")
    row = rows.loc["0.weight"]
    assert (row["stored_as"], row["codec"], row["dtype"]) == ("shared", "huffman", "float32")
    assert (row["shape"], row["count"]) == ((40, 60), 2400)
    assert row["codebook_bytes"] == 7 * 4
    record = records.read(storage.Artifact(path).file["0.weight"].data)
    codes = {kind: 0 for kind in KIND_COLUMNS}
    for section in streams.sections(record.main.data):
        codes[section.kind] += len(section.data)
    assert row["values_bytes"] == codes["values"]
    assert row["code_table_bytes"] == codes["code table"]
    assert row["header_bytes"] == codes["header"] + record.head_bytes
    assert rows.loc["3.running_mean"]["stored_as"] == "plain"
    assert rows.loc["3.num_batches_tracked"]["dtype"] == "int64"


def test_scales_are_told_from_values(path):
    model = compress.quantize_weights(network(), bits=4, granularity="group", group_size=16)
    row = save(model, path).frame.set_index("tensor").loc["0.weight"]
    assert row["stored_as"] == "k-bit"
    assert 0 < row["scales_bytes"] <= 40 * 4 * 4
    affine = compress.quantize_weights(network(), bits=4, symmetric=False)
    row = save(affine, path).frame.set_index("tensor").loc["0.weight"]
    assert 0 < row["scales_bytes"] <= 40 * (4 + 1)


def test_roundings_count_no_weights(path):
    task = data.task(*[(torch.rand(8, 60), torch.randint(0, 3, (8,)))] * 3)
    account = save(compress.quantize_static(network(), task), path)
    rounding = account.frame[account.frame["stored_as"] == "rounding"]
    assert len(rounding) == 2
    assert (rounding["count"] == 0).all()
    assert (rounding["scales_bytes"] > 0).all()
    assert rounding["entropy_bits"].isna().all()
    assert not math.isnan(account.entropy_bits)
    assert save(compress.prune(network()), path).frame["stored_as"].isin(["masked"]).sum() == 2


@given(hnp.arrays("i1", st.integers(1, 60), elements=st.integers(-3, 3)))
def test_entropy_against_scipy(values):
    counts = np.unique(values, return_counts=True)[1]
    expected = scipy.stats.entropy(counts, base=2)
    for tensor in (torch.from_numpy(values), torch.from_numpy(values.astype("f4"))):
        assert ledger.entropy(tensor) == pytest.approx(expected, abs=1e-9)


def test_entropy_tells_values_by_their_bits():
    assert ledger.entropy(torch.tensor([0.0, -0.0])) == 1
    assert ledger.entropy(torch.tensor([1 + 0j, 1 + 0j, 2 + 0j, 2 + 0j])) == 1
    assert ledger.entropy(torch.empty(0)) == 0
    assert str(ledger.entropy(torch.zeros(5))) == "0.0"


def test_entropy_of_shared_weights_is_that_of_their_codes(path):
    model = compressed()
    account = save(model, path)
    codes = model[0].sources["weight"].codes()
    row = account.frame.set_index("tensor").loc["0.weight"]
    expected = scipy.stats.entropy(codes.unique(return_counts=True)[1].numpy(), base=2)
    assert row["entropy_bits"] == pytest.approx(expected)
    bits = 8 * row["size_bytes"] / 2400
    assert row["bits_per_weight"] == pytest.approx(bits)
    assert row["above_entropy_bits"] == pytest.approx(bits - expected)
    rows = account.frame[account.frame["count"] > 0]
    mean = np.average(rows["entropy_bits"], weights=rows["count"])
    assert account.entropy_bits == pytest.approx(mean)
    assert account.bits_per_weight == pytest.approx(8 * path.stat().st_size / account.count)


def test_inspecting_gives_what_saving_gave(path):
    account = save(compressed(), path)
    pd.testing.assert_frame_equal(storage.inspect(path, entropy=True).frame, account.frame)
    without = storage.inspect(path)
    assert without.frame["entropy_bits"].isna().all()
    assert math.isnan(without.entropy_bits)
    columns = ["tensor", "codec", "size_bytes", "bits_per_weight"]
    pd.testing.assert_frame_equal(without.frame[columns], account.frame[columns])


def test_a_plain_file(path):
    state = {"a": torch.randn(30, 20), "b": torch.zeros(7, dtype=torch.uint8)}
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    account = storage.inspect(path, entropy=True)
    assert account.size_bytes == path.stat().st_size
    rows = account.frame.set_index("tensor")
    assert rows.loc["a"]["values_bytes"] == 2400
    assert rows.loc["b"]["entropy_bits"] == 0
    assert (rows["codec"] == "").all()
    header = rows.loc["(header of model.safetensors)"]
    assert header["header_bytes"] == path.stat().st_size - 2407
    assert header["count"] == 0


def shards(folder, **changes):
    """A model in two shards, as Hugging Face has it; ``changes`` to the map of its tensors."""
    state = {"a": torch.randn(9, 9), "b": torch.randn(5), "c": torch.zeros(3)}
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    safetensors.torch.save_file({"a": state["a"]}, folder / names[0])
    safetensors.torch.save_file({"b": state["b"], "c": state["c"]}, folder / names[1])
    where = {"a": names[0], "b": names[1], "c": names[1]} | changes
    index = {"metadata": {"total_size": 356}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_sharded_folder(tmp_path):
    shards(tmp_path)
    account = storage.inspect(tmp_path, entropy=True)
    assert account.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert account.count == 81 + 5 + 3
    headers = account.frame["tensor"][account.frame["stored_as"] == ""]
    assert list(headers) == [
        "(header of model-00001-of-00002.safetensors)",
        "(header of model-00002-of-00002.safetensors)",
        "(header of model.safetensors.index.json)",
    ]


def test_folders_that_are_not_whole(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder without model"):
        storage.inspect(tmp_path)
    shards(tmp_path, d="model-00001-of-00002.safetensors")
    with pytest.raises(StreamError, match="differ about d"):
        storage.inspect(tmp_path)
    shards(tmp_path, d="model-00003.safetensors")
    with pytest.raises(FileNotFoundError, match="model-00003"):
        storage.inspect(tmp_path)
    shards(tmp_path, d="../secret.safetensors")
    with pytest.raises(StreamError, match="a shard outside the folder"):
        storage.inspect(tmp_path)
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(StreamError, match=r"index\.json is damaged"):
            storage.inspect(tmp_path)


def test_damage_is_refused_without_decoding(path):
    save(compressed(), path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(StreamError, match=r"tensor .*checksum"):
        storage.inspect(path)


def test_the_table_reads_well(path):
    account = save(compressed(), path)
    table = account.table()
    assert list(table.index) == [*account.frame["tensor"], "total"]
    assert table.loc["total", "all (B)"] == f"{path.stat().st_size:,}"
    assert table.loc["0.weight", "shape"] == "40 x 60"
    assert "positions (B)" not in table
    assert table.loc["0.weight", "codebook (B)"] == "28"
    assert table.loc["total", "codebook (B)"] == f"{account.by_kind()['codebook']:,}"
    text = repr(account)
    first = f"{path.stat().st_size:,} bytes, {account.bits_per_weight:.3f} bits a weight, entropy"
    assert text.startswith(first)
    assert "0.weight" in text
    assert "<table" in account._repr_html_()
    assert "entropy" not in repr(storage.inspect(path))


def test_a_row_of_known_sections():
    sections = [Section("values", b"12345"), Section("header", b"1"), Section("values", b"1")]
    row = ledger.row("w", sections, shape=(2, 4), entropy_bits=2.0)
    assert (row["values_bytes"], row["header_bytes"], row["size_bytes"]) == (6, 1, 7)
    assert (row["count"], row["bits_per_weight"], row["above_entropy_bits"]) == (8, 7.0, 5.0)
    assert ledger.row("scalar", sections, shape=())["count"] == 1


def test_an_empty_model(path):
    account = save({}, path)
    assert account.size_bytes == path.stat().st_size
    assert math.isnan(account.bits_per_weight)
    assert math.isnan(account.entropy_bits)
    assert storage.load(path) == {}
