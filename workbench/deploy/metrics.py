"""What the server counts, in the format of Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from workbench.deploy.repository import Repository

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_EXAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_STATES = {
    "queued_examples": "Examples that wait for a worker",
    "wait_seconds": "Estimated wait of a request that comes now",
    "batch_limit": "Most examples of the next batch",
    "workers": "Worker processes",
    "workers_busy": "Worker processes that compute",
    "shedding": "1 while a long queue is refused",
}


class Metrics:
    """Counters and histograms of one server; gauges are read when somebody asks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "workbench_requests", "Answers by status", ["model", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "workbench_request_seconds", "From the headers of a request to its answer", ["model"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.batch_examples = Histogram(
            "workbench_batch_examples", "Examples computed together", ["model"],
            buckets=_EXAMPLES, registry=self.registry,
        )  # fmt: skip
        self.batch_seconds = Histogram(
            "workbench_batch_seconds", "Time of one batch, the way to the worker included",
            ["model"], buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip

    def request(self, model: str, status: int, seconds: float) -> None:
        """Count an answer; ``model`` is "" where none of the loaded ones was asked."""
        self.requests.labels(model, status).inc()
        self.seconds.labels(model).observe(seconds)

    def batch(self, model: str, examples: int, seconds: float) -> None:
        self.batch_examples.labels(model).observe(examples)
        self.batch_seconds.labels(model).observe(seconds)

    def watch(self, repository: Repository) -> None:
        """Tell the state of these models too."""
        self.registry.register(_States(repository))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _States:
    def __init__(self, repository: Repository):
        self.repository = repository

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        labels = ["model", "version"]
        gauges = {
            key: GaugeMetricFamily(f"workbench_{key}", text, labels=labels)
            for key, text in _STATES.items()
        }
        share = GaugeMetricFamily("workbench_version_share", "Share of traffic", labels=labels)
        swaps = CounterMetricFamily("workbench_swaps", "Versions swapped", labels=["model"])
        rollbacks = CounterMetricFamily("workbench_rollbacks", "Rolled back", labels=["model"])
        for model in self.repository.ready().values():
            swaps.add_metric([model.name], model.swaps)
            rollbacks.add_metric([model.name], model.rollbacks)
            for version in model.versions.values():
                where = [model.name, version.number]
                for key, value in version.batcher.state().items():
                    gauges[key].add_metric(where, value)
                own = {model.canary: model.share, model.default: 1.0 - model.share}
                share.add_metric(where, own.get(version, 0.0))
        yield from [*gauges.values(), share, swaps, rollbacks]
