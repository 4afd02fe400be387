"""Words and pages made from a comparison: nothing measured is ever typed by hand.

`say` writes a sentence, `table` a short table, `html` one page that stands on its own. As a
program, ``python -m workbench.explore.report`` runs the main comparison and writes its page; with
``--record`` it also keeps the frame and the picture under ``docs/`` and the table in the README.
"""

import argparse
import base64
import html as escaping
import importlib.metadata
import os
import platform
import string
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from workbench.explore import panels, plots


@dataclass(frozen=True)
class Prose:
    """Text that a notebook shows as Markdown."""

    text: str

    def __repr__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        return self.text


def say(
    template: str, rows: pd.Series | Mapping[str, object] | pd.DataFrame | None = None, **values
) -> Prose:
    """A sentence whose numbers come from the frame, so that it cannot drift from them.

    Args:
        template: a `str.format` template.
        rows: a row, whose columns are the fields; or a comparison, whose candidates are: write
            ``{int8 static[speedup]:.1f}``. A frame of one row counts as that row.
        values: further fields.

    A value that is not known is written as "unknown".

    Raises:
        ValueError: the template has a field or a format that does not fit; the error lists what
            is known.

    >>> say("{name} is {speedup:.1f} times faster", {"name": "int8", "speedup": 2.42})
    int8 is 2.4 times faster
    """
    if isinstance(rows, pd.DataFrame):
        if len(rows) == 1:
            rows = rows.iloc[0]
        else:
            rows = {row["name"]: row.to_dict() for _, row in rows.iterrows()}
    fields = {**({} if rows is None else dict(rows)), **values}
    try:
        return Prose(_Formatter().vformat(template, (), fields))
    except (KeyError, IndexError, AttributeError) as error:
        known = [repr(name) for name in fields]
        inner = [list(value) for value in fields.values() if isinstance(value, dict)]
        known += [f"[{name}]" for name in inner[0]] if inner else []
        raise ValueError(
            f"the template has no value for {error}; known are {', '.join(known)}"
        ) from error


def table(frame: pd.DataFrame, *, timing: bool = True) -> pd.DataFrame:
    """The comparison as a short table to read, with rounded texts; candidates as its index.

    Without ``timing`` it holds nothing that differs from run to run.
    """
    frame = plots.ready(frame)
    columns = {"technique": frame["technique"]}
    if "runtime" in frame:
        columns["runtime"] = frame["runtime"]
    columns["kind"] = ["simulated" if yes else "real" for yes in frame["simulated"]]
    columns["size (kB)"] = [_number(size / 1e3, ",.0f") for size in frame["size_bytes"]]
    if "compression_ratio" in frame:
        columns["times smaller"] = [_number(ratio, ".2f") for ratio in frame["compression_ratio"]]
    scale, digits = (100, ".1f") if plots.is_percent(frame) else (1, ".3f")
    columns[plots.score_label(frame)] = _with_interval(frame, "score", scale, digits)
    if timing:
        columns["latency (ms)"] = _with_interval(frame, "latency_ms", 1, ".3g")
        if "speedup" in frame:
            columns["speed-up"] = _with_interval(frame, "speedup", 1, ".2f")
        if "verdict" in frame:
            columns["verdict"] = frame["verdict"]
    remarks = _remarks(frame)
    if any(remarks):
        columns["remarks"] = remarks
    index = pd.Index(frame["name"], name="candidate")
    return pd.DataFrame({name: list(column) for name, column in columns.items()}, index=index)


