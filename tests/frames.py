"""Frames as `workbench.measure.compare` makes them, with made-up numbers."""

import math

import pandas as pd

#  name, technique, runtime, simulated, size_bytes, score, latency_ms, error
ROWS = (
    ("fp32", "none", "eager", False, 2_764_520, 0.9361, 4.10, ""),
    ("fp32, onnxruntime", "none", "onnxruntime", False, 2_771_004, 0.9361, 2.87, ""),
    ("fp32, compiled", "none", "compiled", False, 2_764_520, 0.9361, 3.55, ""),
    ("int8 static", "int8 static per channel", "onnxruntime", False, 731_220, 0.9352, 0.74, ""),
    ("int8 per tensor", "int8 static per tensor", "onnxruntime", False, 722_008,
     0.9330, 0.73, ""),
    ("4 bits", "4-bit per channel weights", "eager", True, 372_416, 0.9298, 4.32, ""),
    ("2 bits", "2-bit per channel weights", "eager", True, 201_304, 0.8120, 4.30, ""),
    ("broken", "int8 dynamic per channel", "onnxruntime", False, math.nan, math.nan, math.nan,
     "layer <conv1> cannot be quantized"),
)  # fmt: skip


def frame(rows=ROWS, *, metric: str = "accuracy", higher_is_better: bool = True) -> pd.DataFrame:
    """All the columns of a comparison; the first row is the baseline."""
    base = rows[0]
    records = []
    for name, technique, runtime, simulated, size, score, latency, error in rows:
        half = 0.0049 if higher_is_better else 0.01
        speedup = base[6] / latency
        verdict = f"{speedup:.1f} times faster" if speedup > 1 else "no measurable difference"
        verdict = "simulated (no measurable difference)" if simulated else verdict
        records.append(
            {
                "name": name, "technique": technique, "runtime": runtime, "device": "cpu",
                "threads": 1, "batch_size": 1, "simulated": simulated, "size_bytes": size,
                "compression_ratio": base[4] / size, "parameters": 688_394, "nonzeros": 688_000,
                "macs": 25_100_000, "metric": metric, "higher_is_better": higher_is_better,
                "score": score, "score_low": score - half, "score_high": score + half,
                "p_value": math.nan if name == base[0] else 0.31, "latency_ms": latency,
                "latency_low_ms": 0.95 * latency, "latency_high_ms": 1.06 * latency,
                "latency_p95_ms": 1.3 * latency, "speedup": speedup,
                "speedup_low": 0.95 * speedup, "speedup_high": 1.05 * speedup,
                "verdict": "baseline" if name == base[0] else "" if error else verdict,
                "peak_memory_bytes": math.nan, "seed": 0, "note": "", "error": error,
            }
        )  # fmt: skip
    return pd.DataFrame(records)


def bits_frame() -> pd.DataFrame:
    """A comparison whose metric is better when it is lower."""
    rows = (
        ("fp32", "none", "eager", False, 4_100_000, 1.95, 9.0, ""),
        (
            "int8 dynamic",
            "int8 dynamic per channel",
            "onnxruntime",
            False,
            1_100_000,
            1.96,
            4.0,
            "",
        ),
        ("4 bits", "4-bit per channel weights", "eager", True, 600_000, 2.21, 9.1, ""),
    )
    return frame(rows, metric="bits per character", higher_is_better=False)
