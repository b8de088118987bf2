"""The compose files: services that find each other, files that are there, and nothing that a
server does not know or need."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from polydelta.server.settings import ENV_PREFIX, ServerSettings, env_name

DOCKER = Path(__file__).parents[2] / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
CUDA = yaml.safe_load((DOCKER / "compose.cuda.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
# Seconds in which what is left after the drain is aborted and the process is gone.
LAST_SECONDS = 10


def default(value: str) -> str:
    """What compose makes of `${NAME:-default}` where NAME is not set."""
    return re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", value)


def mounts(service: str) -> dict[str, str]:
    """Path in the container -> volume or path beside the compose file."""
    parts = (line.split(":") for line in SERVICES[service]["volumes"])
    return {target: source for source, target, *_ in parts}


def published(service: str) -> str:
    """The container's port."""
    (line,) = SERVICES[service]["ports"]
    return line.rpartition(":")[2]


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_has_no_rights_to_spare_and_cannot_write_to_its_image(service: str) -> None:
    settings = SERVICES[service]
    assert settings["read_only"] is True
    assert settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert not settings.keys() & {"privileged", "cap_add", "network_mode", "pid"}


@pytest.mark.parametrize("service", ["prometheus", "grafana"])
def test_a_service_of_another_image_is_told_not_to_run_as_root(service: str) -> None:
    assert int(SERVICES[service]["user"].partition(":")[0]) > 0


def test_nobody_overrides_the_user_and_the_health_check_of_our_image() -> None:
    assert not SERVICES["polydelta"].keys() & {"user", "healthcheck", "command", "entrypoint"}


@pytest.mark.parametrize("service", SERVICES)
def test_what_is_mounted_is_there_or_is_a_volume(service: str) -> None:
    sources = set(mounts(service).values())
    files = {source for source in sources if source.startswith(".")}
    assert [source for source in files if not (DOCKER / source).exists()] == []
    assert sources - files - COMPOSE["volumes"].keys() == set()


def test_every_volume_is_used() -> None:
    assert {s for service in SERVICES for s in mounts(service).values()} >= COMPOSE[
        "volumes"
    ].keys()


@pytest.mark.parametrize("compose", [COMPOSE, CUDA], ids=["cpu", "cuda"])
def test_the_server_is_built_from_a_dockerfile_and_its_volumes_are_mounted(
    compose: dict[str, Any],
) -> None:
    file = DOCKER.parent / compose["services"]["polydelta"]["build"]["dockerfile"]
    (volumes,) = re.findall(r"^VOLUME (\[.*\])$", file.read_text(), re.MULTILINE)
    assert set(json.loads(volumes)) == mounts("polydelta").keys()


def test_the_gpus_file_changes_a_service_that_there_is() -> None:
    assert CUDA["services"].keys() <= SERVICES.keys()


def test_prometheus_scrapes_the_server_and_reads_rules_that_are_mounted() -> None:
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    (group,) = scrape["static_configs"]
    assert group["targets"] == [f"polydelta:{published('polydelta')}"]
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]
    found = mounts("prometheus")
    assert found["/etc/prometheus/prometheus.yml"] == "./prometheus/prometheus.yml"
    folders = {str(Path("/etc/prometheus", pattern).parent) for pattern in config["rule_files"]}
    assert folders <= found.keys()


def test_grafana_asks_prometheus_and_finds_the_dashboards() -> None:
    provisioning = DOCKER / "grafana" / "provisioning"
    (source,) = [
        source
        for file in provisioning.glob("datasources/*.yml")
        for source in yaml.safe_load(file.read_text())["datasources"]
    ]
    (provider,) = [
        provider
        for file in provisioning.glob("dashboards/*.yml")
        for provider in yaml.safe_load(file.read_text())["providers"]
    ]
    assert source["url"] == f"http://prometheus:{published('prometheus')}"
    assert mounts("grafana")[provider["options"]["path"]] == "./grafana/dashboards"
    assert "/etc/grafana/provisioning" in mounts("grafana")


@pytest.mark.parametrize("file", ["compose.yaml", "compose.cuda.yaml", ".env.example"])
def test_every_variable_of_ours_is_a_setting_of_the_server(file: str) -> None:
    names = set(re.findall(rf"\b{ENV_PREFIX}[A-Z_]+", (DOCKER / file).read_text()))
    assert names - {env_name(name) for name in ServerSettings.model_fields} == set()


def test_what_is_set_for_the_server_are_values_that_it_takes() -> None:
    environment: dict[str, str] = SERVICES["polydelta"]["environment"]
    values = {n.removeprefix(ENV_PREFIX).lower(): default(v) for n, v in environment.items()}
    settings = ServerSettings(**values)
    assert (settings.host, str(settings.port)) == ("0.0.0.0", published("polydelta"))


def test_a_stop_gives_the_server_the_time_that_it_gives_its_requests() -> None:
    server = SERVICES["polydelta"]
    grace = int(default(server["stop_grace_period"]).removesuffix("s"))
    assert grace >= int(default(server["environment"]["POLYDELTA_SHUTDOWN_TIMEOUT"])) + LAST_SECONDS


def test_ports_are_published_to_this_machine_unless_it_is_told_otherwise() -> None:
    lines = [line for service in SERVICES for line in SERVICES[service]["ports"]]
    assert all(line.startswith(("127.0.0.1:", "${POLYDELTA_HOST:-127.0.0.1}:")) for line in lines)
