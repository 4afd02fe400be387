"""All that a page about a model rests on: what was measured of it before and after, as frames.

`gather` measures, and nothing is said of the model that does not stand in a frame. `to_json` and
`from_json` let the frames travel inside the page that was made of them.

Explanations are compared as Adebayo et al. (2018), "Sanity checks for saliency maps", compare them:
how alike two maps are means little until one knows how alike the map of a network of shuffled
weights is.
"""

import base64
import hashlib
import importlib.metadata
import json
import math
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from workbench import measure, storage
from workbench.compress import Recipe
from workbench.compress.computed import copy_of
from workbench.data import Split, Task
from workbench.deploy.attribution import attribute
from workbench.deploy.loading import Loaded
from workbench.deploy.runtimes import Predictor, prepare
from workbench.explore.diagnosis import doctor
from workbench.explore.differences import class_name, difference
from workbench.measure.comparison import Candidate
from workbench.measure.latency import choose_baseline, describe
from workbench.measure.robustness import under_attack

Frames = dict[str, pd.DataFrame]
VERSION = 1
MAPS = ("input", "before", "after", "shuffled")  # pictures of one example
SHOWN = 4  # examples whose maps are kept
_STEPS = (0.0, 0.01, 0.02, 0.05)  # sizes of an attack, in parts of the range of the input


def gather(
    task: Task,
    models: Mapping[str, Candidate],
    *,
    baseline: str | None = None,
    after: str | None = None,
    comparison: pd.DataFrame | None = None,
    recipe: Recipe | None = None,
    code: str | None = None,
    title: str | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    examples: int = 16,
    attacked: int = 500,
    seed: int = 0,
    progress: bool = True,
) -> Frames:
    """Measure candidates, and look closely at one of them beside the baseline.

    What cannot be found out of these models, such as an attack where the input is text, is left
    out, and the frame ``left_out`` says why.

    Args:
        models: as for `workbench.measure.compare`; at least two.
        baseline: name of the model before; the first by default.
        after: name of the model that the page is about; the last by default.
        comparison: what `workbench.measure.compare` said of the same models, if it was asked.
        recipe: what ``after`` was made with.
        code: how to make the models again; by default, how to run the recipe that the page holds.
        title: of the page.
        bounds: smallest and largest value of an input, for the attack.
        examples: test examples whose explanations are compared.
        attacked: test examples that are attacked.
        seed: of everything drawn at random.

    Returns:
        - ``about``: one row, what was compared;
        - ``candidates``: the comparison;
        - ``bytes``: bytes of each kind, and ``ledger``: of each tensor (see `storage.Ledger`),
          of the two as plain ``.safetensors`` files;
        - ``agreement``: one row, and ``classes``: one for each, of `workbench.explore.difference`;
        - ``findings`` of `workbench.explore.doctor`;
        - ``explanations``: one row per example, how alike the maps are (see `similarity`);
          ``similarity``: their means; ``maps``: the pictures of the first few;
        - ``attacks`` of `workbench.measure.robustness.under_attack` by FGSM;
        - ``machine``, ``provenance``: checksums, versions, seed; ``recipe`` and ``code``;
        - ``left_out``.

    Raises:
        ValueError: fewer than two models, an unknown name, ``examples`` or ``attacked`` below 1, or
            one of the two could not be measured.
    """
    baseline = choose_baseline(models, baseline)
    after = _chosen(models, baseline, after)
    for name, count in (("examples", examples), ("attacked", attacked)):
        if count < 1:
            raise ValueError(f"{name} is {count}; give 1 or more")
    if comparison is None:
        comparison = measure.compare(task, models, baseline=baseline, seed=seed, progress=progress)
    rows = comparison.set_index("name")
    for name in (baseline, after):
        if name not in rows.index or pd.isna(rows.loc[name, "score"]):
            why = rows["error"].get(name) or "it is not in the comparison"
            raise ValueError(f"{name!r} has no score: {why}; repair it, or choose another")
    threads = int(rows.loc[after, "threads"])
    example = task.example_input
    old, new = (_prepared(models[name], example, threads) for name in (baseline, after))
    case = _Case(task, (baseline, after), (old, new), threads, bounds, seed)
    frames = {
        "about": _about(case, comparison, title),
        "candidates": comparison,
        "machine": _labelled(measure.hardware().rows()),
        "recipe": pd.DataFrame({"json": [recipe.to_json()] if recipe else []}, dtype="str"),
        "code": pd.DataFrame(
            {"python": [code or _code(list(models), baseline, after, recipe)]}, dtype="str"
        ),
    }
    sections: dict[str, Callable[[], Frames]] = {
        "Where the bytes are": lambda: _bytes(case),
        "Answers that changed": lambda: _answers(case),
        "What the doctor found": lambda: _findings(case),
        "What the answers rest on": lambda: _explanations(case, examples),
        "Under attack": lambda: _attacks(case, attacked),
        "Where it comes from": lambda: {"provenance": _labelled(_provenance(case))},
    }
    left_out = []
    for heading, section in tqdm(sections.items(), desc="page", disable=not progress):
        try:
            frames |= section()
        except Exception as error:  # of one section: the others stand
            left_out.append((heading, describe(error)))
    frames["left_out"] = pd.DataFrame(left_out, columns=["section", "reason"], dtype="str")
    return {name: _plain(frame) for name, frame in frames.items()}


