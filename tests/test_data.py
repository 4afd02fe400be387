import gzip
import lzma
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, TensorDataset

from workbench import data

LABELS = "fashion-mnist/t10k-labels-idx1-ubyte.gz"  # the smallest file


@pytest.fixture(scope="module")
def fashion() -> data.Task:
    return data.fashion_mnist()


@pytest.fixture(scope="module")
def austen() -> data.Task:
    return data.austen()


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A data folder of our own, with the checksums and one small file."""
    (tmp_path / LABELS).parent.mkdir()
    for name in ("SHA256SUMS", LABELS):
        shutil.copy(data.folder() / name, tmp_path / name)
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    return tmp_path


# Files


def test_untouched_file_passes(copied):
    assert data.verified(LABELS) == copied / LABELS


def test_missing_file_is_named_with_its_remedy(copied):
    (copied / LABELS).unlink()
    with pytest.raises(FileNotFoundError, match=f"(?s){LABELS}.*missing.*git checkout"):
        data.verified(LABELS)


def test_truncated_file_is_refused(copied):
    path = copied / LABELS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{LABELS}.*truncated or altered.*git checkout"):
        data.verified(LABELS)


def test_one_flipped_bit_is_refused(copied):
    path = copied / LABELS
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="truncated or altered"):
        data.verified(LABELS)


def test_file_without_a_checksum_is_refused(copied):
    (copied / "foreign.bin").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"no line for foreign\.bin"):
        data.verified("foreign.bin")


@pytest.mark.parametrize("load", [data.fashion_mnist, data.austen])
def test_data_sets_read_verified_files_only(copied, load):
    with pytest.raises(FileNotFoundError, match="git checkout"):
        load()


def test_checksums_cover_every_data_file():
    lines = (data.folder() / "SHA256SUMS").read_text().splitlines()
    listed = {line.split(maxsplit=1)[1] for line in lines}
    present = {
        path.relative_to(data.folder()).as_posix()
        for path in data.folder().rglob("*.*")
        if path.suffix in {".gz", ".xz", ".safetensors", ".json", ".csv", ".jpg"}
    }
    assert present == listed


# Fashion-MNIST


def test_fashion_sizes_and_range(fashion):
    assert [len(s) for s in (fashion.train, fashion.validation, fashion.test)] == [
        55_000, 5_000, 10_000,
    ]  # fmt: skip
    (images,), labels = next(fashion.train.batches(1000))
    assert images.shape == (1000, 1, 28, 28)
    assert (images.min(), images.max()) == (0, 1)
    assert labels.dtype == torch.int64
    assert len(fashion.labels) == 10


def test_fashion_classes_are_balanced(fashion):
    test_labels = fashion.test.source.tensors[1]
    assert torch.equal(test_labels.bincount(), torch.full((10,), 1000))
    both = torch.cat([s.source.tensors[1] for s in (fashion.train, fashion.validation)])
    assert torch.equal(both.bincount(), torch.full((10,), 6000))


def test_fashion_labels_are_those_of_the_file(fashion):
    raw = gzip.decompress((data.folder() / LABELS).read_bytes())  # 8 bytes of header
    assert fashion.test.source.tensors[1].tolist() == list(raw[8:])


def test_fashion_pixels_are_those_of_the_file(fashion):
    path = data.folder() / "fashion-mnist/t10k-images-idx3-ubyte.gz"
    last = gzip.decompress(path.read_bytes())[-28 * 28 :]
    image = fashion.test.source.tensors[0][-1]
    assert (image * 255).round().flatten().tolist() == list(last)


# Austen


def read(task: data.Task, codes: torch.Tensor) -> str:
    return "".join(task.labels[code] for code in codes.flatten().tolist())


def test_austen_target_is_the_input_one_character_later(austen):
    (codes,), target = next(austen.train.batches(10))
    assert codes.shape == target.shape == (10, 128)
    assert torch.equal(codes[:, 1:], target[:, :-1])


def test_austen_starts_where_each_novel_starts(austen):
    for split, heading in (
        (austen.train, "SENSE AND SENSIBILITY"),
        (austen.validation, "NORTHANGER ABBEY"),
        (austen.test, "Persuasion"),
    ):
        (codes,), _ = next(split.batches(1))
        assert read(austen, codes).startswith(heading)


def test_austen_splits_share_no_window(austen):
    def distinct(split: data.Split) -> set[bytes]:
        return {window.numpy().tobytes() for window in split.source.tensors[0]}

    train, validation, test = map(distinct, (austen.train, austen.validation, austen.test))
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_austen_training_ends_before_the_held_out_novels(austen):
    text = read(austen, austen.train.source.tensors[0][::2])  # every second: no overlap
    assert "Catherine Morland" not in text  # of Northanger Abbey
    assert "Anne Elliot" not in text  # of Persuasion
    assert "Harriet Smith" in text  # of Emma, the last one trained on


def test_austen_counts_each_held_out_character_once(austen):
    targets = austen.test.source.tensors[1]
    counted = targets != data.IGNORED
    assert not counted[:, :64].any()
    assert counted[:, 64:].all()
    scored = read(austen, targets[:, 64:])
    text = lzma.decompress((data.folder() / "austen.txt.xz").read_bytes()).decode()
    novel = text[text.index("Persuasion\n\n\nby") :]
    assert scored == novel[65 : 65 + len(scored)]
    assert len(novel) - len(scored) <= 65 + 64  # the first half window, and what fills no window


def test_austen_context_sets_the_window(austen):
    assert data.austen(context=32).example_input[0].shape == (1, 32)


# A task of one's own

X, Y = torch.arange(40.0).reshape(20, 2), torch.arange(20) % 3


class Pairs(Dataset):
    """Items ((input, input), target), as many data sets give them."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int):
        return (X[index], X[index] * 2), Y[index]


