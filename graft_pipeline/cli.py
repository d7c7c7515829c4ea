"""The `graft` command: thin commands over the packages, importing what they need when they run.

Exit codes: 0 done, 1 an error of ours with its message on stderr, 2 wrong usage.
"""

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graft_pipeline.errors import GraftError

if TYPE_CHECKING:
    from graft_pipeline.search import SearchIndex
    from resources.storage import Storage
    from training.zero_shot.answering.writers import Writer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
)
areas_app = typer.Typer(no_args_is_help=True, help="Register the areas whose regions are collected.")
planet_app = typer.Typer(
    no_args_is_help=True, help="The embedded world that answers Flickr's and Earth Engine's APIs."
)
photos_app = typer.Typer(no_args_is_help=True, help="What becomes of photos after they were collected.")
app.add_typer(areas_app, name="areas")
app.add_typer(photos_app, name="photos")
app.add_typer(planet_app, name="planet")


@app.callback()
def graft() -> None:
    """Satellite models that understand language, learned from geotagged ground photos (GRAFT, ICLR 2024).

    Settings come from GRAFT_ environment variables or .env; without keys everything talks to the embedded planet.
    """


def main() -> None:
    """Run the command line; errors of ours become one line on stderr and exit code 1."""
    try:
        app()
    except GraftError as error:
        typer.secho(f"graft: {error}", fg="red", err=True)
        sys.exit(1)


def _storage() -> "Storage":
    from graft_pipeline.settings import load_settings
    from resources.storage import Storage

    return Storage(load_settings().root)


def _model_writer() -> "Writer":
    from graft_pipeline.settings import load_settings
    from resources.program_writer import ProgramModel
    from training.zero_shot.answering.writers import PromptedWriter

    return PromptedWriter(ProgramModel.from_settings(load_settings()).complete)


def _table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*["" if value is None else str(value) for value in row])
    # A pipe has no width of its own: give it room instead of 80 columns.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Which planet: two seeds are two different worlds.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where data, Dagster's state, report and scores go.")] = Path(
        "demo"
    ),
    small: Annotated[
        bool, typer.Option("--small", help="Two regions and few steps: a smoke test, not a result.")
    ] = False,
) -> None:
    """Run the whole pipeline on the embedded planet and print the scores."""
    from graft_pipeline.demo import run_demo

    run_demo(folder, seed=seed, is_small=small)


@app.command()
def collect(
    file: Annotated[Path, typer.Argument(help="The area: GeoJSON or any vector file of polygons.")],
    folder: Annotated[
        Path, typer.Option(help="A demo's folder, or one to make: data, Dagster's state and settings.")
    ] = Path("demo"),
    name: Annotated[str | None, typer.Option(help="Name of the area; default: the file's.")] = None,
    where: Annotated[
        str | None, typer.Option(help="Features to take, in SQL: \"name='Rhode Island'\".")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which planet, if the folder is new.")] = 0,
) -> None:
    """Collect an area of your own here and now, from photos to pairs: what a backfill does in a deployment."""
    from graft_pipeline.demo import collect_area

    collect_area(folder, file, name=name, where=where, seed=seed)
    env_file = folder.resolve() / "settings.env"
    typer.echo(f"Lineage and pictures: make ui. Tables: GRAFT_ENV_FILE={env_file} graft status")


@planet_app.command("serve")
def planet_serve(
    seed: Annotated[int, typer.Option(help="Which planet.")] = 0,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 takes a free one.")] = 8750,
    latency_ms: Annotated[float, typer.Option(min=0, help="Added to every answer.")] = 0.0,
    quota: Annotated[
        float | None, typer.Option(help="Requests a second; above it the answer is 429.")
    ] = None,
    fault_rate: Annotated[
        float, typer.Option(min=0, max=1, help="Share of requests that end in a fault.")
    ] = 0.0,
    now: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d"], help="Its present, UTC: what comes later does not exist yet."),
    ] = None,
    mount: Annotated[
        list[str] | None,
        typer.Option(
            help="SENSOR=FILE.tif: serve a real GeoTIFF as a scene of that sensor's collection. Repeatable."
        ),
    ] = None,
) -> None:
    """Serve a planet on loopback until interrupted; point GRAFT_PLANET__URL at it."""
    from graft_pipeline.settings import load_settings
    from resources.planet.process import serve

    mounts: dict[str, list[str]] = {}
    collections = {name: record.collection for name, record in load_settings().sensor_records.items()}
    for entry in mount or []:
        sensor, separator, file = entry.partition("=")
        if not separator or not file:
            raise typer.BadParameter(f"{entry!r}: write SENSOR=FILE.tif, such as naip=scene.tif")
        mounts.setdefault(collections.get(sensor, sensor), []).append(file)
    serve(
        seed=seed,
        port=port,
        latency_ms=latency_ms,
        quota=quota,
        fault_rate=fault_rate,
        mounts=mounts,
        now=now,
    )


