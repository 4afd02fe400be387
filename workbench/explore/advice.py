"""What to do with a model, and what not: ideas drawn from its facts, each tried on the spot.

`advise` measures the model (`workbench.explore.facts`), lets a list of rules draw ideas from what
was found, applies each idea without training, and ranks them by what came out: the file that it
really saves to, the time that it really takes, the answers that really changed. A rule is one
function that looks at facts, never at names. What did not pay, or cannot, is listed with the
numbers that say so.
"""

import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
from torch import nn
from tqdm.auto import tqdm

from workbench.compress.computed import CONVOLUTIONS, LINEAR, RECURRENT, Source, steps
from workbench.compress.recipe import (
    EqualizeLayers,
    Factorize,
    FineTune,
    Prune,
    PruneStructured,
    QuantizeAware,
    QuantizeDynamic,
    QuantizeStatic,
    QuantizeWeights,
    Recipe,
    ShareWeights,
)
from workbench.data import Metric, Split, Task
from workbench.deploy.runtimes import RUNTIMES, Predictor, installed, prepare
from workbench.explore.code import code_of
from workbench.explore.diagnosis import Finding
from workbench.explore.facts import Facts, facts
from workbench.explore.limits import OBJECTIVES, Limits, Objective
from workbench.explore.plots import family
from workbench.measure import artifact_bytes, measure_latency
from workbench.training import Evaluation, evaluate

Sure = Literal["high", "medium", "low"]
SURE = ("high", "medium", "low")

MANY_ZEROS = 0.5  # from here on a model counts as pruned
WIDE_SPREAD = 8.0  # widest over median channel: three of eight bits are lost under one scale
FIXED = 0.5  # of a call that does not depend on the batch
_ROUNDS = 20
_INT8 = (QuantizeStatic, QuantizeDynamic)
_FEW_CALIBRATION = 256  # examples; a trial need not be as careful as the real thing


@dataclass(frozen=True)
class Idea:
    """What a rule proposes: the same technique at several levels, the boldest first."""

    technique: str
    reason: str
    recipes: tuple[Recipe, ...]
    real: bool = True  # whether kernels compute with what it makes


