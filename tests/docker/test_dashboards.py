"""Grafana's dashboard and how it is provisioned: it loads, and no panel stays empty for a typo."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import yaml

WIDTH = 24
# What Grafana puts in when it asks Prometheus.
BUILT_IN = {"__rate_interval": "1m", "__range": "1h"}
# Grafana's own ids; `count:` scales what follows it.
UNITS = {"s", "bytes", "percentunit", "reqps", "ops", "none", "count:tokens", "count:tokens/s"}


@pytest.fixture(scope="session")
def panels(dashboard) -> list[dict[str, Any]]:
    """Those that show something."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


@pytest.fixture(scope="session")
def variables(dashboard) -> dict[str, dict[str, Any]]:
    return {variable["name"]: variable for variable in dashboard["templating"]["list"]}


@pytest.fixture(scope="session")
def labels(queries, variables):
    """Labels of the result of a panel's query."""

    def find(query: str):
        def value(use: re.Match[str]) -> str:
            return BUILT_IN.get(use[1]) or dict.fromkeys(variables, ".*")[use[1]]

        return queries.labels(re.sub(r"\$(\w+)", value, query))

    return find


def test_every_query_asks_for_what_a_running_server_has(panels, labels):
    for panel in panels:
        for target in panel["targets"]:
            found = labels(target["expr"])
            used = set(re.findall(r"{{(\w+)}}", target.get("legendFormat", "")))
            assert used <= set(found), panel["title"]


def test_all_that_only_this_server_tells_is_shown_or_watched(panels, rule_groups, live_metrics):
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    asked += [rule["expr"] for group in rule_groups for rule in group["rules"]]
    used = set(re.findall(r"\bpolydelta_\w+", " ".join(asked)))
    ours = {name for name in live_metrics if name.startswith("polydelta_")}
    ours = {re.sub("_(bucket|count|sum|created)$", "", name) for name in ours}
    used = {re.sub("_(bucket|count|sum|total)$", "", name) for name in used}
    assert {name.removesuffix("_total") for name in ours} <= used


def test_a_graph_s_series_can_be_told_apart(panels, labels):
    for panel in panels:
        if panel["type"] != "timeseries":
            continue
        legends = [target["legendFormat"] for target in panel["targets"]]
        for target, legend in zip(panel["targets"], legends, strict=True):
            shown = set(re.findall(r"{{(\w+)}}", legend))
            # The job is the same for all, and nobody serves two models in one process.
            assert set(labels(target["expr"])) - {"job", "model_name"} <= shown, panel["title"]
        assert "" not in legends
        assert all("{{" in legend or legends.count(legend) == 1 for legend in legends)


def test_variables_offer_what_a_running_server_has(variables, labels):
    assert list(variables) == ["datasource", "model_name", "instance"]
    for name in ("model_name", "instance"):
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variables[name]["query"]["query"])
        assert asked is not None
        assert asked[2] == name
        assert name in labels(asked[1])


def test_every_query_looks_only_at_the_chosen_servers(panels):
    for panel in panels:
        for target in panel["targets"]:
            for selector in re.findall(r"{(.*?)}", target["expr"]):
                chosen = 'instance=~"$instance"' in selector
                assert chosen or "alertname" in selector, panel["title"]


def test_annotations_can_be_found(dashboard, labels):
    for annotation in dashboard["annotations"]["list"]:
        found = labels(annotation["expr"])
        shown = annotation["titleFormat"] + annotation["textFormat"]
        assert set(re.findall(r"{{(\w+)}}", shown)) <= set(found)


def test_every_panel_says_what_it_shows_and_in_which_unit(panels):
    for panel in panels:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert len(panel["description"]) <= 130, panel["title"]
        fields = panel["fieldConfig"]
        units = [fields["defaults"]["unit"]]
        for override in fields["overrides"]:
            units += [p["value"] for p in override["properties"] if p["id"] == "unit"]
        assert set(units) <= UNITS, panel["title"]


def test_every_panel_asks_the_chosen_data_source(dashboard, panels, variables):
    assert variables["datasource"]["type"] == "datasource"
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    others = [*dashboard["annotations"]["list"], variables["model_name"], variables["instance"]]
    assert all(one["datasource"] == chosen for one in [*panels, *others])


def test_ids_are_unique_and_titles_within_a_row(dashboard):
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    row, seen = "", set()
    for panel in dashboard["panels"]:
        row = panel["title"] if panel["type"] == "row" else row
        assert (row, panel["title"], panel["type"]) not in seen
        seen.add((row, panel["title"], panel["type"]))
    for panel in dashboard["panels"]:
        refs = [target["refId"] for target in panel.get("targets", ())]
        assert len(refs) == len(set(refs))


def test_panels_do_not_overlap(dashboard):
    places = [(panel["title"], panel["gridPos"]) for panel in dashboard["panels"]]
    for title, at in places:
        assert at["x"] >= 0, title
        assert at["x"] + at["w"] <= WIDTH, title
    for (one, a), (other, b) in itertools.combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or apart, f"{one} lies on {other}"


def test_every_row_is_as_wide_as_the_page(dashboard):
    by_top: dict[int, int] = {}
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        by_top[at["y"]] = by_top.get(at["y"], 0) + at["w"]
    assert set(by_top.values()) == {WIDTH}


def test_nothing_is_left_of_an_export(dashboard):
    assert dashboard["uid"] == "polydelta"
    assert not {"__inputs", "__requires", "id", "version", "iteration"} & set(dashboard)


def test_grafana_finds_prometheus_and_the_dashboard_where_compose_puts_them(
    docker_folder, dashboard, variables
):
    services = yaml.safe_load((docker_folder / "compose.yaml").read_text())["services"]
    provisioning = docker_folder / "grafana" / "provisioning"
    mounted = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounted["./grafana/provisioning"] == "/etc/grafana/provisioning"

    (provider,) = yaml.safe_load((provisioning / "dashboards" / "polydelta.yml").read_text())[
        "providers"
    ]
    assert mounted["./grafana/dashboards"] == provider["options"]["path"]

    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    assert variables["datasource"]["current"] == {"text": source["name"], "value": source["uid"]}
    scraped = yaml.safe_load((docker_folder / "prometheus" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