@areas_app.command("add")
def areas_add(
    file: Annotated[
        Path, typer.Argument(help="Any vector file that geopandas reads: GeoJSON, GeoPackage, Shapefile ...")
    ],
    name: Annotated[str | None, typer.Option(help="Name of the area; default: the file's.")] = None,
    where: Annotated[
        str | None, typer.Option(help="Features to take, in SQL: \"name='Rhode Island'\".")
    ] = None,
) -> None:
    """Register an area; `regions` then makes its regions partitions."""
    from graft_pipeline import areas
    from graft_pipeline.regions import regions_touching
    from graft_pipeline.settings import load_settings

    area = areas.read_area(file, name=name, where=where)
    storage = _storage()
    with storage.explained():
        path = areas.register_area(storage.areas_folder, area)
    touched = regions_touching(area.geometry, load_settings().grid_deg)
    typer.echo(f"{area.name}: {len(touched)} regions, registered at {path}")


@areas_app.command("list")
def areas_list() -> None:
    """List the registered areas."""
    from graft_pipeline import areas
    from graft_pipeline.regions import regions_touching
    from graft_pipeline.settings import load_settings

    grid_deg = load_settings().grid_deg
    storage = _storage()
    with storage.explained():
        registered = areas.list_areas(storage.areas_folder)
    if not registered:
        typer.echo("No area is registered yet: run graft areas add FILE with any vector file of polygons.")
        return
    rows = [
        [
            area.name,
            len(regions_touching(area.geometry, grid_deg)),
            *(f"{v:.3f}" for v in area.geometry.bounds),
        ]
        for area in registered
    ]
    _table("Areas", ["area", "regions", "west", "south", "east", "north"], rows)


@photos_app.command("purge")
def photos_purge(
    photo_ids: Annotated[list[str] | None, typer.Argument(help="Flickr's ids of photos.")] = None,
    owner: Annotated[
        list[str] | None,
        typer.Option(help="Flickr's id of an owner: all their photos, also later ones. Repeatable."),
    ] = None,
    reason: Annotated[str, typer.Option(help="Kept in the list of purged photos.")] = "requested",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would be removed.")] = False,
) -> None:
    """Remove photos from every dataset and keep them out; run it while nothing is being collected."""
    from datetime import UTC

    from rich.console import Console
    from rich.progress import Progress

    from graft_pipeline.ablations import variant_roots
    from graft_pipeline.purging import purge
    from resources.storage import Storage

    if not photo_ids and not owner:
        raise typer.BadParameter("give ids of photos, or --owner", param_hint="IDS")
    storage = _storage()
    with Progress(console=Console(stderr=True)) as bars, storage.explained():
        task = bars.add_task("Regions", total=None)
        report = purge(
            storage,
            photo_ids or [],
            owner or [],
            reason=reason,
            now=datetime.now(UTC),
            copies=[Storage(root) for root in variant_roots(storage.root)],
            dry_run=dry_run,
            progress=lambda done, of: bars.update(task, completed=done, total=of),
        )
        bars.update(task, completed=report.regions, total=report.regions)
    counts = {"newly listed photos": report.photos, "newly listed owners": report.owners, **report.rows}
    counts |= {"training sets": report.training_sets, "regions": report.regions}
    title = "Would be purged" if dry_run else "Purged"
    _table(title, ["what", "count"], [list(item) for item in counts.items()])


