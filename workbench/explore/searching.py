"""Find the recipe for a budget: "at most 60 kB, at most 1 point lost, fastest".

Most candidates are only looked at: built without training, which takes a second, their size and
their loss on a few validation examples. The few that these cheap proxies favour are trained, and
kept as they were where training does harm. What is found is then trained again with other seeds and
scored on the test examples, which the search never saw. All that was tried lies in a database, so
that a search that was stopped goes on.
"""

import contextlib
import hashlib
import html
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from workbench import models
from workbench.compress import computed, sensitivity
from workbench.compress.recipe import (
    FineTune,
    Prune,
    PruneStructured,
    Recipe,
    ShareWeights,
    Step,
    device_of,
)
from workbench.data import Task
from workbench.deploy.runtimes import prepare
from workbench.explore import limits as choosing
from workbench.explore import plots
from workbench.explore.code import code_of
from workbench.explore.limits import Limits, Objective
from workbench.explore.spaces import CLUSTERS, SPARSITIES, Channels, Codes
from workbench.measure import accuracy, size
from workbench.measure.latency import measure_latency
from workbench.training import Evaluation, evaluate

VERSION = 2  # of what is kept in the database
ROUND = 8  # candidates that are looked at before the best of them are trained
TIMED = 6  # candidates whose latency is measured
REPAIR = FineTune()
POLISH = FineTune(optimizer=partial(torch.optim.AdamW, lr=5e-4, weight_decay=0))


