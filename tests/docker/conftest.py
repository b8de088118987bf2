"""What `/metrics` of a running server has, and whether it can answer a query in PromQL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import torch
import yaml
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save_file

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.server.app import create_app
from polydelta.server.settings import ServerSettings
from polydelta.server.stores import disk_tier, make_publisher, open_store

# Label -> its values; an empty set stands for any value.
Labels = Mapping[str, frozenset[str]]
ANY: frozenset[str] = frozenset()

# What Prometheus adds to every sample.
TARGET = {"job": ANY, "instance": ANY}
# What Prometheus makes itself.
SYNTHETIC: Mapping[str, Labels] = {
    "up": TARGET,
    "ALERTS": {**dict.fromkeys(("alertname", "alertstate", "severity"), ANY), **TARGET},
}
# Values of these come from clients and machines: no test has seen them all.
OPEN = {"adapter", "le", "model_name", "status", "tenant", "version"}
# Operators whose result is elements of the left side.
SETS = {"and", "unless"}
COMPARISONS = {"==", "!=", ">", "<", ">=", "<="}


class Queries:
    """Knows the labels of every metric, and so of every query; says what a query asks in vain."""

    def __init__(self, known: Mapping[str, Labels]) -> None:
        self._known = dict(known)

    def record(self, name: str, query: str) -> None:
        """A recording rule: later queries may use its name."""
        assert name not in self._known, f"{name} is there already"
        self._known[name] = self.labels(query)

    def labels(self, query: str) -> Labels:
        """Of the query's result. Fails if it does not parse, or if something in it can match
        nothing: a metric, a label or a label's value that there is not, two sides that never
        meet."""
        found = self._of(promql.parse(query))
        assert found is not None, f"{query} is a number that never changes"
        return found

    def _of(self, node: Any) -> Labels | None:
        """None for what has no labels because it is no vector."""
        match node:
            case promql.VectorSelector():
                return self._selected(node)
            case promql.MatrixSelector():
                return self._selected(node.vector_selector)
            case promql.ParenExpr() | promql.SubqueryExpr() | promql.UnaryExpr():
                return self._of(node.expr)
            case promql.NumberLiteral() | promql.StringLiteral():
                return None
            case promql.AggregateExpr():
                return self._aggregated(node)
            case promql.BinaryExpr():
                return self._combined(node)
            case promql.Call():
                return self._called(node)
        raise AssertionError(f"{node} is new to this test")

    def _selected(self, selector: promql.VectorSelector) -> Labels:
        assert selector.name in self._known, f"no metric is called {selector.name}"
        labels = self._known[selector.name]
        for matcher in selector.matchers.matchers:
            assert matcher.name in labels, f"{selector.name} has no label {matcher.name}"
            there = labels[matcher.name]
            missing = set(matcher.value.split("|")) - there if there else set()
            assert not missing, f"{selector.name} never has {matcher.name} {missing}"
        return labels

    def _aggregated(self, node: promql.AggregateExpr) -> Labels:
        labels = self._of(node.expr)
        assert labels is not None
        if str(node.op) in ("topk", "bottomk"):
            return labels
        if node.modifier is None:
            return {}
        named = node.modifier.labels
        assert set(named) <= set(labels), f"{node.prettify()} has only {set(labels)}"
        if node.modifier.type == promql.AggModifierType.By:
            return {name: labels[name] for name in named}
        return {name: values for name, values in labels.items() if name not in named}

    def _called(self, node: promql.Call) -> Labels | None:
        vectors = [labels for each in node.args if (labels := self._of(each)) is not None]
        match node.func.name:
            case "time":
                return None
            case "vector":
                return {}
            case "absent":
                return {m.name: ANY for m in node.args[0].matchers.matchers}
            case "histogram_quantile":
                assert "le" in vectors[0], f"{node.prettify()} has lost its buckets"
                return {name: values for name, values in vectors[0].items() if name != "le"}
        (labels,) = vectors
        return labels

    def _combined(self, node: promql.BinaryExpr) -> Labels | None:
        left, right = self._of(node.lhs), self._of(node.rhs)
        if left is None or right is None:
            return right if left is None else left
        operator, modifier = str(node.op), node.modifier
        if operator == "or":
            return {**left, **right}
        matching = None if modifier is None else modifier.matching
        if matching is None:
            assert set(left) == set(right), f"{node.prettify()}: {set(left)} against {set(right)}"
            return left
        assert matching.type == promql.LabelModifierType.Include, "`on` says more than `ignoring`"
        assert set(matching.labels) <= set(left) & set(right), node.prettify()
        one_each = modifier.card == promql.VectorMatchCardinality.OneToOne
        if operator in SETS | COMPARISONS or not one_each:  # `group_left`, that is
            return left
        return {name: left[name] for name in matching.labels}


def write_adapter(folder: Path, layout: BaseLayout) -> None:
    """A LoRA adapter of one module, which changes nothing."""
    module, (rows, columns) = next(iter(layout.module_shapes.items()))
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [module]}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes = {"lora_A": (1, columns), "lora_B": (rows, 1)}
    tensors = {f"base_model.model.{module}.{k}.weight": torch.zeros(v) for k, v in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def docker_folder() -> Path:
    return Path(__file__).parents[2] / "docker"


@pytest.fixture(scope="session")
def live_metrics(
    tiny_checkpoint: Checkpoint,
    tiny_layout: BaseLayout,
    serve: Callable[..., Any],
    run: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Mapping[str, Labels]:
    """Sample name -> labels, of a server that has answered, refused and stopped."""
    folder = tmp_path_factory.mktemp("metrics")
    write_adapter(folder / "dates", tiny_layout)
    settings = ServerSettings(adapters=(folder,), store=folder / "store", dtype="float32")
    with closing(open_store(settings)) as store, serve(tiny_checkpoint, False) as engine:
        publisher = make_publisher(store, engine, settings, disk_tier(store, settings))
        client = TestClient(create_app(engine, store, publisher, settings))
        for model, status in (("tiny", 200), ("dates", 200), ("nobody", 404)):
            body = {"model": model, "prompt": "Hi", "max_tokens": 3}
            assert client.post("/v1/completions", json=body).status_code == status
        run(engine, [GenerationRequest("1", (1, 2), SamplingParams(), tenant="acme")])
        engine.shutdown()
        body["model"] = "tiny"
        assert client.post("/v1/completions", json=body).status_code == 503
        exposition = client.get("/metrics").text
    found: dict[str, Labels] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            found[sample.name] = _with(found.get(sample.name, TARGET), sample.labels)
    return found


def _with(labels: Labels, seen: Mapping[str, str]) -> Labels:
    more = {name: ANY if name in OPEN else frozenset((value,)) for name, value in seen.items()}
    return {**labels, **{name: labels.get(name, ANY) | values for name, values in more.items()}}


@pytest.fixture(scope="session")
def rule_groups(docker_folder: Path) -> list[dict[str, Any]]:
    """Of all files, in the order in which Prometheus reads them."""
    files = sorted((docker_folder / "prometheus" / "rules").iterdir())
    return [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]


@pytest.fixture(scope="session")
def queries(live_metrics: Mapping[str, Labels], rule_groups: Iterable[dict[str, Any]]) -> Queries:
    """Over a running server's metrics, and what is recorded of them."""
    queries = Queries({**live_metrics, **SYNTHETIC})
    for rule in (rule for group in rule_groups for rule in group["rules"] if "record" in rule):
        queries.record(rule["record"], rule["expr"])
    return queries


@pytest.fixture(scope="session")
def dashboard(docker_folder: Path) -> dict[str, Any]:
    return json.loads((docker_folder / "grafana" / "dashboards" / "polydelta.json").read_text())