@app.command()
def query(
    sql: Annotated[str, typer.Argument(help="Any DuckDB SQL; every dataset is a view.")],
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")] = False,
    limit: Annotated[int, typer.Option(help="Rows shown at most; 0 shows all.")] = 50,
) -> None:
    """Ask the datasets, for example `graft query "SELECT sensor, count(*) FROM pairs GROUP BY sensor"`."""
    import duckdb

    from graft_pipeline.errors import InputError
    from graft_pipeline.manifests import connect

    connection = connect(_storage().root)
    try:
        cursor = connection.execute(sql)
    except duckdb.Error as error:
        views = ", ".join(sorted(row[0] for row in connection.execute("SHOW TABLES").fetchall()))
        raise InputError(f"{error}\nViews: {views}. Correct the SQL.") from None
    columns = [column[0] for column in cursor.description or []]
    rows = cursor.fetchmany(limit) if limit else cursor.fetchall()
    if csv:
        import csv as csv_module

        writer = csv_module.writer(sys.stdout)
        writer.writerow(columns)
        writer.writerows(rows)
    else:
        _table(
            f"{len(rows)} rows{' (limit)' if limit and len(rows) == limit else ''}",
            columns,
            [list(r) for r in rows],
        )


@app.command()
def segment(
    raster: Annotated[
        Path, typer.Argument(help="Any raster that GDAL opens, with red, green and blue bands.")
    ],
    words: Annotated[
        list[str] | None, typer.Argument(help='Classes in words: "farmland" "a baseball field".')
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="GeoTIFF of classes to write.")] = Path(
        "map.tif"
    ),
    prompts: Annotated[
        str | None,
        typer.Option(help="Instead of words: planet, eurosat, or a JSON file of classes and templates."),
    ] = None,
    sensor: Annotated[
        str, typer.Option(help="Whose pixel-level encoder is used, at whose metres per pixel.")
    ] = "naip",
    encoder: Annotated[
        str | None, typer.Option(help="Folder of another encoder, or any open_clip ViT (with --pretrained).")
    ] = None,
    pretrained: Annotated[str | None, typer.Option(help="open_clip tag or checkpoint of --encoder.")] = None,
    bands: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Red, green and blue band; default: by the file's colours."),
    ] = None,
    values: Annotated[
        tuple[float, float] | None,
        typer.Option("--range", help="Values shown as black and white: 0 3000 for Sentinel-2 reflectance."),
    ] = None,
    overlap: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of a window that its neighbour sees.")
    ] = 0.25,
    sam: Annotated[
        str | None, typer.Option(help="Folder or hub name of a SAM (transformers) that refines the outlines.")
    ] = None,
) -> None:
    """Segment a raster by words alone: `graft segment scene.tif "farmland" "forest" -o map.tif`."""
    from rich.progress import Progress

    from graft_pipeline.errors import InputError
    from graft_pipeline.settings import load_settings
    from training.encoders import load_clip
    from training.zero_shot.prompted import Sam
    from training.zero_shot.prompts import PromptSet, load_prompts
    from training.zero_shot.raster import RasterOptions, segment_raster

    if bool(words) == bool(prompts):
        raise InputError('Name the classes in words ("farmland" "forest"), or give --prompts, not both.')
    sensors = load_settings().sensor_records
    if sensor not in sensors:
        raise InputError(f"No sensor {sensor!r}: use one of {', '.join(sensors)}.")
    wanted = load_prompts(prompts) if prompts else PromptSet.of_words(words or [])
    folder = _storage().models_folder / f"sensor={sensor}" / "pixel_encoder" / "encoder"
    if encoder is None and not folder.exists():
        raise InputError(
            f"{folder} holds no encoder: materialise {sensor}/pixel_encoder, or name one with --encoder."
        )
    named = encoder or f"local-dir:{folder}"
    clip = load_clip(f"local-dir:{named}" if Path(named).is_dir() else named, pretrained)
    options = RasterOptions(gsd_m=sensors[sensor].gsd_m, bands=bands, display_range=values, overlap=overlap)
    with Progress() as bars:
        task = bars.add_task("Rows of windows", total=None)
        made = segment_raster(
            clip,
            raster,
            output,
            wanted,
            options,
            lambda done, of: bars.update(task, completed=done, total=of),
            None if sam is None else Sam(sam).refine,
        )
    rows = [[number, name, f"{100 * share:.1f} %"] for number, (name, share) in enumerate(made.share.items())]
    _table(f"{made.path}: {made.width_px} x {made.height_px} px", ["value", "class", "share"], rows)