def batches():
    yield X[:12], Y[:12]
    yield X[12:], Y[12:]


def everything(split: data.Split) -> tuple[list[torch.Tensor], torch.Tensor]:
    inputs, targets = zip(*split.batches(6), strict=True)
    return [torch.cat(column) for column in zip(*inputs, strict=True)], torch.cat(targets)


@pytest.mark.parametrize(
    "source",
    [(X, Y), [X, Y], TensorDataset(X, Y), DataLoader(TensorDataset(X, Y), 7), batches],
    ids=["tuple", "list", "dataset", "loader", "callable"],
)
def test_every_kind_of_source_gives_the_same_examples(source):
    mine = data.task(train=source, validation=source, test=source)
    for split in (mine.train, mine.validation, mine.test):
        (x,), y = everything(split)
        assert torch.equal(x, X)
        assert torch.equal(y, Y)
    assert mine.example_input[0].shape == (1, 2)


@pytest.mark.parametrize(
    "source", [(X, X * 2, Y), TensorDataset(X, X * 2, Y), Pairs()], ids=["tuple", "flat", "nested"]
)
def test_several_inputs(source):
    mine = data.task(train=source, test=source)
    (first, second), y = everything(mine.test)
    assert torch.equal(second, first * 2)
    assert torch.equal(y, Y)
    assert [x.shape for x in mine.example_input] == [(1, 2), (1, 2)]


def test_a_tenth_is_held_out_and_nothing_is_lost():
    mine = data.task(train=(X, Y), test=(X, Y))
    assert (len(mine.train), len(mine.validation)) == (18, 2)
    kept, held_out = everything(mine.train)[0][0], everything(mine.validation)[0][0]
    assert torch.cat([kept, held_out])[:, 0].sort().values.tolist() == X[:, 0].tolist()


def test_held_out_examples_depend_on_the_seed_only():
    def held_out(seed: int) -> list[float]:
        mine = data.task(train=(X, Y), test=(X, Y), seed=seed)
        return mine.validation.source.tensors[0][:, 0].tolist()

    assert held_out(0) == held_out(0)
    assert held_out(0) != held_out(1)


@given(count=st.integers(1, 30), batch_size=st.integers(1, 40), shuffle=st.booleans())
def test_a_pass_gives_each_example_once(count, batch_size, shuffle):
    split = data.Split(TensorDataset(torch.arange(count), torch.arange(count)))
    seen = [y for _, y in split.batches(batch_size, shuffle=shuffle, seed=1)]
    assert sorted(torch.cat(seen).tolist()) == list(range(count))
    assert len(seen) == split.count_batches(batch_size)
    assert all(len(y) == batch_size for y in seen[:-1])


@pytest.mark.parametrize("source", [TensorDataset(X, Y), Pairs()], ids=["tensors", "items"])
def test_order_depends_on_the_seed_only(source):
    def order(seed: int) -> list[float]:
        split = data.Split(source)
        return [v for (x, *_), _ in split.batches(5, shuffle=True, seed=seed) for v in x[:, 0]]

    assert order(3) == order(3)
    assert order(3) != order(4)


def test_callable_is_read_once_to_count_its_batches():
    assert data.Split(batches).count_batches(1) == 2


def test_subset_is_part_of_the_split_and_repeats():
    split = data.task(train=(X, Y), test=(X, Y)).test
    chosen = split.subset(8, seed=1).source.tensors[0][:, 0]
    assert len(set(chosen.tolist())) == 8
    assert set(chosen.tolist()) <= set(X[:, 0].tolist())
    assert torch.equal(chosen, split.subset(8, seed=1).source.tensors[0][:, 0])


