"""Families of samples that are made when Prometheus asks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric

if TYPE_CHECKING:  # the engine imports torch, which the routes do not need
    from polydelta.engine.histogram import Distribution

# Each with the values of its labels.
Samples = Iterable[tuple[tuple[str, ...], float]]


def by_one(samples: Mapping[str, float]) -> Samples:
    """Of a family with one label more."""
    return (((value,), sample) for value, sample in samples.items())


class Families:
    """Makes families that all have the same first labels."""

    def __init__(self, prefix: str, labels: Mapping[str, str]) -> None:
        self._prefix = prefix
        self._names = list(labels)
        self._values = list(labels.values())

    def gauge(self, name: str, text: str, value: float) -> Metric:
        return self.gauges(name, text, (), [((), value)])

    def counter(self, name: str, text: str, value: float) -> Metric:
        return self.counters(name, text, (), [((), value)])

    def gauges(self, name: str, text: str, labels: tuple[str, ...], samples: Samples) -> Metric:
        """labels: more of them; samples: with the values of these."""
        family = GaugeMetricFamily(self._prefix + name, text, labels=[*self._names, *labels])
        return self._filled(family, samples)

    def counters(self, name: str, text: str, labels: tuple[str, ...], samples: Samples) -> Metric:
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

    def _filled(self, family: GaugeMetricFamily | CounterMetricFamily, samples: Samples) -> Metric:
        for values, sample in samples:
            family.add_metric([*self._values, *values], sample)
        return family
