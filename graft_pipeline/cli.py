"""The `graft` command: thin commands over the packages, importing what they need when they run.

Exit codes: 0 done, 1 an error of ours with its message on stderr, 2 wrong usage. What encoders are for is in
cli_encoders.py.
"""

import io
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from graft_pipeline import cli_encoders
from graft_pipeline.cli_shared import check_output, open_storage, print_table
from graft_pipeline.errors import GraftError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
)
areas_app = typer.Typer(no_args_is_help=True, help="Register the areas whose regions are collected.")
planet_app = typer.Typer(
    no_args_is_help=True, help="The embedded world that answers Flickr's and Earth Engine's APIs."
)
photos_app = typer.Typer(no_args_is_help=True, help="What becomes of photos after they were collected.")
# Without a name: its commands are ours.
app.add_typer(cli_encoders.app)
app.add_typer(areas_app, name="areas")
app.add_typer(photos_app, name="photos")
app.add_typer(planet_app, name="planet")


@app.callback()
def graft() -> None:
    """Satellite models that understand language, learned from geotagged ground photos (GRAFT, ICLR 2024).

    Settings come from GRAFT_ environment variables or .env; without keys everything talks to the embedded planet.
    """


def main() -> None:
    """Run the command line; errors of ours and of the system become one line on stderr and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Titles and tags are in any script, terminals not in UTF-8 alone.
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except GraftError as error:
        typer.secho(f"graft: {error}", fg="red", err=True)
        sys.exit(1)
    except OSError as error:
        typer.secho(f"graft: {error}: check that it is there, may be used and has space.", fg="red", err=True)
        sys.exit(1)


@app.command()
def demo(
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Which planet: two seeds are two different worlds.")
    ] = 0,
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
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Which planet, if the folder is new.")] = 0,
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
    """Serve a planet on loopback until interrupted; point GRAFT_PLANET__URL and GRAFT_PLANET__SEED at it."""
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
    storage = open_storage()
    with storage.explained():
        before = [known for known in areas.list_areas(storage.areas_folder) if known.name == area.name]
        path = areas.register_area(storage.areas_folder, area)
    touched = regions_touching(area.geometry, load_settings().grid_deg)
    typer.echo(f"{area.name}: {len(touched)} regions, registered at {path}")
    if before and not before[0].geometry.equals(area.geometry):
        typer.secho(
            f"It replaces another area that was called {area.name}: to have both, give one a --name.",
            fg="yellow",
            err=True,
        )


@areas_app.command("list")
def areas_list() -> None:
    """List the registered areas."""
    from graft_pipeline import areas
    from graft_pipeline.regions import regions_touching
    from graft_pipeline.settings import load_settings

    grid_deg = load_settings().grid_deg
    storage = open_storage()
    with storage.explained():
        registered = areas.list_areas(storage.areas_folder)
    if not registered:
        typer.echo(
            f"No area is registered yet in {storage.root}: run graft areas add FILE with any vector file of polygons."
        )
        return
    rows = [
        [
            area.name,
            len(regions_touching(area.geometry, grid_deg)),
            *(f"{v:.3f}" for v in area.geometry.bounds),
        ]
        for area in registered
    ]
    print_table("Areas", ["area", "regions", "west", "south", "east", "north"], rows)


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
    storage = open_storage()
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
    # With its place: whoever forgot to name the deployment would believe that the photos are gone.
    title = f"{'Would be purged' if dry_run else 'Purged'} from {storage.root}"
    print_table(title, ["what", "count"], [list(item) for item in counts.items()])


@app.command()
def query(
    sql: Annotated[str, typer.Argument(help="Any DuckDB SQL; every dataset is a view.")],
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")] = False,
    limit: Annotated[int, typer.Option(min=0, help="Rows shown at most; 0 shows all.")] = 50,
) -> None:
    """Ask the datasets, for example `graft query "SELECT sensor, count(*) FROM pairs GROUP BY sensor"`."""
    import duckdb

    from graft_pipeline.errors import InputError
    from graft_pipeline.manifests import connect, named_in
    from graft_pipeline.schemas import DATASETS

    storage = open_storage()
    with storage.explained():
        connection = connect(storage.root, named_in(sql))
    try:
        # DuckDB fails at characters that are none.
        sql.encode()
        if not connection.extract_statements(sql):
            raise InputError('There is no SQL to run: give a query, such as "SELECT * FROM pairs".')
        cursor = connection.execute(sql)
        columns = [column[0] for column in cursor.description or []]
        rows = cursor.fetchmany(limit + 1) if limit else cursor.fetchall()
    except UnicodeEncodeError:
        raise InputError("The SQL is no UTF-8: use a locale in UTF-8, such as LC_ALL=C.UTF-8.") from None
    except duckdb.Error as error:
        raise InputError(f"{error}\nViews: {', '.join(sorted(DATASETS))}. Correct the SQL.") from None
    except RuntimeError as error:
        if "interrupted" not in str(error):
            raise
        # What DuckDB makes of Ctrl-C.
        raise KeyboardInterrupt from None
    has_more = bool(limit) and len(rows) > limit
    rows = rows[:limit] if has_more else rows
    if csv:
        import csv as csv_module

        writer = csv_module.writer(sys.stdout)
        writer.writerow(columns)
        writer.writerows(rows)
        if has_more:
            typer.secho(f"Only the first {limit} rows: --limit 0 gives all.", fg="yellow", err=True)
    else:
        title = f"the first {limit} rows (--limit 0 gives all)" if has_more else f"{len(rows)} rows"
        print_table(title, columns, [list(r) for r in rows])


@app.command()
def backfill(
    area: Annotated[
        list[str] | None,
        typer.Option(help="Registered area whose regions are meant; repeatable. Default: all."),
    ] = None,
    stale_days: Annotated[
        float,
        typer.Option(min=0, max=36500, help="Leave out regions that were searched within so many days."),
    ] = 30.0,
    max_regions: Annotated[
        int | None, typer.Option(min=1, help="So many at most: the missing ones, then those with most news.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be collected.")] = False,
) -> None:
    """Collect regions that are missing, failed or stale: a backfill for Dagster's daemon, one run a region."""
    from datetime import UTC, timedelta

    from graft_pipeline import backfills, incremental
    from graft_pipeline.definitions import build_defs
    from graft_pipeline.instance import region_states
    from graft_pipeline.settings import load_settings

    settings, storage = load_settings(), open_storage()
    sensors = list(settings.sensor_records)
    with backfills.deployed_instance() as instance, storage.explained():
        wanted = backfills.regions_of(storage, area or [], settings.grid_deg)
        definitions = build_defs(settings)
        new = wanted - set(instance.get_dynamic_partitions("region"))
        if new and not dry_run:
            backfills.register_regions(instance, definitions)
        states = [
            *(state for state in region_states(instance, sensors) if state.key in wanted - new),
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
        print_table(
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
        backfill_id = backfills.launch_backfill(
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
    from rich.console import Console

    from graft_pipeline import backfills
    from graft_pipeline import trace as tracing
    from graft_pipeline.settings import load_settings

    page = output or (Path("trace.html") if show else None)
    if page is not None:
        tracing.check_page_name(page)
        check_output(page)
    storage = open_storage()
    with storage.explained():
        found = tracing.trace(storage.root, item)
        steps = []
        if backfills.dagster_home():
            from assets.history import history

            with backfills.deployed_instance() as instance:
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

    storage = open_storage()
    with storage.explained():
        tables = region_status(storage)
    if not tables:
        typer.echo(
            f"Nothing is materialised yet in {storage.root}: register an area (graft areas add FILE) and "
            "materialise `regions`."
        )
    for group, columns, rows in tables:
        print_table(f"{group}: rows per region (ok/all where rows can fail)", columns, rows)


if __name__ == "__main__":
    main()
