"""Encoders trained in processes of their own: what the run shows, what survives a kill, what a pod is asked to be."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from assets.launching import environment, pod_spec
from graft_pipeline.definitions import build_defs
from graft_pipeline.errors import InputError, SettingsError, TrainingError
from graft_pipeline.settings import load_settings

REGION = "N42.00W071.50"
ENCODER = "naip/image_encoder"


@pytest.fixture(scope="module")
def collected(planet: Any, deploy_for_module: Callable[..., Any]) -> Any:
    """A deployment with a training set of one region."""
    deployment = deploy_for_module(planet_url=planet.url, validation_fraction="0.3")
    deployment.register(-71.45, 42.05, -71.35, 42.15)
    deployment.collect(REGION, "naip")
    deployment.materialise("naip/training_set")
    return deployment


@pytest.fixture
def learned(collected: Any, planet: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same, with its settings in the environment of this test too."""
    variables = {"ROOT": str(collected.storage.root), "PLANET__URL": planet.url, "RECIPE": "smoke"}
    for name, value in variables.items():
        monkeypatch.setenv(f"GRAFT_{name}", value)
    return collected


class Watch:
    """A progress resource that calls back with each step a run hears of."""

    def __init__(self, at_step: Callable[[int], None] = lambda step: None) -> None:
        self.steps: list[int] = []
        self._at_step = at_step

    def task(self, name: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            self.steps.append(done)
            self._at_step(done)

        return report


def train(deployment: Any, watch: Watch | None = None, key: str = ENCODER, **fields: Any) -> Any:
    """Materialise an encoder in a run of its own, with fields of TrainConfig in the run's config."""
    deployment.definitions = build_defs(load_settings(), progress=watch or Watch())
    config = {"ops": {key.replace("/", "__"): {"config": {"train_config": fields}}}}
    return deployment.materialise(key, run_config=config)


def trainings() -> list[psutil.Process]:
    """Processes of trainings that this process started."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.is_running() and "encoder" in child.cmdline()
    ]


def observations(deployment: Any, run_id: str) -> list[dict[str, Any]]:
    events = deployment.instance.get_records_for_run(
        run_id, of_type=dg.DagsterEventType.ASSET_OBSERVATION
    ).records
    observed = [event.event_log_entry.dagster_event.asset_observation_data for event in events]
    return [{name: value.value for name, value in at.asset_observation.metadata.items()} for at in observed]


def log_lines(deployment: Any, run_id: str) -> list[str]:
    return [entry.user_message for entry in deployment.instance.all_logs(run_id)]


def test_a_run_shows_how_its_training_goes_and_ends_with_curves(learned: Any) -> None:
    watch = Watch()
    run = train(learned, watch)
    assert watch.steps[-1] == 4
    metadata = learned.metadata(ENCODER)
    assert "data:image/" in metadata["curve"].value
    assert "data:image/" in metadata["retrieval"].value
    assert metadata["train_pairs"].value >= metadata["train_tiles"].value > 0
    observed = observations(learned, run.run_id)
    assert [at["step"] for at in observed] == [2, 4]
    assert all(at["tiles_per_second"] > 0 for at in observed)
    assert observed[-1]["validation_recall_at_10"] == metadata["validation_recall_at_10"].value
    assert any(line.startswith("step 4 of 4: loss") for line in log_lines(learned, run.run_id))
    card = json.loads(
        (learned.storage.models_folder / "sensor=naip/image_encoder/encoder/model_card.json").read_text()
    )
    assert card["model_id"] == metadata["model_id"].value


def test_a_training_that_was_killed_and_one_that_was_terminated_go_on(learned: Any) -> None:
    # So many steps that a signal sent at a checkpoint arrives long before the end.
    long = {"steps": 150, "validate_every": 10}

    def kill(step: int) -> None:
        for process in trainings() if step >= 10 else []:
            process.kill()

    with pytest.raises(TrainingError, match="materialise the asset again"):
        train(learned, Watch(kill), **long)

    def interrupt(step: int) -> None:
        if step >= 20 and not interrupted:
            interrupted.append(step)
            os.kill(os.getpid(), signal.SIGINT)

    interrupted: list[int] = []
    terminated = Watch(interrupt)
    with pytest.raises(dg.DagsterExecutionInterruptedError):
        train(learned, terminated, **long)
    assert not trainings()
    assert min(terminated.steps) > 10

    rest = Watch()
    run = train(learned, rest, **long)
    assert min(rest.steps) > interrupted[0] // 10 * 10
    assert rest.steps[-1] == 150
    assert "going on after step" in " ".join(log_lines(learned, run.run_id))


def test_two_processes_train_under_torchrun(learned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_TRAINING_PROCESSES", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    watch = Watch()
    train(learned, watch, "naip/pixel_encoder", device="cpu")
    assert watch.steps[-1] == 4
    assert learned.metadata("naip/pixel_encoder")["best_step"].value in (2, 4)


def test_what_stops_a_training_stops_the_run_in_its_own_words(learned: Any) -> None:
    with pytest.raises(InputError, match="steps of a TrainConfig must be positive"):
        train(learned, steps=-1)


@pytest.mark.parametrize("imagery", ["earth_engine", "stac", "folder"])
@pytest.mark.parametrize("sensors", ["[]", '[{"name": "naip"}, {"name": "sentinel2", "cloud_rule": "chip"}]'])
def test_a_training_knows_the_sensors_of_its_deployment(
    imagery: str, sensors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_IMAGERY", imagery)
    monkeypatch.setenv("GRAFT_SENSORS", sensors)
    settings = load_settings()
    # A pod has nothing of the launcher's own environment.
    monkeypatch.delenv("GRAFT_IMAGERY")
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)
    assert load_settings().sensor_records == settings.sensor_records


# --- Kubernetes ---


class Node:
    """A Kubernetes API for one node: a pod is a process of this machine, its log what that process prints."""

    def __init__(self, folder: Path) -> None:
        self.pods: list[dict[str, Any]] = []
        self.deleted: list[str] = []
        self._folder, self._process = folder, None
        node = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                node.start(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self._answer(node.pods[-1])

            def do_DELETE(self) -> None:
                node.deleted.append(self.path.rsplit("/", 1)[-1])
                self._answer({"kind": "Status"})

            def do_GET(self) -> None:
                if re.search(r"/pods/[^/]+/log", self.path):
                    self.send_response(200)
                    self.end_headers()
                    for line in node.log():
                        self.wfile.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ} {line}".encode())
                else:
                    pod = node.pods[-1] | {"status": node.status()}
                    self._answer({"kind": "PodList", "items": [pod]} if "/pods?" in self.path else pod)

            def _answer(self, body: dict[str, Any]) -> None:
                content = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def start(self, pod: dict[str, Any]) -> None:
        self.pods.append(pod)
        container = pod["spec"]["containers"][0]
        variables = {item["name"]: item["value"] for item in container["env"]}
        # Nothing of the launcher's own environment: a pod has only what it is given.
        variables["PATH"] = str(Path(sys.executable).parent)
        self._process = subprocess.Popen(
            container["command"],
            env=variables,
            cwd=self._folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def log(self) -> Iterator[str]:
        yield from self._process.stdout

    def status(self) -> dict[str, Any]:
        code = self._process.poll()
        state = {"running": {}} if code is None else {"terminated": {"exitCode": code}}
        container = {"name": "training", "ready": True, "restartCount": 0, "image": "", "imageID": ""}
        return {"phase": "Running", "containerStatuses": [container | {"state": state}]}

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """A cluster that the settings and the kubeconfig of the test point at."""
    made = Node(tmp_path)
    named = {"name": "one"}
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [named | {"cluster": {"server": made.url}}],
        "users": [named | {"user": {"token": "none"}}],
        "contexts": [named | {"context": {"cluster": "one", "user": "one"}}],
        "current-context": "one",
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(kubeconfig))
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig")
    )
    settings = {
        "TRAINING_LAUNCHER": "kubernetes",
        "KUBERNETES__IMAGE": "registry.example/graft:1",
        "KUBERNETES__NAMESPACE": "learning",
        "KUBERNETES__POLL_INTERVAL_S": "0.2",
        "KUBERNETES__RESOURCES": '{"limits": {"nvidia.com/gpu": "1"}}',
        "KUBERNETES__SERVICE_ACCOUNT": "trainer",
        "KUBERNETES__ENV_SECRETS": '["object-store"]',
        "KUBERNETES__POD_SPEC": json.dumps(
            {
                "nodeSelector": {"pool": "gpu"},
                "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "graft"}}],
                "containers": [
                    {
                        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                        "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
                        "envFrom": [{"configMapRef": {"name": "proxies"}}],
                    }
                ],
            }
        ),
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"GRAFT_{name}", value)
    yield made
    made.stop()


def test_a_pod_trains_and_reports_through_its_log(
    learned: Any, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "visible-nowhere")
    watch = Watch()
    run = train(learned, watch, device="cpu")
    assert watch.steps[-1] == 4
    assert observations(learned, run.run_id)[-1]["step"] == 4
    (pod,) = node.pods
    assert node.deleted == [pod["metadata"]["name"]]
    spec = pod["spec"]
    (container,) = spec["containers"]
    assert container["image"] == "registry.example/graft:1"
    assert container["command"][:4] == ["python", "-m", "training", "encoder"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "1"}}
    assert container["envFrom"] == [
        {"secretRef": {"name": "object-store"}},
        {"configMapRef": {"name": "proxies"}},
    ]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"shared-memory": "/dev/shm", "data": "/data"}
    assert {volume["name"] for volume in spec["volumes"]} == set(mounted)
    assert {"NCCL_DEBUG", "OMP_WAIT_POLICY", "DAGSTER_PIPES_CONTEXT"} <= {
        item["name"] for item in container["env"]
    }
    assert spec["serviceAccountName"] == "trainer"
    assert spec["nodeSelector"] == {"pool": "gpu"}
    assert spec["restartPolicy"] == "Never"
    assert "visible-nowhere" not in json.dumps(pod)


def test_a_pod_that_fails_says_why(learned: Any, node: Node) -> None:
    with pytest.raises(InputError, match="no_such_field"):
        train(learned, no_such_field=1)
    assert len(node.deleted) == 1


def test_a_pod_may_bring_its_own_shared_memory_but_no_second_container(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}
    monkeypatch.setenv("GRAFT_KUBERNETES__POD_SPEC", json.dumps({"volumes": [memory]}))
    spec = pod_spec(load_settings())
    assert spec["volumes"] == [memory]
    assert spec["containers"][0]["volumeMounts"] == [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    monkeypatch.setenv("GRAFT_KUBERNETES__POD_SPEC", json.dumps({"containers": [{}, {"name": "proxy"}]}))
    with pytest.raises(SettingsError, match="2 containers: describe one"):
        pod_spec(load_settings())


def test_a_pod_needs_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_TRAINING_LAUNCHER", "kubernetes")
    with pytest.raises(SettingsError, match="GRAFT_KUBERNETES__IMAGE"):
        load_settings()
