"""Photos: Flickr's answers made rows, the rules that reject some, merging what is found into what is known.

What Flickr is asked for is decided in photo_search.py; image bytes are the business of ground_images.py.
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline.manifests import columns
from graft_pipeline.regions import Region
from graft_pipeline.schemas import FLICKR_PHOTOS

logger = logging.getLogger(__name__)

#: Flickr's geotag accuracy "street": the only one used (paper, section 3.2).
STREET_ACCURACY = 16

#: Shorter side that ground images have at least, where Flickr offers it.
WANTED_SHORTER_SIDE_PX = 256

#: Photos of a burst are taken in the same minute, at most so far from the one that is kept.
BURST_RADIUS_M = 10.0

#: Reason of a known photo that is seen in another region.
MOVED = "moved"

#: What a later record of a known photo replaces.
_RETOLD = ("title", "tags", "license_id")
_RETOLD_IMAGE = ("image_url", "width_px", "height_px")

#: Suffixes of Flickr's uncropped sizes by nominal longer side, smallest first; the original last, as it may
#: be huge, rotated or no JPEG. The square sizes `s` and `q` are crops and left out.
_SIZES = {
    "t": 100,
    "m": 240,
    "n": 320,
    "w": 400,
    "z": 640,
    "c": 800,
    "l": 1024,
    "b": 1024,
    "h": 1600,
    "k": 2048,
    "o": 100_000,
}

_PHOTO_ID = re.compile(r"[A-Za-z0-9_\-]{1,64}")
_SCREENSHOT_TAGS = {"screenshot", "screenshots", "screencapture", "screengrab", "screencap"}
_SCREENSHOT_TITLE = re.compile(r"screen ?shot[\s_\-]|screenshot$", re.IGNORECASE)
_EARTH_RADIUS_M = 6_371_008.8


@dataclass(frozen=True)
class PhotoRows:
    """What came of raw photo records.

    Attributes:
        table: FLICKR_PHOTOS rows, in the order found; ids may repeat, bursts are not looked for yet.
        outside: likewise, records whose geotag is in another region; left to that one, all `rejected` as `moved`.
        unreadable: records without a usable id.
    """

    table: pa.Table
    outside: pa.Table
    unreadable: int


def photo_rows(raw: Iterable[Mapping[str, Any]], region: Region) -> PhotoRows:
    """Coerce raw records of `flickr.photos.search` to rows, and reject what the rules exclude.

    Flickr's types vary between answers (numbers come as strings and the reverse), so each field is coerced.
    Times taken are the owner's clock without a zone: `taken_at_utc` takes solar time, `round(lon / 15)`
    hours, and is left out unless the time is known to the second.

    Args:
        raw: photo records with the extras license, date_upload, date_taken, last_update, geo, tags, media and url_*.
        region: the region that was searched.

    Returns:
        Rows and counts. Reasons of rejected rows, the first that applies: `bad_metadata`, `no_geotag`,
        `not_a_photo`, `screenshot`, `accuracy_below_16`, `no_usable_url`.
    """
    rows: list[dict[str, Any]] = []
    outside: list[dict[str, Any]] = []
    unreadable = 0
    for record in raw:
        photo_id = str(record.get("id", ""))
        if _PHOTO_ID.fullmatch(photo_id) is None:
            unreadable += 1
            continue
        lon, lat = _number(record.get("longitude")), _number(record.get("latitude"))
        accuracy = int(_number(record.get("accuracy")) or 0)
        # Flickr answers 0/0/0 for photos without a geotag.
        has_geotag = lon is not None and lat is not None and not (lon == lat == 0.0 and accuracy == 0)
        if lon is None or lat is None or not has_geotag:
            lon = lat = 0.0
        is_outside = has_geotag and not region.contains(lon, lat)
        uploaded = _number(record.get("dateupload"))
        uploaded_at = _from_unix(uploaded)
        owner = _text(record.get("owner")) or ""
        taken_local, is_exact = _time_taken(record)
        url, width, height = _image(record)
        reason = None
        if is_outside:
            reason = MOVED
        elif uploaded_at is None or not owner:
            reason = "bad_metadata"
        elif not has_geotag:
            reason = "no_geotag"
        elif _is_not_a_photo(record):
            reason = "not_a_photo"
        elif _is_screenshot(record):
            reason = "screenshot"
        elif accuracy < STREET_ACCURACY:
            reason = "accuracy_below_16"
        elif url is None:
            reason = "no_usable_url"
        (outside if is_outside else rows).append(
            {
                "photo_id": photo_id,
                "owner_id": owner,
                "title": _text(record.get("title")),
                "tags": _text(record.get("tags")),
                "license_id": _text(record.get("license")),
                "lon_deg": lon,
                "lat_deg": lat,
                "accuracy": max(0, min(accuracy, 127)),
                "uploaded_at_utc": uploaded_at or datetime(1970, 1, 1, tzinfo=UTC),
                "updated_at_utc": _from_unix(_number(record.get("lastupdate"))),
                "taken_at_local": taken_local,
                "taken_at_utc": _solar_utc(taken_local, lon) if taken_local and is_exact else None,
                "is_taken_exact": is_exact,
                "image_url": url,
                "width_px": width,
                "height_px": height,
                "duplicate_of": None,
                "status": "rejected" if reason else "ok",
                "reason": reason,
            }
        )
    if unreadable:
        logger.warning("%d records without a usable photo id were left out", unreadable)
    schema = FLICKR_PHOTOS.schema
    return PhotoRows(
        pa.Table.from_pylist(rows, schema=schema), pa.Table.from_pylist(outside, schema=schema), unreadable
    )


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _text(value: Any) -> str | None:
    # Some answers wrap texts: {"_content": "..."}.
    if isinstance(value, Mapping):
        value = value.get("_content")
    if value is None:
        return None
    # Lone surrogates cannot be stored as UTF-8.
    return str(value).encode("utf-8", "replace").decode("utf-8").strip() or None


def _from_unix(seconds: float | None) -> datetime | None:
    # Flickr opened in 2004; what lies beyond 2100 is no date either.
    if seconds is None or not 0 < seconds < 4_102_444_800:
        return None
    return datetime.fromtimestamp(int(seconds), tz=UTC)


def _time_taken(record: Mapping[str, Any]) -> tuple[datetime | None, bool]:
    """(local time taken, is it known to the second); `datetakenunknown` means the upload's time: dropped."""
    if (_number(record.get("datetakenunknown")) or 0) != 0:
        return None, False
    try:
        taken = datetime.strptime(str(record.get("datetaken")), "%Y-%m-%d %H:%M:%S")
    except ValueError:
        return None, False
    granularity = _number(record.get("datetakengranularity"))
    return taken, granularity is None or granularity == 0


