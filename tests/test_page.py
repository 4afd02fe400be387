"""The page on a model: what it rests on, and that nothing in it comes from anywhere else."""

import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import frames as made_up
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from workbench import compress, data, measure, training
from workbench.explore import evidence, page, plots, report

NAME = "int8 </script><b>2 & 3"
STRIPES = ("rows", "columns", "flat")


def stripes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of 8 x 8 with three bright rows or columns at a place that varies, or with none."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (count,), generator=generator)
    x = 0.2 * torch.rand(count, 1, 8, 8, generator=generator)
    for image, kind, at in zip(
        x, y, torch.randint(0, 6, (count,), generator=generator), strict=False
    ):
        if kind < 2:
            image.movedim(1 + int(kind), 1)[:, at : at + 3] += 0.7
    return x, y


@pytest.fixture(scope="module")
def task() -> data.Task:
    train, test = stripes(600, 0), stripes(200, 1)
    return data.task(train=train, test=test, labels=STRIPES, name="stripes")


@pytest.fixture(scope="module")
def model(task) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 3)
    )
    training.fit(model, task, epochs=8, batch_size=20, progress=False)
    return model


RECIPE = compress.Recipe(compress.QuantizeStatic(samples=64))


@pytest.fixture(scope="module")
def models(task, model) -> dict:
    int8 = RECIPE(model, task, progress=False)
    four = compress.quantize_weights(model, bits=4)
    return {"float32": model, "4 bits": four, NAME: (int8, "onnxruntime")}


@pytest.fixture(scope="module")
def comparison(task, models) -> pd.DataFrame:
    return measure.compare(task, models, repeats=10, progress=False)


@pytest.fixture(scope="module")
def frames(task, models, comparison) -> evidence.Frames:
    return evidence.gather(
        task, models, comparison=comparison, recipe=RECIPE, examples=6, attacked=100, progress=False
    )


@pytest.fixture(scope="module")
def text(frames) -> str:
    return page.html(frames)


