"""Commands for what encoders are for: segment, search, map, serve, ask and evaluate.

Commands that make data and look after it are in cli.py, of which these are a part.
"""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graft_pipeline.cli_shared import (
    check_output,
    image_clip,
    open_storage,
    pixel_clip,
    print_table,
    sensor_record,
)

if TYPE_CHECKING:
    from graft_pipeline.search import SearchIndex
    from resources.storage import Storage
    from training.zero_shot.answering.writers import Writer

app = typer.Typer()

# Options of more than one command.
Since = Annotated[
    datetime | None, typer.Option(formats=["%Y-%m-%d"], help="First UTC day of the scenes' acquisition.")
]
Until = Annotated[
    datetime | None, typer.Option(formats=["%Y-%m-%d"], help="UTC day before which scenes were acquired.")
]
Encoder = Annotated[
    str | None, typer.Option(help="Folder of another encoder, or any open_clip ViT (with --pretrained).")
]
Pretrained = Annotated[str | None, typer.Option(help="open_clip tag or checkpoint of --encoder.")]
RefiningSam = Annotated[
    str | None, typer.Option(help="Folder or hub name of a SAM (transformers) that refines the outlines.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]


def _model_writer() -> "Writer":
    from graft_pipeline.settings import load_settings
    from resources.program_writer import ProgramModel
    from training.zero_shot.answering.writers import PromptedWriter

    return PromptedWriter(ProgramModel.from_settings(load_settings()).complete)


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
    encoder: Encoder = None,
    pretrained: Pretrained = None,
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
    sam: RefiningSam = None,
) -> None:
    """Segment a raster by words alone: `graft segment scene.tif "farmland" "forest" -o map.tif`."""
    from rich.console import Console
    from rich.progress import Progress

    from graft_pipeline.errors import InputError
    from graft_pipeline.settings import load_settings
    from training.zero_shot.prompted import Sam
    from training.zero_shot.prompts import PromptSet, load_prompts
    from training.zero_shot.raster import RasterOptions, segment_raster

    if bool(words) == bool(prompts):
        raise InputError('Name the classes in words ("farmland" "forest"), or give --prompts, not both.')
    check_output(output, raster)
    record = sensor_record(load_settings(), sensor)
    wanted = load_prompts(prompts) if prompts else PromptSet.of_words(words or [])
    clip = pixel_clip(open_storage(), sensor, encoder, pretrained)
    options = RasterOptions(gsd_m=record.gsd_m, bands=bands, display_range=values, overlap=overlap)
    with Progress(console=Console(stderr=True)) as bars:
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
    print_table(f"{made.path}: {made.width_px} x {made.height_px} px", ["value", "class", "share"], rows)


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
    since: Since = None,
    until: Until = None,
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
    for written in (output, sheet):
        if written is not None:
            check_output(written, area, photo)
    storage = open_storage()
    record = sensor_record(load_settings(), sensor)
    days = [None if day is None else day.date() for day in (since, until)]
    filters = Filters(read_area(area).geometry if area else None, *days)
    with storage.explained():
        index = SearchIndex.open(storage.root, sensor)
        vector = _query_vector(storage, index, words, like, photo)
        found = index.search(vector, top, filters, is_exact=is_exact)
        if sheet is not None:
            picture = sheets.search_sheet(
                {str(words or like or photo): found},
                lambda region: stored_chips(storage.root, sensor, region),
                crop_px=record.crop_px,
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
    print_table(title, ["rank", "score", "tile_id", "lon_deg", "lat_deg", "region", "acquired"], rows)


def _query_vector(
    storage: "Storage", index: "SearchIndex", words: str | None, like: str | None, photo: Path | None
) -> Any:
    """What is searched for in an index, (D,) float32: words, a tile of it, or a ground photo."""
    from graft_pipeline.errors import DataError, InputError
    from graft_pipeline.settings import load_settings
    from training.zero_shot.queries import text_vector

    if like is not None:
        return index.vector_of(like)
    clip = image_clip(storage, index)
    if photo is None:
        return text_vector(clip, words or "")
    from resources.foundation import FoundationModel

    try:
        content = photo.read_bytes()
    except OSError as error:
        raise InputError(f"{photo}: {error.strerror}. Name an image file.") from error
    model = FoundationModel.of_deployment(load_settings(), storage.models_folder)
    try:
        return model.embed_images([content])[0]
    except DataError as error:
        raise InputError(f"{photo} is no image that can be decoded: name a JPEG or PNG.") from error


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
    since: Since = None,
    until: Until = None,
) -> None:
    """Map where words apply: `graft map "farmland" "forest" --area area.geojson -o maps`."""
    from rich.console import Console
    from rich.progress import Progress

    from graft_pipeline import concept_maps, map_files
    from graft_pipeline.areas import read_area
    from graft_pipeline.grid import stored_chips
    from graft_pipeline.search import Filters, SearchIndex
    from training.zero_shot.queries import text_vector

    map_files.check_maps_name(output)
    check_output(output, area, is_folder=not output.suffix or output.is_dir())
    shown = read_area(area).geometry if area else None
    days = [None if day is None else day.date() for day in (since, until)]
    cells = concept_maps.Squares(cell_km) if cell_km is not None else concept_maps.Hexagons(resolution)
    storage = open_storage()
    with storage.explained(), Progress(console=Console(stderr=True)) as bars:
        index = SearchIndex.open(storage.root, sensor)
        clip = image_clip(storage, index)
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
    print_table(
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
    from graft_pipeline.search import SearchIndex
    from graft_pipeline.settings import load_settings
    from graft_pipeline.web.app import Basemap, create_app
    from graft_pipeline.web.server import run
    from training.zero_shot.queries import text_vector

    settings, storage = load_settings(), open_storage()
    record = sensor_record(settings, sensor)
    with storage.explained():
        index = SearchIndex.open(storage.root, sensor)
        index.load()
        clip = image_clip(storage, index)
    basemap = Basemap(settings.basemap_url, settings.basemap_attribution)
    # Of the data, not of the settings: a server needs no keys, and real photos are not copied.
    planet_seed = storage.planet_seed()
    if planet_seed is not None and settings.basemap_url is None:
        from resources.planet.basemap import ZOOMS, TilePainter
        from resources.planet.world import World

        painter = TilePainter(World(planet_seed))
        basemap = Basemap(attribution="GRAFT's embedded planet", draw=painter.tile, zooms=ZOOMS)
    page = create_app(
        root=storage.root,
        index=index,
        sensor=record,
        encode_text=lambda words: text_vector(clip, words),
        grid_deg=settings.grid_deg,
        basemap=basemap,
        shows_copies=planet_seed is not None,
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
    encoder: Encoder = None,
    pretrained: Pretrained = None,
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
    sam: RefiningSam = None,
    seconds: Annotated[float, typer.Option(min=1, help="Longest run of the program.")] = 120.0,
    device: Device = "cpu",
) -> None:
    """Answer a question about an image, with the program and the evidence: `graft ask scene.tif "Where is ..."`."""
    from graft_pipeline.errors import InputError
    from graft_pipeline.grid import SUFFIX, sensor_of
    from graft_pipeline.manifests import write_bytes_atomic
    from graft_pipeline.settings import load_settings
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
    if gsd_m is not None and not gsd_m > 0:
        raise InputError(f"--gsd-m {gsd_m:g} is no size of a pixel: give metres, such as 1.")
    if evidence is not None:
        check_output(evidence, image)
    settings, storage = load_settings(), open_storage()
    is_file = Path(image).exists()
    name = sensor or ("naip" if is_file else sensor_of(image).removesuffix(SUFFIX))
    if name not in settings.sensor_records and not is_file:
        raise InputError(
            f"No sensor {name!r}, and no file {image}: use one of {', '.join(settings.sensor_records)}."
        )
    record = sensor_record(settings, name)
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
    clip = pixel_clip(storage, name, encoder, pretrained, device)
    vocabulary = load_prompts(prompts or ("planet" if storage.planet_seed() is not None else "naip_osm"))
    masks = None if sam is None else Sam(sam, device=device).masks
    detector = PixelDetector(clip, vocabulary, record.gsd_m, masks=masks)
    answer = Interpreter(detector, Limits(seconds=seconds)).run(parsed, looked_at)
    typer.echo(f"{answer.text}\n\n{parsed.text}")
    print_table("Steps", ["call", "gave"], [[step.call, step.shown] for step in answer.evidence.steps])
    if answer.evidence.objects:
        print_table(
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
    device: Device = "cpu",
) -> None:
    """Score encoders on a benchmark of the paper, beside the paper's own numbers (Tables 1 to 4)."""
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.progress import Progress
    from upath import UPath

    from training.zero_shot.answering.scoring import AnswerEvaluation
    from training.zero_shot.benchmarks import evaluate_dataset
    from training.zero_shot.tables import save_evaluation, write_evaluation_report

    check_output(output, is_folder=True)
    with Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task(dataset, total=None)
        made = evaluate_dataset(
            dataset,
            data,
            contender or [],
            prompts,
            open_storage().models_folder,
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