@app.command()
def search(
    words: Annotated[str | None, typer.Argument(help='What is searched for: "solar farm".')] = None,
    like: Annotated[str | None, typer.Option(help="Instead of words: tiles that look like this one.")] = None,
    photo: Annotated[
        Path | None, typer.Option(help="Instead of words: tiles where this ground photo may be taken.")
    ] = None,
    area: Annotated[
        Path | None, typer.Option(help="Vector file of polygons in which tiles are searched; default: all.")
    ] = None,
    since: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="First UTC day of the scenes' acquisition.")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="UTC day before which scenes were acquired.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Tiles at most.")] = 50,
    sensor: Annotated[str, typer.Option(help="Whose tiles are searched.")] = "naip",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Tiles as points: .geojson, or .parquet for GeoParquet."),
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="Contact sheet of the tiles to write, a JPEG.")] = None,
    is_exact: Annotated[
        bool, typer.Option("--exact", help="Score every tile, however many there are.")
    ] = False,
) -> None:
    """Find the tiles that words describe: `graft search "solar farm" --area area.geojson -o hits.geojson`."""
    from graft_pipeline import sheets
    from graft_pipeline.areas import read_area
    from graft_pipeline.errors import InputError
    from graft_pipeline.grid import stored_chips
    from graft_pipeline.manifests import write_bytes_atomic
    from graft_pipeline.search import Filters, SearchIndex, check_hits_name, write_hits
    from graft_pipeline.settings import load_settings

    if sum(query is not None for query in (words, like, photo)) != 1:
        raise InputError('Say what is searched for: words ("solar farm"), --like TILE_ID or --photo FILE.')
    if output is not None:
        check_hits_name(output)
    settings, storage = load_settings(), _storage()
    if sensor not in settings.sensor_records:
        raise InputError(f"No sensor {sensor!r}: use one of {', '.join(settings.sensor_records)}.")
    days = [None if day is None else day.date() for day in (since, until)]
    filters = Filters(read_area(area).geometry if area else None, *days)
    with storage.explained():
        index = SearchIndex.open(storage.root, sensor)
        vector = _query_vector(index, words, like, photo)
        found = index.search(vector, top, filters, is_exact=is_exact)
        if sheet is not None:
            picture = sheets.search_sheet(
                {str(words or like or photo): found},
                lambda region: stored_chips(storage.root, sensor, region),
                crop_px=settings.sensor_records[sensor].crop_px,
            )
            write_bytes_atomic(sheet, picture)
    if output is not None:
        write_hits(output, found)
    rows = [
        [
            rank,
            f"{row['score']:.4f}",
            row["tile_id"],
            *(f"{row[name]:.5f}" for name in ("center_lon_deg", "center_lat_deg")),
            *(row["region"], f"{row['acquired_at_utc']:%Y-%m-%d}"),
        ]
        for rank, row in enumerate(found.to_pylist(), start=1)
    ]
    title = f"{len(rows)} of {index.rows:,} tiles in {len(index.regions)} regions"
    _table(title, ["rank", "score", "tile_id", "lon_deg", "lat_deg", "region", "acquired"], rows)


def _query_vector(index: "SearchIndex", words: str | None, like: str | None, photo: Path | None) -> Any:
    """What is searched for in an index, (D,) float32: words, a tile of it, or a ground photo."""
    from graft_pipeline.errors import InputError
    from graft_pipeline.settings import load_settings
    from training.encoders import load_clip
    from training.zero_shot.queries import text_vector

    if like is not None:
        return index.vector_of(like)
    folder = _storage().models_folder
    clip = load_clip(f"local-dir:{folder / f'sensor={index.sensor}' / 'image_encoder' / 'encoder'}")
    index.check_model(clip.fingerprint())
    if photo is None:
        return text_vector(clip, words or "")
    from resources.foundation import FoundationModel

    try:
        content = photo.read_bytes()
    except OSError as error:
        raise InputError(f"{photo}: {error.strerror}. Name an image file.") from error
    return FoundationModel.of_deployment(load_settings(), folder).embed_images([content])[0]