def html(
    frame: pd.DataFrame, *, title: str = "What the techniques did", hardware: object = None
) -> str:
    """The comparison as one HTML page that needs no network: picture, findings, table, versions.

    Args:
        title: heading of the page.
        hardware: the card of `workbench.measure.hardware`, or any mapping or object to show.

    Raises:
        ValueError: a column is missing, or no candidate has been measured.
    """
    picture = base64.b64encode(plots.tradeoff(frame).png(dpi=160)).decode()
    alternative = f"{plots.score_label(frame)} against size and against latency of the candidates"
    sections = [
        f"<h1>{_escape(title)}</h1>",
        f"<p>{_escape(_what(frame))}</p>",
        f'<img src="data:image/png;base64,{picture}" alt="{_escape(alternative)}">',
        "<h2>Findings</h2>",
        _list(_findings(frame)),
        "<h2>All candidates</h2>",
        f'<div class="wide" tabindex="0">{_html_table(table(frame))}</div>',
        "<p>Intervals are 95 %. Hollow markers and the word <em>simulated</em> mean that the "
        "cheaper arithmetic is imitated: the size is real, a gain in speed is not.</p>",
    ]
    if hardware is not None:
        sections += ["<h2>Hardware</h2>", _card(hardware)]
    sections += ["<h2>Made with</h2>", _list(_provenance())]
    body = "\n".join(sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def write_html(frame: pd.DataFrame, path: str | os.PathLike, **options) -> Path:
    """Write the page of `html`, with its options, to ``path``: wholly or not at all."""
    page = html(frame, **options)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        Path(unfinished).chmod(0o644)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    return path


def markdown(frame: pd.DataFrame) -> str:
    """The most important columns of `table` as Markdown, for a README."""
    rows = table(frame)
    accuracy = plots.score_label(frame)
    rows = rows[["runtime", "size (kB)", "times smaller", accuracy, "latency (ms)", "verdict"]]
    lines = [["candidate", *rows], ["---"] * (1 + rows.shape[1])]
    lines += [[str(cell) for cell in row] for row in rows.itertuples()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main_comparison() -> pd.DataFrame:
    """The comparison of the report: a residual network on Fashion-MNIST, in float32 and cheaper."""
    from workbench import compress, data, measure, models

    task = data.fashion_mnist()
    model = models.pretrained("resnet-14")
    int8 = compress.quantize_static(model, task)
    four_bits = compress.quantize_weights(model, bits=4, granularity="group")
    candidates = {
        "float32": model,
        "float32, compiled": (model, "compiled"),
        "float32, ORT": (model, "onnxruntime"),
        "int8, compiled": (int8, "compiled"),
        "int8, ORT": (int8, "onnxruntime"),
        "4-bit weights": four_bits,
    }
    return measure.compare(task, candidates)


def record(frame: pd.DataFrame) -> None:
    """Keep a comparison as ``docs/comparison.csv``, its picture, and its table in the README."""
    root = Path(__file__).parents[2]
    (root / "docs").mkdir(exist_ok=True)
    frame.to_csv(root / "docs" / "comparison.csv", index=False)
    (root / "docs" / "tradeoff.png").write_bytes(plots.tradeoff(frame).png(dpi=120))
    readme = (root / "README.md").read_text()
    before, rest = readme.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    text = f"{before}{MARKS[0]}\n{markdown(frame)}\n{MARKS[1]}{after}"
    (root / "README.md").write_text(text)


MARKS = ("<!-- comparison -->", "<!-- end of comparison -->")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the main comparison and write its page."""
    parser = argparse.ArgumentParser(prog="workbench.explore.report", description=main.__doc__)
    parser.add_argument("--output", default="build/report.html", help="file to write")
    parser.add_argument("--record", action="store_true", help="renew docs/ and the README's table")
    given = parser.parse_args(arguments)
    from workbench import measure

    frame = main_comparison()
    path = write_html(frame, given.output, hardware=measure.hardware())
    if given.record:
        record(frame)
    print(f"wrote {path}")


class _Formatter(string.Formatter):
    """`str.format`, except that a value which is not known is called so."""

    def format_field(self, value: object, spec: str) -> str:
        if _unknown(value):
            return "unknown"
        if spec in ("", ",") and isinstance(value, float) and value.is_integer():
            value = int(value)  # a count, a float only because another row has none
        try:
            return super().format_field(value, spec)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{value!r} cannot be written as {spec!r}: {error}") from error


def _unknown(value: object) -> bool:
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def _number(value: float, digits: str) -> str:
    return "unknown" if _unknown(value) else format(value, digits)


def _with_interval(frame: pd.DataFrame, column: str, scale: float, digits: str) -> list[str]:
    """ "93.5 (93.0 to 94.0)", or the value alone where the frame has no interval."""
    low, high = plots.interval_columns(column)
    texts = []
    for _, row in frame.iterrows():
        text = _number(row[column] * scale, digits)
        if not _unknown(row.get(low)) and not _unknown(row.get(high)):
            text += f" ({row[low] * scale:{digits}} to {row[high] * scale:{digits}})"
        texts.append(text)
    return texts


def _remarks(frame: pd.DataFrame) -> list[str]:
    remarks = [[row.get("error"), row.get("note")] for _, row in frame.iterrows()]
    return ["; ".join(text for text in pair if isinstance(text, str) and text) for pair in remarks]


def _what(frame: pd.DataFrame) -> str:
    """What was compared, under which conditions."""
    text = f"{len(frame)} candidates"
    reference = plots.baseline(frame)
    text += "." if reference is None else f", compared with {reference['name']}."
    row = frame.iloc[0]
    if {"device", "threads", "batch_size"} <= set(frame):
        threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
        text += f" Latency on {row['device']} with {threads}, batches of {row['batch_size']}."
    return text


def _findings(frame: pd.DataFrame) -> list[str]:
    everything = panels.remaining(frame, panels.Limits())
    findings = []
    for objective in panels.OBJECTIVES:
        best = panels.winner(everything, objective)
        if best is not None:
            findings.append(f"The {objective}: {best['name']} ({panels.numbers(best, frame)}).")
    front = plots.pareto_front(frame)
    findings.append(f"On the Pareto front of size and score: {'; '.join(front)}.")
    return findings


def _provenance() -> list[str]:
    names = ("workbench", "torch", "onnxruntime", "numpy", "pandas", "matplotlib")
    found = [f"{name} {version}" for name in names if (version := _version(name))]
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return [made, f"Python {platform.python_version()}", *found]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _card(hardware: object) -> str:
    if hasattr(hardware, "_repr_html_"):
        return hardware._repr_html_()
    if is_dataclass(hardware):
        hardware = asdict(hardware)
    if isinstance(hardware, Mapping):
        return _list([f"{name}: {value}" for name, value in hardware.items()])
    return f"<pre>{_escape(str(hardware))}</pre>"


def _list(items: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{_escape(item)}</li>" for item in items) + "\n</ul>"


def _html_table(rows: pd.DataFrame) -> str:
    headings = "".join(f'<th scope="col">{_escape(h)}</th>' for h in [rows.index.name, *rows])
    body = ""
    for name, *cells in rows.itertuples():
        body += f'<tr><th scope="row">{_escape(name)}</th>{"".join(map(_cell, cells))}</tr>\n'
    return f"<table>\n<thead><tr>{headings}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


def _cell(text: str) -> str:
    number = text[:1].isdigit() and text[-1] in "0123456789)"  # stays on one line
    return f"<td{' class=number' if number else ''}>{_escape(text)}</td>"


def _escape(text: object) -> str:
    return escaping.escape(str(text))


_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; color: #1a1a1a; background: #fff; }
main { max-width: 76rem; margin: 0 auto; padding: 1rem; }
img { max-width: min(100%, 62rem); height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; }
th, td { padding: 0.3rem 0.45rem; border-bottom: 1px solid #ccc; text-align: left; }
.number { white-space: nowrap; }
thead th { border-bottom: 2px solid #666; }
"""


if __name__ == "__main__":
    main()
