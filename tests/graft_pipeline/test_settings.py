"""Settings come from the environment, errors say what to do, secrets stay secret."""

from pathlib import Path

import pytest

from graft_pipeline.errors import SettingsError
from graft_pipeline.settings import Settings, load_settings


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
    ("name", "value"), [("GRAFT_FLICKR_LICENSES", "4, 5"), ("GRAFT_FLICKR_SAFE_SEARCH", "1")]
)
def test_filters_are_spelled_in_one_way(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
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


def test_settings_can_be_copied_with_other_endpoints() -> None:
    copy = Settings(_env_file=None).model_copy(update={"ee_url": "http://127.0.0.1:1"})
    assert copy.ee_url == "http://127.0.0.1:1"
