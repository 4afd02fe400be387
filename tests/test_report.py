"""Prose and tables made from a frame, and the program that writes the page."""

import inspect

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


def test_the_program_writes_the_main_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "main_models", lambda: ("task", "recipe", {"fp32": 1, "int8": 2}))
    monkeypatch.setattr(report.measure, "compare", lambda *_: FRAME)
    given = {}
    monkeypatch.setattr(report.evidence, "gather", lambda *_, **settings: given.update(settings))
    monkeypatch.setattr(report, "html", lambda _: "<p>page</p>")
    path = tmp_path / "build" / "page.html"
    report.main(["--output", str(path)])
    assert path.read_text() == "<p>page</p>"
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    assert given["comparison"] is FRAME
    assert (given["recipe"], given["after"]) == ("recipe", "int8, ORT")
    assert capsys.readouterr().out == f"wrote {path}\n"


def test_the_page_shows_how_the_main_models_are_made():
    code = inspect.getsource(report.main_models)
    assert 'models.pretrained("resnet-14")' in code
    compile(code, "page", "exec")
