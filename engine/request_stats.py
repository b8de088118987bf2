"""How requests fare, as distributions. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from polydelta.engine.histogram import Distribution, Histogram
from polydelta.engine.request import RequestTimes

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
TIMES = (0, 1, 2, 5, 10, 20, 50)

# By the names that vLLM has for them.
BUCKETS: Mapping[str, tuple[float, ...]] = {
    "time_to_first_token_seconds": SECONDS,
    "inter_token_latency_seconds": TOKEN_SECONDS,
    "request_time_per_output_token_seconds": TOKEN_SECONDS,
    "e2e_request_latency_seconds": SECONDS,
    "request_queue_time_seconds": SECONDS,
    "request_inference_time_seconds": SECONDS,
    "request_prefill_time_seconds": SECONDS,
    "request_decode_time_seconds": SECONDS,
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "request_params_max_tokens": TOKENS,
    "request_num_preemptions": TIMES,
}


class RequestStats:
    """Belongs to the engine's thread."""

    def __init__(self) -> None:
        self._histograms = {name: Histogram(bounds) for name, bounds in BUCKETS.items()}
        self._inter_token = self._histograms["inter_token_latency_seconds"]

    def distributions(self) -> Mapping[str, Distribution]:
        return {name: histogram.distribution() for name, histogram in self._histograms.items()}

    def token(self, gap: float) -> None:
        """A token after the first one. gap: seconds since the one before."""
        self._inter_token.observe(gap)

    def first_token(self, times: RequestTimes) -> None:
        self._observe("time_to_first_token_seconds", times.arrived, times.first_token)
        self._observe("request_queue_time_seconds", times.arrived, times.admitted)
        self._observe("request_prefill_time_seconds", times.admitted, times.first_token)

    def served(self, times: RequestTimes, max_tokens: int) -> None:
        """A request ran to its end."""
        self._observe("e2e_request_latency_seconds", times.arrived, times.last_token)
        self._observe("request_inference_time_seconds", times.admitted, times.last_token)
        self._observe("request_decode_time_seconds", times.first_token, times.last_token)
        if times.per_output_token is not None:
            self._histograms["request_time_per_output_token_seconds"].observe(
                times.per_output_token
            )
        self._histograms["request_prompt_tokens"].observe(times.num_prompt_tokens)
        self._histograms["request_generation_tokens"].observe(times.num_output_tokens)
        self._histograms["request_params_max_tokens"].observe(max_tokens)
        self._histograms["request_num_preemptions"].observe(times.num_preemptions)

    def _observe(self, name: str, began: float | None, ended: float | None) -> None:
        if began is not None and ended is not None:
            self._histograms[name].observe(ended - began)
