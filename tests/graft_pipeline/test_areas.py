import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas
import pytest
import shapely
from upath import UPath

from graft_pipeline.areas import (
    Area,
    area_name,
    list_areas,
    read_area,
    regions_table,
    register_area,
    union,
)
from graft_pipeline.errors import InputError
from graft_pipeline.manifests import conform
from graft_pipeline.schemas import REGIONS

SQUARE = shapely.box(-71.7, 42.3, -71.6, 42.4)
BOW_TIE = shapely.Polygon([(0, 0), (2, 2), (2, 0), (0, 2)])


def write(path: Path, *shapes: Any, crs: str | None = "EPSG:4326", **columns: Any) -> Path:
    geopandas.GeoDataFrame(columns, geometry=list(shapes), crs=crs).to_file(path)
    return path


def test_a_file_of_any_format_and_crs_is_read_as_degrees(tmp_path: Path) -> None:
    frame = geopandas.GeoDataFrame(geometry=[SQUARE], crs="EPSG:4326").to_crs("EPSG:32619")
    frame.to_file(tmp_path / "My Area.gpkg")
    area = read_area(tmp_path / "My Area.gpkg")
    assert area.name == "my_area"
    assert area.geometry.bounds == pytest.approx(SQUARE.bounds, abs=1e-6)


def test_features_are_united_and_can_be_chosen(tmp_path: Path) -> None:
    shapes = [shapely.box(0, 0, 1, 1), shapely.box(1, 0, 2, 1), shapely.box(5, 0, 6, 1)]
    path = write(tmp_path / "three.geojson", *shapes, name=["A", "B", "C"])
    assert read_area(path).geometry.area == pytest.approx(3)
    chosen = read_area(path, name="AB", where="name in ('A', 'B')")
    assert chosen.name == "ab"
    assert chosen.geometry.equals(shapely.box(0, 0, 2, 1))


def test_a_self_crossing_polygon_is_repaired(tmp_path: Path) -> None:
    area = read_area(write(tmp_path / "tie.geojson", BOW_TIE))
    assert area.geometry.is_valid
    assert area.geometry.area == pytest.approx(2)


def test_geojson_without_crs_is_in_degrees(tmp_path: Path) -> None:
    path = tmp_path / "bare.geojson"
    path.write_text(json.dumps(shapely.geometry.mapping(SQUARE)))
    assert read_area(path).geometry.equals(SQUARE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent.geojson", "no file"),
        (lambda folder: text(folder / "broken.geojson", "{"), "cannot be read"),
        (lambda folder: text(folder / "notes.txt", "hello"), "cannot be read"),
        (lambda folder: text(folder / "empty.geojson", '{"type":"FeatureCollection","features":[]}'), "no "),
        (lambda folder: write(folder / "points.geojson", shapely.Point(0, 0)), "Point"),
        (lambda folder: write(folder / "line.geojson", shapely.LineString([(0, 0), (1, 1)])), "LineString"),
        (lambda folder: write(folder / "none.geojson", None, crs="EPSG:4326"), "no feature"),
        (lambda folder: write(folder / "no_crs.shp", SQUARE, crs=None), "CRS"),
        (lambda folder: write(folder / "fiji.geojson", shapely.box(177, -19, 182, -16)), "antimeridian"),
        (lambda folder: write(folder / "wide.geojson", shapely.box(-179, -19, 179, -16)), "antimeridian"),
        (lambda folder: write(folder / "metres.geojson", shapely.box(3e5, 4e6, 4e5, 5e6)), "CRS"),
        (lambda folder: write(folder / "pole.geojson", shapely.box(0, 83, 9, 90)), "UTM"),
        (lambda folder: write(folder / "south.geojson", shapely.box(0, -81, 9, -70)), "UTM"),
        (lambda folder: write(folder / "flat.geojson", shapely.Polygon([(0, 0), (1, 1), (0, 0)])), "area"),
    ],
)
def test_bad_files_are_refused_with_a_remedy(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_area(make(tmp_path))
    assert str(caught.value).endswith(".")


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


@pytest.mark.parametrize("where", ["name = 'Atlantis'", "no such syntax", "colour = 'red'"])
def test_a_condition_that_selects_nothing_is_refused(tmp_path: Path, where: str) -> None:
    path = write(tmp_path / "a.geojson", SQUARE, name=["A"])
    with pytest.raises(InputError, match="condition"):
        read_area(path, where=where)


def test_names_fit_files_and_tables() -> None:
    assert area_name("Rhode Island") == "rhode_island"
    assert area_name("../etc/passwd") == "etc_passwd"
    with pytest.raises(InputError):
        area_name("///")


def test_areas_are_registered_idempotently(root: UPath, snapshot_of: Any) -> None:
    folder = root / "areas"
    assert list_areas(folder) == []
    register_area(folder, Area("b", SQUARE))
    register_area(folder, Area("a", shapely.box(0, 0, 1, 1)))
    before = snapshot_of(folder)
    register_area(folder, Area("b", SQUARE))
    assert snapshot_of(folder) == before
    areas = list_areas(folder)
    assert [area.name for area in areas] == ["a", "b"]
    assert areas[1].geometry.equals(SQUARE)
    assert union(areas).area == pytest.approx(1 + SQUARE.area)
    assert union([]).is_empty


def test_a_foreign_file_among_the_areas_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.geojson").write_text("{}")
    with pytest.raises(InputError, match=r"x\.geojson"):
        list_areas(UPath(tmp_path))


def test_regions_table_says_how_much_is_covered() -> None:
    table = regions_table(
        [Area("half", shapely.box(-72, 42, -71.5, 43)), Area("all", shapely.box(-72, 42, -71, 43))]
    )
    assert conform(table, REGIONS).equals(table)
    assert table["area"].to_pylist() == ["all", "half"]
    assert table["covered_pct"].to_pylist() == pytest.approx([100, 50])
    assert set(table["epsg"].to_pylist()) == {32619}


def test_us_states(real_data: Path, tmp_path: Path) -> None:
    file = real_data / "us_states.geojson"
    island = read_area(file, where="name = 'Rhode Island'", name="Rhode Island")
    assert island.name == "rhode_island"
    register_area(UPath(tmp_path), island)
    table = regions_table(list_areas(UPath(tmp_path)))
    assert "N41W072" in table["region"].to_pylist()
    assert table["covered_pct"].to_numpy().min() > 0
    assert len(regions_table([read_area(file)])) > 900
