"""The figures that the README quotes, each in a record that says how it was made.

As a program, ``python -m workbench.explore.results`` (``make results``) measures them again, keeps
one JSON file for each table under ``data/results`` and writes the tables into the README, in every
language that it has. A test holds both against each other.

- ``comparison``: one network, and what each technique makes of it.
- ``headline``: every network, and the smallest and the fastest that it becomes within a loss.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from torch import nn

from workbench import compress, data, deploy, measure, models, storage
from workbench.data import Split, Task
from workbench.deploy.runtimes import Predictor
from workbench.explore import blocks, plots, report
from workbench.measure.comparison import Candidate

LOSS = 0.01  # most that a network of the headline may lose: of the metric, or of its bits
SEED = 0
VALIDATION_EXAMPLES = 1000
PEER = "int8 by NNCF, OpenVINO"
# What others state: times smaller, of the same networks on handwritten digits.
# Han and others (2016), "Deep Compression".
PUBLISHED = {"lenet-300-100": 40, "lenet-5": 39}
# What `make experiments` trained and kept, of some networks.
_TRAINED = {
    "Deep Compression": "deep-compression-{}",
    "search, most accurate": "search-{}-most-accurate",
    "search, smallest": "search-{}-smallest",
}
_PAGES = ("README.md", "README.zh-CN.md")


def read(name: str) -> pd.DataFrame:
    """The frame of one record, with what is known of its making in ``attrs``.

    Raises:
        FileNotFoundError: no such record.
        ValueError: the file is not the committed one.
    """
    kept = json.loads(data.verified(f"results/{name}.json").read_text())
    frame = pd.DataFrame(kept.pop("rows"))
    frame.attrs = kept
    return frame


def keep(name: str, frame: pd.DataFrame, *, question: str) -> None:
    """Write a frame as a record, with seed, machine, versions and date, and renew the checksums."""
    card = asdict(measure.hardware())
    machine = ("processor", "vector_extensions", "logical_cores", "gpu", "operating_system")
    record = {
        "question": question,
        "seed": SEED,
        "machine": {key: card[key] for key in machine},
        "versions": {"python": card["python"], **dict(card["libraries"])},
        "date": datetime.now(UTC).date().isoformat(),
        "rows": json.loads(frame.to_json(orient="records", double_precision=15)),
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    path = data.folder() / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    data.write_whole(path, lambda part: Path(part).write_text(text, "utf-8"))
    data.write_checksums()


def comparison() -> pd.DataFrame:
    """What does each technique make of one residual network?"""
    task, _, candidates = report.main_models()
    return measure.compare(task, candidates, seed=SEED)


def headline(names: Sequence[str] | None = None, *, progress: bool = True) -> pd.DataFrame:
    """How small and how fast does each network become, within a loss of one point?

    Candidates are made without training, but for the committed files of Deep Compression and of
    `explore.search`. All are scored on validation examples; the smallest and the fastest of those
    within `LOSS` are then measured on the test examples, beside the network itself and a peer.

    Returns:
        Four rows of `measure.compare` for each network, with ``network`` and ``role``: "dense",
        "smallest", "fastest" and "peer".
    """
    names = [*models.names(), "efficientnet-lite0", "minilm-films"] if names is None else names
    return pd.concat([_of_network(name, progress) for name in names], ignore_index=True)


def headline_table(frame: pd.DataFrame) -> str:
    """The headline as the README shows it."""
    lines = [
        ["network", "score", "size (kB)", "latency (ms)", "smallest", "fastest", "peer"],
        ["---"] * 7,
    ]
    for network, rows in frame.groupby("network", sort=False):
        dense, small, fast, peer = (row for _, row in rows.iterrows())
        published = PUBLISHED.get(network)
        percent = plots.is_percent(rows)
        scores = [f"{100 * v:.1f} %" if percent else f"{v:.3f} bits" for v in rows["score"]]
        lines.append([
            network,
            scores[0],
            f"{dense.size_bytes / 1e3:,.0f} → **{small.size_bytes / 1e3:,.0f}**",
            f"{dense.latency_ms:.3g} → **{fast.latency_ms:.3g}**",
            f"{small['name']}: {small.compression_ratio:.1f} times smaller, {scores[1]}"
            + (", simulated" if small.simulated else ""),
            f"{fast['name']}: {fast.speedup:.1f} times as fast, {scores[2]}",
            f"{peer.compression_ratio:.1f} times smaller, {peer.speedup:.1f} times as fast, "
            f"{scores[3]}" + (f"; published: {published} times smaller" if published else ""),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _of_network(name: str, progress: bool) -> pd.DataFrame:
    model = models.pretrained(name)
    task = _task(name, model)
    made = {"float32": model} | _candidates(name, model, task)
    # The file of a module is coded as `storage.save` does; that of a runtime stays as it is.
    codec = dict.fromkeys(set(made) - {"float32"}, "auto")
    few = _few(task, VALIDATION_EXAMPLES)
    tried = measure.compare(
        few, made, split="validation", codec=codec, seed=SEED, progress=progress
    )
    tried = tried.set_index("name", drop=False)
    dense = tried["score"].iloc[0]
    lost = dense - tried["score"] if task.metric.higher_is_better else tried["score"] / dense - 1
    fits = tried[(lost <= LOSS) & tried["error"].eq("")]
    real = fits[~fits["simulated"].astype(bool)]
    roles = {
        "dense": "float32",
        "smallest": fits["size_bytes"].idxmin(),
        "fastest": real["latency_ms"].idxmin(),
        "peer": PEER,
    }
    made[PEER] = _peer(model, task)
    final = measure.compare(
        task,
        {key: made[key] for key in dict.fromkeys(roles.values())},
        codec={key: "auto" for key in (roles["smallest"], roles["fastest"]) if key != "float32"},
        seed=SEED,
        progress=progress,
    )
    rows = final.set_index("name", drop=False).loc[list(roles.values())].reset_index(drop=True)
    rows.insert(0, "network", name)
    rows.insert(1, "role", list(roles))
    return rows


def _few(task: Task, count: int) -> Task:
    def some(part: Split) -> Split:
        return part.subset(min(count, len(part)), seed=SEED)

    return replace(task, validation=some(task.validation), test=some(task.test))


def _peer(model: nn.Module, task: Task) -> Predictor:
    """The network as Intel's own tool makes it int8, whatever that costs in answers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.zip"
        deploy.export(
            model, path, "openvino-int8", task=_few(task, 64), agreement=0.0, tolerance=9.0
        )
        return deploy.load(path)


