"""Size, speed and accuracy of several models in one table, with how sure one can be of each."""

import contextlib
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm.auto import tqdm

from workbench.compress import computed
from workbench.data import Split, Task
from workbench.deploy.runtimes import RUNTIMES, Predictor, prepare
from workbench.measure import accuracy, size
from workbench.measure.latency import REPEATS, choose_baseline, describe, measure_latency
from workbench.training import Evaluation, evaluate, evaluation_mode

Candidate = nn.Module | tuple[nn.Module, str] | Predictor | Callable[..., Tensor]

COLUMNS = (
    "name", "technique", "runtime", "device", "threads", "batch_size", "simulated",
    "size_bytes", "compression_ratio", "parameters", "nonzeros", "macs",
    "metric", "higher_is_better", "score", "score_low", "score_high", "p_value",
    "latency_ms", "latency_low_ms", "latency_high_ms", "latency_p95_ms",
    "speedup", "speedup_low", "speedup_high", "verdict",
    "peak_memory_bytes", "seed", "note", "error",
)  # fmt: skip


def compare(
    task: Task,
    models: Mapping[str, Candidate],
    *,
    baseline: str | None = None,
    runtime: str = "eager",
    split: Literal["train", "validation", "test"] = "test",
    batch_size: int = 1,
    threads: int = 1,
    repeats: int = REPEATS,
    device: str = "cpu",
    codec: str | Mapping[str, str] | None = None,
    executor: Executor | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure every model on ``task`` and return one row for each.

    Args:
        models: name -> a module, a pair (module, runtime), a `Predictor` or a callable that
            takes the inputs. None of them is changed.
        baseline: name of the model that the others are compared with; the first by default.
        runtime: of the modules that come without one: "eager", "compiled" or "onnxruntime".
        split: the examples that are scored; choose on "validation", report on "test".
        batch_size: examples in one call when latency and memory are measured.
        threads: of one call when latency is measured.
        repeats: rounds of the latency measurement.
        device: "cpu", "cuda", or "auto" (CUDA when present).
        codec: codes the files whose bytes are counted, as `workbench.storage.save` does: of all
            candidates or by name; one that is not named has a plain file. The ``.onnx`` file of an
            ONNX Runtime candidate stays as it is.
        executor: scores the models, if given; one that cannot travel to it is scored here.
            Latency is always measured here, with all candidates in turn.
        seed: of the latency measurement's order and bootstrap.

    Returns:
        A tidy frame; cells that cannot be known are NaN.

        - ``name``, ``technique`` (what was done to the model, in order, or "none"), ``runtime``,
          ``device``, ``threads``, ``batch_size``;
        - ``simulated``: compressed arithmetic is only imitated, so the speed is not its own;
        - ``size_bytes`` of the saved file, ``compression_ratio`` (the baseline's bytes divided
          by these), ``parameters``, ``nonzeros``, ``macs`` for one example;
        - ``metric``, ``higher_is_better``, ``score`` with its 95 % interval ``score_low`` to
          ``score_high``, and ``p_value`` of the paired test against the baseline;
        - ``latency_ms`` (median) with its 95 % interval ``latency_low_ms`` to
          ``latency_high_ms``, ``latency_p95_ms``, ``speedup`` (the baseline's time divided by
          this one's, round by round: see `measure_latency`) with its 95 % interval
          ``speedup_low`` to ``speedup_high``, and ``verdict`` in words;
        - ``peak_memory_bytes`` of one call, beyond weights and inputs (torch runtimes only);
        - ``seed``, ``note``, and ``error``: why this candidate could not be measured, or "". The
          others are measured all the same.

    Raises:
        ValueError: no models, an unknown baseline, runtime, split or codec, a number below 1, more
            examples in a batch than there are, or a split that is read in random order.

    Shown in notebooks 00 and 01.
    """
    baseline = choose_baseline(models, baseline)
    part = _check(task, runtime, split, batch_size, threads, repeats)
    codecs = _codecs(codec, models)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = _first_examples(part, batch_size, split)
    example = tuple(x[:1] for x in inputs)

    rows, predictors = {}, {}

    def failed(name: str, error: str) -> None:
        """Keep what the row says about the candidate, drop what was measured so far."""
        predictors.pop(name, None)
        rows[name] = {key: rows[name][key] for key in _IDENTITY} | {"error": error}

    for name, entry in tqdm(models.items(), desc="prepare", unit="model", disable=not progress):
        candidate, chosen = _candidate_and_runtime(name, entry, runtime)
        rows[name] = _identity(candidate, chosen, device)
        try:
            if isinstance(candidate, nn.Module):
                _check_model(candidate, example)
            predictors[name] = prepare(
                candidate, chosen, example_input=example, device=device, threads=threads
            )
            rows[name] |= _facts(predictors[name], inputs, codecs.get(name))
        except Exception as error:
            failed(name, describe(error))

    evaluations = _evaluate_all(predictors, task, part, executor, progress)
    reference = evaluations.get(baseline)
    for name, evaluation in evaluations.items():
        try:
            rows[name] |= _score_cells(evaluation, task, None if name == baseline else reference)
        except Exception as error:
            failed(name, describe(error))

    if predictors:
        latency = measure_latency(
            predictors,
            inputs,
            repeats=repeats,
            threads=threads,
            seed=seed,
            baseline=baseline if baseline in predictors else None,
            progress=progress,
        ).summary
        for name, row in latency.to_dict("index").items():
            if row["error"]:
                failed(name, row["error"])
            else:
                rows[name] |= row if baseline in predictors else _without_ratios(row)

    before_bytes = rows[baseline].get("size_bytes", math.nan)
    for row in rows.values():
        row["compression_ratio"] = before_bytes / row.get("size_bytes", math.nan)
    shared = {
        "threads": threads,
        "batch_size": batch_size,
        "metric": task.metric.name,
        "higher_is_better": task.metric.higher_is_better,
        "seed": seed,
    }
    blank = {"simulated": False, "verdict": "", "note": "", "error": ""}
    return pd.DataFrame(
        [{"name": name} | shared | blank | row for name, row in rows.items()], columns=list(COLUMNS)
    )


_IDENTITY = ("technique", "runtime", "device")


def _check(
    task: Task, runtime: str, split: str, batch_size: int, threads: int, repeats: int
) -> Split:
    """Refuse what is wrong for all candidates alike; return the split."""
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime is {runtime!r}; choose from {RUNTIMES}")
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split is {split!r}; choose 'train', 'validation' or 'test'")
    counts = (("batch_size", batch_size, 1), ("threads", threads, 1), ("repeats", repeats, 10))
    for name, value, least in counts:
        if value < least:
            raise ValueError(f"{name} is {value}; give {least} or more")
    part = getattr(task, split)
    if isinstance(part.source, DataLoader) and isinstance(part.source.sampler, RandomSampler):
        raise ValueError(
            f"the {split} split is read in random order, so answers cannot be compared example "
            "by example; give a DataLoader with shuffle=False"
        )
    return part


def _codecs(
    codec: str | Mapping[str, str] | None, models: Mapping[str, Candidate]
) -> Mapping[str, str]:
    """The codec of each candidate that has one."""
    if codec is None:
        return {}
    from workbench.storage.streams import CODECS

    found = codec if isinstance(codec, Mapping) else dict.fromkeys(models, codec)
    if unknown := set(found) - set(models):
        raise ValueError(f"codec names {sorted(unknown)}; candidates are {list(models)}")
    if wrong := set(found.values()) - {"auto", *CODECS}:
        raise ValueError(f"codec is {wrong.pop()!r}; choose 'auto' or one of {', '.join(CODECS)}")
    return found


def _first_examples(part: Split, count: int, split: str) -> tuple[Tensor, ...]:
    batches, found = [], 0
    for inputs, _target in part.batches(count):
        batches.append(inputs)
        found += len(inputs[0])
        if found >= count:
            return tuple(torch.cat(pieces)[:count] for pieces in zip(*batches, strict=True))
    raise ValueError(f"batch_size is {count}; the {split} split has {found} examples")


def _candidate_and_runtime(name: str, entry: Candidate, runtime: str) -> tuple[object, str]:
    if not isinstance(entry, tuple):
        # A bare callable runs as it is, whatever the modules beside it are lowered to.
        return entry, runtime if isinstance(entry, nn.Module) else "eager"
    if len(entry) != 2:
        raise TypeError(f"{name} is a tuple of {len(entry)}; give a pair (module, runtime)")
    return entry


def _identity(candidate: object, runtime: str, device: str) -> dict:
    """What can be said of a candidate before anything is done with it."""
    if isinstance(candidate, Predictor):
        runtime, device, candidate = candidate.runtime, candidate.device, candidate.model
    elif not isinstance(candidate, nn.Module):
        runtime = "callable"
    technique = " + ".join(computed.steps(candidate)) or "none"
    return {"technique": technique, "runtime": runtime, "device": device}


def _check_model(model: nn.Module, example: tuple[Tensor, ...]) -> None:
    """Refuse a model that has no weights, bad ones, or does not take the task's inputs."""
    empty = True
    for name, weight in computed.weights(model):
        empty = False
        if weight.is_floating_point() and not weight.isfinite().all():
            bad = "NaN" if weight.isnan().any() else "infinity"
            raise ValueError(f"weight {name} holds {bad}; train the model again, or load it anew")
    if empty:
        raise ValueError(
            f"{type(model).__name__} has no parameters, so there is nothing to compress or count; "
            "pass its forward method instead to measure it as a callable"
        )
    output = _try(model, example)
    if not torch.is_tensor(output):
        raise TypeError(f"the model returns a {type(output).__name__}; return one tensor")
    if output.isnan().any():
        raise ValueError("the model answers NaN; look for a division by zero or an overflow")


def _try(model: nn.Module, example: tuple[Tensor, ...]) -> object:
    """Call the model once; an error names the layer that it came from and what that was given."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    running, hooks = [], []  # the modules that were entered and not yet left, outermost first
    for name, module in model.named_modules():

        def enter(module, inputs, name=name):
            running.append((name, module, inputs))

        def leave(*_):
            running.pop()

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with evaluation_mode(model), torch.no_grad():
            return model(*(x.to(device) for x in example))
    except Exception as error:
        name, module, inputs = running[-1] if running else ("", model, example)
        kind = type(module).__name__ if list(module.children()) else str(module)
        where = f"layer {name} = {kind} was given {_shapes(inputs)}" if name else kind
        raise ValueError(
            f"the model does not take the task's inputs of shape {_shapes(example)}: {where}: "
            f"{error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _shapes(inputs: tuple) -> str:
    return ", ".join(str(tuple(x.shape)) for x in inputs if torch.is_tensor(x))


def _facts(predictor: Predictor, inputs: tuple[Tensor, ...], codec: str | None) -> dict:
    """What a prepared candidate is, before its answers and its speed are looked at."""
    codec = codec if size.can_be_coded(predictor) else None
    facts = {
        "simulated": predictor.simulated,
        "note": "; ".join(filter(None, [predictor.note, codec and f"file coded ({codec})"])),
        "peak_memory_bytes": size.peak_memory_bytes(predictor, inputs),
    }
    if predictor.model is not None:
        facts |= {
            "size_bytes": size.artifact_bytes(predictor, codec=codec),
            "parameters": size.parameters(predictor.model),
            "nonzeros": size.nonzeros(predictor.model),
            "macs": size.macs(predictor.model, inputs),
        }
    elif hasattr(predictor, "artifact"):  # loaded from a file, without its module
        facts["size_bytes"] = len(predictor.artifact)
    return facts


def _evaluate_all(
    predictors: dict[str, Predictor],
    task: Task,
    part: Split,
    executor: Executor | None,
    progress: bool,
) -> dict[str, Evaluation | Exception]:
    """Score every predictor on ``part``; an exception stands in for what could not be scored."""
    task = replace(task, train=part, validation=part, test=part)  # the other splits stay at home
    futures = {}
    found = {}
    try:
        if executor is not None:
            for name, predictor in predictors.items():
                with contextlib.suppress(Exception):  # a broken executor: score it here
                    futures[name] = executor.submit(
                        evaluate, predictor, task, device=predictor.device
                    )
        names = tqdm(predictors, desc="accuracy", unit="model", disable=not progress)
        for name in names:
            if name in futures:
                with contextlib.suppress(Exception):  # it did not travel, or fails anywhere
                    found[name] = futures[name].result()
                    continue
            try:
                found[name] = evaluate(predictors[name], task, device=predictors[name].device)
            except Exception as error:
                found[name] = error
    finally:
        for future in futures.values():
            future.cancel()
    return found


def _score_cells(
    evaluation: Evaluation | Exception, task: Task, reference: Evaluation | Exception | None
) -> dict:
    if isinstance(evaluation, Exception):
        raise evaluation
    proportion = task.metric.proportion
    low, high = accuracy.interval(evaluation.scores, proportion)
    p_value = math.nan
    if isinstance(reference, Evaluation):
        p_value = accuracy.paired_p_value(reference.scores, evaluation.scores, proportion)
    return {
        "score": evaluation.value,
        "score_low": low,
        "score_high": high,
        "p_value": p_value,
    }


def _without_ratios(row: dict) -> dict:
    """The baseline failed: latencies stand, but there is nothing to compare them with."""
    return {key: value for key, value in row.items() if key.endswith("_ms") or key == "error"}