@app.command("map")
def map_concepts(
    words: Annotated[list[str], typer.Argument(help='Concepts in words: "farmland" "a solar farm".')],
    area: Annotated[
        Path | None,
        typer.Option(help="Vector file of polygons in which tiles are mapped; default: all tiles."),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="File that ends in .parquet, .tif or .html, or a folder for one of each."
        ),
    ] = Path("maps"),
    sensor: Annotated[str, typer.Option(help="Whose tiles are mapped.")] = "naip",
    resolution: Annotated[
        int, typer.Option(help="H3 resolution of the hexagons, 3 to 10; 7 is 5 square kilometres.")
    ] = 7,
    cell_km: Annotated[
        float | None, typer.Option(help="Instead of hexagons: side of square cells, kilometres.")
    ] = None,
    threshold: Annotated[
        float,
        typer.Option(help="Contrast from which a tile is a hit: standard deviations above the mean tile."),
    ] = 1.0,
    since: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="First UTC day of the scenes' acquisition.")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="UTC day before which scenes were acquired.")
    ] = None,
) -> None:
    """Map where words apply: `graft map "farmland" "forest" --area area.geojson -o maps`."""
    from rich.console import Console
    from rich.progress import Progress

    from graft_pipeline import concept_maps, map_files
    from graft_pipeline.areas import read_area
    from graft_pipeline.grid import stored_chips
    from graft_pipeline.search import Filters, SearchIndex
    from training.encoders import load_clip
    from training.zero_shot.queries import text_vector

    shown = read_area(area).geometry if area else None
    days = [None if day is None else day.date() for day in (since, until)]
    cells = concept_maps.Squares(cell_km) if cell_km is not None else concept_maps.Hexagons(resolution)
    storage = _storage()
    with storage.explained(), Progress(console=Console(stderr=True)) as bars:
        index = SearchIndex.open(storage.root, sensor)
        folder = storage.models_folder / f"sensor={sensor}" / "image_encoder" / "encoder"
        clip = load_clip(f"local-dir:{folder}")
        index.check_model(clip.fingerprint())
        task = bars.add_task("Concepts", total=None)
        maps = concept_maps.map_vectors(
            index,
            {concept: text_vector(clip, concept) for concept in dict.fromkeys(words)},
            cells,
            None if shown is None and days == [None, None] else Filters(shown, *days),
            threshold,
            lambda done, of: bars.update(task, completed=done, total=of),
        )
        written = map_files.write_maps(
            output,
            maps,
            f"{', '.join(maps.concepts)} by {sensor}",
            lambda region: stored_chips(storage.root, sensor, region),
            shown,
        )
    _table(
        f"{int(maps.tiles.sum()):,} tiles in {len(maps.keys):,} cells: {', '.join(map(str, written.files))}",
        ["concept", "hits", "cells with hits", "densest cell", "its share", "its centre"],
        concept_maps.summary(maps),
    )
    for reason in written.left_out.values():
        typer.secho(f"Left out: {reason}", fg="yellow", err=True)


@app.command()
def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8760,
    sensor: Annotated[str, typer.Option(help="Whose tiles are searched.")] = "naip",
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. There is no log-in: beyond loopback, put a proxy that asks for one before it."
        ),
    ] = "127.0.0.1",
) -> None:
    """Serve the search page: words in, a map of where they apply, with the best tiles and their photos."""
    from graft_pipeline.errors import InputError
    from graft_pipeline.search import SearchIndex
    from graft_pipeline.settings import load_settings
    from graft_pipeline.web.app import Basemap, create_app
    from graft_pipeline.web.server import run
    from training.encoders import load_clip
    from training.zero_shot.queries import text_vector

    settings, storage = load_settings(), _storage()
    if sensor not in settings.sensor_records:
        raise InputError(f"No sensor {sensor!r}: use one of {', '.join(settings.sensor_records)}.")
    with storage.explained():
        index = SearchIndex.open(storage.root, sensor)
        index.load()
        folder = storage.models_folder / f"sensor={sensor}" / "image_encoder" / "encoder"
        clip = load_clip(f"local-dir:{folder}")
        index.check_model(clip.fingerprint())
    basemap = Basemap(settings.basemap_url, settings.basemap_attribution)
    if settings.is_planet and settings.basemap_url is None:
        from resources.planet.basemap import ZOOMS, TilePainter
        from resources.planet.world import World

        painter = TilePainter(World(settings.planet.seed))
        basemap = Basemap(attribution="GRAFT's embedded planet", draw=painter.tile, zooms=ZOOMS)
    page = create_app(
        root=storage.root,
        index=index,
        sensor=settings.sensor_records[sensor],
        encode_text=lambda words: text_vector(clip, words),
        grid_deg=settings.grid_deg,
        basemap=basemap,
        shows_copies=settings.is_planet,
        host=host,
    )
    run(
        page,
        host,
        port,
        on_ready=lambda url: typer.echo(f"Search {index.rows:,} tiles at {url} (Ctrl-C ends it)"),
    )