class Parsed(HTMLParser):
    """The page as a browser sees it: texts with the elements around them, attributes by element."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.elements = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        inside = [tag for tag, _ in self.open]
        if inside and not {"script", "style", "head"} & set(inside):
            if self.texts and self.texts[-1][0] is self.open[-1][1]:
                data = self.texts.pop()[2] + data
            self.texts.append((self.open[-1][1], inside, data))

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def untraced(text: str, frames: evidence.Frames) -> list[str]:
    """What a reader finds digits in, and no frame holds."""
    numbers, texts = set(), set()
    for frame in frames.values():
        for value in frame.to_numpy(dtype=object).ravel():
            if isinstance(value, str):
                texts.add(value)
            elif not pd.isna(value):
                numbers.add(float(value))
    found = []
    for attributes, inside, shown in Parsed(text).texts:
        if "cite" in inside or not re.search(r"\d", shown):
            continue
        if inside[-1] != "data":
            found += [] if shown in texts else [shown]
        elif float(attributes["value"]) not in numbers or not rounds(attributes["value"], shown):
            found.append(shown)
    return found


def rounds(value: str, shown: str) -> bool:
    """Whether a text is this value, rounded to the digits it has, in its unit."""
    number, unit = re.fullmatch(r"([-+]?[\d,.]+(?:e[-+]\d+)?)( kB| MB|%|)", shown).groups()
    scaled = float(value) * {" kB": 1e-3, " MB": 1e-6, "%": 100, "": 1}[unit]
    digits, _, power = number.replace(",", "").partition("e")
    last = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
    return abs(float(digits + (f"e{power}" if power else "")) - scaled) <= 0.5001 * last


def test_every_number_of_the_page_is_in_a_frame(text, frames):
    assert untraced(text, frames) == []
    assert sum(1 for _, inside, _ in Parsed(text).texts if inside[-1] == "data") > 150


def test_a_number_that_is_not_in_a_frame_is_noticed(text, frames):
    score = f"{frames['candidates']['score'][2]}"
    other = [
        text.replace("</h1>", " 7</h1>"),
        text.replace(f'value="{score}">', 'value="0.123">', 1),
        re.sub(rf'(value="{re.escape(score)}">)[\d.]+', r"\g<1>12.3", text, count=1),
        text.replace("4 layers", "5 layers").replace("2 of 2", "2 of 3"),
    ]
    assert [len(untraced(changed, frames)) > 0 for changed in other] == [True] * 4


def test_frames_come_back_from_the_page_to_the_last_bit(text, frames, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    again = report.read_page(path)
    assert list(again) == list(frames)
    for name, frame in frames.items():
        pd.testing.assert_frame_equal(again[name], frame, check_exact=True)
    assert page.html(again) == text


CELLS = st.one_of(st.none(), st.floats(allow_nan=False), st.just(math.inf))


@given(st.lists(CELLS), st.lists(st.text()), st.lists(st.integers(-(2**62), 2**62)))
def test_any_frame_comes_back(numbers, texts, counts):
    written = {
        "numbers": pd.DataFrame({"x": pd.Series(numbers, dtype="float64")}),
        "texts": pd.DataFrame({"<x>": pd.Series(texts, dtype="str")}),
        "counts": pd.DataFrame({"n": pd.Series(counts, dtype="int64"), "yes": True}),
    }
    text = evidence.to_json(written)
    assert "<" not in text
    json.loads(text, parse_constant=pytest.fail)
    for name, frame in evidence.from_json(text).items():
        pd.testing.assert_frame_equal(frame, written[name], check_exact=True)


def test_what_is_no_page_is_refused(tmp_path):
    path = tmp_path / "other.html"
    path.write_text("<p>hello</p>")
    with pytest.raises(ValueError, match=r"other\.html holds no frames; give a page"):
        report.read_page(path)
    with pytest.raises(ValueError, match="not frames of version 1; make the page again"):
        evidence.from_json('{"version": 2, "frames": {}}')


def test_the_page_is_valid_html(text):
    html5lib = pytest.importorskip("html5lib")
    html5lib.HTMLParser(strict=True).parse(text)
    parsed = Parsed(text)
    names = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert {link["href"][1:] for link in parsed.all("a")} <= set(names)
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_pictures_have_a_text_and_tables_have_headings(text):
    parsed = Parsed(text)
    assert len(parsed.all("img")) == 4
    assert all(len(image["alt"]) > 20 for image in parsed.all("img"))
    assert len(parsed.all("table")) == len(parsed.all("caption"))
    assert {heading["scope"] for heading in parsed.all("th")} == {"row", "col"}


def test_nothing_is_fetched_and_no_script_runs(text):
    parsed = Parsed(text)
    addresses = [v for _, a in parsed.elements for k, v in a.items() if k in ("src", "href")]
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert [script["type"] for script in parsed.all("script")] == ["application/json"]
    assert not {"link", "iframe", "object"} & {tag for tag, _ in parsed.elements}
    assert "default-src 'none'" in parsed.all("meta")[1]["content"]
    assert len(text.encode()) < 3_000_000


def test_what_the_user_wrote_is_escaped(text):
    assert NAME not in text
    assert [shown for _, _, shown in Parsed(text).texts if shown == NAME]


def contrast(first: str, second: str) -> float:
    """WCAG 2.2, contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        wide = colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
        parts = np.array([int(wide[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_colours_can_be_read_in_light_and_dark(text):
    assert contrast("#000", "#fff") == pytest.approx(21)
    found = re.findall(r"--(\w+): (#[0-9a-f]+)", text)
    for theme in (dict(found[:5]), dict(found[5:])):
        assert set(theme) == {"ink", "paper", "line", "link", "shade"}
        for ink, paper in (("ink", "paper"), ("link", "paper"), ("ink", "shade")):
            assert contrast(theme[ink], theme[paper]) >= 7
        assert contrast(theme["line"], theme["paper"]) >= 3


def test_summary_has_three_sentences_of_the_two_models(frames):
    rows = frames["candidates"].set_index("name")
    before, after = rows.loc["float32"], rows.loc[NAME]
    summary = " ".join(
        "".join(shown for _, _, shown in Parsed(page._summary(frames)).texts).split()
    )
    assert (
        f"The file of {NAME} takes {after.size_bytes / 1e3:.1f} kB, that of float32 "
        f"{before.size_bytes / 1e3:.1f} kB"
    ) in summary
    assert f"Its accuracy is {after.score:.1%} (95% interval {after.score_low:.1%} to" in summary
    assert f"in eager before: {after.verdict}." in summary
    assert "simulated" not in summary


def test_summary_says_where_chance_is_no_explanation_and_speed_is_simulated(frames):
    def changed(**cells) -> str:
        rows = frames["candidates"].copy()
        for column, value in cells.items():
            rows.loc[rows["name"] == NAME, column] = value
        return page._summary(frames | {"candidates": rows})

    assert "chance alone does not explain" in changed(p_value=0.01)
    assert "chance alone can explain" in changed(p_value=0.2)
    assert "chance" not in changed(p_value=math.nan)
    assert "this speed says nothing" in changed(simulated=True)
    assert "times smaller" in changed(compression_ratio=1.1)
    assert "times smaller" not in changed(compression_ratio=0.9)


def test_a_metric_that_is_no_proportion(frames):
    rows = made_up.bits_frame()
    about = frames["about"].assign(before="fp32", after="int8 dynamic")
    changed = frames | {"candidates": rows, "about": about}
    text = page._summary(changed) + page._tradeoff(changed)
    assert '<data value="1.96">1.96</data>' in text
    assert "bits per character" in text


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (950, "0.9 kB"), (99_940, "99.9 kB"), (123_456, "123 kB"), (9_999_000, "9,999 kB"),
        (12_345_678, "12.3 MB"), (4.5e9, "4,500.0 MB"),
    ],
)  # fmt: skip
def test_sizes_in_kilobytes_and_megabytes(size_bytes, shown):
    assert page._size(size_bytes) == shown
    assert rounds(str(size_bytes), shown)


def test_ledger_adds_up_and_agreement_is_that_of_the_answers(frames, task, models):
    kinds = frames["bytes"].set_index("kind")
    ledger = frames["ledger"].groupby("name")["size_bytes"].sum()
    assert kinds.loc["all"].tolist() == [ledger["float32"], ledger[NAME]]
    assert (kinds.drop("all").sum() == kinds.loc["all"]).all()
    row = frames["agreement"].iloc[0]
    assert row["fixed"] + row["broken"] + row["other"] == row["changed"]
    assert 1 - row["changed"] / row["answers"] == pytest.approx(row["agreement"])
    scores = frames["candidates"].set_index("name")["score"]
    gained = (row["fixed"] - row["broken"]) / row["answers"]
    assert gained == pytest.approx(scores[NAME] - scores["float32"])


def test_maps_of_the_model_after_are_more_alike_than_those_of_shuffled_weights(frames):
    means = frames["similarity"].set_index("model")
    assert means.loc["after", "spearman"] > 0.9
    assert means.loc["shuffled", "spearman"] < means.loc["after", "spearman"] - 0.3
    assert means.loc["shuffled", "cosine"] < means.loc["after", "cosine"] - 0.3
    maps = frames["maps"]
    assert list(maps["map"]) == list(evidence.MAPS) * 4
    rows = frames["explanations"]
    assert means.loc["after", "spearman"] == rows["spearman_after"].mean()
    assert means.loc["after", "spearman_lowest"] == rows["spearman_after"].min()


def test_maps_are_drawn_beside_their_example():
    values = np.array([[-1.0, 0.0, 1.0]])
    rows = [(name, kind, values) for name in ("cat", "dog") for kind in evidence.MAPS]
    axes = plots.maps(rows, columns=4).axes
    assert [one.get_title() for one in axes] == [*evidence.MAPS, "", "", "", ""]
    assert [one.get_ylabel() for one in axes[::4]] == ["cat", "dog"]
    assert [one.images[0].get_clim() for one in axes] == [(0, 1), *[(-1, 1)] * 3] * 2
    assert all(np.array_equal(one.images[0].get_array(), values) for one in axes)


def test_a_map_that_ignores_the_weights_is_called_so(frames):
    same = frames["similarity"].assign(spearman=0.9)
    assert "do not depend on what was learned" in page._explanations(frames | {"similarity": same})
    unknown = frames["similarity"].assign(spearman=math.nan)
    said = page._explanations(frames | {"similarity": unknown})
    assert "what was learned, and" not in said
    assert "do not depend" not in said


def test_the_attack_goes_down_and_is_none_without_a_step(frames):
    rows = frames["attacks"]
    own = rows[(rows["name"] == "float32") & (rows["against"] == "float32")]
    assert list(own["score"]) == sorted(own["score"], reverse=True)
    assert own["score"].iloc[0] > own["score"].iloc[-1] + 0.01
    assert list(own["epsilon"]) == [0.0, 0.01, 0.02, 0.05]
    assert set(frames["attacks"]["name"]) == {"float32", NAME}


VALUES = st.lists(st.floats(-100, 100, width=16), min_size=3, max_size=20).map(np.array)


@given(VALUES, st.integers(0, 99))
def test_similarity(values, seed):
    other = np.random.default_rng(seed).normal(size=len(values))
    found = evidence.similarity(values, other)
    assert found == pytest.approx(evidence.similarity(other, values), nan_ok=True)
    if np.ptp(values) == 0:
        assert math.isnan(found["spearman"])
    else:
        ranks = [stats.rankdata(x) for x in (values, other)]
        assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)
        same = evidence.similarity(values, 3 * values)
        assert same == pytest.approx({"spearman": 1, "cosine": 1})
        assert evidence.similarity(values, -values)["spearman"] == pytest.approx(-1)
    if np.any(values):
        expected = 1 - _cosine_distance(values, other)
        assert found["cosine"] == pytest.approx(expected, abs=1e-9)
    else:
        assert math.isnan(found["cosine"])


def _cosine_distance(first: np.ndarray, second: np.ndarray) -> float:
    from scipy.spatial.distance import cosine

    return float(cosine(first, second))


def test_shuffled_keeps_the_values_and_the_model(model):
    before = [parameter.clone() for parameter in model.parameters()]
    first, again, other = (evidence.shuffled(model, seed=seed) for seed in (0, 0, 1))
    for old, kept, new, same, else_ in zip(
        before, model.parameters(), first.parameters(), again.parameters(), other.parameters(),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(old, kept)
        assert torch.equal(new, same)
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)
        assert old.numel() < 9 or not (torch.equal(old, new) or torch.equal(new, else_))


def test_checksums_tell_data_and_models_apart(frames, task, model, tmp_path):
    facts = frames["provenance"].set_index("label")["text"]
    sums = [text for label, text in facts.items() if "sha256" in label]
    assert len(sums) == len(set(sums)) == 5
    assert all(re.fullmatch("[0-9a-f]{64}", text) for text in sums)
    other = stripes(200, 1)
    other[0][3, 0, 2, 2] += 1
    assert evidence._data_sha256(task.test) == facts["test data, sha256"]
    assert evidence._data_sha256(data.Split(data.TensorDataset(*other))) != sums[2]
    in_batches = data.Split(lambda: [other])
    assert "not known" in evidence._data_sha256(in_batches)


def test_the_code_of_the_page_makes_the_model_again(
    frames, text, task, model, tmp_path, monkeypatch
):
    path = tmp_path / "page.html"
    path.write_text(text)
    (code,) = frames["code"]["python"]
    given = {}
    monkeypatch.setattr(report, "page", lambda *a, **k: given.update(k, models=a[1], path=a[2]))
    exec(code, {"model": model, "task": task, "page": path})
    assert given["recipe"] == RECIPE
    assert list(given["models"]) == ["float32", NAME]
    facts = frames["provenance"].set_index("label")["text"]
    digest = evidence._saved(given["models"][NAME])[1]
    assert digest == facts["model after, sha256 of its plain .safetensors file"]


def test_without_a_recipe_the_code_says_which_models():
    code = evidence._code(["a", "b"], "a", "b", None)
    assert "task and models (a, b)" in code
    assert "recipe" not in code
    compile(code, "page", "exec")


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(20, 16), nn.Linear(16, 4)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(words).mean(1))


