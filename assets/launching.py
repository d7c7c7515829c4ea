"""Trainings in processes of their own, through Dagster Pipes: on this machine, or in a pod of Kubernetes.

What a training does is in training/; what its asset shows in the end, in learning.py.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import dagster as dg
from dagster._core.errors import DagsterPipesExecutionError
from upath import UPath

from graft_pipeline import errors
from graft_pipeline.errors import GraftError, SettingsError, TrainingError
from graft_pipeline.progress import Report
from graft_pipeline.settings import Settings
from resources.foundation import FoundationModel

Listener = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Training:
    """One training of a satellite encoder, as `python -m training encoder` is told of it.

    Attributes:
        snapshot: folder of the training set.
        root: storage root that the chips' shards are relative to.
        output: folder that gets the encoder, its curves and its checkpoints.
        sensor: name of the sensor.
        level: `image` or `pixel`.
        recipe: name in training.recipes.
        foundation: the model to start from.
        seed: of the training.
        fields: fields of TrainConfig that differ from the recipe's.
    """

    snapshot: UPath
    root: UPath
    output: UPath
    sensor: str
    level: str
    recipe: str
    foundation: FoundationModel
    seed: int
    fields: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """The command line after `python -m`; nothing in it is secret."""
        options = {
            "root": str(self.root),
            "level": self.level,
            "sensor": self.sensor,
            "recipe": self.recipe,
            "architecture": self.foundation.architecture,
            "pretrained": self.foundation.pretrained or "",
            "seed": str(self.seed),
        }
        return [
            *("training", "encoder", str(self.snapshot), str(self.output)),
            *(f"--{name}={value}" for name, value in options.items()),
            *(f"--set={name}={json.dumps(value)}" for name, value in self.fields.items()),
        ]


@dataclass(frozen=True)
class Trained:
    """What a training gave.

    Attributes:
        result: model_id, best_step, train_tiles, train_photos, seconds and more of training.loop.TrainResult.
        history: per step: step, loss, learning_rate.
        validations: per validation: step, loss, recall_at_1, recall_at_10.
    """

    result: dict[str, Any]
    history: list[dict[str, float]]
    validations: list[dict[str, float]]


def launch(
    context: dg.AssetExecutionContext, settings: Settings, training: Training, report: Report
) -> Trained:
    """Run a training where the settings say, and show in the run how it goes.

    Its log lines become the run's; each validation is an observation of the asset (loss, retrieval, tiles per
    second). When the run is terminated the training ends too; it goes on at its last checkpoint when the asset
    is materialised again.

    Args:
        context: of the asset that is trained.
        settings: of the deployment.
        training: what to train.
        report: told (step, steps).

    Returns:
        Result and curves.

    Raises:
        GraftError: what stopped the training, as it said itself.
    """
    told: dict[str, dict[str, Any]] = {}

    def listen(message: dict[str, Any]) -> None:
        told[message["kind"]] = message
        if message["kind"] == "progress":
            report(message["step"], message["steps"])
            if message["validation"]:
                observed = {name: message[name] for name in ("step", "loss", "tiles_per_second")}
                observed |= {f"validation_{name}": value for name, value in message["validation"].items()}
                context.log_event(dg.AssetObservation(context.asset_key, metadata=observed))

    run = _run_in_pod if settings.training_launcher == "kubernetes" else _run_here
    try:
        run(context, settings, training, listen)
    except (DagsterPipesExecutionError, *_kubernetes_errors()) as failure:
        if error := told.get("error"):
            raise getattr(errors, error["error"], GraftError)(error["message"]) from None
        raise TrainingError(
            f"The process of the training ended early ({failure}): see its output, and materialise the asset "
            "again; it goes on at the last checkpoint."
        ) from failure
    if "result" not in told:
        raise TrainingError(
            "The training ended well but told nothing: install dagster-pipes where it runs and materialise again."
        )
    curves = json.loads((training.output / "history.json").read_text())
    result = {name: value for name, value in told["result"].items() if name != "kind"}
    return Trained(result, curves["history"], curves["validations"])


def command(training: Training, processes: int, python: str) -> list[str]:
    """What runs a training: Python, or torchrun if it is to be more than one process.

    Args:
        training: what to train.
        processes: how many, as a rule one per GPU.
        python: the interpreter.

    Returns:
        The command's words.
    """
    if processes == 1:
        return [python, "-m", *training.arguments()]
    torchrun = ("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m")
    return [python, "-m", *torchrun, *training.arguments()]


def environment(settings: Settings) -> dict[str, str]:
    """Variables that a training needs whatever process starts it; none is secret."""
    # Idle OpenMP threads sleep instead of spinning, which matters where cores are shared.
    variables = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    # Whole records: a pod knows neither the source of the imagery nor what a sensor left to its standard record.
    records = [asdict(sensor) for sensor in settings.sensor_records.values()]
    variables["GRAFT_SENSORS"] = json.dumps(records)
    return variables


def _run_here(
    context: dg.AssetExecutionContext, settings: Settings, training: Training, listen: Listener
) -> None:
    client = dg.PipesSubprocessClient(message_reader=_listening(dg.PipesTempFileMessageReader)(listen))
    client.run(
        context=context,
        command=command(training, settings.training_processes, sys.executable),
        env=environment(settings),
        extras={"launcher_pid": os.getpid()},
    )


def _run_in_pod(
    context: dg.AssetExecutionContext, settings: Settings, training: Training, listen: Listener
) -> None:
    try:
        from dagster_k8s import PipesK8sClient, PipesK8sPodLogsMessageReader
    except ImportError as error:
        raise SettingsError(
            "GRAFT_TRAINING_LAUNCHER=kubernetes needs the extra `k8s`: pip install 'graft-pipeline[k8s]'."
        ) from error
    client = PipesK8sClient(
        message_reader=_listening(PipesK8sPodLogsMessageReader)(listen),
        poll_interval=settings.kubernetes.poll_interval_s,
    )
    client.run(
        context=context,
        command=command(training, settings.training_processes, "python"),
        env=environment(settings),
        image=settings.kubernetes.image,
        namespace=settings.kubernetes.namespace,
        base_pod_spec=pod_spec(settings),
    )


def _kubernetes_errors() -> tuple[type[Exception], ...]:
    """What PipesK8sClient raises for a pod that did not end well; empty where it is not installed."""
    try:
        from dagster_k8s.client import DagsterK8sError
    except ImportError:
        return ()
    return (DagsterK8sError,)


def pod_spec(settings: Settings) -> dict[str, Any]:
    """The pod of a training, but for image, command and plain variables, which PipesK8sClient sets.

    Args:
        settings: of the deployment.

    Returns:
        A PodSpec as Kubernetes spells it: the settings' own, with what a training needs where they do not say it.

    Raises:
        SettingsError: if the settings describe another container beside the training's.
    """
    pod = settings.kubernetes
    given = dict(pod.pod_spec)
    own, volumes = given.pop("containers", [{}]), given.pop("volumes", [])
    if len(own) != 1:
        raise SettingsError(
            f"GRAFT_KUBERNETES__POD_SPEC has {len(own)} containers: describe one, the training's, or leave them out."
        )
    container = {
        "name": "training",
        "resources": pod.resources,
        **own[0],
    }
    container["envFrom"] = [
        *({"secretRef": {"name": name}} for name in pod.env_secrets),
        *own[0].get("envFrom", ()),
    ]
    mounts = own[0].get("volumeMounts", [])
    if all(mount["mountPath"] != "/dev/shm" for mount in mounts):
        # Processes of one training hand gradients to each other there; the default is 64 MB.
        mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}, *mounts]
    if all(volume["name"] != "shared-memory" for volume in volumes):
        volumes = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}, *volumes]
    container |= {"volumeMounts": mounts, "env": list(own[0].get("env", []))}
    account = {"serviceAccountName": pod.service_account} if pod.service_account else {}
    return {"containers": [container], "volumes": volumes, **account, **given}


def _listening(reader: type[Any]) -> type[Any]:
    """A message reader of that kind that lets us hear custom messages as they come, not at the end."""

    class Listening(reader):
        def __init__(self, listen: Listener) -> None:
            super().__init__()
            self._listen = listen

        @contextmanager
        def read_messages(self, handler: Any) -> Iterator[Any]:
            with super().read_messages(_Ear(handler, self._listen)) as params:
                yield params

    return Listening


class _Ear:
    """Between a message reader and Dagster's handler."""

    def __init__(self, handler: Any, listen: Listener) -> None:
        self._handler, self._listen = handler, listen

    def handle_message(self, message: Mapping[str, Any]) -> None:
        if message["method"] == "report_custom_message":
            self._listen(message["params"]["payload"])
        else:
            self._handler.handle_message(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handler, name)
