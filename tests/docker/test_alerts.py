"""Prometheus' configuration, its alerts and what it records: they load, and they can come true."""

from __future__ import annotations

import re
from typing import Any

import promql_parser as promql
import pytest
import yaml

from polydelta.server.settings import ServerSettings

# From "look at it on Monday" to "wake somebody".
SEVERITIES = {"info", "warning", "critical"}
LABEL = re.compile(r"\$labels\.(\w+)")


@pytest.fixture(scope="session")
def alerts(rule_groups) -> list[dict[str, Any]]:
    return [rule for group in rule_groups for rule in group["rules"] if "alert" in rule]


@pytest.fixture(scope="session")
def prometheus(docker_folder) -> dict[str, Any]:
    return yaml.safe_load((docker_folder / "prometheus" / "prometheus.yml").read_text())


def test_prometheus_scrapes_the_server_of_the_compose_file_and_loads_all_rules(
    prometheus, docker_folder
):
    compose = yaml.safe_load((docker_folder / "compose.yaml").read_text())
    (job,) = prometheus["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert compose["services"][host]["environment"]["POLYDELTA_PORT"] == port
    assert job["metrics_path"] == "/metrics"
    folder = docker_folder / "prometheus"
    loaded = {path for pattern in prometheus["rule_files"] for path in folder.glob(pattern)}
    assert loaded == set((folder / "rules").iterdir())


def test_names_are_unique(rule_groups, alerts):
    for names in (
        [group["name"] for group in rule_groups],
        [alert["alert"] for alert in alerts],
    ):
        assert len(names) == len(set(names))


def test_every_expression_asks_for_what_a_running_server_has(alerts, queries):
    for alert in alerts:
        queries.labels(alert["expr"])


def test_rules_ask_about_the_job_that_is_scraped(rule_groups, prometheus):
    (job,) = (config["job_name"] for config in prometheus["scrape_configs"])
    named = {
        name
        for group in rule_groups
        for rule in group["rules"]
        for name in re.findall(r'job="(\w+)"', rule["expr"])
    }
    assert named == {job}


def test_every_alert_says_how_bad_it_is_and_what_to_do(alerts, queries):
    for alert in alerts:
        assert set(alert) == {"alert", "expr", "for", "labels", "annotations"}, alert["alert"]
        assert alert["alert"].startswith("PolyDelta")
        assert alert["labels"]["severity"] in SEVERITIES
        promql.parse_duration(alert["for"])
        told = alert["annotations"]
        assert set(told) == {"summary", "description"}
        assert told["summary"].endswith(".")
        assert told["description"].endswith(".")
        assert len(told["summary"]) < len(told["description"]), alert["alert"]
        used = set(LABEL.findall(told["summary"] + told["description"]))
        assert used <= set(queries.labels(alert["expr"])), alert["alert"]


def test_descriptions_name_alerts_and_panels_that_there_are(alerts, dashboard):
    names = {alert["alert"] for alert in alerts}
    titles = {panel["title"] for panel in dashboard["panels"]}
    for alert in alerts:
        text = alert["annotations"]["description"]
        assert set(re.findall(r"PolyDelta\w+", text)) <= names - {alert["alert"]}
        assert set(re.findall(r'(?:panel|row|table)\s+"(.+?)"', text)) <= titles


def test_descriptions_name_options_that_the_server_takes(alerts):
    options = {f"--{name.replace('_', '-')}" for name in ServerSettings.model_fields}
    for alert in alerts:
        named = set(re.findall(r"--[a-z-]+", alert["annotations"]["description"]))
        assert named <= options, alert["alert"]


def test_recorded_names_say_of_whom_and_over_what_time(rule_groups):
    records = [rule for group in rule_groups for rule in group["rules"] if "record" in rule]
    for rule in records:
        assert re.fullmatch(r"instance:polydelta_\w+:\w*rate\d+m", rule["record"])
        assert set(re.findall(r"\[(\w+)\]", rule["expr"])) <= {rule["record"].rpartition("rate")[2]}


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("polydelta_refusal_total", "no metric"),
        ('polydelta_pool_pages{owners="kv"}', "no label"),
        ('polydelta_pool_pages{owner="key"}', "never has"),
        ("sum by (reason) (polydelta_pool_pages)", "has only"),
        ("polydelta_ready / vllm:num_requests_running", "against"),
        ("histogram_quantile(0.5, sum(vllm:e2e_request_latency_seconds_bucket))", "buckets"),
        ("2 * 3", "never changes"),
    ],
)
def test_a_query_that_can_match_nothing_is_found(queries, query, why):
    with pytest.raises(AssertionError, match=why):
        queries.labels(query)