@dataclass(frozen=True)
class Advice:
    """One idea at the boldest level within the limits, with what came out of a short trial.

    ``size_bytes`` is that of the coded file (`workbench.storage.save`), ``lost`` by how much the
    score got worse on few validation examples with its 95 % interval, and ``speedup`` that over
    the model in eager PyTorch, NaN where no kernel computes with what the technique makes, or
    where it does not keep to the limits as it is.
    """

    technique: str
    recipe: Recipe
    runtime: str
    reason: str
    fits: bool
    size_bytes: int
    lost: float
    lost_low: float
    lost_high: float
    speedup: float
    speedup_low: float
    speedup_high: float
    sure: Sure
    why: str

    def apply(self, model: nn.Module, task: Task, *, progress: bool = True) -> Predictor:
        """Do it: a predictor, whose ``model`` is what `workbench.storage.save` takes."""
        small = self.recipe(model, task, progress=progress) if self.recipe.steps else model
        return prepare(small, self.runtime, example_input=task.example_input)

    @property
    def code(self) -> str:
        """The same as Python, for a ``model`` and a ``task``."""
        lines = [
            "from workbench import deploy, storage", "",
            code_of(self.recipe) if self.recipe.steps else "small = model",
            'storage.save(small, "small.safetensors")',
            f'fast = deploy.prepare(small, "{self.runtime}", example_input=task.example_input)',
        ]  # fmt: skip
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class Advised:
    """What `advise` found; the last line of a cell shows it as a table.

    ``ranked`` holds what to do, the best first; ``avoid`` what not to do, and why; ``facts`` what
    was measured of the model before.
    """

    facts: Facts
    ranked: tuple[Advice, ...]
    avoid: tuple[Finding, ...]
    objective: Objective

    def __iter__(self) -> Iterator[Advice]:
        return iter(self.ranked)

    def __len__(self) -> int:
        return len(self.ranked)

    def __getitem__(self, place: int) -> Advice:
        return self.ranked[place]

    @property
    def frame(self) -> pd.DataFrame:
        """One row for each piece of advice, in order."""
        rows = [
            {"rank": place, "technique": a.technique, "recipe": _line(a.recipe),
             "runtime": a.runtime, "fits": a.fits, "size_bytes": a.size_bytes,
             "times_smaller": self.facts.size_bytes / a.size_bytes, "speedup": a.speedup,
             "speedup_low": a.speedup_low, "speedup_high": a.speedup_high, "lost": a.lost,
             "lost_low": a.lost_low, "lost_high": a.lost_high, "sure": a.sure,
             "reason": a.reason, "why": a.why}
            for place, a in enumerate(self, 1)
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        lines = [_described(self.facts), f"What makes it {self.objective}, within the limits:"]
        for place, a in enumerate(self, 1):
            lines.append(f"{place}. {a.technique} [{_line(a.recipe)}, {a.runtime}]")
            lines.append(f"   {a.reason}. {_gain(self.facts, a)}. Sure: {a.sure}, {a.why}.")
        lines += ["Nothing helps."] if not len(self) else []
        lines += [f"- {f.cause}: {f.evidence}. {f.advice}." for f in self.avoid]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
            head = "".join(f"<th style='text-align:left'>{title}</th>" for title in titles)
            body = "".join(
                "<tr>" + "".join(f"<td style='text-align:left'>{cell}</td>" for cell in row)
                + "</tr>" for row in rows
            )  # fmt: skip
            return f"<table><tr>{head}</tr>{body}</table>"

        do = [
            (
                str(place),
                f"{html.escape(a.technique)}<br><code>{html.escape(_line(a.recipe))}</code><br>"
                f"in {a.runtime}",
                html.escape(a.reason),
                html.escape(_gain(self.facts, a)),
                f"<b>{a.sure}</b>: {html.escape(a.why)}",
            )
            for place, a in enumerate(self, 1)
        ]
        avoid = [tuple(map(html.escape, (f.cause, f.evidence, f.advice))) for f in self.avoid]
        shown = [f"<p>{html.escape(_described(self.facts))}</p>"]
        shown.append(table(("", "what to do", "why", "gain", "how sure"), do))
        if avoid:
            shown.append(table(("what not to do", "why not", "instead"), avoid))
        return "".join(shown)


def advise(
    model: nn.Module,
    task: Task,
    limits: Limits | None = None,
    *,
    objective: Objective = "fastest",
    runtimes: Sequence[str] = ("onnxruntime",),
    examples: int = 300,
    threads: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Advised:
    """Say which technique fits this model, from what it is and from short trials of each.

    No trial trains. A technique that loses too much untrained is ranked last, with the training
    that may repair it, and counts as little sure. Nothing but the training and validation splits
    is looked at.

    Args:
        limits: of the file and of the score; by default one point (0.01) may be lost.
        objective: what counts within the limits: the latency of one example, the bytes of the
            coded file, or the score. Simulated techniques are never called fast.
        runtimes: to try beside eager PyTorch.
        examples: of the validation split that each trial is scored on.
        threads: of one call.
        seed: of the draw of examples.

    Returns:
        The ranked list, with the facts that it rests on and a list of what to leave.

    Raises:
        ValueError: an unknown objective or runtime, or a number out of range.
    """
    limits = Limits(score_lost=0.01) if limits is None else limits
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}; choose one of {', '.join(OBJECTIVES)}")
    if unknown := set(runtimes) - set(installed()):
        raise ValueError(f"runtimes names {sorted(unknown)}; installed of {RUNTIMES} are "
                         f"{installed()}")  # fmt: skip
    for name, value in (("examples", examples), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    few = _few(task, examples, seed)
    with tqdm(total=3, desc="advice", unit="step", disable=not progress) as bar:
        found = facts(model, task.example_input, threads=threads)
        ideas, avoid = [], []
        for rule in _RULES:
            for said in rule(found):
                (ideas if isinstance(said, Idea) else avoid).append(said)
        bar.total = len(ideas) + 2
        bar.update()
        trials = _Trials(model, few, limits, tuple(runtimes), threads, found)
        for idea in ideas:
            bar.set_postfix_str(idea.technique)
            trials.run(idea)
            bar.update()
        bar.set_postfix_str("latency")
        advice = trials.timed()
        bar.update()
    ranked, left = _rank(advice, found, objective)
    return Advised(found, tuple(ranked), (*avoid, *trials.refused, *left), objective)


# What the facts of a model suggest. Each rule yields ideas to try, and findings: what to leave.


def _runtime(f: Facts) -> Iterator[Idea | Finding]:
    if f.fixed_share >= FIXED:
        why = (f"{f.fixed_share:.0%} of a call in eager PyTorch is the same whatever the number of "
               "examples: a runtime with less to do between layers takes it away")  # fmt: skip
    else:
        why = "A runtime merges layers and chooses kernels; the answers stay"
    if _rounded(f):
        why = (f"{f.layers.stored_as.ne('float').mean():.0%} of the layers are rounded already; "
               "eager PyTorch only imitates int8, a runtime has the kernels")  # fmt: skip
    yield Idea("another runtime", why, (Recipe(),))


def _static_int8(f: Facts) -> Iterator[Idea | Finding]:
    if _rounded(f):
        yield Finding("Do not quantize again", f"{f.layers.stored_as.ne('float').mean():.0%} of "
                      "the layers hold rounded weights",
                      "Use a runtime that computes with them")  # fmt: skip
        return
    products = f.share("mac_share", *CONVOLUTIONS, *LINEAR)
    if products < 0.1:
        return
    wide = f.top("spread")
    if wide["spread"] >= WIDE_SPREAD:
        yield Finding(
            "Do not give a whole tensor one scale",
            f"in {wide['layer']} the widest channel has {wide['spread']:.0f} times the range of "
            "the median one",
            "Round with one scale per channel, and equalise the layers first if that is not enough",
        )
    why = (f"Convolutions and linear layers do {products:.0%} of the multiply-accumulates, and "
           "int8 kernels do four in the time of one")  # fmt: skip
    plain = QuantizeStatic(samples=_FEW_CALIBRATION)
    careful = (
        (EqualizeLayers(), plain)
        if wide["spread"] >= WIDE_SPREAD
        else (replace(plain, method="mse"),)
    )
    yield Idea("int8 weights and activations", why, (Recipe(plain), Recipe(*careful)))


def _dynamic_int8(f: Facts) -> Iterator[Idea | Finding]:
    if _rounded(f):
        return
    reached = f.share("mac_share", *LINEAR, *RECURRENT)
    convolved = f.share("mac_share", *CONVOLUTIONS)
    if convolved > 0.5:
        yield Finding(
            "Do not quantize dynamically",
            f"convolutions do {convolved:.0%} of the multiply-accumulates, and dynamic int8 leaves "
            "them, or, in ONNX Runtime's own form, makes them slower",
            "Calibrate once: int8 weights and activations",
        )
    elif reached > 0.5 and f.layers["weights"].max() >= 4096:
        why = f"Linear layers do {reached:.0%} of the multiply-accumulates; no calibration needed"
        yield Idea("int8 with ranges taken from each input", why, (Recipe(QuantizeDynamic()),))


def _few_bits(f: Facts) -> Iterator[Idea | Finding]:
    if _rounded(f):
        return
    top = f.top("weight_share")
    why = f"{top['layer']} ({top['type']}) holds {top['weight_share']:.0%} of the weights"
    levels = (QuantizeWeights(bits=b, granularity="group") for b in (2, 3, 4))
    yield Idea("few bits for each weight", why, (*map(Recipe, levels),), real=False)


def _shared(f: Facts) -> Iterator[Idea | Finding]:
    if _rounded(f):
        return
    zeros = f.mean("zeros")
    top = f.top("weight_share")
    why = f"{top['layer']} ({top['type']}) holds {top['weight_share']:.0%} of the weights"
    if zeros >= MANY_ZEROS:
        why = (f"{zeros:.0%} of the weights are zero already: the coded file holds their places "
               "in less than a bit each, and a code for each weight that is left")  # fmt: skip
    levels = (ShareWeights(clusters=c) for c in (8, 16, 32))
    yield Idea("shared weights", why, (*map(Recipe, levels),), real=False)


def _channels(f: Facts) -> Iterator[Idea | Finding]:
    if _rounded(f):
        return
    spare = f.mean("spare")
    bold = spare >= 0.2
    why = (f"{spare:.0%} of the channels, by weights, are almost zero or parallel to another"
           if bold else "Fewer channels are faster in every runtime")  # fmt: skip
    shares = (0.05, 0.1, 0.2, 0.4, 0.6) if bold else (0.6, 0.8)
    levels = (PruneStructured(macs=share, samples=_FEW_CALIBRATION) for share in shares)
    yield Idea("fewer channels", why, (*map(Recipe, levels),))


def _low_rank(f: Facts) -> Iterator[Idea | Finding]:
    if _rounded(f):
        return
    share = f.mean("rank_share")
    if share > 0.25:
        yield Finding(
            "Do not factorize",
            f"{share:.0%} of the directions are needed for 90% of the weights' energy, and a "
            "product of two thin layers is smaller only below half",
            "Spend the loss on fewer bits or fewer channels",
        )
        return
    why = f"{share:.0%} of the directions hold 90% of the weights' energy"
    levels = (Factorize(energy=energy) for energy in (0.9, 0.97, 0.99))
    yield Idea("low rank", why, (*map(Recipe, levels),))


def _zeros(f: Facts) -> Iterator[Idea | Finding]:
    zeros = f.mean("zeros")
    if zeros >= MANY_ZEROS:
        yield Idea("the file coded", f"{zeros:.0%} of the weights are zero already, and need no "
                   "bytes of their own; nothing is lost", (Recipe(),), real=False)  # fmt: skip
    elif not _rounded(f):
        yield Idea("single weights removed", "Zeros cost a coded file little",
                   tuple(Recipe(Prune(sparsity=s)) for s in (0.7, 0.4)), real=False)  # fmt: skip
    yield Finding(
        "Do not prune single weights for speed",
        f"{max(zeros, 0.0):.0%} of the weights are zero now, and dense kernels multiply every one",
        "Remove whole channels for speed; zeros are for the coded file",
    )


def _bfloat16(f: Facts) -> Iterator[Idea | Finding]:
    if not {"AMX BF16", "AVX-512 BF16", "BF16"} & {*f.extensions}:
        yield Finding(
            "Do not convert to bfloat16 for speed",
            f"this processor has {', '.join(f.extensions) or 'no vector extensions'}, and "
            "nothing that multiplies in bfloat16",
            "Use int8 kernels",
        )


_RULES: tuple[Callable[[Facts], Iterator[Idea | Finding]], ...] = (
    _runtime, _static_int8, _dynamic_int8, _channels, _low_rank, _few_bits, _shared, _zeros,
    _bfloat16,
)  # fmt: skip


def _rounded(f: Facts) -> bool:
    """Whether most weights are codes already."""
    return f.layers.loc[f.layers["stored_as"].ne("float"), "weight_share"].sum() > 0.5


@dataclass
class _Trial:
    idea: Idea
    recipe: Recipe
    runtime: str
    timed: Predictor | None
    size_bytes: int
    lost: tuple[float, float, float]  # low, middle, high
    fits: bool


class _Trials:
    """Applies ideas, and keeps what came out."""

    def __init__(
        self, model: nn.Module, task: Task, limits: Limits, runtimes: tuple[str, ...],
        threads: int, found: Facts,
    ):  # fmt: skip
        self.model, self.task, self.limits, self.found = model, task, limits, found
        self.runtimes, self.threads = runtimes, threads
        self.eager = self._prepared(model, "eager")
        self.reference = evaluate(self.eager, task, split="validation")
        self.kept: list[_Trial] = []
        self.refused: list[Finding] = []

    def run(self, idea: Idea) -> None:
        """Keep the boldest level within the limits in each runtime, else the mildest."""
        for runtime in self.runtimes if idea.real else ("eager",):
            try:
                self.kept.append(self._boldest(idea, runtime))
            except Exception as error:  # techniques refuse what they cannot handle by name
                text = (str(error).splitlines() or [type(error).__name__])[0]
                self.refused.append(Finding(
                    f"Do not count on {idea.technique} in {runtime}", text.rstrip("."),
                    "Change the model first, or choose another technique",
                ))  # fmt: skip

    def timed(self) -> list[Advice]:
        """All that was kept, with the speed of what is real and fits, measured in turn."""
        timed = {f"{i}": t.timed for i, t in enumerate(self.kept) if t.timed is not None}
        speed = measure_latency(
            {"eager": self.eager} | timed, self.task.example_input,
            repeats=_ROUNDS, threads=self.threads,
        ).summary  # fmt: skip
        columns = ["speedup", "speedup_low", "speedup_high"]
        figures = {place: map(float, speed.loc[place, columns]) for place in timed}
        return [
            self._advice(trial, *figures.get(f"{i}", [math.nan] * 3))
            for i, trial in enumerate(self.kept)
        ]

    def _boldest(self, idea: Idea, runtime: str) -> _Trial:
        for place, recipe in enumerate(idea.recipes, 1):
            small = recipe(self.model, self.task, progress=False) if recipe.steps else self.model
            # Integer kernels may answer differently; the rest is the same in each runtime.
            lowered = idea.real and any(isinstance(step, _INT8) for step in recipe.steps)
            answers = self._prepared(small, runtime if lowered else "eager")
            scored = (
                evaluate(answers, self.task, split="validation") if recipe.steps
                else self.reference
            )  # fmt: skip
            lost = _lost(self.reference, scored, self.task.metric)
            good = lost[1] <= self.limits.score_lost + 1e-9  # 0.91 - 0.90 is a little over 0.01
            if good or place == len(idea.recipes):
                size_bytes = artifact_bytes(small, codec="auto")
                if self._within(idea, small, size_bytes) or place == len(idea.recipes):
                    break
        fits = good and self._within(idea, small, size_bytes)
        if fits and answers.runtime != runtime:
            answers = self._prepared(small, runtime)
        # What must be trained first is not timed: exporting takes longer than all the rest.
        timed = answers if fits and idea.real and _computes(answers) else None
        return _Trial(idea, recipe, runtime, timed, size_bytes, lost, fits)

    def _within(self, idea: Idea, small: nn.Module, size_bytes: int) -> bool:
        """Whether it keeps to the limits other than that of the score."""
        limits, technique = self.limits, family(" + ".join(steps(small)) or "none")
        return (
            size_bytes <= limits.size_bytes
            and (limits.techniques is None or technique in limits.techniques)
            and (limits.simulated or idea.real)
        )

    def _advice(self, trial: _Trial, *speed: float) -> Advice:
        low, lost, high = trial.lost
        count, limit = len(self.reference.scores), self.limits.score_lost
        recipe = trial.recipe
        if lost > limit + 1e-9:
            sure, why = "low", "it must be trained to come back, which was not tried"
            recipe = _with_training(recipe)
        elif not trial.fits:
            sure, why = "high", "measured, but another limit is not kept"
        elif not recipe.steps:
            sure, why = "high", "no weight changes"
        elif high <= limit:
            sure, why = "high", f"measured; the interval of {count} examples is within the limit"
        else:
            sure, why = "medium", f"measured, but {count} examples cannot rule out a larger loss"
        return Advice(
            trial.idea.technique, recipe, trial.runtime, trial.idea.reason, trial.fits,
            trial.size_bytes, lost, low, high, *speed, sure, why,
        )  # fmt: skip

    def _prepared(self, model: nn.Module, runtime: str) -> Predictor:
        return prepare(model, runtime, example_input=self.task.example_input, threads=self.threads)


def _with_training(recipe: Recipe) -> Recipe:
    """The recipe with what may bring the score back; int8 is trained as what it will be."""
    kept = [step for step in recipe.steps if not isinstance(step, QuantizeStatic)]
    return Recipe(*kept, FineTune() if len(kept) == len(recipe.steps) else QuantizeAware())


def _computes(predictor: Predictor) -> bool:
    """Whether its speed is its own: plain layers, or integer kernels for what is rounded."""
    rounded = any(isinstance(module, Source) for module in predictor.model.modules())
    return not rounded or predictor.int8_kernels > 0


def _rank(
    advice: list[Advice], found: Facts, objective: Objective
) -> tuple[list[Advice], list[Finding]]:
    """What helps, the best first; and as findings what was tried and did not."""

    def key(a: Advice) -> tuple:
        slow = math.inf if math.isnan(a.speedup) else -a.speedup
        first = {"fastest": slow, "smallest": a.size_bytes, "most accurate": a.lost}[objective]
        return (not a.fits, first, a.size_bytes, slow)

    helps, left = [], []
    alone = {a.runtime: a for a in advice if not a.recipe.steps}
    for a in _settled(sorted(advice, key=key), objective):
        smaller, faster = a.size_bytes < 0.98 * found.size_bytes, a.speedup_low > 1
        if smaller or faster:
            helps.append(a)
        else:
            left.append(Finding(
                f"Leave {a.technique}", f"tried here: {_gain(found, a)}", "Choose another technique"
            ))  # fmt: skip
        plain = alone.get(a.runtime)
        if plain is not None and a is not plain and a.speedup < plain.speedup:
            left.append(Finding(
                f"Do not expect speed of {a.technique}",
                f"{a.speedup:.1f} times eager in {a.runtime}, where the model as it is has "
                f"{plain.speedup:.1f}",
                "Use the runtime alone where only time counts",
            ))  # fmt: skip
    return helps, left


def _settled(ordered: list[Advice], objective: Objective) -> list[Advice]:
    """What the measurement cannot tell apart is put in order of how sure it is."""
    found = []
    for a in ordered:
        place = len(found)
        while place and _as_good(a, found[place - 1], objective):
            place -= 1
        found.insert(place, a)
    return found


def _as_good(a: Advice, other: Advice, objective: Objective) -> bool:
    surer = SURE.index(a.sure) < SURE.index(other.sure)
    if objective == "fastest":
        same = a.speedup_high >= other.speedup_low
    elif objective == "most accurate":
        same = a.lost_low <= other.lost_high
    else:
        same = a.size_bytes == other.size_bytes
    return surer and same and a.fits == other.fits


def _few(task: Task, examples: int, seed: int) -> Task:
    """The task with few validation examples."""
    try:
        part = task.validation.subset(min(examples, len(task.validation)), seed=seed)
    except TypeError:  # a callable: the batches that hold that many
        kept, count = [], 0
        for batch in task.validation.batches(examples):
            kept.append((*batch[0], batch[1]))
            count += len(batch[1])
            if count >= examples:
                break
        part = Split(lambda: kept)
    return replace(task, validation=part)


def _lost(before: Evaluation, after: Evaluation, metric: Metric) -> tuple[float, float, float]:
    """How much worse the mean score became: lower end of its 95 % interval, value, upper end.

    The same examples are scored twice, so only changed answers count. For scores of 0 and 1 two
    pairs that changed, one each way, are added first, without which no change in few examples
    would pass for certainty that there is none.

    Reference: Agresti and Min (2005), "Simple improved confidence intervals for comparing matched
    proportions".
    """
    sign = 1 if metric.higher_is_better else -1
    change = sign * (before.scores - after.scores).double()
    count, spread = len(change), float((change**2).sum())
    added = 1.0 if metric.proportion else 0.0
    middle = float(change.sum()) / (count + 2 * added)
    variance = ((spread + added) / (count + 2 * added) - middle**2) / (count + 2 * added)
    half = 1.96 * math.sqrt(max(0.0, variance))
    return middle - half, float(change.mean()), middle + half


def _line(recipe: Recipe) -> str:
    return " + ".join(map(repr, recipe.steps)) or "the model as it is"


def _gain(found: Facts, a: Advice) -> str:
    untimed = "no speed of its own" if a.fits else "speed not measured"
    speed = (untimed if math.isnan(a.speedup) else
             f"{a.speedup:.1f} times the speed of eager PyTorch")  # fmt: skip
    return (f"{a.size_bytes / 1000:,.1f} kB, {found.size_bytes / a.size_bytes:.1f} times smaller; "
            f"{speed}; {a.lost:+.4f} lost ({a.lost_low:+.4f} to {a.lost_high:+.4f})")  # fmt: skip


def _described(f: Facts) -> str:
    top, busy = f.top("weight_share"), f.top("time_share")
    return (
        f"{f.size_bytes / 1000:,.1f} kB, of which {top['layer']} ({top['type']}) holds "
        f"{top['weight_share']:.0%}; {f.latency_ms:.2f} ms for one example in eager PyTorch, of "
        f"which {busy['layer']} ({busy['type']}) takes {busy['time_share']:.0%} and "
        f"{f.fixed_share:.0%} does not depend on the number of examples."
    )
