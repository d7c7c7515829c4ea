"""Settings come from the environment, errors say what to do, secrets stay secret."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from assets.external import build_external_assets
from graft_pipeline.errors import InputError, SettingsError
from graft_pipeline.imagery import NAIP, SENTINEL2, Sensor
from graft_pipeline.settings import SensorSettings, Settings, load_settings


def test_without_keys_the_planet_answers() -> None:
    settings = load_settings()
    assert settings.is_planet
    assert settings.training_recipe == "planet"
    assert list(settings.sensor_records) == ["naip", "sentinel2"]


def test_all_keys_mean_production_and_some_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_FLICKR_KEY", "k-visible-nowhere")
    with pytest.raises(SettingsError, match="GRAFT_FLICKR_SECRET, GRAFT_EE_PROJECT not set") as caught:
        load_settings()
    assert "k-visible-nowhere" not in str(caught.value)
    monkeypatch.setenv("GRAFT_FLICKR_SECRET", "s-visible-nowhere")
    monkeypatch.setenv("GRAFT_EE_PROJECT", "my-project")
    settings = load_settings()
    assert not settings.is_planet
    assert settings.training_recipe == "paper"
    assert "visible-nowhere" not in repr(settings) + str(settings.model_dump_json())


def test_a_wrong_value_is_named_and_a_secret_in_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_GRID_DEG", "0.3")
    monkeypatch.setenv("GRAFT_FLICKR_SECRET", "s-visible-nowhere")
    with pytest.raises(SettingsError, match="GRAFT_GRID_DEG") as caught:
        load_settings()
    assert "s-visible-nowhere" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GRAFT_FLICKR_LICENSES", "4, 5"),
        ("GRAFT_FLICKR_SAFE_SEARCH", "1"),
        ("GRAFT_SCHEDULE_EVERY_HOURS", "5"),
        ("GRAFT_SEED", "-1"),
    ],
)
def test_values_that_mean_nothing_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name):
        load_settings()


def test_an_env_file_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my.env").write_text("GRAFT_PLANET__SEED=7\nGRAFT_ROOT=somewhere\n")
    monkeypatch.setenv("GRAFT_ENV_FILE", str(tmp_path / "my.env"))
    settings = load_settings()
    assert (settings.planet.seed, settings.root) == (7, "somewhere")


def test_a_sensor_of_ones_own_replaces_the_standard_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "GRAFT_SENSORS",
        '[{"name": "naip5m", "collection": "USDA/NAIP/DOQQ", "bands": ["R", "G", "B"], "gsd_m": 5.0}]',
    )
    (sensor,) = load_settings().sensor_records.values()
    assert (sensor.name, sensor.chip_m, sensor.spacing_m) == ("naip5m", 2240.0, 560.0)


def test_a_standard_sensor_may_be_changed_in_a_few_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "GRAFT_SENSORS",
        '[{"name": "naip"}, {"name": "sentinel2", "cloud_rule": "chip", "raw_bands": ["B8"]}]',
    )
    naip, sentinel2 = load_settings().sensor_records.values()
    assert naip == NAIP
    assert sentinel2 == replace(SENTINEL2, cloud_rule="chip", raw_bands=("B8",))
    assert sentinel2.requested_bands == ("B4", "B3", "B2", "B8", "SCL")
    assert {field.name for field in fields(Sensor)} == set(SensorSettings.model_fields)


@pytest.mark.parametrize(
    ("sensor", "message"),
    [
        ({"name": "mine", "gsd_m": 1.0}, "collection, bands"),
        ({"name": "naip", "cloud_rule": "chip"}, "mask_band and max_cloud_pct"),
        ({"name": "naip", "max_cloud_pct": 1.0}, "cloud_property and max_cloud_pct together"),
        ({"name": "sentinel2", "raw_bands": ["B8", "B8"]}, "twice"),
        (
            {"name": "sentinel2", "cloud_rule": "chip", "cloud_property": None, "max_scene_cloud_pct": 50.0},
            "needs cloud_property",
        ),
    ],
)
def test_sensors_that_cannot_be_are_named(sensor: dict[str, Any], message: str) -> None:
    settings = Settings(_env_file=None, sensors=[sensor])
    with pytest.raises(InputError, match=f"'{sensor['name']}'.*{message}"):
        _ = settings.sensor_records


def test_a_sensors_unknown_field_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_SENSORS", '[{"name": "naip", "rawbands": ["N"]}]')
    with pytest.raises(SettingsError, match="RAWBANDS"):
        load_settings()


@pytest.mark.parametrize("source", ["stac", "folder"])
def test_other_sources_have_sensors_of_their_own_and_need_no_earth_engine(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    for name, value in (("IMAGERY", source), ("FLICKR_KEY", "k"), ("FLICKR_SECRET", "s")):
        monkeypatch.setenv(f"GRAFT_{name}", value)
    settings = load_settings()
    assert not settings.is_planet
    assert list(settings.sensor_records) == ["naip", "sentinel2"]
    assert settings.sensor_records["naip"].collection == "naip"
    keys = {spec.key.to_user_string() for spec in build_external_assets(settings)}
    kind = {"stac": "stac", "folder": "geotiff"}[source]
    sentinel2 = {"stac": "sentinel_2_l2a", "folder": "sentinel2"}[source]
    assert keys >= {f"{kind}/naip", f"{kind}/{sentinel2}"}


def test_settings_can_be_copied_with_other_endpoints() -> None:
    copy = Settings(_env_file=None).model_copy(update={"ee_url": "http://127.0.0.1:1"})
    assert copy.ee_url == "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("GRAFT_SEARCH_RADIUS", "4", "did you mean GRAFT_SEARCH_RADIUS_KM"),
        ("GRAFT_PLANET__SEEED", "4", "GRAFT_PLANET__SEEED"),
        ("GRAFT_SENSORS", "[{", "GRAFT_SENSORS is no JSON"),
        ("GRAFT_IMAGE_HOSTS", "staticflickr.com", "GRAFT_IMAGE_HOSTS is no JSON"),
        ("GRAFT_ENV_FILE", "/nowhere/settings.env", "correct GRAFT_ENV_FILE"),
    ],
)
def test_what_would_do_nothing_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message):
        load_settings()


def test_a_misspelt_line_and_a_file_that_is_no_text_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRAFT_ENV_FILE", str(tmp_path / "my.env"))
    (tmp_path / "my.env").write_text("GRAFT_ROOOT=somewhere\n")
    with pytest.raises(SettingsError, match=r"GRAFT_ROOOT is no setting.*GRAFT_ROOT"):
        load_settings()
    (tmp_path / "my.env").write_bytes(b"GRAFT_ROOT=\xff\xd0\n")
    with pytest.raises(SettingsError, match="no env file"):
        load_settings()


def test_what_kubernetes_puts_into_pods_is_let_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PORT", "SERVICE_HOST", "DAGSTER_WEBSERVER_PORT_80_TCP_ADDR", "GRID_STRIDE_M__naip"):
        monkeypatch.setenv(f"GRAFT_{name}", "448")
    assert load_settings().grid_stride_m == {"naip": 448}
