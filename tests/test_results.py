"""The figures of the README, held against their records, and those against their checksums."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from workbench import data, models
from workbench.explore import blocks, results

ROOT = Path(__file__).parents[1]
NAMES = ["comparison", "headline"]


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
@pytest.mark.parametrize("name", NAMES)
def test_pages_show_what_was_recorded(name, page):
    assert blocks.read(ROOT / page, name) == results.table(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_figure_is_refused(name, tmp_path, monkeypatch):
    shutil.copytree(data.folder() / "results", tmp_path / "results")
    shutil.copy(data.folder() / "SHA256SUMS", tmp_path)
    monkeypatch.setattr(data, "folder", lambda: tmp_path)
    assert len(results.read(name))
    path = tmp_path / "results" / f"{name}.json"
    figure = re.search(r'"size_bytes": \d*(\d)', path.read_text())
    other = str((int(figure[1]) + 1) % 10)
    text = path.read_text()
    path.write_text(text[: figure.start(1)] + other + text[figure.end(1) :])
    with pytest.raises(ValueError, match="altered: sha256"):
        results.read(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_record_says_how_it_was_made(name):
    made = results.read(name).attrs
    assert set(made) == {"question", "seed", "machine", "versions", "date"}
    assert made["versions"]["torch"].startswith("2.")
    assert made["machine"]["logical_cores"] >= 1
    assert made["question"].endswith("?")


def test_the_headline_keeps_its_promise():
    frame = results.read("headline")
    assert frame["error"].eq("").all()
    for network, rows in frame.groupby("network", sort=False):
        rows = rows.set_index("role")
        assert list(rows.index) == ["dense", "smallest", "fastest", "peer"], network
        assert not rows.loc["fastest", "simulated"]
        dense = rows.loc["dense"]
        for role in ("smallest", "fastest"):
            chosen = rows.loc[role]
            lost = abs(dense.score - chosen.score)
            if dense.metric != "accuracy":
                lost /= dense.score
            # It was chosen on other examples: on these, it may lose what their number allows.
            assert lost <= results.LOSS + (chosen.score_high - chosen.score_low) / 2, (
                network,
                role,
            )


def test_the_headline_starts_from_the_networks_as_they_were_trained():
    dense = results.read("headline").query("role == 'dense'").set_index("network")
    for name in models.names():
        made = models.record(name)
        assert dense.metric[name] == made["metric"]
        assert dense.score[name] == pytest.approx(made["test"], abs=0.0005), name


def test_a_network_is_measured_beside_its_peer(monkeypatch):
    pytest.importorskip("nncf")
    task = results._few(data.fashion_mnist(), 100)
    monkeypatch.setattr(results, "_task", lambda name, model: task)
    frame = results.headline(["lenet-300-100"], progress=False)
    assert list(frame["role"]) == ["dense", "smallest", "fastest", "peer"]
    assert frame["name"].iloc[0] == "float32"
    assert frame["size_bytes"].iloc[1] == frame["size_bytes"].min()
    table = results.headline_table(frame).splitlines()
    assert len(table) == 3
    assert {line.count("|") for line in table} == {8}
    assert f"{frame['size_bytes'].iloc[1] / 1e3:,.0f}" in table[2]
    assert "published: 40 times smaller" in table[2]
    assert ("simulated" in table[2]) == frame["simulated"].iloc[1]


def test_what_the_readme_says_of_simulated_models_holds():
    frame = results.read("headline")
    assert (frame["speedup"][frame["simulated"]] < 1).all()
    assert results.headline_table(frame).count("simulated") == frame["simulated"].sum() > 0


def test_keep_and_read_return_the_same_frame(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "folder", lambda: tmp_path)
    frame = pd.DataFrame({"name": ["a", "b"], "latency_ms": [1 / 3, None], "fits": [True, False]})
    results.keep("some", frame, question="Is it kept?")
    pd.testing.assert_frame_equal(results.read("some"), frame, check_dtype=False)
    assert json.loads((tmp_path / "results" / "some.json").read_text())["seed"] == results.SEED
