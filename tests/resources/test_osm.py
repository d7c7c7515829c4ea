"""Extracts as Geofabrik and Overpass give them, written small, labelled against areas computed by hand."""

import json

import numpy as np
import pyarrow as pa
import pytest
import shapely

from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Projection
from graft_pipeline.imagery import NAIP
from graft_pipeline.osm_labels import label_tiles, osm_classes
from graft_pipeline.schemas import TILES
from resources.osm import read_osm

EPSG = 32619
X, Y = 330_000.0, 4_700_000.0
#: North-west corner of the one tile's footprint: chips are 448 m, footprints their central 224 m.
WEST, NORTH = X + 112, Y - 112


def lonlat(points):
    """(x, y) offsets in metres from the footprint's north-west corner, as (lon, lat)."""
    points = np.asarray(points, float)
    lon, lat = Projection(EPSG).inverse(WEST + points[:, 0], NORTH - points[:, 1])
    return list(zip(lon.tolist(), lat.tolist(), strict=True))


def square(left, top, right, bottom):
    return lonlat([(left, top), (right, top), (right, bottom), (left, bottom)])


#: id: (tags, corners, whether it closes)
WAYS = {
    1: ({"landuse": "forest", "name": "Wood"}, square(0, 0, 224, 168), True),
    2: ({"natural": "wood"}, square(0, 0, 224, 100), True),
    3: ({"highway": "motorway"}, lonlat([(-50, 200), (300, 200)]), False),
    4: ({"leisure": "swimming_pool"}, square(10, 180, 20, 185), True),
    5: ({"landuse": "industrial"}, square(0, 180, 20, 190), True),
    6: ({"building": "yes"}, square(0, 0, 224, 224), True),
    7: ({"landuse": "farmland"}, square(5000, 5000, 6000, 6000), True),
    8: ({"highway": "residential"}, lonlat([(0, 10), (224, 10)]), False),
    # A roundabout, a platform that says it is an area; ten kilometres east.
    9: ({"highway": "primary"}, square(10_020, 20, 10_200, 200), True),
    10: ({"railway": "rail", "area": "yes"}, square(10_000, 0, 10_224, 100), True),
}


def write_pbf(path):
    import osmium
    from osmium.osm import mutable

    nodes, ways = [], []
    for number, (tags, points, closes) in WAYS.items():
        ids = []
        for point in points:
            ids.append(len(nodes) + 1)
            nodes.append(mutable.Node(id=ids[-1], location=point, version=1))
        ways.append(mutable.Way(id=number, nodes=[*ids, *ids[: int(closes)]], tags=tags, version=1))
    writer = osmium.SimpleWriter(str(path))
    for node in nodes:
        writer.add_node(node)
    for way in ways:
        writer.add_way(way)
    writer.close()
    return path


def write_overpass(path):
    elements = []
    for number, (tags, points, closes) in WAYS.items():
        points = [*points, *points[: int(closes)]]
        geometry = [{"lat": lat, "lon": lon} for lon, lat in points]
        count = len(WAYS[number][1])
        nodes = [100 * number + n % count for n in range(len(points))]
        elements.append({"type": "way", "id": number, "nodes": nodes, "tags": tags, "geometry": geometry})
    path.write_text(json.dumps({"version": 0.6, "generator": "Overpass API", "elements": elements}))
    return path


@pytest.fixture(params=["extract.osm.pbf", "extract.osm", "overpass.json"])
def extract(request, tmp_path):
    path = tmp_path / request.param
    return write_overpass(path) if path.suffix == ".json" else write_pbf(path)


def tiles(*corners):
    blank = dict.fromkeys(TILES.schema.names)
    rows = [
        {
            **blank, "tile_id": f"naip-{n}", "tile_index": n, "center_photo_id": str(n), "center_lon_deg": 0.0,
            "center_lat_deg": 0.0, "center_x_m": x + 224, "center_y_m": y - 224, "epsg": EPSG, "x0_m": x, "y0_m": y,
            "gsd_m": 1.0, "chip_px": 448, "sampling": "non_overlapping", "split": "train",
        }
        for n, (x, y) in enumerate(corners)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=TILES.schema)


