"""`/metrics` for Prometheus."""

from polydelta.server.metrics.metrics import Metrics, metrics_router
from polydelta.server.metrics.refusals import CountRefusals, Refusals

__all__ = ["CountRefusals", "Metrics", "Refusals", "metrics_router"]
