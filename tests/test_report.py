"""Prose, table and page made from a frame."""

import os
import sys
import types
from html.parser import HTMLParser

import frames
import numpy as np
import pandas as pd
import pytest

from workbench.explore import report

FRAME = frames.frame()


def test_say_fills_in_a_row():
    prose = report.say("{name}: {speedup:.1f} times, {size_bytes:,} bytes", FRAME.iloc[3])
    assert repr(prose) == prose._repr_markdown_() == "int8 static: 5.5 times, 731,220 bytes"


def test_say_takes_a_frame_of_one_row_as_that_row():
    assert str(report.say("{name}", FRAME[3:4])) == "int8 static"


def test_say_fills_in_candidates_of_a_frame_by_name():
    prose = report.say("{fp32[score]:.1%} and {int8 static[score]:.1%}", FRAME)
    assert str(prose) == "93.6% and 93.5%"


def test_say_takes_further_values():
    assert str(report.say("{name}, {bits} bits", FRAME.iloc[0], bits=4)) == "fp32, 4 bits"
    assert str(report.say("{bits} bits", bits=4)) == "4 bits"


@pytest.mark.parametrize("missing", [float("nan"), np.float32("nan"), None, pd.NA])
def test_say_calls_what_is_not_known_unknown(missing):
    assert str(report.say("{x:.1f} ms", x=missing)) == "unknown ms"


@pytest.mark.parametrize("template", ["{speed}", "{}", "{name.first}", "{0}"])
def test_say_lists_what_is_known_when_a_field_is_not(template):
    with pytest.raises(ValueError, match=r"the template has no value for .*; known are 'name'"):
        report.say(template, FRAME.iloc[0])


def test_say_lists_candidates_and_columns_of_a_frame():
    with pytest.raises(ValueError, match=r"known are 'fp32', .*\[speedup\]"):
        report.say("{fp16[speedup]}", FRAME)


def test_say_names_the_value_that_has_another_type():
    with pytest.raises(ValueError, match=r"'fp32' cannot be written as '.1f'"):
        report.say("{name:.1f}", FRAME.iloc[0])


def test_table_has_a_row_for_every_candidate_in_the_words_of_a_reader():
    rows = report.table(FRAME)
    assert rows.loc["int8 static"].to_dict() == {
        "technique": "int8 static per channel",
        "runtime": "onnxruntime",
        "kind": "real",
        "size (kB)": "731",
        "times smaller": "3.78",
        "accuracy (%)": "93.5 (93.0 to 94.0)",
        "latency (ms)": "0.74 (0.703 to 0.784)",
        "speed-up": "5.54 (5.26 to 5.82)",
        "verdict": "5.5 times faster",
        "remarks": "",
    }
    assert rows.loc["4 bits", "kind"] == "simulated"
    assert rows.loc["broken", "remarks"] == "layer <conv1> cannot be quantized"
    assert rows.loc["broken", "size (kB)"] == "unknown"


def test_table_without_times_is_the_same_when_only_times_differ():
    other = FRAME.copy()
    for column in other.columns[other.columns.str.contains("latency|speedup")]:
        other[column] *= 1.2
    other["verdict"] = "slower"
    pd.testing.assert_frame_equal(
        report.table(FRAME, timing=False), report.table(other, timing=False)
    )
    assert "verdict" in report.table(FRAME)


def test_table_has_remarks_only_where_there_are_some():
    assert "remarks" not in report.table(FRAME[:7])


def test_table_of_a_metric_that_is_no_proportion():
    cell = report.table(frames.bits_frame()).loc["4 bits", "bits per character (lower is better)"]
    assert cell == "2.210 (2.200 to 2.220)"


class Page(HTMLParser):
    """Collects tags and text, and checks that every element is closed in order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.addresses = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page():
    frame = FRAME.copy()
    frame.loc[0, "name"] = "<b>fp32</b>"
    return report.html(frame, title="A & <B>", hardware={"cores": 2})


def test_page_is_whole_and_well_formed(page):
    assert page.startswith("<!DOCTYPE html>\n<html lang=")
    parsed = Page(page)
    assert parsed.tags.count("img") == 1
    assert parsed.tags.count("tr") == 1 + len(FRAME)


def test_page_needs_no_network(page):
    parsed = Page(page)
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    assert "http" not in page


def test_page_escapes_what_the_user_wrote(page):
    assert "<title>A &amp; &lt;B&gt;</title>" in page
    assert "<b>fp32</b>" not in page
    assert "<b>fp32</b>" in Page(page).text
    assert "layer &lt;conv1&gt; cannot" in page


def test_page_tells_findings_hardware_and_versions(page):
    text = Page(page).text
    assert (
        "The fastest: int8 per tensor (722 kB, accuracy 93.3%, 0.73 ms, 5.6 times faster)." in text
    )
    assert "cores: 2" in text
    assert "torch 2." in text


def test_a_card_that_draws_itself_is_shown_as_it_is():
    card = types.SimpleNamespace(_repr_html_=lambda: "<p id='card'>2 cores</p>")
    assert "<p id='card'>2 cores</p>" in report.html(FRAME[:2], hardware=card)


def test_write_html_writes_the_page_and_makes_its_folder(tmp_path):
    path = report.write_html(FRAME[:2], tmp_path / "build" / "report.html", title="mine")
    assert "<title>mine</title>" in path.read_text()
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_write_html_leaves_the_old_page_when_it_cannot_finish(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        report.write_html(FRAME[:2], path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_program_writes_the_main_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "main_comparison", lambda: FRAME[:2])
    measure = types.ModuleType("workbench.measure")
    measure.hardware = lambda: {"cores": 2}
    monkeypatch.setitem(sys.modules, "workbench.measure", measure)
    monkeypatch.setattr("workbench.measure", measure, raising=False)
    report.main(["--output", str(tmp_path / "page.html")])
    assert "cores: 2" in (tmp_path / "page.html").read_text()
    assert capsys.readouterr().out == f"wrote {tmp_path / 'page.html'}\n"