@pytest.mark.parametrize("count", [0, 21])
def test_subset_of_impossible_size(count):
    with pytest.raises(ValueError, match=f"count is {count}.*1 to 20"):
        data.task(train=(X, Y), test=(X, Y)).test.subset(count)


@pytest.mark.parametrize("source", [3, "images", None, {"x": X}, [(X, Y)], []])
def test_unknown_kind_of_source(source):
    with pytest.raises(TypeError, match=r"train is a .*; give a tuple of tensors, a Dataset"):
        data.task(train=source, test=(X, Y))


@pytest.mark.parametrize("tensors", [(X,), (X, Y[:5])])
def test_tensors_that_do_not_match(tensors):
    with pytest.raises(ValueError, match="test has tensors of lengths"):
        data.task(train=(X, Y), test=tensors)


def test_empty_split():
    with pytest.raises(ValueError, match="train is empty"):
        data.task(train=(X[:0], Y[:0]), test=(X, Y))


@pytest.mark.parametrize(
    "train", [DataLoader(TensorDataset(X, Y)), batches, (X[:1], Y[:1])], ids=["loader", "call", "1"]
)
def test_no_validation_can_be_held_out(train):
    with pytest.raises(ValueError, match="validation is missing"):
        data.task(train=train, test=(X, Y))


def test_batch_that_is_no_tuple():
    mine = data.task(train=lambda: [X], validation=(X, Y), test=(X, Y))
    with pytest.raises(TypeError, match="a batch is a Tensor; expected a tuple"):
        next(mine.train.batches())


# Metrics and augmentation


def test_correct_marks_the_largest_output():
    outputs = torch.tensor([[0.1, 0.9], [2.0, -1.0]])
    assert data.correct(outputs, torch.tensor([1, 1])).tolist() == [1.0, 0.0]


def test_uniform_guess_over_eight_symbols_costs_three_bits():
    targets = torch.randint(0, 8, (4, 10))
    targets[:, :5] = data.IGNORED
    assert data.bits(torch.zeros(4, 10, 8), targets).tolist() == pytest.approx([3.0] * 4)


def test_cross_entropy_is_that_of_torch_over_all_positions():
    outputs, targets = torch.randn(4, 5, 7), torch.randint(0, 7, (4, 5))
    expected = torch.nn.functional.cross_entropy(outputs.mT, targets)
    assert data.cross_entropy(outputs, targets).item() == pytest.approx(expected.item())


def test_flip_and_shift_gives_a_mirrored_or_moved_copy():
    image = torch.rand(1, 2, 6, 5)
    padded = torch.nn.functional.pad(image[0], [1] * 4)
    possible = [
        view
        for mirrored in (padded, padded.flip(-1))
        for row in range(3)
        for column in range(3)
        for view in [mirrored[:, row : row + 6, column : column + 5]]
    ]
    changed = data.flip_and_shift(
        image.expand(50, -1, -1, -1), torch.Generator().manual_seed(0), pixels=1
    )
    found = {next(i for i, view in enumerate(possible) if torch.equal(view, c)) for c in changed}
    assert len(found) > 9  # most of the 18 turn up among 50


def test_flip_and_shift_repeats_with_its_generator():
    images = torch.rand(8, 1, 9, 9)
    first, second = (
        data.flip_and_shift(images, torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_recorded_reads_what_an_experiment_measured():
    frame = data.recorded("pruning-lenet-300-100")
    assert set(frame.criterion) == {"none", "magnitude", "random"}
    assert frame.seed.nunique() == 3


def test_recorded_refuses_what_was_altered(tmp_path, monkeypatch):
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "mine.csv").write_text("score\n0.5\n")
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    data.write_checksums()
    assert data.recorded("mine").score.tolist() == [0.5]
    (folder / "mine.csv").write_text("score\n0.9\n")
    with pytest.raises(ValueError, match="truncated or altered"):
        data.recorded("mine")
    with pytest.raises(FileNotFoundError, match=r"other\.csv is missing"):
        data.recorded("other")


def test_checksums_cover_all_files_and_are_those_of_the_repository(tmp_path, monkeypatch):
    committed = (data.folder() / "SHA256SUMS").read_text()
    shutil.copytree(data.folder(), tmp_path / "data")
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path / "data"))
    data.write_checksums()
    assert (tmp_path / "data/SHA256SUMS").read_text() == committed


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    data.write_whole(path, lambda temporary: Path(temporary).write_text("old"))

    def broken(temporary):
        Path(temporary).write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        data.write_whole(path, broken)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