def _solar_utc(taken_local: datetime, lon_deg: float) -> datetime | None:
    try:
        return taken_local.replace(tzinfo=UTC) - timedelta(hours=round(lon_deg / 15))
    except OverflowError:
        return None


def _image(record: Mapping[str, Any]) -> tuple[str | None, int | None, int | None]:
    """URL, width and height of the smallest size that suffices, else of the largest there is."""
    offered: list[tuple[float, int, str, int | None, int | None]] = []
    for rank, (suffix, nominal_px) in enumerate(_SIZES.items()):
        url = record.get(f"url_{suffix}")
        if not isinstance(url, str) or not (url.startswith("https://") and url.isascii()):
            continue
        width, height = _number(record.get(f"width_{suffix}")), _number(record.get(f"height_{suffix}"))
        if width is None or height is None or not 1 <= min(width, height) <= max(width, height) < 1_000_000:
            # Three to four is the commonest shape.
            offered.append((0.75 * nominal_px, rank, url, None, None))
        else:
            offered.append((min(width, height), rank, url, int(width), int(height)))
    if not offered:
        return None, None, None
    enough = [size for size in offered if size[0] >= WANTED_SHORTER_SIDE_PX]
    _, _, url, width_px, height_px = min(enough) if enough else max(offered, key=lambda size: size[:2])
    return url, width_px, height_px


def _is_not_a_photo(record: Mapping[str, Any]) -> bool:
    # content_type: 1 photo, 2 screenshot, 3 other (drawings, renderings).
    return str(record.get("media") or "photo") != "photo" or _number(record.get("content_type")) == 3


def _is_screenshot(record: Mapping[str, Any]) -> bool:
    tags = set((_text(record.get("tags")) or "").lower().split())
    title = _text(record.get("title")) or ""
    return (
        _number(record.get("content_type")) == 2
        or bool(tags & _SCREENSHOT_TAGS)
        or _SCREENSHOT_TITLE.match(title) is not None
    )


