"""What a server counts, in the text format of Prometheus (`/metrics`)."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "lara_requests",
            "Requests answered, by protocol and by what came of them: ok, refused or failed.",
            ["protocol", "outcome"],
            registry=self._registry,
        )
        self.turned_away = Counter(
            "lara_connections_turned_away",
            "Connections closed by the server, by reason.",
            ["reason"],
            registry=self._registry,
        )
        self.connections = Gauge(
            "lara_connections", "Clients connected now.", registry=self._registry
        )
        self.request_seconds = self._histogram(
            "lara_request_seconds", "From a request's arrival to its answer.", SECONDS
        )
        self.policy_seconds = self._histogram(
            "lara_policy_seconds", "One call of the policy.", SECONDS
        )
        self.batch_rows = self._histogram(
            "lara_batch_observations", "Observations in one call of the policy.", ROWS
        )

    def text(self) -> str:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry).decode()

    def called(self, rows: int, seconds: float) -> None:
        """Counts a call of the policy."""
        self.batch_rows.observe(rows)
        self.policy_seconds.observe(seconds)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self._registry)
