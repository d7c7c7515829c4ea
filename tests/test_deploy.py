"""What deploy/ says: files that their own tools accept, settings that exist, secrets that are named and not held."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from graft_pipeline.settings import Settings, load_settings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
LOCAL = yaml.safe_load((ROOT / "dagster.yaml").read_text())
PRODUCTION = yaml.safe_load((DEPLOY / "dagster.yaml").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
VALUES = yaml.safe_load((DEPLOY / "helm" / "values.yaml").read_text())
#: Names that are read before settings are, or by Compose alone.
BESIDE = {"GRAFT_ENV_FILE", "GRAFT_KEYS_FOLDER"}


def variables(prefix: str = "GRAFT_", model: Any = Settings) -> set[str]:
    """Every environment variable that settings have."""
    found = set()
    for name, field in model.model_fields.items():
        is_nested = isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields")
        found.add(f"{prefix}{name.upper()}")
        if is_nested:
            found |= variables(f"{prefix}{name.upper()}__", field.annotation)
    return found


def named_in(*paths: Path) -> set[str]:
    """GRAFT_ variables that files name."""
    return {name for path in paths for name in re.findall(r"GRAFT_[A-Z][A-Z_]*[A-Z]", path.read_text())}


def test_every_variable_that_is_named_exists() -> None:
    texts = [*DEPLOY.rglob("*"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "Makefile"]
    files = [
        path for path in texts if path.suffix in {".md", ".yaml", ".example", ".py", ""} and path.is_file()
    ]
    assert named_in(*files) - BESIDE <= variables()


def test_every_setting_is_in_the_reference() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from write_reference import settings, settings_page
    finally:
        sys.path.remove(str(ROOT / "docs"))
    nested = {"GRAFT_PLANET", "GRAFT_KUBERNETES"}
    assert {setting.variable for setting in settings()} == variables() - nested
    page = settings_page()
    assert all(f"<code>{name}</code>" in page for name in variables() - nested)
    assert [setting.variable for setting in settings() if not setting.description] == []
    assert "Storage root: a folder, or any URL" in page


def test_the_production_instance_is_the_local_one_with_another_storage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dagster._core.instance.config import dagster_instance_config

    assert {key: PRODUCTION[key] for key in PRODUCTION if key not in ("storage", "compute_logs")} == LOCAL
    for name in re.findall(r"env: (\w+)", (DEPLOY / "dagster.yaml").read_text()):
        monkeypatch.setenv(name, "5432" if name.endswith("PORT") else "something")
    dagster_instance_config(str(DEPLOY))


def test_the_production_storage_is_loadable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each class is there and takes its configuration; nothing listens at the database's address."""
    from dagster._core.instance.ref import InstanceRef

    address = {
        "DAGSTER_PG_HOST": "127.0.0.1",
        "DAGSTER_PG_PORT": "1",
        "DAGSTER_PG_PASSWORD": "not-to-be-shown",
    }
    for name in re.findall(r"env: (\w+)", (DEPLOY / "dagster.yaml").read_text()):
        monkeypatch.setenv(name, address.get(name, "graft"))
    monkeypatch.setattr("time.sleep", lambda _: None)
    instance = InstanceRef.from_dir(str(DEPLOY))
    assert type(instance.compute_log_manager).__name__ == "S3ComputeLogManager"
    with pytest.raises(Exception, match="too many retries for DB connection"):
        _ = instance.storage
    assert "127.0.0.1" in caplog.text
    assert "not-to-be-shown" not in caplog.text


