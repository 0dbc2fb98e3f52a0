"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.responses = Counter(
            "hnet_responses", "Answers to /v1/completions by status.", ["status"], registry=self.registry
        )
        self.texts = Counter("hnet_texts", "Texts by how they ended.", ["finish"], registry=self.registry)
        self.prompt_bytes = Counter(
            "hnet_prompt_bytes", "Bytes of prompts of texts that began.", registry=self.registry
        )
        self.new_bytes = Counter("hnet_new_bytes", "Bytes written.", registry=self.registry)
        self.failed_steps = Counter("hnet_failed_steps", "Steps in which the model raised.", registry=self.registry)
        self.running = Gauge("hnet_running", "Texts in a slot.", registry=self.registry)
        self.waiting = Gauge("hnet_waiting", "Texts that wait for one.", registry=self.registry)
        self.slots = Gauge("hnet_slots", "Slots.", registry=self.registry)
        self.first_byte = Histogram(
            "hnet_first_byte_seconds", "From asking to a text's first byte.", buckets=SECONDS, registry=self.registry
        )
        self.whole = Histogram(
            "hnet_text_seconds", "From asking to a text's end.", buckets=SECONDS, registry=self.registry
        )

    def page(self) -> bytes:
        return generate_latest(self.registry)
