"""A region's searches of Flickr: what each has to ask for, what was searched before, going on where one ended.

How the service is asked is in resources/flickr.py; what its records mean, in photos.py.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline.errors import InputError
from graft_pipeline.manifests import write_bytes_atomic
from graft_pipeline.provenance import fingerprint
from graft_pipeline.unfinished import Unfinished

if TYPE_CHECKING:
    from upath import UPath

#: How far before the watermark a search begins anew: Flickr's index lists some photos late.
OVERLAP = timedelta(days=2)

#: In a partition's folder: what was searched when its photos were last stored, and the day of the last whole search.
_FILE = "searched.txt"

#: Flickr's client: (lon_deg, lat_deg, radius_km, uploaded_from, uploaded_to) to photo records.
Ask = Callable[[float, float, float, datetime, datetime], Iterable[dict[str, Any]]]


@dataclass(frozen=True)
class Searched:
    """What a region's last search was that was completed and stored.

    Attributes:
        scope: fingerprint of what decides which photos a whole search finds, but for the time of it; "" before the
            first.
        whole_on: UTC day of the last whole search; None before the first.
    """

    scope: str = ""
    whole_on: date | None = None


@dataclass(frozen=True)
class Search:
    """What one search of a region asks for.

    Attributes:
        places: SEARCH_LOCATIONS rows: location_id, lon_deg, lat_deg, radius_km.
        filters: what else decides the answers.
        uploaded_from: first upload time asked for, UTC.
        uploaded_to: end of the upload times asked for, UTC.
        is_whole: whether it asks for everything.
        completed: to be noted with `keep_searched`, once its photos are stored.
    """

    places: list[dict[str, Any]]
    filters: Mapping[str, str]
    uploaded_from: datetime
    uploaded_to: datetime
    is_whole: bool
    completed: Searched

    def records(
        self, ask: Ask, unfinished: Unfinished, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Search around every location of the region; an interrupted search goes on where it was.

        Args:
            ask: Flickr's client.
            unfinished: answers of an interrupted search, and of this one; close it when the photos are stored.
            progress: called with (done, total) locations.

        Yields:
            Raw photo records; discs overlap, so ids repeat.
        """
        request = fingerprint(self.places, self.uploaded_from, self.filters)
        uploaded_to, begun = self.uploaded_to, unfinished.take("search", request)
        if begun is not None:
            # Else photos that were uploaded in between would be missed at the locations that it had done.
            uploaded_to = datetime.fromisoformat(begun[0]["uploaded_to"])
        of_location = fingerprint(request, uploaded_to)
        for done, place in enumerate(self.places, start=1):
            key = f"location-{place['location_id']}"
            kept = unfinished.take(key, of_location)
            if kept is None:
                where = place["lon_deg"], place["lat_deg"], place["radius_km"]
                found = list(ask(*where, self.uploaded_from, uploaded_to))
                if begun is None:
                    # Only with a first answer: a search that is refused leaves nothing.
                    begun = {"uploaded_to": uploaded_to.isoformat()}, b""
                    unfinished.keep("search", request, begun[0])
                unfinished.keep(key, of_location, {}, json.dumps(found).encode())
            else:
                found = json.loads(kept[1])
            yield from found
            if progress:
                progress(done, len(self.places))


def plan(
    locations: pa.Table,
    known: pa.Table,
    last: Searched,
    filters: Mapping[str, str],
    *,
    uploaded_from: str,
    whole_every_days: int,
    now: datetime,
    full_refresh: bool = False,
) -> Search:
    """What a region's next search asks for.

    What was uploaded since OVERLAP before the watermark, the last upload that is known. Everything, if no photo is
    known, if that is asked for, if other ground or other filters were searched last, where a watermark says nothing
    of older photos, or if the last whole search is long ago, as owners geotag and change photos long after the upload.

    Args:
        locations: SEARCH_LOCATIONS rows.
        known: FLICKR_PHOTOS rows of the region.
        last: what was searched before.
        filters: what else decides the answers.
        uploaded_from: first upload date of the deployment, YYYY-MM-DD.
        whole_every_days: days after which a whole search is due again; 0: never.
        now: end of the upload times asked for, UTC.
        full_refresh: ask for everything.

    Returns:
        The search.

    Raises:
        InputError: if `uploaded_from` is no date.
    """
    try:
        first = datetime.strptime(uploaded_from, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError as error:
        raise InputError(f"{uploaded_from!r} is no date: write uploaded_from as YYYY-MM-DD.") from error
    places = locations.select(["location_id", "lon_deg", "lat_deg", "radius_km"]).to_pylist()
    # Whatever the locations are called.
    ground = locations.select(["lon_deg", "lat_deg", "radius_km"]).to_pylist()
    scope = fingerprint(ground, uploaded_from, dict(filters))
    is_old = last.whole_on is None or (now.date() - last.whole_on).days >= whole_every_days
    is_due = full_refresh or scope != last.scope or (is_old and whole_every_days > 0)
    latest: datetime | None = pc.max(known["uploaded_at_utc"]).as_py()
    is_whole = is_due or latest is None
    since = first if is_whole or latest is None else max(first, latest.astimezone(UTC) - OVERLAP)
    return Search(
        places, filters, since, now, is_whole, Searched(scope, now.date() if is_due else last.whole_on)
    )


def last_searched(folder: "UPath | Path") -> Searched:
    """What a region's last search was.

    Args:
        folder: the partition's folder.

    Returns:
        As `keep_searched` noted it.
    """
    try:
        scope, _, day = str((folder / _FILE).read_text(encoding="utf-8")).strip().partition(" ")
    except FileNotFoundError:
        return Searched()
    try:
        return Searched(scope, date.fromisoformat(day))
    except ValueError:
        return Searched(scope)


def keep_searched(folder: "UPath | Path", searched: Searched) -> None:
    """Note that a search was completed, once its photos are stored.

    Args:
        folder: the partition's folder.
        searched: what it was.

    Raises:
        ServiceError: if the disk is full.
    """
    text = f"{searched.scope} {searched.whole_on or ''}".strip()
    write_bytes_atomic(folder / _FILE, f"{text}\n".encode())
