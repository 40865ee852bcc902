"""The numbers of one or several processes as Prometheus reads them (``text/plain; version=0.0.4``).

What is counted stands in ``observe.py``; here it is added up and written. prometheus-client is
imported when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import __version__
from .observe import COUNTERS, HISTOGRAMS, Labels

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

#: Over several workers these are no sum but the largest, and the smallest.
_LARGEST = {"gateway_queue_oldest_seconds"}
_SMALLEST = {"gateway_sink_up", "gateway_spool_up"}


def expose(states: Sequence[Mapping[str, Any]]) -> bytes:
    """The text form of Prometheus for one or several processes, added up."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_collector(states))
    return generate_latest(registry)


def _collector(states: Sequence[Mapping[str, Any]]) -> Collector:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector as Base

    class Numbers(Base):
        def collect(self) -> Iterable[Metric]:
            build = GaugeMetricFamily("gateway_build_info", "1, with the version of this gateway", labels=["version"])
            build.add_metric([__version__], 1)
            yield build
            for name, (labels, description) in COUNTERS.items():
                counter = CounterMetricFamily(name, description, labels=list(labels))
                for values, number in _added(states, "counts", name, sum).items():
                    counter.add_metric(list(values), number)
                yield counter
            for name, (labels, description, bounds) in HISTOGRAMS.items():
                histogram = HistogramMetricFamily(name, description, labels=list(labels))
                for values, cells in _added(states, "spread", name, _cells).items():
                    buckets, below = [], 0.0
                    for bound, inside in zip([*bounds, float("inf")], cells[:-1], strict=True):
                        below += inside
                        buckets.append(("+Inf" if bound == float("inf") else str(bound), below))
                    histogram.add_metric(list(values), buckets, cells[-1])
                yield histogram
            shown = {name: known for state in states for name, known in state["gauges"].items()}
            for name, known in shown.items():
                gauge = GaugeMetricFamily(name, known["description"], labels=list(known["labels"]))
                combine = max if name in _LARGEST else min if name in _SMALLEST else sum
                readings = [{name: state["gauges"][name]["values"]} for state in states if name in state["gauges"]]
                for values, number in _added([{"all": reading} for reading in readings], "all", name, combine).items():
                    gauge.add_metric(list(values), number)
                yield gauge

    return Numbers()


def _added(states: Sequence[Mapping[str, Any]], kind: str, name: str, combine: Callable[[list[Any]], Any]) -> dict[Labels, Any]:
    """The values of one metric in every process, made one by label."""
    found: dict[Labels, list[Any]] = {}
    for state in states:
        for labels, value in state[kind].get(name, ()):
            found.setdefault(tuple(labels), []).append(value)
    return {labels: combine(values) for labels, values in found.items()}


def _cells(histograms: list[list[float]]) -> list[float]:
    return [sum(cell) for cell in zip(*histograms, strict=True)]
