"""What a server counts, as Prometheus reads it."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Of one server. Tasks are no labels: there may be thousands."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        own = self.registry
        self.requests = Counter("lpt_requests", "Requests by path and status.", ("path", "status"), registry=own)
        self.seconds = Histogram(
            "lpt_request_seconds", "From headers to answer.", ("path",), buckets=SECONDS, registry=own
        )
        self.questions = Counter("lpt_questions", "Images asked about, by their own status.", ("status",), registry=own)
        self.batch = Histogram("lpt_batch_size", "Images answered together.", buckets=SIZES, registry=own)
        self.batch_seconds = Histogram("lpt_batch_seconds", "Of a batch.", buckets=SECONDS, registry=own)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(name, text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