def similarity(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """How alike two maps of one example are: 1 for maps that say the same, 0 for unrelated ones.

    ``spearman`` compares the ranks of the values, ``cosine`` the values themselves, so that the
    large ones count for more. NaN where a map is the same everywhere, or zero.

    Reference: Adebayo, Gilmer, Muelly, Goodfellow, Hardt and Kim (2018), "Sanity checks for
    saliency maps".

    >>> similarity(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 90.0]))["spearman"]
    1.0
    """
    first, second = (np.asarray(values, np.float64).ravel() for values in (first, second))
    flat = np.ptp(first) == 0 or np.ptp(second) == 0
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    return {
        "spearman": math.nan if flat else float(stats.spearmanr(first, second).statistic),
        "cosine": float(first @ second / norms) if norms else math.nan,
    }


def shuffled(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy that knows nothing: the values of each parameter in another order.

    Its layers and the spread of its weights are those of the model, but not what it has learned: an
    explanation that looks the same for both explains nothing.
    """
    copy = copy_of(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copy.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return copy


def to_json(frames: Frames) -> str:
    """The frames as text that a web page can hold, and that `from_json` reads."""
    written = {
        name: {
            "columns": {column: str(kind) for column, kind in frame.dtypes.items()},
            "rows": [[_cell(value) for value in row] for row in frame.itertuples(index=False)],
        }
        for name, frame in frames.items()
    }
    text = json.dumps({"version": VERSION, "frames": written}, allow_nan=False)
    return text.replace("<", "\\u003c")  # or "</script>" in a name would end the script


def from_json(text: str) -> Frames:
    """The frames that `to_json` wrote, equal to the last bit.

    Raises:
        ValueError: this is no such text, or one of another version.
    """
    written = json.loads(text)
    if not isinstance(written, dict) or written.get("version") != VERSION:
        raise ValueError(f"these are not frames of version {VERSION}; make the page again")
    return {
        name: pd.DataFrame(
            {
                column: pd.Series([row[place] for row in frame["rows"]], dtype=kind)
                for place, (column, kind) in enumerate(frame["columns"].items())
            }
        )
        for name, frame in written["frames"].items()
    }


@dataclass(frozen=True)
class _Case:
    """The two models that are looked at closely."""

    task: Task
    names: tuple[str, str]
    predictors: tuple[Predictor, Predictor]
    threads: int
    bounds: tuple[float, float]
    seed: int

    @property
    def models(self) -> list[nn.Module]:
        for name, predictor in zip(self.names, self.predictors, strict=True):
            if predictor.model is None:
                raise TypeError(f"{name!r} is no module, and cannot be looked into")
        return [predictor.model for predictor in self.predictors]


def _chosen(models: Mapping[str, Candidate], baseline: str, after: str | None) -> str:
    others = [name for name in models if name != baseline]
    if not others:
        raise ValueError(f"{baseline!r} is the only model; give a second to compare with it")
    if after is not None and after not in others:
        raise ValueError(f"after is {after!r}; choose from {others}")
    return others[-1] if after is None else after


def _prepared(candidate: Candidate, example: tuple[Tensor, ...], threads: int) -> Predictor:
    model, runtime = candidate if isinstance(candidate, tuple) else (candidate, "eager")
    return prepare(model, runtime, example_input=example, threads=threads)


def _about(case: _Case, comparison: pd.DataFrame, title: str | None) -> pd.DataFrame:
    before, after = case.names
    return pd.DataFrame([{
        "title": title or f"From {before} to {after}", "task": case.task.name, "before": before,
        "after": after, "candidates": len(comparison), "confidence": 0.95, "seed": case.seed,
    }])  # fmt: skip


def _bytes(case: _Case) -> Frames:
    accounts = [_saved(model)[0] for model in case.models]
    kinds = pd.DataFrame({
        when: account.by_kind() for when, account in zip(("before", "after"), accounts, strict=True)
    })  # fmt: skip
    kinds.loc["all"] = kinds.sum()
    kinds = kinds[kinds.any(axis=1)].rename_axis("kind").reset_index()
    named = [a.frame.assign(name=name) for name, a in zip(case.names, accounts, strict=True)]
    ledger = pd.concat(named, ignore_index=True)
    ledger["shape"] = [" x ".join(map(str, shape)) for shape in ledger["shape"]]
    return {"bytes": kinds, "ledger": ledger}


def _saved(model: nn.Module) -> tuple[storage.Ledger, str]:
    """The ledger of the plain file of a model, and the file's sha256."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        account = storage.save(model, path, codec="plain", progress=False)
        return account, hashlib.sha256(path.read_bytes()).hexdigest()


def _answers(case: _Case) -> Frames:
    found = difference(*case.predictors, case.task)
    kinds = found.flips["kind"].value_counts()
    agreement = {
        "answers": found.answers, "agreement": found.agreement,
        "agreement_low": found.agreement_low, "agreement_high": found.agreement_high,
        "kl_nats": found.kl_nats, "changed": len(found.flips),
        **{kind: int(kinds.get(kind, 0)) for kind in ("fixed", "broken", "other")},
    }  # fmt: skip
    classes = found.per_class.assign(label=found.per_class["label"].map(str))
    return {"agreement": pd.DataFrame([agreement]), "classes": classes}


def _findings(case: _Case) -> Frames:
    found = doctor(*case.predictors, case.task, threads=case.threads)
    rows = [("What was measured", found.measured, "")]
    rows += [(one.cause, one.evidence, one.advice) for one in found]
    return {"findings": pd.DataFrame(rows, columns=["cause", "evidence", "advice"])}


def _explanations(case: _Case, examples: int) -> Frames:
    model = case.models[0]
    blind = prepare(shuffled(model, seed=case.seed), example_input=case.task.example_input)
    drawn = case.task.test.subset(min(examples, len(case.task.test)), seed=case.seed)
    rows, maps = [], []
    for number, (inputs, target) in enumerate(drawn.batches(1), 1):
        arrays = [x.numpy() for x in inputs]
        old, new = (predictor(*inputs) for predictor in case.predictors)
        if old.dim() != 2:
            raise ValueError(f"answers have shape {tuple(old.shape)}; only classes are explained")
        answer = int(old.argmax())
        before, after, nothing = (
            attribute(_Answers(predictor), arrays, target=answer)
            for predictor in (*case.predictors, blind)
        )  # (1, ...)
        labels = [class_name(case.task, int(at)) for at in (target, answer, new.argmax())]
        row = {"example": number, **dict(zip(("target", "before", "after"), labels, strict=True))}
        for model_name, other in (("after", after), ("shuffled", nothing)):
            alike = similarity(before, other)
            row |= {f"{score}_{model_name}": value for score, value in alike.items()}
        rows.append(row)
        if number <= SHOWN and arrays[0].ndim == 4:  # (1, channels, height, width)
            pictures = (arrays[0], before, after, nothing)
            for kind, picture in zip(MAPS, pictures, strict=True):
                maps.append({"example": number, "answer": str(labels[1]), "map": kind}
                            | _picture(picture[0].sum(0)))  # fmt: skip
    table = pd.DataFrame(rows)
    table = table.astype(dict.fromkeys(("target", "before", "after"), "str"))
    means = [
        {
            "model": name, "examples": len(table),
            "spearman": table[f"spearman_{name}"].mean(), "cosine": table[f"cosine_{name}"].mean(),
            "spearman_lowest": table[f"spearman_{name}"].min(),
        }
        for name in ("after", "shuffled")
    ]  # fmt: skip
    columns = ["example", "answer", "map", "height", "width", "values"]
    return {
        "explanations": table,
        "similarity": pd.DataFrame(means),
        "maps": pd.DataFrame(maps, columns=columns),
    }


class _Answers(Loaded):
    """A predictor, as `attribute` asks it: by its answers alone, the same way for any runtime."""

    def __init__(self, predictor: Predictor):
        self.predictor = predictor

    def run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            return [self.predictor(*map(torch.from_numpy, arrays)).float().cpu().numpy()]


def _picture(values: np.ndarray) -> dict:
    """A picture, (height, width), as whole numbers from -127 to 127 in base64."""
    scaled = np.rint(127 * values / (np.abs(values).max() or 1)).astype(np.int8)
    height, width = scaled.shape
    text = base64.b64encode(scaled.tobytes()).decode()
    return {"height": height, "width": width, "values": text}


def _attacks(case: _Case, attacked: int) -> Frames:
    kind = case.task.example_input[0].dtype
    if not kind.is_floating_point:
        raise TypeError(f"the first input is {kind}; only floating point can change a little")
    low, high = case.bounds
    models = dict(zip(case.names, case.models, strict=True))
    frame = under_attack(
        case.task, models, epsilons=[step * (high - low) for step in _STEPS], attack="fgsm",
        bounds=case.bounds, count=attacked, seed=case.seed, progress=False,
    )  # fmt: skip
    return {"attacks": frame}


def _provenance(case: _Case) -> dict[str, str]:
    found = {"made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "data": case.task.name}
    for split in ("train", "validation", "test"):
        found[f"{split} data, sha256"] = _data_sha256(getattr(case.task, split))
    for when, predictor in zip(("before", "after"), case.predictors, strict=True):
        model = predictor.model
        digest = "no module" if model is None else _saved(model)[1]
        found[f"model {when}, sha256 of its plain .safetensors file"] = digest
    found["seed"] = str(case.seed)
    names = ("workbench", "torch", "onnxruntime", "numpy", "pandas", "scipy", "captum")
    versions = [f"{name} {version}" for name in names if (version := _version(name))]
    found["made with"] = ", ".join([f"Python {platform.python_version()}", *versions])
    return found


def _data_sha256(split: Split) -> str:
    """Of inputs and targets, batch by batch as `Split.batches` gives them."""
    if not isinstance(split.source, Dataset):
        return "not known: a loader or a callable may give the examples in another order"
    digest = hashlib.sha256()
    for inputs, target in split.batches():
        for tensor in (*inputs, target):
            digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code(names: list[str], baseline: str, after: str, recipe: Recipe | None) -> str:
    """Python that makes a page again; what only the user has is named in its first line."""
    if recipe is None:
        return "\n".join([
            f"# task and models ({', '.join(names)}) are those whose checksums stand above",
            "from workbench.explore import report", "",
            f'report.page(task, models, "again.html", baseline={baseline!r}, after={after!r})',
        ])  # fmt: skip
    return "\n".join([
        "# task and model are those whose checksums stand above, page is the path of this file",
        "from workbench.compress import Recipe", "from workbench.explore import report", "",
        'recipe = Recipe.from_json(report.read_page(page)["recipe"]["json"][0])',
        f"models = {{{baseline!r}: model, {after!r}: recipe(model, task)}}",
        'report.page(task, models, "again.html", recipe=recipe)',
    ])  # fmt: skip


def _labelled(texts: Mapping[str, str]) -> pd.DataFrame:
    return pd.DataFrame({"label": list(texts), "text": list(texts.values())})


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows numbered from 0, and texts of one type, as they are read back."""
    frame = frame.reset_index(drop=True)
    mixed = [name for name, kind in frame.dtypes.items() if kind == object]  # noqa: E721
    return frame.astype(dict.fromkeys(mixed, "str"))


def _cell(value: object) -> object:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return None if pd.isna(value) else value