def test_what_cannot_be_found_out_is_left_out_with_its_reason(tmp_path):
    torch.manual_seed(0)
    x, y = torch.randint(0, 20, (40, 6)), torch.randint(0, 4, (40,))
    task, model = data.task(train=(x, y), test=(x, y)), Words()
    small = compress.quantize_weights(model, bits=8)
    models = {"float32": model, "int8": small}
    frame = measure.compare(task, models, repeats=10, progress=False)
    path = report.page(
        task, models, tmp_path / "new" / "page.html", comparison=frame, progress=False
    )
    again = report.read_page(path)
    reasons = again["left_out"].set_index("section")["reason"]
    assert "of floats, are explained" in reasons["What the answers rest on"]
    assert "is torch.int64; only floating point can change" in reasons["Under attack"]
    assert len(reasons) == 2
    assert untraced(path.read_text(), again) == []
    shown = [shown for _, _, shown in Parsed(path.read_text()).texts]
    assert set(reasons) <= set(shown)


def test_a_callable_has_answers_only(task, models, comparison):
    asked = {"float32": models["float32"], "service": models["float32"].forward}
    frame = comparison[:2].assign(name=list(asked))
    found = evidence.gather(task, asked, comparison=frame, examples=1, attacked=1, progress=False)
    reasons = found["left_out"].set_index("section")["reason"]
    assert "'service' is no module" in reasons["Where the bytes are"]
    assert "agreement" in found
    assert page.html(found)


