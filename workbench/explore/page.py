"""One HTML page that needs nothing else: what was done to a model, and what that changed.

The page is a function of the frames of `workbench.explore.evidence`, and holds them: `read` gives
them back. Each number stands in a ``<data>`` element together with the value of the cell that it
was rounded from, and each text with digits in it is, whole, a text of a frame; but for what is
cited, nothing else in the page has digits. So every number can be found in a frame.

No script runs, and nothing is fetched: the page's own policy forbids both.
"""

import base64
import html as escaping
import os
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.explore import evidence, limits, plots
from workbench.explore.evidence import Frames
from workbench.storage import Ledger

_LARGEST = 8  # tensors that are listed
_LONG = 60  # from this length on, a text of a table gets a wide column


def html(frames: Frames) -> str:
    """The page, from frames as `workbench.explore.evidence.gather` returns them.

    What could not be found out has no frame, and its section says why.
    """
    sections = {
        "Summary": _summary, "The trade-off": _tradeoff, "Where the bytes are": _bytes,
        "Answers that changed": _answers, "What the doctor found": _findings,
        "What the answers rest on": _explanations, "Under attack": _attacks,
        "The machine": _machine, "Where it comes from": _provenance,
        "How to make it again": _again,
    }  # fmt: skip
    reasons = dict(frames["left_out"].itertuples(index=False))
    title = _escape(frames["about"]["title"][0])
    body, links = f"<h1>{title}</h1>\n", ""
    for heading, section in sections.items():
        anchor = heading.lower().replace(" ", "-")
        links += f'<li><a href="#{anchor}">{heading}</a></li>\n'
        if heading in reasons:
            text = f"<p>Left out:</p>\n<p><em>{_escape(reasons[heading])}</em></p>\n"
        else:
            text = section(frames)
        body += f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{heading}</h2>\n'
        body += f"{text}</section>\n"
    return _DOCUMENT.substitute(
        title=title, style=_STYLE, links=links, body=body, frames=evidence.to_json(frames)
    )


def read(path: str | os.PathLike) -> Frames:
    """The frames that a page was made of, equal to the last bit.

    Raises:
        ValueError: the file is no page of `html`, or one of another version.
    """
    text = Path(path).read_text(encoding="utf-8")
    found = re.search(f"{_FRAMES}(.*?)</script>", text, re.DOTALL)
    if found is None:
        raise ValueError(f"{path} holds no frames; give a page that report.page wrote")
    return evidence.from_json(found[1])


def _summary(frames: Frames) -> str:
    """Three sentences, on bytes, answers and speed; then the best of all candidates."""
    frame, about = frames["candidates"], _only(frames["about"])
    rows = {row["name"]: row for row in frame.to_dict("records")}
    before, after = rows[about["before"]], rows[about["after"]]
    told = {"before": before, "after": after, "about": about}
    size = (
        "The file of {after[name]} takes {after[size_bytes]:bytes}, that of {before[name]} "
        "{before[size_bytes]:bytes}"
    )
    if after["compression_ratio"] > 1:
        size += ": it is {after[compression_ratio]:.2f} times smaller"
    score = (
        "Its {after[metric]} is {after[score]:score} ({about[confidence]:.0%} interval "
        "{after[score_low]:score} to {after[score_high]:score}), and {before[score]:score} before"
    )
    if after["p_value"] < 1 - about["confidence"]:
        score += "; chance alone does not explain the difference (p = {after[p_value]:.2g})"
    elif pd.notna(after["p_value"]):
        score += "; chance alone can explain the difference (p = {after[p_value]:.2g})"
    speed = (
        "One call takes {after[latency_ms]:.3g} ms in {after[runtime]}, and "
        "{before[latency_ms]:.3g} ms in {before[runtime]} before: {after[verdict]}"
    )
    if after["simulated"]:
        speed += ". Its cheaper arithmetic is simulated: the size is real, this speed says nothing"
    text = "".join(f"<p>{_fill(each, told, frame)}.</p>\n" for each in (size, score, speed))
    everything = limits.remaining(frame, limits.Limits())
    best = {each: limits.winner(everything, each) for each in limits.OBJECTIVES}
    wins = "{name} ({size_bytes:bytes}, {metric} {score:score}, {latency_ms:.3g} ms)"
    items = [
        f"The {each} of the {_fill('{candidates}', about)} candidates: {_fill(wins, row, frame)}."
        for each, row in best.items() if row is not None
    ]  # fmt: skip
    return text + _list(items)