def test_compose_obeys_its_specification() -> None:
    command = [
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(DEPLOY / "compose.yaml"),
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_compose_gives_each_process_what_its_configuration_reads() -> None:
    read = set()
    for name in ("dagster.yaml", "workspace.yaml"):
        read |= set(re.findall(r"env: (\w+)", (DEPLOY / name).read_text()))
    for name in ("code", "daemon", "webserver"):
        assert read <= set(COMPOSE["services"][name]["environment"]), name
    # Only one container gets the keys of the services.
    assert [name for name, service in COMPOSE["services"].items() if "env_file" in service] == ["code"]
    assert COMPOSE["services"]["webserver"]["ports"] == ["127.0.0.1:3000:3000"]
    for name, service in COMPOSE["services"].items():
        assert "docker.sock" not in str(service), name
        if service["image"].startswith("graft"):
            assert service["cap_drop"] == ["ALL"], name


def test_what_the_deployment_writes_is_its_users() -> None:
    """Folders that the image has, so that they are not root's: neither as mounts of new volumes nor in a pod."""
    text = (DEPLOY / "Dockerfile").read_text()
    owned = re.search(r"install -d -o graft ([/\w .]+)$", text, re.MULTILINE)
    user = re.search(r"useradd .*--uid (\d+) graft", text)
    assert owned
    assert user
    folders = set(owned[1].split())
    (deployment,) = VALUES["dagster-user-deployments"]["deployments"]
    ours = [service for service in COMPOSE["services"].values() if service["image"].startswith("graft")]
    mounts = [mount.split(":") for service in ours for mount in service.get("volumes", [])]
    assert {target for source, target, *_ in mounts if source in COMPOSE["volumes"]} == {
        "/var/lib/graft",
        "/home/graft/.cache",
    }
    assert {target for source, target, *_ in mounts if source in COMPOSE["volumes"]} <= folders
    for environment in (COMPOSE["services"]["code"]["environment"], deployment["env"]):
        assert str(Path(environment["GRAFT_FLICKR_PACING_FILE"]).parent) in folders
    assert deployment["podSecurityContext"]["runAsUser"] == int(user[1])


def test_no_secret_is_committed() -> None:
    example = dict(
        line.split("=", 1)
        for line in (DEPLOY / "settings.env.example").read_text().splitlines()
        if line[:1] not in "#"
    )
    secrets = [name for name in example if re.search(r"SECRET|PASSWORD|KEY$|KEY_ID", name)]
    assert len(secrets) >= 5
    assert not any(example[name] for name in secrets)
    assert "postgresqlPassword" not in VALUES["postgresql"]
    ignored = ROOT.joinpath(".gitignore").read_text().splitlines()
    assert ".env" in ignored
    # The folder that compose.yaml mounts unless told otherwise.
    keys = re.search(r"GRAFT_KEYS_FOLDER:-\./(\w+)\}:/run/keys:ro", (DEPLOY / "compose.yaml").read_text())
    assert keys
    assert f"/deploy/{keys[1]}/" in ignored
    # An allow-list: what is not named does not get into the image.
    image = ROOT.joinpath(".dockerignore").read_text().splitlines()
    assert image[1] == "*"
    assert {f"deploy/{keys[1]}", "**/.env"} <= set(
        image[max(n for n, line in enumerate(image) if line[:1] == "!") :]
    )


def test_the_charts_environment_is_usable_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    (deployment,) = VALUES["dagster-user-deployments"]["deployments"]
    for name, value in deployment["env"].items():
        monkeypatch.setenv(name, value)
    for name in ("GRAFT_FLICKR_KEY", "GRAFT_FLICKR_SECRET", "GRAFT_EE_PROJECT"):
        monkeypatch.setenv(name, "from graft-secrets")
    settings = load_settings()
    assert settings.training_launcher == "kubernetes"
    assert settings.kubernetes.pod_spec["nodeSelector"] == {"pool": "gpu"}
    gpus = settings.kubernetes.resources["limits"]["nvidia.com/gpu"]
    assert settings.training_processes == int(gpus)
    image = VALUES["dagsterWebserver"]["image"]
    assert settings.kubernetes.image == f"{image['repository']}:{image['tag']}"
    mounts = [mount["mountPath"] for mount in deployment["volumeMounts"]]
    assert str(settings.ee_key_file.parent) in mounts if settings.ee_key_file else False


def launcher_configuration() -> dict[str, Any]:
    """What the chart's template makes of the values, as the launcher's own configuration."""
    given = VALUES["runLauncher"]["config"]["k8sRunLauncher"]
    run = given["runK8sConfig"]
    return {
        "service_account_name": VALUES["serviceAccount"]["name"],
        "postgres_password_secret": "dagster-postgresql-secret",
        "dagster_home": "/opt/dagster/dagster_home",
        "instance_config_map": "graft-instance",
        "image_pull_policy": given["imagePullPolicy"],
        "load_incluster_config": given["loadInclusterConfig"],
        "fail_pod_on_run_failure": given["failPodOnRunFailure"],
        "resources": given["resources"],
        "run_k8s_config": {
            "pod_spec_config": run["podSpecConfig"],
            "container_config": run["containerConfig"],
            "job_spec_config": run["jobSpecConfig"],
        },
    }


def code_locations_context() -> dict[str, Any]:
    """What the chart's template hands from the user deployment to its runs."""
    (deployment,) = VALUES["dagster-user-deployments"]["deployments"]
    assert deployment["includeConfigInLaunchedRuns"]["enabled"]
    taken = {
        "volumes": "volumes",
        "volume_mounts": "volumeMounts",
        "labels": "labels",
        "resources": "resources",
    }
    return {
        "image_pull_policy": deployment["image"]["pullPolicy"],
        "env_config_maps": [f"graft-dagster-user-deployments-{deployment['name']}-user-env"],
        "env_secrets": [secret["name"] for secret in deployment["envSecrets"]],
        "service_account_name": VALUES["serviceAccount"]["name"],
        "namespace": "graft",
        **{name: deployment[key] for name, key in taken.items() if deployment.get(key)},
    }


def test_the_charts_run_launcher_is_what_dagster_accepts() -> None:
    from dagster._config import validate_config
    from dagster_k8s import K8sRunLauncher

    result = validate_config(K8sRunLauncher.config_type(), launcher_configuration())
    assert result.success, json.dumps([error.message for error in result.errors or []])


def test_a_runs_pod_has_the_size_and_the_user_that_the_values_say(tmp_path: Path) -> None:
    """Merged by Dagster from the launcher's configuration and the code location's, whose words win."""
    from dagster._core.code_pointer import ModuleCodePointer
    from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
    from dagster._core.storage.dagster_run import DagsterRun
    from dagster_k8s import K8sRunLauncher
    from dagster_k8s.container_context import K8sContainerContext

    cluster = {"server": "http://127.0.0.1:1"}
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(kubeconfig))
    outside = {"load_incluster_config": False, "kubeconfig_file": str(tmp_path / "kubeconfig")}
    launcher = K8sRunLauncher(**{**launcher_configuration(), **outside})
    context = {"k8s": code_locations_context()}
    pointer = ModuleCodePointer("graft_pipeline.definitions", "defs")
    origin = JobPythonOrigin(
        "collect_region", RepositoryPythonOrigin("python", pointer, container_context=context)
    )
    run = DagsterRun(job_name="collect_region", job_code_origin=origin)
    merged = K8sContainerContext.create_for_run(run, launcher, include_run_tags=True).run_k8s_config
    container, pod = merged.container_config, merged.pod_spec_config
    assert container["resources"] == VALUES["runLauncher"]["config"]["k8sRunLauncher"]["resources"]
    assert container["resources"]["limits"]["memory"] == "8Gi"
    assert {"secret_ref": {"name": "graft-secrets"}} in container["env_from"]
    assert [mount["mount_path"] for mount in container["volume_mounts"]] == ["/run/keys"]
    assert pod["security_context"]["run_as_user"] == 1000
    assert container["security_context"]["capabilities"] == {"drop": ["ALL"]}