@app.command()
def ask(
    image: Annotated[
        str, typer.Argument(help="GeoTIFF, PNG or JPEG, or the id of a tile of this deployment: naip-30012.")
    ],
    question: Annotated[
        str | None, typer.Argument(help='In English: "How many baseball fields are north of the river?"')
    ] = None,
    program: Annotated[
        str | None, typer.Option(help="Instead of a question: a program, such as 'count(find(\"lake\"))'.")
    ] = None,
    writer: Annotated[
        Literal["auto", "grammar", "endpoint"],
        typer.Option(
            help="Who writes the program: the embedded grammar, the model of GRAFT_ANSWER_URL, or (auto) that model "
            "where the grammar does not know the question."
        ),
    ] = "auto",
    evidence: Annotated[
        Path | None, typer.Option(help="PNG to write: the image with what the answer rests on.")
    ] = None,
    sensor: Annotated[
        str | None,
        typer.Option(help="Whose pixel-level encoder looks; default: the tile's, else naip."),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Folder of another encoder, or any open_clip ViT (with --pretrained).")
    ] = None,
    pretrained: Annotated[str | None, typer.Option(help="open_clip tag or checkpoint of --encoder.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="What images show besides: a prompt set or JSON file. Default: planet or naip_osm."
        ),
    ] = None,
    gsd_m: Annotated[
        float | None,
        typer.Option(help="Metres per pixel of an image without coordinates; default: the sensor's."),
    ] = None,
    values: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--range", help="Values shown as black and white, of images not in bytes; default: the sensor's."
        ),
    ] = None,
    sam: Annotated[
        str | None, typer.Option(help="Folder or hub name of a SAM (transformers) that refines the outlines.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Longest run of the program.")] = 120.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
) -> None:
    """Answer a question about an image, with the program and the evidence: `graft ask scene.tif "Where is ..."`."""
    from graft_pipeline.errors import InputError
    from graft_pipeline.manifests import write_bytes_atomic
    from graft_pipeline.settings import load_settings
    from training.encoders import load_clip
    from training.zero_shot.answering import evidence as drawing
    from training.zero_shot.answering.detection import PixelDetector
    from training.zero_shot.answering.images import read_image, read_tile
    from training.zero_shot.answering.interpreter import Interpreter, Limits
    from training.zero_shot.answering.language import parse
    from training.zero_shot.answering.writers import with_grammar
    from training.zero_shot.prompted import Sam
    from training.zero_shot.prompts import load_prompts

    if (question is None) == (program is None):
        raise InputError("Ask a question, or give --program, not both.")
    settings, storage = load_settings(), _storage()
    is_file = Path(image).exists()
    name = sensor or (image.rpartition("-")[0] if not is_file else "") or "naip"
    if name not in settings.sensor_records:
        raise InputError(
            f"No sensor {name!r}, and no file {image}: use one of {', '.join(settings.sensor_records)}."
        )
    record = settings.sensor_records[name]
    if program is None:
        model = (
            _model_writer() if writer == "endpoint" or (writer == "auto" and settings.answer_url) else None
        )
        write = model if writer == "endpoint" and model is not None else with_grammar(model)
        program = write(question or "")
    parsed = parse(program)
    with storage.explained():
        looked_at = (
            read_image(image, gsd_m or record.gsd_m, values or record.display_range)
            if is_file
            else read_tile(storage.root, image)
        )
    folder = storage.models_folder / f"sensor={name}" / "pixel_encoder" / "encoder"
    if encoder is None and not folder.exists():
        raise InputError(
            f"{folder} holds no encoder: materialise {name}/pixel_encoder, or name one with --encoder."
        )
    named = encoder or f"local-dir:{folder}"
    clip = load_clip(f"local-dir:{named}" if Path(named).is_dir() else named, pretrained, device)
    vocabulary = load_prompts(prompts or ("planet" if settings.is_planet else "naip_osm"))
    masks = None if sam is None else Sam(sam, device=device).masks
    detector = PixelDetector(clip, vocabulary, record.gsd_m, masks=masks)
    answer = Interpreter(detector, Limits(seconds=seconds)).run(parsed, looked_at)
    typer.echo(f"{answer.text}\n\n{parsed.text}")
    _table("Steps", ["call", "gave"], [[step.call, step.shown] for step in answer.evidence.steps])
    if answer.evidence.objects:
        _table(
            "Evidence",
            ["object", "score", "m2", "middle (column, row)"],
            [
                [of.concept, f"{of.score:.2f}", f"{of.pixels * looked_at.gsd_m**2:,.0f}",
                 f"{of.middle[1]:.0f}, {of.middle[0]:.0f}"]
                for of in answer.evidence.objects
            ],
        )  # fmt: skip
    if evidence is not None:
        write_bytes_atomic(evidence, drawing.to_png(answer, looked_at, question or parsed.text))
        typer.echo(f"Drawn at {evidence}")