def _tradeoff(frames: Frames) -> str:
    frame = frames["candidates"]
    columns = {
        "candidate": "{name}", "what was done": "{technique}", "runtime": "{runtime}",
        "arithmetic": "{arithmetic}", "size": "{size_bytes:bytes}",
        "times smaller": "{compression_ratio:.2f}",
        str(frame["metric"][0]): "{score:score}| ({score_low:score} to {score_high:score})",
        "one call (ms)": "{latency_ms:.3g}| ({latency_low_ms:.3g} to {latency_high_ms:.3g})",
        "verdict": "{verdict}", "remarks": "{note}",
    }  # fmt: skip
    shown = frame.assign(
        arithmetic=["simulated" if simulated else "real" for simulated in frame["simulated"]],
        note=frame["error"].where(frame["error"] != "", frame["note"]),
    )
    words = f"{plots.score_label(frame)} against size, and against the time of one call"
    note = (
        "In brackets, intervals of {confidence:.0%}. Where the arithmetic is simulated (hollow "
        "markers) the size is real, and a gain in speed is not."
    )
    return (
        _image(plots.tradeoff(frame), f"Two scatter plots of the candidates: {words}")
        + _table(shown, columns, "All candidates", frame)
        + f"<p>{_fill(note, _only(frames['about']))}</p>\n"
    )


def _bytes(frames: Frames) -> str:
    ledger = frames["ledger"]
    mine = ledger[ledger["name"] == frames["about"]["after"][0]]
    columns = {"bytes of": "{kind}", "before": "{before:,}", "after": "{after:,}"}
    text = "<p>Both as plain <code>.safetensors</code> files, to the byte.</p>\n"
    text += _table(frames["bytes"], columns, "Bytes by what they are for")
    text += _image(plots.ledger(Ledger(mine)), "Bars: the largest tensors of the file, in bytes")
    columns = {
        "tensor": "{tensor}", "stored as": "{stored_as}", "shape": "{shape}",
        "bytes": "{size_bytes:,}", "bits a weight": "|{bits_per_weight:.3g}",
    }  # fmt: skip
    largest = mine.sort_values("size_bytes", ascending=False, kind="stable").head(_LARGEST)
    return text + _table(largest, columns, "The largest tensors after")


def _answers(frames: Frames) -> str:
    told = _only(frames["agreement"]) | _only(frames["about"])
    sentence = (
        "{agreement:.2%} of {answers:,} answers are the same ({confidence:.0%} interval "
        "{agreement_low:.2%} to {agreement_high:.2%}). {changed:,} changed: {fixed:,} from wrong "
        "to right, {broken:,} from right to wrong, {other:,} from wrong to wrong. The mean "
        "divergence of the probabilities is {kl_nats:.3g} nats."
    )
    columns = {
        "class": "{label}", "examples": "{count:,}", "right before": "{before:.1%}",
        "right after": "{after:.1%}", "change": "{change:+.1%}",
    }  # fmt: skip
    table = _table(frames["classes"], columns, "Right answers by class, the greatest loss first")
    return f"<p>{_fill(sentence, told)}</p>\n{table}"


def _findings(frames: Frames) -> str:
    measured, found = frames["findings"]["evidence"][0], frames["findings"][1:]
    text = f"<p>{_escape(measured)}</p>\n"
    if found.empty:
        return f"{text}<p>Nothing wrong was found.</p>\n"
    columns = {"cause": "{cause}", "evidence": "{evidence}", "advice": "{advice}"}
    return text + _table(found, columns, "Why it is not smaller, or not faster")


