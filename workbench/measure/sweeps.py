"""Latency and throughput over batch sizes and threads: what they buy, and where it ends."""

from collections.abc import Iterable, Mapping

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from workbench.deploy.runtimes import Predictor, prepare
from workbench.measure.latency import measure_latency


def batch_and_threads(
    candidates: Mapping[str, tuple[nn.Module, str] | Predictor],
    inputs: Tensor | tuple[Tensor, ...],
    *,
    batches: Iterable[int] = (1, 8, 64),
    threads: Iterable[int] = (1,),
    device: str = "cpu",
    repeats: int = 10,
    progress: bool = True,
) -> pd.DataFrame:
    """Time each candidate at each batch size and number of threads; candidates in turn.

    Args:
        candidates: name -> (model, runtime), or a Predictor, whose own threads are then kept.
        inputs: at least as many examples as the largest batch.
        repeats: rounds of each measurement, as in `measure_latency`.

    Returns one row per measurement: ``name``, ``batch``, ``threads``, ``latency_ms`` with its
    interval, and ``examples_s``.

    Raises:
        ValueError: no candidates, or a batch below 1 or above the number of examples.
    """
    inputs = (inputs,) if torch.is_tensor(inputs) else tuple(inputs)
    batches, threads = list(batches), list(threads)
    for batch in batches:
        if not 1 <= batch <= len(inputs[0]):
            raise ValueError(f"batch is {batch}; give 1 to {len(inputs[0])}, or more examples")
    rows = []
    bar = tqdm(total=len(threads) * len(batches), desc="sweep", disable=not progress)
    for count in threads:
        predictors = {
            name: candidate
            if isinstance(candidate, Predictor)
            else prepare(
                *candidate,
                example_input=tuple(x[:1] for x in inputs),
                device=device,
                threads=count,
            )
            for name, candidate in candidates.items()
        }
        for batch in batches:
            examples = tuple(x[:batch] for x in inputs)
            timed = measure_latency(predictors, examples, threads=count, repeats=repeats).summary
            columns = timed[["latency_ms", "latency_low_ms", "latency_high_ms", "error"]]
            rows.append(columns.reset_index().assign(batch=batch, threads=count))
            bar.update()
    bar.close()
    frame = pd.concat(rows, ignore_index=True)
    frame["examples_s"] = frame["batch"] / (frame["latency_ms"] / 1e3)
    return frame