@app.command()
def evaluate(
    dataset: Annotated[
        str,
        typer.Argument(
            help="eurosat, bigearthnet, bigearthnet43, sat4, sat6, naip_osm, naip_osm_single, satlas_naip, "
            "satlas_sentinel2, rsvqa_lr, rsvqa_hr, rsvqa_hr_phili."
        ),
    ],
    data: Annotated[
        Path, typer.Option(help="Folder or file of the dataset, as published; of naip_osm, the storage root.")
    ],
    contender: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=KIND:WHAT[:WEIGHTS], KIND of folder, open_clip, timm, torchvision, clipseg; repeatable. "
            "Default: this deployment's encoder."
        ),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="JSON file of classes and templates; default: ours.")
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder of the report; evaluations of other datasets stay in it."
        ),
    ] = Path("evaluation"),
    sam: Annotated[
        str | None, typer.Option(help="Folder or hub name of a SAM: segmentation is scored refined as well.")
    ] = None,
    draws: Annotated[int, typer.Option(min=0, help="One-shot runs; 0 leaves one-shot out.")] = 10,
    questions: Annotated[
        int, typer.Option(min=0, help="Questions drawn of RSVQA, as the paper does; 0 takes all.")
    ] = 500,
    writer: Annotated[
        Literal["grammar", "endpoint"],
        typer.Option(
            help="Who writes the programs of RSVQA's questions: the embedded grammar, or the model of GRAFT_ANSWER_URL."
        ),
    ] = "grammar",
    seed: Annotated[int, typer.Option(help="Of examples, questions and bootstrap resamples.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
) -> None:
    """Score encoders on a benchmark of the paper, beside the paper's own numbers (Tables 1 to 4)."""
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.progress import Progress
    from upath import UPath

    from training.zero_shot.answering.scoring import AnswerEvaluation
    from training.zero_shot.benchmarks import evaluate_dataset
    from training.zero_shot.tables import save_evaluation, write_evaluation_report

    with Progress() as bars:
        task = bars.add_task(dataset, total=None)
        made = evaluate_dataset(
            dataset,
            data,
            contender or [],
            prompts,
            _storage().models_folder,
            sam=sam,
            draws=draws,
            questions=questions,
            writer=_model_writer() if writer == "endpoint" else None,
            seed=seed,
            device=device,
            progress=lambda done, of: bars.update(task, completed=done, total=of),
        )
    folder = UPath(output)
    save_evaluation(folder, made)
    Console().print(Markdown(write_evaluation_report(folder).split("\n## " + dataset)[0]))
    skipped = ", ".join(f"{reason} {count}" for reason, count in made.skipped.items())
    asked = f"{sum(made.questions.values())} questions of " if isinstance(made, AnswerEvaluation) else ""
    typer.echo(
        f"{asked}{made.images} images scored{f'; left out: {skipped}' if skipped else ''}. "
        f"Report: {output}/report.html"
    )


@app.command()
def backfill(
    area: Annotated[
        list[str] | None,
        typer.Option(help="Registered area whose regions are meant; repeatable. Default: all."),
    ] = None,
    stale_days: Annotated[
        float, typer.Option(min=0, help="Leave out regions that were searched within so many days.")
    ] = 30.0,
    max_regions: Annotated[
        int | None, typer.Option(min=1, help="So many at most: the missing ones, then those with most news.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be collected.")] = False,
) -> None:
    """Collect regions that are missing, failed or stale: a backfill for Dagster's daemon, one run a region."""
    from datetime import UTC, timedelta

    from graft_pipeline import automation, incremental
    from graft_pipeline.definitions import build_defs
    from graft_pipeline.settings import load_settings

    settings, storage = load_settings(), _storage()
    sensors = list(settings.sensor_records)
    with automation.deployed_instance() as instance, storage.explained():
        wanted = automation.regions_of(storage, area or [], settings.grid_deg)
        definitions = build_defs(settings)
        new = wanted - set(instance.get_dynamic_partitions("region"))
        if new and not dry_run:
            automation.register_regions(instance, definitions)
        states = [
            *(state for state in automation.region_states(instance, sensors) if state.key in wanted - new),
            *(incremental.RegionState(key) for key in new),
        ]
        choices = incremental.to_backfill(
            states,
            datetime.now(UTC),
            stale=timedelta(days=stale_days),
            locations=settings.search_locations_per_region,
            limit=max_regions,
        )
        counts = [f"{sum(c.reason == r for c in choices)} {r}" for r in ("missing", "failed", "stale")]
        busy = sum(state.is_busy for state in states)
        typer.echo(f"{len(choices)} of {len(states)} regions: {', '.join(counts)}. Busy already: {busy}.")
        if not choices:
            return
        shown = [[c.key, c.reason, c.calls] for c in choices[:20]]
        _table(
            "First to last" if len(choices) <= 20 else "The first 20",
            ["region", "why", "Flickr calls"],
            shown,
        )
        pace = incremental.hours(choices, settings.flickr_calls_per_hour)
        typer.echo(f"About {sum(c.calls for c in choices):,} Flickr calls: {pace:.1f} hours at the quota.")
        if dry_run:
            return
        title = (
            f"graft backfill {' '.join(f'--area {name}' for name in area or [])} --stale-days {stale_days:g}"
        )
        backfill_id = automation.launch_backfill(
            instance, definitions, sensors, [c.key for c in choices], area or [], " ".join(title.split())
        )
        typer.echo(
            f"Backfill {backfill_id} is requested. Dagster's daemon takes it up (dagster dev, or dagster-daemon run); "
            f"watch it in the UI at /runs/b/{backfill_id}, or say graft backfill again: it leaves out what is busy."
        )


@app.command()
def trace(
    item: Annotated[str, typer.Argument(help="Id of a tile (naip-123) or of a photo (123).")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Page to write, with the pictures: FILE.html or FILE.md."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--open", help="Open the page, written to trace.html by default.")
    ] = False,
) -> None:
    """Print everything about one tile or photo: its rows and files, every step's materialisation, its checks."""
    import os

    from rich.console import Console

    from graft_pipeline import trace as tracing
    from graft_pipeline.settings import load_settings

    page = output or (Path("trace.html") if show else None)
    storage = _storage()
    with storage.explained():
        found = tracing.trace(storage.root, item)
        steps = []
        if os.environ.get("DAGSTER_HOME"):
            import dagster as dg

            from assets.history import history

            with dg.DagsterInstance.get() as instance:
                steps = history(instance, found)
        if page is not None:
            sensors = load_settings().sensor_records.values()
            crops = {sensor.name: sensor.crop_px for sensor in sensors}
            tracing.write_page(page, found, steps, tracing.pictures(storage.root, found, crops))
    Console(width=None if sys.stdout.isatty() else 200).print(tracing.tree(found, steps))
    if page is not None:
        typer.echo(f"Written to {page}")
    if show:
        typer.launch(str(page))


@app.command()
def status() -> None:
    """Show what is materialised per region, and what failed."""
    from graft_pipeline.status import region_status

    tables = region_status(_storage())
    if not tables:
        typer.echo(
            "Nothing is materialised yet: register an area (graft areas add FILE) and materialise `regions`."
        )
    for group, columns, rows in tables:
        _table(f"{group}: rows per region (ok/all where rows can fail)", columns, rows)


if __name__ == "__main__":
    main()
