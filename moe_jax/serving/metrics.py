"""Numbers of the server for Prometheus, in a registry of their own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from moe_jax.serving.answer import OngoingAnswer

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counters, gauges and histograms; the engine's `Observer`."""

    def __init__(self):
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "moe_jax_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter(
            "moe_jax_prompt_tokens", "Tokens of prompts of accepted requests", registry=registry
        )
        self.generated_tokens = Counter(
            "moe_jax_generated_tokens", "Tokens of answers", registry=registry
        )
        self.first_token_seconds = Histogram(
            "moe_jax_time_to_first_token_seconds",
            "Seconds from a request to the first token of an answer",
            buckets=_SECONDS,
            registry=registry,
        )
        self.token_seconds = Histogram(
            "moe_jax_time_per_token_seconds",
            "Seconds from a token of an answer to the next",
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue = Gauge(
            "moe_jax_queue_answers", "Answers that wait for a row", registry=registry
        )
        self.rows = Gauge("moe_jax_rows_in_use", "Rows that answers have", registry=registry)
        self.blocks = Gauge(
            "moe_jax_cache_blocks_in_use", "Blocks of the cache that rows own", registry=registry
        )
        self.preemptions = Gauge(
            "moe_jax_preemptions", "Rows that gave way to older ones", registry=registry
        )
        self.compilations = Gauge(
            "moe_jax_compilations", "Programs compiled since the start", registry=registry
        )

    def first_token(self, answer: OngoingAnswer) -> None:
        """See `Observer`."""
        self.generated_tokens.inc()
        self.first_token_seconds.observe(answer.latest - answer.created)

    def token(self, answer: OngoingAnswer, seconds: float) -> None:
        """See `Observer`."""
        del answer
        self.generated_tokens.inc()
        self.token_seconds.observe(seconds)

    def text(self) -> bytes:
        """The numbers in Prometheus's text format."""
        return generate_latest(self.registry)