def test_the_charts_webserver_listens_where_no_root_is_needed() -> None:
    webserver = VALUES["dagsterWebserver"]
    assert webserver["podSecurityContext"]["runAsNonRoot"]
    # The chart starts it with -p of the service's port.
    port = webserver["service"]["port"]
    assert port >= 1024
    assert webserver["readinessProbe"]["httpGet"]["port"] == port


def test_what_the_guide_calls_things_is_what_the_chart_calls_them() -> None:
    text = (ROOT / "docs" / "how-to" / "kubernetes.md").read_text()
    installed = re.search(r"helm -n \w+ upgrade --install (\w+) (\w+) ", text)
    assert installed
    release, chart = installed.groups()
    assert f"--install {release} {chart} " in (DEPLOY / "helm" / "values.yaml").read_text()
    # dagster.fullname, and the webserver's default nameOverride, of the chart's helpers.
    full = release if chart in release else f"{release}-{chart}"
    assert set(re.findall(r"exec deploy/([\w-]+) ", text)) == {f"{full}-daemon"}
    port = VALUES["dagsterWebserver"]["service"]["port"]
    assert re.findall(r"port-forward service/([\w-]+) \d+:(\d+)", text) == [
        (f"{release}-dagster-webserver", str(port))
    ]


def test_the_chart_has_the_queue_of_the_local_instance() -> None:
    daemon, concurrency = VALUES["dagsterDaemon"], VALUES["concurrency"]
    assert concurrency["enabled"]
    assert concurrency["pools"]["granularity"] == LOCAL["concurrency"]["pools"]["granularity"]
    assert concurrency["pools"]["defaultLimit"] == LOCAL["concurrency"]["pools"]["default_limit"]
    local = LOCAL["concurrency"]["runs"]["tag_concurrency_limits"]
    assert concurrency["runs"]["tagConcurrencyLimits"] == local
    queue = daemon["runCoordinator"]["config"]["queuedRunCoordinator"]
    assert queue["dequeueIntervalSeconds"] == LOCAL["run_queue"]["dequeue_interval_seconds"]
    assert daemon["runRetries"]["maxRetries"] == LOCAL["run_retries"]["max_retries"]
    assert VALUES["pythonLogs"]["managedPythonLoggers"] == LOCAL["python_logs"]["managed_python_loggers"]