def test_refusals_say_what_to_do_and_leave_no_file(task, models, comparison, tmp_path):
    failed = comparison.copy()
    failed.loc[2, ["score", "error"]] = [math.nan, "no kernel"]
    refusals = [
        ({"models": {"float32": models["float32"]}}, "'float32' is the only model; give a second"),
        ({"baseline": "a"}, "baseline is 'a'; choose from"),
        ({"after": "float32"}, r"after is 'float32'; choose from \['4 bits'"),
        ({"examples": 0}, "examples is 0; give 1 or more"),
        ({"attacked": 0}, "attacked is 0; give 1 or more"),
        ({"comparison": failed}, "has no score: no kernel; repair it"),
        ({"comparison": comparison[:2]}, "has no score: it is not in the comparison"),
    ]
    for settings, message in refusals:
        settings = {"models": models, "comparison": comparison} | settings
        with pytest.raises(ValueError, match=message):
            report.page(task, path=tmp_path / "page.html", progress=False, **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_drawn_leaves_the_old_one(task, frames, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")
    monkeypatch.setattr(evidence, "gather", lambda *_, **__: frames)

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        report.page(task, {}, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_page_in_a_browser(browser, text, tmp_path):
    """Offline, at three widths, light and dark: no message, nothing wider than the window."""
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    for width, scheme in ((1280, "light"), (800, "dark"), (400, "light")):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
        )
        tab, messages, asked = context.new_page(), [], []
        tab.on("console", lambda message, found=messages: found.append(message.text))
        tab.on("pageerror", lambda error, found=messages: found.append(str(error)))
        tab.on("request", lambda request, found=asked: found.append(request.url))
        tab.goto(path.as_uri())
        assert messages == []
        assert [url for url in asked if not url.startswith("data:image/png")] == [path.as_uri()]
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("[...document.images].every(image => image.naturalWidth > 100)")
        colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert colour == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 22, 22)")
    printed = tab.pdf(prefer_css_page_size=True)
    assert printed.startswith(b"%PDF")
    assert Path(path).stat().st_size < 3_000_000
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b(?!s)", printed)) <= 15