def merge_photos(existing: pa.Table | None, found: pa.Table, outside: pa.Table | None = None) -> pa.Table:
    """Merge newly found photos into those of a region, and take over what is told anew of those that are known.

    What tiles and chips were built on stays as it was first stored: owner, times, and a place accurate to the
    street. Title, tags, licence and address of the image are those of the latest record, and a photo that was
    rejected for its metadata is judged again; as long as its place was too coarse, so is the place. A known photo
    that is seen outside of the region is rejected, reason `moved`, until it is seen inside again.

    Of a burst (same owner, same minute taken, within BURST_RADIUS_M) the photo kept is the first by
    (uploaded_at, photo_id), after those kept before; the others become `rejected`, reason `burst`, with
    `duplicate_of`.

    Args:
        existing: FLICKR_PHOTOS rows of the region, None at first.
        found: more of them, as `photo_rows` makes them; ids may repeat, in any order.
        outside: likewise, photos in other regions; only those that are known here count.

    Returns:
        FLICKR_PHOTOS rows, unique by photo_id, sorted by (uploaded_at, photo_id). Merging the same again
        changes nothing; the order of the rows in `found` does not matter.
    """
    known = FLICKR_PHOTOS.empty() if existing is None else existing
    records = found if outside is None else pa.concat_tables([found, outside])
    # Of several records of one id (overlapping discs, unstable paging) the latest counts; where that is not told,
    # any rule will do that ignores their order.
    others = dict.fromkeys((*FLICKR_PHOTOS.order, *FLICKR_PHOTOS.schema.names))
    del others["updated_at_utc"]
    records = records.sort_by([("updated_at_utc", "descending"), *((name, "ascending") for name in others)])
    records = _first_of_each(records, "photo_id")
    is_known = pc.is_in(records["photo_id"], known["photo_id"].combine_chunks())
    known, is_ok_anew = _retold(known, records.filter(is_known))
    is_moved = pc.fill_null(pc.equal(records["reason"], MOVED), False)
    new = records.filter(pc.invert(pc.or_(is_known, is_moved)))
    merged = pa.concat_tables([known.cast(FLICKR_PHOTOS.schema), new.cast(FLICKR_PHOTOS.schema)])
    is_new = np.concatenate([is_ok_anew, np.ones(new.num_rows, dtype=np.bool_)])
    merged = _mark_bursts(merged, is_new)
    return merged.sort_by([(name, "ascending") for name in FLICKR_PHOTOS.order]).combine_chunks()


def _retold(known: pa.Table, seen: pa.Table) -> tuple[pa.Table, npt.NDArray[np.bool_]]:
    """Known photos with what records of some of them tell; and which rows were not ok and are now."""
    position = pc.index_in(known["photo_id"], seen["photo_id"].combine_chunks())
    is_seen = pc.is_valid(position)
    before = known.filter(is_seen).to_pylist()
    records = seen.take(position.filter(is_seen)).to_pylist()
    after = [_retold_row(row, record) for row, record in zip(before, records, strict=True)]
    rest = known.filter(pc.invert(is_seen)).cast(FLICKR_PHOTOS.schema)
    table = pa.concat_tables([rest, pa.Table.from_pylist(after, schema=FLICKR_PHOTOS.schema)])
    is_ok_anew = [
        row["status"] == "ok" and old["status"] != "ok" for old, row in zip(before, after, strict=True)
    ]
    return table, np.array([False] * rest.num_rows + is_ok_anew, dtype=np.bool_)


