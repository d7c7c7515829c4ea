"""A deployment in a temporary folder: settings, Dagster instance, storage, and a button to materialise with."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from graft_pipeline import areas
from graft_pipeline.automation import region_keys
from graft_pipeline.definitions import build_defs
from graft_pipeline.manifests import write_bytes_atomic
from graft_pipeline.settings import load_settings
from resources.storage import Storage

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@dataclass
class Deployment:
    """What a data engineer has: definitions, an instance, and the storage behind them."""

    definitions: dg.Definitions
    instance: dg.DagsterInstance
    storage: Storage
    folder: Path

    @classmethod
    def make(
        cls, folder: Path, monkeypatch: pytest.MonkeyPatch, planet_url: str | None = None, **settings: Any
    ) -> "Deployment":
        """Set GRAFT_ variables (`settings`, lower case) and open an instance in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
        variables = {
            "root": str(folder / "data"),
            "grid_deg": "0.25",
            "search_locations_per_region": "4",
            "search_radius_km": "3",
            "flickr_calls_per_hour": "3600000",
            "ee_requests_per_second": "1000",
            "recipe": "smoke",
            **({"planet__url": planet_url} if planet_url else {}),
            **settings,
        }
        for name, value in variables.items():
            monkeypatch.setenv(
                f"GRAFT_{name.upper()}", value if isinstance(value, str) else json.dumps(value)
            )
        loaded = load_settings()
        return cls(
            build_defs(loaded), dg.DagsterInstance.from_config(str(folder)), Storage(loaded.root), folder
        )

    def register(self, west: float, south: float, east: float, north: float) -> None:
        """Register a box as area, make its regions partitions, and train the planet's foundation model."""
        ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features = [{"type": "Feature", "properties": {}, "geometry": geometry}]
        file = self.folder / "area.geojson"
        file.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        areas.register_area(self.storage.areas_folder, areas.read_area(file, name="area"))
        self.materialise("regions", "openclip/foundation")

    def start_like(self, other: "Deployment") -> None:
        """Take over another deployment's areas, regions and foundation model."""
        for name, content in other.contents().items():
            if name.startswith(("areas/", "regions/", "models/")):
                write_bytes_atomic(self.storage.root / name, content)
        self.instance.add_dynamic_partitions("region", other.instance.get_dynamic_partitions("region"))

    def materialise(
        self, *keys: str, partition: str | None = None, **options: Any
    ) -> dg.ExecuteInProcessResult:
        """Materialise assets by key, `naip/tiles`, as the UI does."""
        return self.definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=self.instance,
            asset_selection=[dg.AssetKey(key.split("/")) for key in keys],
            partition_key=partition,
            run_config={**QUIET, **options.pop("run_config", {})},
            **options,
        )

    def collect(self, partition: str, *sensors: str) -> dg.ExecuteInProcessResult:
        """Materialise one region from search to pairs."""
        return self.materialise(*("/".join(key.path) for key in region_keys(sensors)), partition=partition)

    def metadata(self, key: str) -> dict[str, Any]:
        """Metadata of an asset's latest materialisation."""
        event = self.instance.get_latest_materialization_event(dg.AssetKey(key.split("/")))
        assert event is not None
        return dict(event.asset_materialization.metadata)

    def contents(self) -> dict[str, bytes]:
        """Every file of the storage, wherever it is, by its path below the root."""
        root = self.storage.root
        files = (file for file in root.rglob("*") if file.is_file())
        return {file.path.removeprefix(root.path).lstrip("/"): file.read_bytes() for file in files}

    def files(self) -> dict[str, tuple[bytes, int]]:
        """Every file of the storage: content and modification time."""
        root = self.folder / "data"
        return {
            str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }


@pytest.fixture
def deploy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Deployment]]:
    """Makes deployments; keyword arguments are settings."""
    with ExitStack() as stack:
        number = 0

        def make(**settings: Any) -> Deployment:
            nonlocal number
            number += 1
            deployment = Deployment.make(tmp_path / f"deployment-{number}", monkeypatch, **settings)
            stack.callback(deployment.instance.dispose)
            return deployment

        yield make


@pytest.fixture(scope="module")
def deploy_for_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Deployment]]:
    """As `deploy`, for deployments that a module's tests read but do not run any more."""
    with pytest.MonkeyPatch.context() as monkeypatch, ExitStack() as stack:

        def make(**settings: Any) -> Deployment:
            deployment = Deployment.make(tmp_path_factory.mktemp("deployment"), monkeypatch, **settings)
            stack.callback(deployment.instance.dispose)
            return deployment

        yield make