@dataclass(frozen=True)
class Search:
    """What `search` found. ``winner`` is a row of ``frame``, None if nothing keeps to the limits.

    ``frame`` has the model itself, then a row for each candidate, with the columns of
    `workbench.measure.compare` that are known, and these:

    - ``stage``: "baseline", "screened" (no training, few validation examples) or "trained" (unless
      training did harm: the recipe says it), and scored on all validation examples;
    - ``lost``: how much worse the score is than the model's own on the same examples;
    - ``harm``: the same for the loss, ``predicted`` what the sensitivity of the layers says of it;
    - ``recipe``: as JSON.

    ``tested`` has a row for each seed that the winner was trained with: ``seed``, ``size_bytes``,
    ``score`` and ``lost`` on the test examples, and ``promised``, what it lost on validation.
    ``promised`` and ``lost`` are the means; ``lost`` has its 95 % interval over the examples,
    ``lost_low`` to ``lost_high``. ``model`` is the one of the first seed.
    """

    frame: pd.DataFrame
    limits: Limits
    objective: Objective
    winner: pd.Series | None = None
    model: nn.Module | None = None
    tested: pd.DataFrame | None = None
    promised: float = math.nan
    lost: float = math.nan
    lost_low: float = math.nan
    lost_high: float = math.nan

    @cached_property
    def recipe(self) -> Recipe | None:
        """The winner's recipe."""
        return None if self.winner is None else Recipe.from_json(self.winner.recipe)

    @property
    def front(self) -> pd.DataFrame:
        """The trained candidates that no other beats on both cost and score."""
        trained = self.frame[self.frame.stage.eq("trained") & self.frame[self.cost].notna()]
        names = plots.pareto_front(trained, self.cost) if len(trained) else []
        return trained.set_index("name").loc[names].reset_index()

    @property
    def cost(self) -> str:
        """The column that is traded against the score."""
        return "latency_ms" if self.objective == "fastest" else "size_bytes"

    @property
    def code(self) -> str:
        """Python that makes the winner of ``model`` and ``task``."""
        if self.recipe is None:
            raise ValueError("nothing keeps to the limits, so there is no recipe to open as code")
        return code_of(self.recipe)

    def plot(self) -> plots.Picture:
        """All candidates: what they cost, and what they lose."""
        name = None if self.winner is None else self.winner["name"]
        return plots.found(
            self.frame, size_bytes=self.limits.size_bytes, lost=self.limits.score_lost, winner=name
        )

    def __str__(self) -> str:
        frame, best = self.frame, self.winner
        trained, looked = (int(frame.stage.eq(stage).sum()) for stage in ("trained", "screened"))
        count = f"{looked} looked at, {trained} trained"
        if best is None:
            least = frame.lost[frame.stage.eq("trained")].min()
            near = f"; the least that one lost is {_lost(least, frame)}" if trained else ""
            return f"Nothing keeps to the limits: {count}{near}. Go on for longer, or allow more."
        speed = f", {best.speedup:.3g} times as fast" if self.objective == "fastest" else ""
        line = (
            f"The {self.objective} is {best['name']}: {best.size_bytes / 1e3:.4g} kB{speed}, lost "
            f"{_lost(best.lost, frame)} on validation ({count})."
        )
        if self.tested is None:
            return line
        low, high = (_lost(value, frame) for value in (self.lost_low, self.lost_high))
        return (
            f"{line} Trained with {len(self.tested)} seeds it lost {_lost(self.promised, frame)} "
            f"there, and {_lost(self.lost, frame)} on the test examples, between {low} and {high} "
            "with 95 % confidence."
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        steps = "" if self.recipe is None else self.recipe._repr_html_()
        return f"<p>{html.escape(str(self))}</p>{steps}"


def search(
    model: nn.Module,
    task: Task,
    limits: Limits,
    *,
    objective: Objective = "most accurate",
    minutes: float = 10,
    candidates: int | None = None,
    storage: str | os.PathLike = "search.db",
    recipes: Mapping[str, Recipe] | None = None,
    repair: Step = REPAIR,
    polish: Step = POLISH,
    seeds: int = 3,
    examples: int = 500,
    codec: str | None = "auto",
    executor: Executor | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Search:
    """The best recipe within ``limits``: hundreds are looked at, the most promising are trained.

    For "smallest" and "most accurate" each layer gets its own sparsity and number of shared values;
    for "fastest" channels go and int8 kernels run, in ONNX Runtime, whose file is then what counts.
    The search starts from the plans that the sensitivity of the layers makes for the limit of size,
    and goes on by optuna's tree of Parzen estimators for size (or MACs) and harm.

    Interrupt it at any time; the same call goes on where it was stopped, even after its process was
    killed. With the same seed and number of candidates it tries the same candidates, whether it was
    stopped or not, with an executor or without.

    Args:
        limits: ``size_bytes`` and ``score_lost``, from `workbench.explore.limits`.
        minutes: of this call. Time to train the winner again is set aside; what was begun is ended.
        candidates: end sooner, after the round of eight in which so many were looked at.
        storage: a file, made if it is not there, or the URL of a database that several machines
            search in together ("postgresql://..."). It keeps many searches apart.
        recipes: of your own, by name; they are trained first, as they are.
        repair: trains a candidate after what removes weights or channels.
        polish: trains the shared values.
        seeds: how many times the winner is trained.
        examples: of validation, for candidates that are not trained. Those that are, are scored on
            all.
        codec: codes the files, as in `workbench.measure.artifact_bytes`; None for plain ones.
        executor: works on the candidates of a round, if given.
        seed: of the search, and the first one of the training.

    Raises:
        ImportError: optuna is not installed.
        ValueError: no limit, an unknown objective, or a number out of range.

    References: Ozaki et al. (2022), "Multiobjective tree-structured Parzen estimator"; He et al.
    (2018), "AMC: AutoML for model compression and acceleration on mobile devices".

    Shown in notebook 16.
    """
    recipes = dict(recipes or {})
    _check(limits, objective, minutes, candidates, seeds, examples, recipes)
    # Whatever a step or a technique looks at, it is not the test split.
    blind = replace(task, test=task.validation)
    part = blind.validation.subset(min(examples, len(blind.validation)), seed=seed)
    few = replace(blind, validation=part, test=part)
    how = _How(objective, codec, repair, polish, seed)
    key = _key(model, task, limits, recipes, how, examples)
    study = _open(storage, key)
    shared = "://" in str(storage)
    run = _Run(model, blind, few, limits, how, study, recipes, shared, executor, progress)
    run.go(time.monotonic() + 60 * minutes, candidates, seeds)
    return run.finish(task, seeds)


@dataclass(frozen=True)
class _How:
    """What decides how a candidate is made and measured, beside its recipe."""

    objective: Objective
    codec: str | None
    repair: Step
    polish: Step
    seed: int

    def trained(self, recipe: Recipe, seed: int) -> Recipe:
        """The recipe with training after each step that removes or shares weights."""
        after = {Prune: self.repair, PruneStructured: self.repair, ShareWeights: self.polish}
        steps = [s for step in recipe.steps for s in (step, after.get(type(step))) if s is not None]
        return _seeded(Recipe(*steps), seed)

    def ready(self, model: nn.Module, task: Task) -> Callable[..., Tensor]:
        """The model as it will be used."""
        if self.objective != "fastest":
            return model
        return prepare(model, "onnxruntime", example_input=task.example_input)

    def size_bytes(self, ready: Callable[..., Tensor]) -> int:
        codec = self.codec if self.objective != "fastest" else None  # the runtime's own file
        return size.artifact_bytes(ready, codec=codec)


class _Run:
    """A search at work. All that it knows lies in the study, so that any process can go on."""

    def __init__(self, model, blind, few, limits, how, study, recipes, shared, executor, progress):
        self.model, self.blind, self.few, self.limits = model, blind, few, limits
        self.how, self.study, self.recipes, self.shared = how, study, recipes, shared
        self.executor, self.progress = executor, progress
        self.live = _Live(progress)

    def go(self, deadline: float, candidates: int | None, seeds: int) -> None:
        """Look and train until the time or the number of candidates is reached."""
        self.deadline, self.seeds = deadline, seeds
        dense = self._known("dense", self._dense)
        space = self._space()
        self._known("started", partial(self._start, space, dense["bytes"]))
        with tqdm(desc="search", unit="candidate", disable=not self.progress) as bar:
            self._train([*self.recipes], bar)
            for index in itertools.count():
                first, last = index * ROUND, (index + 1) * ROUND
                if (candidates is not None and first >= candidates) or not self._time(0):
                    return
                if not self._screen(space, first, last, bar):
                    return
                key = f"round {index}"
                if key in self.study.user_attrs and self.shared:
                    continue  # of another machine
                self._train(self._known(key, lambda last=last: self._nominees(last)), bar)
                self.live.show(lambda: Search(self.frame(), self.limits, self.how.objective))

    def finish(self, task: Task, seeds: int) -> Search:
        """Choose the winner; train it again, and score it on the test examples."""
        frame = self.frame()
        if self.how.objective == "fastest":
            frame = self._timed(frame)
        trained = frame[frame.stage.ne("screened")]
        fits = choosing.remaining(trained, self.limits)
        winner = choosing.winner(fits[fits.stage.eq("trained")], self.how.objective)
        if winner is None or seeds == 0:
            return Search(frame, self.limits, self.how.objective, winner)
        recipe = Recipe.from_json(winner.recipe)
        first, rows, lost = None, [], []
        dense = evaluate(self.how.ready(self.model, task), task).scores.double()
        for seed in range(self.how.seed, self.how.seed + seeds):
            small = _made(_seeded(recipe, seed), self.model, self.few, self.blind)
            ready = self.how.ready(small, task)
            scores = evaluate(ready, task).scores.double()
            lost.append(_worse(dense, scores, task))
            chosen_by = evaluate(ready, task, split="validation").value
            rows.append({
                "seed": seed, "size_bytes": self.how.size_bytes(ready),
                "score": scores.mean().item(), "lost": lost[-1].mean().item(),
                "promised": _sign(task) * (chosen_by - frame.score[0]),
            })  # fmt: skip
            first = small if first is None else first
        # One number for each example, so that the interval is that of other examples.
        each = torch.stack(lost).mean(0)
        low, high = accuracy.interval(each, proportion=False)
        tested = pd.DataFrame(rows)
        return Search(
            frame, self.limits, self.how.objective, winner, first, tested,
            tested.promised.mean(), each.mean().item(), low, high,
        )  # fmt: skip

    def frame(self) -> pd.DataFrame:
        """All that is known, as `Search.frame`."""
        attributes, metric = self.study.user_attrs, self.blind.metric
        dense = attributes["dense"]
        rows = [{"name": "model", "technique": "none", "stage": "baseline", "recipe": "",
                 "verdict": "baseline", "lost": 0.0, "harm": 0.0} | dense["row"]]  # fmt: skip
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.name == "COMPLETE":
                name = f"candidate {trial.number}"
                rows.append({"name": name, "stage": "screened"} | trial.user_attrs["row"])
        for key, row in attributes.items():
            if key.startswith("trained "):
                name = key.removeprefix("trained ")
                rows.append({"name": name, "stage": "trained"} | row)
        blank = {"runtime": "onnxruntime" if self.how.objective == "fastest" else "eager"}
        blank |= {"metric": metric.name, "higher_is_better": metric.higher_is_better}
        blank |= {"latency_ms": math.nan, "speedup": math.nan, "verdict": "", "error": ""}
        frame = pd.DataFrame([blank | row for row in rows])
        # A candidate that was trained stands there once, as what it is then.
        trained = set(frame.name[frame.stage.eq("trained")])
        again = frame.stage.eq("screened") & frame.name.isin(trained)
        return frame[~again].reset_index(drop=True)

    def _dense(self) -> dict:
        """The model's own score and loss, on all validation examples and on the few."""
        start = time.monotonic()
        ready = self.how.ready(self.model, self.blind)
        whole = evaluate(ready, self.blind, split="validation")
        seconds = time.monotonic() - start
        few = evaluate(self.model, self.few, split="validation", device=device_of(self.model))
        macs = size.macs(self.model, self.blind.example_input)
        row = {"size_bytes": self.how.size_bytes(ready), "score": whole.value, "macs": macs,
               "simulated": False}  # fmt: skip
        file_bytes = models.file_bytes(self.model)
        return {"row": row, "few": [few.value, few.loss], "seconds": seconds, "bytes": file_bytes}

    def _space(self) -> Codes | Channels:
        if self.how.objective == "fastest":
            return Channels()
        tables = []
        for step, levels in ((Prune(), SPARSITIES[1:]), (ShareWeights(), CLUSTERS)):
            kept = self._known(f"sensitivity {step}", partial(self._sensitivity, step, levels))
            tables.append(pd.DataFrame(kept))
        return Codes(*tables, coded=self.how.codec is not None)

    def _sensitivity(self, step: Step, levels: Sequence[float]) -> list[dict]:
        if isinstance(step, Prune) and self.how.codec is None:
            levels = levels[:1]  # nothing will be pruned
        table = sensitivity(
            self.model, self.few, step, levels, examples=None, executor=self.executor,
            progress=self.progress,
        )  # fmt: skip
        columns = ["layer", "shared_with", "level", "weights", "dense_bytes", "model_bytes",
                   "loss_increase"]  # fmt: skip
        return json.loads(table[columns].to_json(orient="records"))

    def _start(self, space: Codes | Channels, dense_bytes: int) -> bool:
        for parameters in space.starts(self.limits, dense_bytes):
            self.study.enqueue_trial(parameters, skip_if_exists=True)
        return True

    def _screen(self, space: Codes | Channels, first: int, last: int, bar: tqdm) -> bool:
        """Look at the candidates of a round that nobody has looked at; False if time ran out."""
        from optuna import Trial
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        mine = []
        while (number := len(self._asked())) < last:
            # A sampler of its own for each number: what it draws depends on nothing but the seed
            # and the trials so far, however often the search was stopped.
            self.study.sampler = TPESampler(
                seed=self.how.seed + number, n_startup_trials=ROUND, multivariate=True
            )
            trial = self.study.ask()
            space.recipe(trial)
            mine.append(trial.number)
        open_trials = [t for t in self._asked()[first:last] if t.state == TrialState.RUNNING]
        if self.shared:  # what others have asked for is theirs
            open_trials = [t for t in open_trials if t.number in mine]
        trials = [Trial(self.study, trial._trial_id) for trial in open_trials]
        few_dense = self.study.user_attrs["dense"]["few"]
        jobs = [(self.model, self.few, _seeded(space.recipe(trial), self.how.seed), self.how,
                 few_dense) for trial in trials]  # fmt: skip
        done = 0
        for trial, job, row in zip(trials, jobs, self._map(_screened, jobs, 0), strict=False):
            done += 1
            bar.update()
            if "error" in row:
                trial.set_user_attr("error", row["error"])
                self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
                continue
            row["predicted"] = space.predicted(job[2])
            trial.set_user_attr("row", row)
            if self.limits.size_bytes < math.inf:
                trial.set_constraint("size", row["size_bytes"] / self.limits.size_bytes - 1)
            self.study.tell(trial, [row[space.cost], row["harm"]], skip_if_finished=True)
        return done == len(jobs)

    def _asked(self) -> list:
        trials = self.study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.state.name != "WAITING"]

    def _nominees(self, last: int) -> list[str]:
        """Of the candidates so far, those that each proxy favours and that are worth training."""
        frame = self.frame()
        number = frame.name.str.extract(r"^candidate (\d+)$")[0].astype(float)
        screened = frame[frame.stage.eq("screened") & (number < last)]
        screened = screened[screened.size_bytes <= self.limits.size_bytes]
        if self.how.objective != "most accurate":
            cost = "macs" if self.how.objective == "fastest" else "size_bytes"
            trained = frame[frame.stage.eq("trained") & frame.score.notna()]
            screened = _to_train(screened, trained, cost, self.limits)
        favourites = [screened[p].dropna() for p in ("harm", "predicted") if p in screened]
        return list(dict.fromkeys(screened.name[f.idxmin()] for f in favourites if len(f)))

    def _train(self, names: Sequence[str], bar: tqdm) -> None:
        """Train those that are not yet trained, as long as there is time."""
        missing = [n for n in names if f"trained {n}" not in self.study.user_attrs]
        screened = {f"candidate {t.number}": t for t in self.study.get_trials(deepcopy=False)}
        jobs = []
        for name in missing:
            if name in self.recipes:
                ways = [_seeded(self.recipes[name], self.how.seed)]
            else:  # training may do harm where little was taken away
                bare = Recipe.from_json(screened[name].user_attrs["row"]["recipe"])
                ways = [bare, self.how.trained(bare, self.how.seed)]
            dense = self.study.user_attrs["dense"]["row"]["score"]
            jobs.append((self.model, self.few, self.blind, ways, self.how, dense))
        needed = max([row["seconds"] for row in self._trained()], default=0)
        results = self._map(_trained, jobs, needed)
        for name, row in zip(missing, results, strict=False):
            bar.set_postfix_str(f"{name} trained")
            self.study.set_user_attr(f"trained {name}", row)

    def _trained(self) -> list[dict]:
        attributes = self.study.user_attrs.items()
        return [row for key, row in attributes if key.startswith("trained ")]

    def _timed(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The latency of the cheapest that fit, all in one run: it depends on no trained weight."""
        fits = choosing.remaining(frame[frame.stage.ne("screened")], self.limits)
        chosen = fits[fits.stage.eq("trained")].nsmallest(TIMED, "macs")
        predictors = {"model": self.how.ready(self.model, self.blind)}
        for name, text in zip(chosen.name, chosen.recipe, strict=True):
            steps = [s for s in Recipe.from_json(text).steps if not hasattr(s, "optimizer")]
            small = _made(Recipe(*steps), self.model, self.few, self.few)
            predictors[name] = self.how.ready(small, self.blind)
        summary = measure_latency(predictors, self.blind.example_input, seed=self.how.seed).summary
        frame = frame.set_index("name")
        columns = ["latency_ms", "latency_low_ms", "latency_high_ms", "speedup", "speedup_low",
                   "speedup_high", "verdict"]  # fmt: skip
        for column in columns:
            frame.loc[summary.index, column] = summary[column]
        return frame.reset_index()

    def _known(self, key: str, make: Callable[[], object]) -> object:
        """What the study holds under ``key``, made and kept if it is not there."""
        if key not in self.study.user_attrs:
            self.study.set_user_attr(key, make())
        return self.study.user_attrs[key]

    def _time(self, seconds: float) -> bool:
        """Whether there is time for work of so many seconds, and to train the winner after it."""
        longest = max([row["seconds"] for row in self._trained()], default=0)
        dense = self.study.user_attrs["dense"]
        set_aside = self.seeds * longest + (self.seeds + 1) * 2 * dense["seconds"]
        return time.monotonic() + seconds + set_aside < self.deadline

    def _map(self, function: Callable, jobs: list[tuple], seconds: float) -> Iterator[dict]:
        """Results in order; ends early where there is no time for another."""
        if self.executor is None:
            for job in jobs:
                if not self._time(seconds):
                    return
                yield function(job)
            return
        if not self._time(seconds):
            return
        futures = [self.executor.submit(function, job) for job in jobs]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def _screened(job: tuple) -> dict:
    """What a candidate is worth and costs without training."""
    model, few, recipe, how, (value, loss) = job
    try:
        small = _made(recipe, model, few, few)
        found = evaluate(small, few, split="validation", device=device_of(small))
    except ValueError as error:  # out of reach, as a share of channels can be
        return {"error": str(error)}
    codec = how.codec if how.objective != "fastest" else None
    row = _facts(small, few, recipe, size.artifact_bytes(small, codec=codec), how)
    worse = _sign(few) * (found.value - value)
    return row | {"score": found.value, "lost": worse, "harm": found.loss - loss}


def _trained(job: tuple) -> dict:
    """What it is worth and costs, on all validation examples, in the way that loses least."""
    model, few, task, ways, how, dense = job
    start = time.monotonic()
    rows = [_evaluated(model, few, task, recipe, how, dense) for recipe in ways]
    best = min(rows, key=lambda row: (math.isnan(row["lost"]), row["lost"]))
    return best | {"seconds": time.monotonic() - start}


def _evaluated(
    model: nn.Module, few: Task, task: Task, recipe: Recipe, how: _How, dense: float
) -> dict:
    try:
        small = _made(recipe, model, few, task)
        ready = how.ready(small, task)
        found: Evaluation = evaluate(ready, task, split="validation")
    except ValueError as error:
        return {"error": str(error), "score": math.nan, "lost": math.nan, "size_bytes": math.nan,
                "technique": "none", "simulated": False, "recipe": recipe.to_json()}  # fmt: skip
    row = _facts(small, few, recipe, how.size_bytes(ready), how)
    if how.objective == "fastest":
        row["simulated"] = ready.simulated
    return row | {"score": found.value, "lost": _sign(task) * (found.value - dense)}


def _to_train(
    screened: pd.DataFrame, trained: pd.DataFrame, cost: str, limits: Limits
) -> pd.DataFrame:
    """Those that cost half of the cheapest that kept its score, or lie between it and what did not.

    Where none does, all that are cheaper.
    """
    keeps = trained.lost <= limits.score_lost
    good = trained[cost][keeps & (trained.size_bytes <= limits.size_bytes)].min()
    if math.isnan(good):
        return screened
    bad = trained[cost][~keeps & (trained[cost] < good)].max()
    aim = good / 2 if math.isnan(bad) else math.sqrt(good * bad)
    cheaper = screened[screened[cost] <= 0.95 * good]
    near = cheaper[cheaper[cost].between(0.8 * aim, 1.25 * aim)]
    return near if len(near) else cheaper


def _facts(small: nn.Module, task: Task, recipe: Recipe, size_bytes: int, how: _How) -> dict:
    return {
        "technique": " + ".join(computed.steps(small)) or "none",
        "size_bytes": size_bytes,
        "macs": size.macs(small, task.example_input),
        "simulated": how.objective != "fastest",
        "recipe": recipe.to_json(),
    }


def _made(recipe: Recipe, model: nn.Module, few: Task, task: Task) -> nn.Module:
    """What the recipe makes; the epoch to keep is chosen on few examples, which saves time."""
    task, work = replace(task, validation=few.validation), model
    for step in recipe.steps:
        work = step(work, task, teacher=model, progress=False)
    return work


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    return Recipe(*(replace(s, seed=seed) if hasattr(s, "seed") else s for s in recipe.steps))


def _worse(before: Tensor, after: Tensor, task: Task) -> Tensor:
    return _sign(task) * (after - before)


def _sign(task: Task) -> int:
    return -1 if task.metric.higher_is_better else 1


def _lost(value: float, frame: pd.DataFrame) -> str:
    return f"{100 * value:.2f} points" if plots.is_percent(frame) else f"{value:.4g}"


def _check(limits, objective, minutes, candidates, seeds, examples, recipes) -> None:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("the search needs optuna; install it with: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if objective not in choosing.OBJECTIVES:
        raise ValueError(f"objective is {objective!r}; choose one of {choosing.OBJECTIVES}")
    if limits.size_bytes == math.inf and limits.score_lost == math.inf:
        raise ValueError("limits has neither size_bytes nor score_lost; give at least one")
    if not limits.size_bytes > 0:
        raise ValueError(f"size_bytes is {limits.size_bytes}; give a number above 0")
    if not limits.simulated and objective != "fastest":
        raise ValueError(
            f"limits refuses simulated candidates, but no kernel runs what is the {objective}; use "
            "objective='fastest'"
        )
    for name, value, least in (("minutes", minutes, 0), ("candidates", candidates, 0),
                               ("seeds", seeds, 0), ("examples", examples, 1)):  # fmt: skip
        if value is not None and not value >= least:
            raise ValueError(f"{name} is {value}; give {least} or more")
    for name in recipes:
        if name == "model" or name.startswith("candidate "):
            raise ValueError(f"a recipe is called {name!r}, as rows of the frame are; rename it")


def _open(storage: str | os.PathLike, key: str):
    import optuna

    url = str(storage) if "://" in str(storage) else f"sqlite:///{Path(storage).resolve()}"
    return optuna.create_study(
        storage=optuna.storages.RDBStorage(url), study_name=key, load_if_exists=True,
        directions=["minimize", "minimize"],
    )  # fmt: skip


def _key(model, task, limits, recipes, how, examples) -> str:
    """Of all that decides what the search finds: another model or limit is another search."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        models.save(model, path)
        digest.update(path.read_bytes())
    written = {name: recipe.to_json() for name, recipe in recipes.items()}
    training = [Recipe(step).to_json() for step in (how.repair, how.polish)]
    limited = (sorted(limits.techniques or ()), limits.size_bytes, limits.score_lost)
    lengths = (len(task.train), len(task.validation))
    said = (VERSION, task.name, lengths, limited, limits.simulated, how.objective, how.codec,
            how.seed, examples, training, written)  # fmt: skip
    digest.update(repr(said).encode())
    return f"{task.name} {digest.hexdigest()[:16]}"


class _Live:
    """The picture of the search, drawn anew in a notebook as it goes on."""

    def __init__(self, wanted: bool):
        self.handle = None
        with contextlib.suppress(ImportError):
            from IPython import get_ipython

            self.wanted = wanted and hasattr(get_ipython(), "kernel")

    def show(self, found: Callable[[], Search]) -> None:
        if not self.wanted:
            return
        from IPython.display import display

        picture = found().plot()
        if self.handle is None:
            self.handle = display(picture, display_id=True)
        else:
            self.handle.update(picture)