def _retold_row(row: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """One known photo after a later record of it; an earlier one changes nothing."""
    last, updated = row["updated_at_utc"], record["updated_at_utc"]
    if last is not None and updated is not None and updated < last:
        return row
    if record["reason"] == MOVED:
        return row | _changes(record, "updated_at_utc", "status", "reason", "duplicate_of")
    if row["reason"] == "bad_metadata" or row["accuracy"] < STREET_ACCURACY:
        # It never was ok: nothing stands on it.
        return record
    row = row | _changes(record, *_RETOLD)
    if updated is not None:
        row |= _changes(record, "updated_at_utc")
    if record["image_url"] is not None:
        row |= _changes(record, *_RETOLD_IMAGE)
    if row["reason"] != "burst" and (
        record["status"] == "ok" or record["reason"] in ("not_a_photo", "screenshot")
    ):
        row |= _changes(record, "status", "reason")
    return row


def _changes(record: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: record[name] for name in names}


def _first_of_each(table: pa.Table, column: str) -> pa.Table:
    values = table[column].combine_chunks().dictionary_encode().indices.to_numpy()
    _, first = np.unique(values, return_index=True)
    return table.take(pa.array(np.sort(first)))


def _mark_bursts(table: pa.Table, is_new: npt.NDArray[np.bool_]) -> pa.Table:
    """Reject new ok rows that belong to a burst; rows known before stay, and are what bursts are near to."""
    status, is_exact, taken = columns(table, "status", "is_taken_exact", "taken_at_local")
    rows = np.flatnonzero((status == "ok") & is_exact.astype(bool) & ~np.isnat(taken))
    if not rows.size:
        return table
    owner = table["owner_id"].combine_chunks().dictionary_encode().indices.to_numpy()[rows]
    minute = taken[rows].astype("datetime64[m]").astype(np.int64)
    _, group = np.unique(np.column_stack([owner, minute]), axis=0, return_inverse=True)
    group = group.ravel()
    # Within a group: what is known first, then by (uploaded_at, photo_id).
    ordering = table.select(list(FLICKR_PHOTOS.order)).append_column("is_new", pa.array(is_new))
    order = [("is_new", "ascending"), *((name, "ascending") for name in FLICKR_PHOTOS.order)]
    rank = np.empty(table.num_rows, dtype=np.int64)
    rank[pc.sort_indices(ordering, order).to_numpy()] = np.arange(table.num_rows)
    by_group = np.lexsort((rank[rows], group))
    starts = np.flatnonzero(np.diff(group[by_group], prepend=-1))
    photo_ids, lon, lat = columns(table, "photo_id", "lon_deg", "lat_deg")
    duplicate_of: dict[int, str] = {}
    for start, end in zip(starts, np.append(starts[1:], len(by_group)), strict=True):
        if end - start > 1:
            members = rows[by_group[start:end]]
            kept: list[int] = []
            for row in members:
                near = next(
                    (k for k in kept if _distance_m(lon[k], lat[k], lon[row], lat[row]) <= BURST_RADIUS_M),
                    None,
                )
                if near is None or not is_new[row]:
                    kept.append(int(row))
                else:
                    duplicate_of[int(row)] = photo_ids[near]
    if not duplicate_of:
        return table
    changed = np.fromiter(duplicate_of, dtype=np.int64, count=len(duplicate_of))
    values = {"status": "rejected", "reason": "burst", "duplicate_of": None}
    for name, value in values.items():
        column = table[name].combine_chunks().to_numpy(zero_copy_only=False)
        column = column.astype(object)
        column[changed] = [duplicate_of[row] for row in changed.tolist()] if value is None else value
        field = FLICKR_PHOTOS.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(column, field.type))
    return table


def _distance_m(lon_a: float, lat_a: float, lon_b: float, lat_b: float) -> float:
    x = math.radians(lon_b - lon_a) * math.cos(math.radians((lat_a + lat_b) / 2))
    return _EARTH_RADIUS_M * math.hypot(x, math.radians(lat_b - lat_a))


def upload_rate(table: pa.Table, now: datetime) -> float:
    """How many photos were uploaded a day in the last year.

    Args:
        table: FLICKR_PHOTOS rows.
        now: the present, with time zone.

    Returns:
        Photos a day, whatever became of them.
    """
    if table.num_rows == 0:
        return 0.0
    recent = pc.greater(
        table["uploaded_at_utc"], pa.scalar(now - timedelta(days=365), pa.timestamp("us", "UTC"))
    )
    return float(pc.sum(recent).as_py() or 0) / 365


def by_status(
    table: pa.Table,
) -> dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Where photos lie, by what became of them.

    Args:
        table: FLICKR_PHOTOS rows.

    Returns:
        `ok` first, then each reason: (lon_deg, lat_deg). Photos without a geotag are left out.
    """
    groups: dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] = {}
    status, reason, lon, lat = columns(table, "status", "reason", "lon_deg", "lat_deg")
    label = np.where(status == "ok", "ok", reason)
    for name in sorted(set(label.tolist()) - {"no_geotag"}, key=lambda name: (name != "ok", name)):
        groups[name] = (lon[label == name], lat[label == name])
    return groups


def eligible(photos: pa.Table, images: pa.Table, outdoor: pa.Table) -> pa.Table:
    """Photos that may be paired: ok metadata, a stored image, an outdoor scene.

    Args:
        photos: FLICKR_PHOTOS rows of a region.
        images: GROUND_IMAGES rows of it.
        outdoor: OUTDOOR_PHOTOS rows of it.

    Returns:
        The FLICKR_PHOTOS rows that are all three, in their order.
    """
    stored = images.filter(pc.equal(images["status"], "ok"))["photo_id"].combine_chunks()
    outside = outdoor.filter(outdoor["is_outdoor"])["photo_id"].combine_chunks()
    chosen = pc.and_(pc.is_in(photos["photo_id"], stored), pc.is_in(photos["photo_id"], outside))
    return photos.filter(pc.and_(chosen, pc.equal(photos["status"], "ok")))