def _task(name: str, model: nn.Module) -> Task:
    if name == "char-transformer":
        return data.austen()
    if name == "minilm-films":
        return data.film_sentences()
    if name != "efficientnet-lite0":
        return data.fashion_mnist()
    calibration = data.photo_crops(600, part="calibration", seed=SEED)
    return data.unlabelled(
        model, train=calibration[:300], validation=calibration[300:],
        test=data.photo_crops(1000, seed=SEED), name="photographs",
    )  # fmt: skip


def _candidates(name: str, model: nn.Module, task: Task) -> dict[str, Candidate]:
    dynamic = name in ("char-transformer", "minilm-films")
    int8 = (
        compress.quantize_dynamic(model)
        if dynamic
        else compress.quantize_static(model, task, correct_bias=name == "efficientnet-lite0")
    )
    made = {"float32, ORT": (model, "onnxruntime"), "int8, ORT": (int8, "onnxruntime")}
    made["float32, coded"] = model
    made["int8 weights, coded"] = compress.quantize_weights(model, bits=8)
    for bits in (6, 5, 4):
        some = compress.quantize_weights(model, bits=bits, granularity="group")
        made[f"{bits}-bit weights, coded"] = some
    for title, stem in _TRAINED.items():
        file = f"experiments/{stem.format(name)}.safetensors"
        if (data.folder() / file).exists():
            made[title] = storage.load(data.verified(file), into=model)
    return made


_TABLES: dict[str, tuple[Callable[[], pd.DataFrame], Callable[[pd.DataFrame], str]]] = {
    "comparison": (comparison, report.markdown),
    "headline": (headline, headline_table),
}


def table(name: str) -> str:
    """A record as the table that the README shows."""
    return _TABLES[name][1](read(name))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the figures of the README again."""
    parser = argparse.ArgumentParser(prog="workbench.explore.results", description=main.__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *_TABLES], help="all by default")
    for name in parser.parse_args(arguments).names or _TABLES:
        make = _TABLES[name][0]
        keep(name, make(), question=make.__doc__.splitlines()[0])
        renew(name)


def renew(name: str) -> None:
    """Write the table of a record, and the picture of the comparison, where they are shown."""
    root = data.folder().parent
    blocks.put(name, table(name), *(root / page for page in _PAGES))
    if name == "comparison":
        (root / "docs" / "tradeoff.png").write_bytes(plots.tradeoff(read(name)).png(dpi=120))


if __name__ == "__main__":
    main()