def _explanations(frames: Frames) -> str:
    after, shuffled = frames["similarity"].to_dict("records")
    sentence = (
        "A patch of an example is taken away, and the map shows by how much the answer falls. Over "
        "{after[examples]} test examples the maps before and after are alike with a rank "
        "correlation of {after[spearman]:.2f} (lowest {after[spearman_lowest]:.2f}, cosine "
        "{after[cosine]:.2f}). With the weights shuffled, of a network that has learned nothing, "
        "it is {shuffled[spearman]:.2f} (cosine {shuffled[cosine]:.2f})"
    )
    text = _fill(sentence, {"after": after, "shuffled": shuffled})
    if after["spearman"] > shuffled["spearman"]:
        text += ": the maps show what was learned, and how much of it was kept"
    elif after["spearman"] <= shuffled["spearman"]:
        text += ": these maps do not depend on what was learned, and say nothing of the change"
    text = f"<p>{text}.</p>\n"
    if len(frames["maps"]):
        shown = "Test examples beside maps of what the answer before rests on, for three networks"
        text += _image(_drawn(frames["maps"]), shown)
    columns = {
        "example": "{example}", "right answer": "{target}", "answer before": "{before}",
        "answer after": "{after}", "rank correlation": "{spearman_after:.2f}",
        "cosine": "{cosine_after:.2f}", "shuffled: rank correlation": "{spearman_shuffled:.2f}",
        "shuffled: cosine": "{cosine_shuffled:.2f}",
    }  # fmt: skip
    cited = "Adebayo et al. (2018), Sanity checks for saliency maps"
    table = _table(frames["explanations"], columns, "How alike the maps are")
    return f"{text}{table}<p><cite>{cited}</cite></p>\n"


def _attacks(frames: Frames) -> str:
    frame = frames["attacks"]
    columns = {
        "change of each value": "{epsilon:.3g}", "model": "{name}", "made against": "{against}",
        "right": "{score:.1%}| ({score_low:.1%} to {score_high:.1%})", "examples": "{count:,}",
        "without a gradient": "|{no_gradient:.1%}",
    }  # fmt: skip
    before = frames["about"]["before"][0]
    drawn = frame[frame["against"] == before].assign(metric="accuracy", higher_is_better=True)
    picture = plots.curve(drawn, "epsilon", by="name", x_label="change of each value of the input")
    return (
        "<p>Each value of an input is moved a little, all in the directions that raise the loss. "
        "What is made against the model before is shown to both, and drawn; the table has what is "
        "made against the model after as well.</p>\n"
        + _image(picture, "Lines: accuracy of both models against the size of the change")
        + _table(frame, columns, "Right answers under attack")
        + "<p>A model that rounds its activations may give an attack no gradient, which hides its "
        "weakness and does not remove it.</p>\n<p><cite>Goodfellow et al. (2015), Explaining and "
        "harnessing adversarial examples</cite></p>\n"
    )


def _machine(frames: Frames) -> str:
    return _facts(frames["machine"])


def _provenance(frames: Frames) -> str:
    return _facts(frames["provenance"])


def _again(frames: Frames) -> str:
    text = f"<pre><code>{_escape(frames['code']['python'][0])}</code></pre>\n"
    if len(frames["recipe"]):
        text += "<h3>The recipe</h3>\n"
        text += f"<pre><code>{_escape(frames['recipe']['json'][0])}</code></pre>\n"
    return (
        f"{text}<p>The frames that this page was drawn from are in it, to the last bit: "
        "<code>workbench.explore.report.read_page(path)</code> returns them.</p>\n"
    )


def _drawn(maps: pd.DataFrame) -> plots.Picture:
    pictures = []
    for row in maps.itertuples():
        values = np.frombuffer(base64.b64decode(row.values), np.int8) / 127
        pictures.append((row.answer, row.map, values.reshape(row.height, row.width)))
    return plots.maps(pictures, columns=len(evidence.MAPS))


def _only(frame: pd.DataFrame) -> dict:
    (row,) = frame.to_dict("records")
    return row


class _Filler(string.Formatter):
    """`str.format` that writes HTML, in which each number carries its exact value.

    Two formats are new: "bytes", in kB or MB, and "score", in the unit of the metric.
    """

    def __init__(self, percent: bool):
        self.percent, self.unknown = percent, False

    def format_field(self, value: object, spec: str) -> str:
        if pd.isna(value):
            self.unknown = True
            return "unknown"
        if isinstance(value, str):
            return f"<b>{_escape(value)}</b>" if value else ""
        spec = {"score": ".1%" if self.percent else ".4g"}.get(spec, spec)
        text = _size(value) if spec == "bytes" else format(value, spec)
        return f'<data value="{value}">{text}</data>'