BOUNDS = (-72.0, 42.0, -70.0, 43.0)


def test_tiles_get_the_classes_that_cover_their_footprint(extract):
    made = label_tiles(tiles((X, Y), (X + 2000, Y)), read_osm(extract, BOUNDS), NAIP, EPSG).to_pylist()
    # The pool's 50 square metres are enough for a pool; 200 of industry are not; houses are no class of the table.
    assert made[0]["labels"] == ["forest", "highway", "swimming pool"]
    shares = dict(zip(made[0]["labels"], made[0]["shares"], strict=True))
    # Two features of one class that overlap count once; the road is 20 m wide and crosses the footprint.
    assert shares["forest"] == pytest.approx(168 / 224, rel=1e-3)
    assert shares["highway"] == pytest.approx(20 / 224, rel=1e-3)
    assert shares["swimming pool"] == pytest.approx(50 / 224**2, rel=1e-2)
    assert made[0]["single_label"] == "forest"
    assert made[1] == {"tile_id": "naip-1", "labels": [], "shares": [], "single_label": None}


def test_what_a_road_encloses_is_no_road(extract):
    (made,) = label_tiles(tiles((X + 10_000, Y)), read_osm(extract, BOUNDS), NAIP, EPSG).to_pylist()
    assert made["labels"] == ["highway", "railway"]
    # The ring of a road of 20 m around 160 m squared; cut at corners, where lines have no caps.
    assert made["shares"][0] == pytest.approx((200**2 - 160**2) / 224**2, rel=0.02)
    assert made["shares"][1] == pytest.approx(100 / 224, rel=1e-3)


def test_a_region_without_tiles_needs_no_features():
    assert label_tiles(tiles(), [], NAIP, EPSG).num_rows == 0


def test_features_beyond_the_bounds_are_left_out(extract):
    lon, lat = Projection(EPSG).inverse(np.array([WEST + 112]), np.array([NORTH - 112]))
    around = (float(lon[0]) - 0.01, float(lat[0]) - 0.01, float(lon[0]) + 0.01, float(lat[0]) + 0.01)
    names = [feature.class_name for feature in read_osm(extract, around)]
    assert sorted(names) == ["forest", "forest", "highway", "industrial", "swimming pool"]
    assert all(feature.geometry.intersects(shapely.box(*around)) for feature in read_osm(extract, around))


def test_an_answer_of_overpass_that_broke_off(tmp_path):
    path = write_overpass(tmp_path / "overpass.json")
    remark = 'runtime error: Query timed out in "query" at line 3 after 26 seconds.'
    path.write_text(json.dumps(json.loads(path.read_text()) | {"remark": remark}))
    with pytest.raises(InputError, match=r"timed out.*timeout"):
        list(read_osm(path, BOUNDS))


def test_files_that_are_no_extracts(tmp_path):
    (tmp_path / "page.json").write_text("<html>")
    (tmp_path / "page.osm.pbf").write_bytes(b"<html>")
    for name in ("missing.osm.pbf", "page.json", "page.osm.pbf"):
        with pytest.raises(InputError, match=r"download\.geofabrik\.de"):
            list(read_osm(tmp_path / name, BOUNDS))
    with pytest.raises(InputError, match="no feature of the table"):
        label_tiles(tiles((X, Y)), [], NAIP, EPSG)


def test_the_table_names_each_class_once_and_in_words():
    table = osm_classes()
    assert len({of.name for of in table}) == len(table) >= 15
    assert all(of.words and of.tags for of in table)
    pairs = [(key, value) for of in table for key, values in of.tags.items() for value in values]
    assert len(set(pairs)) == len(pairs)