def test_the_image_has_the_python_and_the_extras_of_the_project() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    (version,) = set(re.findall(r"FROM python:(\d\.\d+)", text))
    assert f'target-version = "py{version.replace(".", "")}"' in project
    extras = re.search(r'"\.\[([\w,]+)\]"', text)
    assert extras
    assert all(f"\n{extra} = [" in project for extra in extras[1].split(","))
    copied = set(re.findall(r"^COPY (\w+) \1$", text, re.MULTILINE))
    assert copied == {"graft_pipeline", "resources", "training", "assets"}


def test_what_is_installed_lays_out_a_deployments_folder(tmp_path: Path) -> None:
    """`graft collect` from the packages as they are installed in the image, without the rest of the repository."""
    text = (DEPLOY / "Dockerfile").read_text().split("\nFROM ")[1]
    source, installed = tmp_path / "src", tmp_path / "installed"
    source.mkdir()
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()]
    assert set(copied) <= let_in
    skipped = shutil.ignore_patterns("__pycache__")
    for name in copied:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skipped)
        else:
            shutil.copy(ROOT / name, source / name)
    # The part of a build that chooses files: a whole one would ask a registry for the setuptools that it needs.
    project = source / "pyproject.toml"
    tables = re.search(r"^\[tool\.setuptools.*?(?=^\[tool\.dagster)", project.read_text(), re.M | re.S)
    assert tables
    project.write_text(f'[project]\nname = "graft-pipeline"\nversion = "0"\n{tables[0]}')
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "build_py"]
    subprocess.run([*build, "-d", str(installed)], cwd=source, check=True)
    shutil.rmtree(source)
    file, folder = tmp_path / "area.geojson", tmp_path / "deployment"
    ring = [[0, 0], [5, 0], [5, 5], [0, 5], [0, 0]]
    file.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    graft = "import graft_pipeline.cli as cli; print(cli.__file__, flush=True); cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", graft, "collect", str(file), "--folder", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )
    assert Path(done.stdout.splitlines()[0]).is_relative_to(installed)
    # Too large an area, which is said when the folder is laid out.
    assert "400 regions" in done.stderr, done.stderr
    assert (folder / "dagster_home" / "dagster.yaml").read_bytes() == (ROOT / "dagster.yaml").read_bytes()


def test_make_serve_obeys_the_demos_settings_over_exported_ones(tmp_path: Path) -> None:
    """There is nothing to search in the demo's root, and the other is no root at all."""
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "settings.env").write_text(f"GRAFT_WORLD=planet\nGRAFT_ROOT={demo / 'data'}\n")
    names = [f"DEMO={demo}", f"BIN={Path(sys.executable).parent}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        # The environment is there: it is not installed anew.
        ["make", "-o", ".venv/.ready", "serve", *names],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**environment, "GRAFT_ROOT": "nowhere://production"},
        timeout=120,
    )
    assert done.returncode == 2, done.stdout
    assert "no search index of naip" in done.stderr


def test_dependencies_are_those_that_were_tested() -> None:
    done = subprocess.run(
        [sys.executable, str(DEPLOY / "check_pins.py")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_pins_that_are_loose_missing_or_out_of_range_are_named() -> None:
    sys.path.insert(0, str(DEPLOY))
    try:
        from check_pins import problems
    finally:
        sys.path.remove(str(DEPLOY))
    project = '[project]\ndependencies = ["pyyaml>=6", "numpy>=99", "nowhere"]\noptional-dependencies = {}\n'
    found = "\n".join(problems(project, "numpy==2.0.0\nrequests>=2\npyyaml==5.0\npyyaml==6.0.3\n"))
    assert "requests>=2 is no exact pin" in found
    assert "pyyaml is there twice" in found
    assert "nowhere is not pinned" in found
    assert "numpy==2.0.0 is not >=99" in found
    assert re.search(r"numpy==\S+ is installed, 2\.0\.0 is pinned", found)
