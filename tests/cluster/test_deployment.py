"""The Kubernetes manifests: what they promise, and that everything they name exists."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from infra.config import Settings, describe_settings, load_settings
from scripts.up import RAY_DEFAULTS

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "infra" / "deploy"
BASE = DEPLOY / "base"
DOCUMENTS: list[dict[str, Any]] = [
    document for path in sorted(BASE.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for document in DOCUMENTS if document["kind"] == kind]


SETTINGS: dict[str, str] = of_kind("ConfigMap")[0]["data"]


@dataclass(frozen=True)
class Pods:
    """Pods of one kind: their template, and how many there are."""

    name: str
    template: dict[str, Any]
    replicas: int
    serves: bool = True
    """Whether they run until they are stopped."""

    @property
    def spec(self) -> dict[str, Any]:
        found: dict[str, Any] = self.template["spec"]
        return found

    @property
    def labels(self) -> dict[str, str]:
        found: dict[str, str] = self.template["metadata"]["labels"]
        return found

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


def all_pods() -> Iterator[Pods]:
    for deployment in of_kind("Deployment"):
        spec = deployment["spec"]
        yield Pods(deployment["metadata"]["name"], spec["template"], spec["replicas"])
    for job in of_kind("Job"):
        yield Pods(job["metadata"]["name"], job["spec"]["template"], 1, serves=False)
    for cluster in of_kind("RayCluster"):
        yield Pods("ray-head", cluster["spec"]["headGroupSpec"]["template"], 1)
        for group in cluster["spec"]["workerGroupSpecs"]:
            yield Pods(f"ray-{group['groupName']}", group["template"], group["replicas"])


PODS = list(all_pods())
CONTAINERS = [
    pytest.param(pods, container, id=f"{pods.name}-{container['name']}")
    for pods in PODS
    for container in pods.containers
]
each_kind = pytest.mark.parametrize("pods", PODS, ids=lambda pods: pods.name)
each_container = pytest.mark.parametrize(("pods", "container"), CONTAINERS)


def test_kustomize_takes_every_file() -> None:
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]

    assert sorted(listed) == sorted(path.name for path in BASE.glob("*.yaml") if path.name != "kustomization.yaml")
    assert {"Deployment", "Job", "RayCluster", "NetworkPolicy", "PodDisruptionBudget"} <= {
        document["kind"] for document in DOCUMENTS
    }


@each_container
def test_every_container_has_bounds_and_no_rights(pods: Pods, container: dict[str, Any]) -> None:
    for bound in ("requests", "limits"):
        assert {"cpu", "memory"} <= container["resources"][bound].keys()
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert pods.spec["securityContext"]["runAsNonRoot"] is True
    assert pods.spec["automountServiceAccountToken"] is False


@each_container
def test_every_container_that_serves_has_probes(pods: Pods, container: dict[str, Any]) -> None:
    if not pods.serves:
        return
    assert "livenessProbe" in container
    # A node of Ray beside a program holds the pod back until it serves; whether the pod is ready, the program says.
    assert ("startupProbe" if container.get("restartPolicy") == "Always" else "readinessProbe") in container
    if container.get("command") == ["concord"]:
        probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
        assert [probes[name]["path"] for name in probes] == ["/healthz", "/healthz", "/readyz"]
        assert {probe["port"] for probe in probes.values()} == {"metrics"}
        assert container["ports"] == [{"containerPort": 8180, "name": "metrics"}]


@each_kind
def test_what_there_are_several_of_is_spread_and_leaves_one_by_one(pods: Pods) -> None:
    if pods.replicas == 1:
        return
    (constraint,) = pods.spec["topologySpreadConstraints"]
    (rule,) = (
        found.get("podAffinityTerm", found) for found in next(iter(pods.spec["affinity"]["podAntiAffinity"].values()))
    )
    budgets = [b["spec"] for b in of_kind("PodDisruptionBudget") if selects(b["spec"]["selector"], pods.labels)]

    assert selects(constraint["labelSelector"], pods.labels)
    assert selects(rule["labelSelector"], pods.labels)
    assert rule["topologyKey"] == "kubernetes.io/hostname"
    assert [budget["maxUnavailable"] for budget in budgets] == [1]


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted: dict[str, str] = selector["matchLabels"]
    return wanted.items() <= labels.items()


def test_there_are_several_workers_and_nodes_of_ray() -> None:
    assert {pods.name: pods.replicas > 1 for pods in PODS} == {
        "concord-actors": False,
        "concord-workers": True,
        "concord-prepare": False,
        "ray-head": False,
        "ray-actors": True,
    }


@each_kind
def test_nobody_from_elsewhere_reaches_a_pod_but_for_probes_metrics_and_the_operator(pods: Pods) -> None:
    (policy,) = (policy["spec"] for policy in of_kind("NetworkPolicy"))

    assert selects(policy["podSelector"], pods.labels)
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    from_elsewhere = [rule for rule in policy["ingress"] if "namespaceSelector" in rule["from"][0]]
    assert all(rule["ports"] for rule in from_elsewhere)
    assert 6379 not in {port["port"] for rule in from_elsewhere for port in rule["ports"]}


def test_every_setting_that_is_named_is_one() -> None:
    known = {line.variable for line in describe_settings(Settings())}
    named = {name for pods in PODS for container in pods.containers for name in environment(container)}

    assert {name for name in SETTINGS if name not in known} == set(RAY_DEFAULTS)
    assert {name for name in named if name.startswith("CONCORD_") and name not in known} == set()


def environment(container: dict[str, Any]) -> set[str]:
    return {variable["name"] for variable in container.get("env", ())}


def test_the_settings_are_those_of_a_safe_production(tmp_path: Path) -> None:
    """Every file that they name exists here as it does in the pods."""
    here = {}
    for name, value in SETTINGS.items():
        if name.endswith("_FILE"):
            file = tmp_path / value.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("x")
            value = str(file)
        here[name] = value

    settings = load_settings(environment={**here, "CONCORD_DATA_DIR": str(tmp_path)})

    assert (settings.mode, settings.profile, settings.allow_insecure) == ("production", "cluster", ())


@each_container
def test_every_file_of_the_settings_is_mounted_where_they_say(pods: Pods, container: dict[str, Any]) -> None:
    volumes = {volume["name"]: volume for volume in pods.spec["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() <= volumes.keys()
    if "envFrom" not in container and "env" not in container:
        return  # it is told nothing, so it needs no file
    files = {
        f"{mounts['secrets']}/{item['path']}"
        for source in volumes["secrets"]["projected"]["sources"]
        for item in source["secret"]["items"]
    }
    wanted = {value for name, value in SETTINGS.items() if name.endswith("_FILE")}

    assert wanted == files
    assert mounts["data"] == SETTINGS["CONCORD_DATA_DIR"]


def test_the_secrets_are_those_that_the_readme_says_how_to_make() -> None:
    readme = (DEPLOY / "README.md").read_text()
    sources = [
        source["secret"]
        for pods in PODS
        for volume in pods.spec["volumes"]
        for source in volume.get("projected", {}).get("sources", ())
    ]

    assert len({source["name"] for source in sources}) == 5
    for source in sources:
        assert f"| `{source['name']}` | `{source['items'][0]['key']}` |" in readme
    assert not of_kind("Secret"), "no secret belongs into a repository"


def test_every_command_and_option_is_one_of_ours() -> None:
    from scripts.cli.main import app

    program = typer.main.get_command(app)
    commands = [c["args"] for pods in PODS for c in pods.containers if c.get("command") == ["concord"]]

    assert sorted(arguments[0] for arguments in commands) == ["schema", "topics", "up", "worker"]
    for arguments in commands:
        command: Any = program
        rest = list(arguments)
        while hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        command.make_context("concord", rest)  # raises for an option that there is not


def test_ray_asks_for_the_token_that_the_programs_present() -> None:
    (ray,) = of_kind("RayCluster")
    nodes = [c for pods in PODS for c in pods.containers if c.get("command") == ["ray", "start"]]

    assert ray["spec"]["authOptions"] == {"mode": "token", "secretName": "concord-ray-token"}
    assert len(nodes) == 2
    for node in nodes:
        told = {variable["name"]: variable["value"] for variable in node["env"]}
        assert told == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": SETTINGS["CONCORD_RAY__TOKEN_FILE"]}
        assert node["args"][0] == f"--address={ray['metadata']['name']}-head-svc:6379"


def test_what_keeps_rays_processes_small_is_as_where_we_start_ray() -> None:
    assert {name: value for name, value in SETTINGS.items() if name in RAY_DEFAULTS} == RAY_DEFAULTS


def test_one_image_is_used_and_the_dockerfile_copies_every_package() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    images = {container["image"] for pods in PODS for container in pods.containers}

    assert images == {f"concord:{project['project']['version']}"}
    assert all(f"COPY {name.removesuffix('*')} {name.removesuffix('*')}\n" in dockerfile for name in packages)
    assert "--require-hashes -r requirements.txt" in dockerfile
    assert next(p for p in project["project"]["dependencies"] if p.startswith("ray")).endswith(
        of_kind("RayCluster")[0]["spec"]["rayVersion"]
    )