def _fill(template: str, values: Mapping[str, object], frame: pd.DataFrame | None = None) -> str:
    """The template with values of a row; what follows a "|" is left out where it is not known."""
    percent = frame is None or plots.is_percent(frame)
    text = ""
    for place, part in enumerate(template.split("|")):
        filler = _Filler(percent)
        filled = filler.vformat(part, (), values)
        text += filled if place == 0 or not filler.unknown else ""
    return text


def _size(size_bytes: float) -> str:
    if size_bytes >= 1e7:
        return f"{size_bytes / 1e6:,.1f} MB"
    return f"{size_bytes / 1e3:,.0f} kB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:,.1f} kB"


def _table(
    rows: pd.DataFrame, columns: Mapping[str, str], caption: str, frame: pd.DataFrame | None = None
) -> str:
    """Columns are heading -> template; the first names the row."""
    head = "".join(f'<th scope="col">{_escape(heading)}</th>' for heading in columns)
    body = ""
    for row in rows.to_dict("records"):
        first, *cells = (_fill(template, row, frame) for template in columns.values())
        body += f'<tr><th scope="row">{first}</th>'
        body += "".join(map(_cell, cells)) + "</tr>\n"
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{_escape(caption)}">\n<table>\n'
        f"<caption>{_escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}</tbody>\n</table>\n</div>\n"
    )


def _cell(text: str) -> str:
    prose = "<data" not in text and len(text) > _LONG
    return f"<td{' class=prose' if prose else ''}>{text}</td>"


def _facts(rows: pd.DataFrame) -> str:
    items = "".join(
        f"<dt>{_escape(row.label)}</dt><dd>{_escape(row.text)}</dd>\n" for row in rows.itertuples()
    )
    return f"<dl>\n{items}</dl>\n"


def _list(items: Sequence[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{item}</li>\n" for item in items) + "</ul>\n"


def _image(picture: plots.Picture, alternative: str) -> str:
    data = base64.b64encode(picture.png(dpi=130)).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{_escape(alternative)}">\n'


def _escape(text: object) -> str:
    return escaping.escape(str(text))


_FRAMES = '<script type="application/json" id="frames">'
_DOCUMENT = string.Template(f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<nav aria-label="Sections">
<ul>
$links</ul>
</nav>
$body</main>
{_FRAMES}$frames</script>
</body>
</html>
""")
_STYLE = """
:root { --ink: #1a1a1a; --paper: #fff; --line: #767676; --link: #0050a0;
  --shade: #f2f2f2; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #161616; --line: #8a8a8a; --link: #8ec5ff; --shade: #262626; }
}
body { font: 1rem/1.5 system-ui, sans-serif; margin: 0; color: var(--ink);
  background: var(--paper); overflow-wrap: break-word; }
main { max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.2rem; padding-top: 0.6rem; border-top: 1px solid var(--line); }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; padding: 0; list-style: none; }
p, li, dd { max-width: 46rem; }
img { display: block; max-width: min(100%, 56rem); height: auto; margin: 1rem 0;
  background: #fff; border-radius: 0.3rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0.45rem; }
th, td { padding: 0.3rem 0.45rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th b, td b { font-weight: inherit; }
.prose { min-width: 14rem; }
data { white-space: nowrap; font-variant-numeric: tabular-nums; }
dt { font-weight: 600; }
dd { margin: 0 0 0.5rem 1rem; overflow-wrap: anywhere; }
pre { overflow-x: auto; padding: 0.7rem; background: var(--shade); }
@page { size: A4; margin: 15mm; }
@media print {
  body { font-size: 10pt; }
  main { padding: 0; }
  nav { display: none; }
  h2, h3, dt, caption { break-after: avoid; }
  p, img, tr, pre, .wide { break-inside: avoid; }
  img { max-width: 100%; max-height: 13cm; }
  table { font-size: 7.5pt; }
  .wide { overflow: visible; }
  .prose { min-width: 0; }
  pre { white-space: pre-wrap; }
}
"""
