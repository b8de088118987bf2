"""Families of samples that are made when Prometheus asks."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric

if TYPE_CHECKING:  # the engine imports torch, which the routes do not need
    from polydelta.engine.histogram import Distribution

# The value of a label, or the values of several.
Values = TypeVar("Values", bound=str | tuple[str, ...])
Simple = TypeVar("Simple", GaugeMetricFamily, CounterMetricFamily)


class Families:
    """Makes families that all have the same first labels."""

    def __init__(self, prefix: str, labels: Mapping[str, str]) -> None:
        self._prefix = prefix
        self._names = list(labels)
        self._values = list(labels.values())

    def gauge(self, name: str, text: str, value: float) -> Metric:
        return self.gauges(name, text, (), {(): value})

    def counter(self, name: str, text: str, value: float) -> Metric:
        return self.counters(name, text, (), {(): value})

    def gauges(
        self, name: str, text: str, labels: tuple[str, ...], samples: Mapping[Values, float]
    ) -> Metric:
        """labels: more of them; samples: by the values of these."""
        family = GaugeMetricFamily(self._prefix + name, text, labels=[*self._names, *labels])
        return self._filled(family, samples)

    def counters(
        self, name: str, text: str, labels: tuple[str, ...], samples: Mapping[Values, float]
    ) -> Metric:
        family = CounterMetricFamily(self._prefix + name, text, labels=[*self._names, *labels])
        return self._filled(family, samples)

    def histogram(self, name: str, text: str, distribution: Distribution) -> Metric:
        return self.histograms(name, text, (), {(): distribution})

    def histograms(
        self,
        name: str,
        text: str,
        labels: tuple[str, ...],
        samples: Mapping[tuple[str, ...], Distribution],
    ) -> Metric:
        family = HistogramMetricFamily(self._prefix + name, text, labels=[*self._names, *labels])
        for values, distribution in samples.items():
            bounds = [*map(str, map(float, distribution.bounds)), "+Inf"]
            # Prometheus counts in each bucket what is in those below it too.
            counts = map(float, accumulate(distribution.counts))
            family.add_metric(
                [*self._values, *values],
                buckets=list(zip(bounds, counts, strict=True)),
                sum_value=distribution.total,
            )
        return family

    def _filled(self, family: Simple, samples: Mapping[Values, float]) -> Simple:
        for values, sample in samples.items():
            more: list[str] = [values] if isinstance(values, str) else [*values]
            family.add_metric(self._values + more, sample)
        return family
