"""What chips and ground images share: many slow calls at once, results stored in order, safe to be killed.

What is fetched and what a failure means is decided in chips.py and ground_images.py.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields as dataclass_fields
from datetime import date, timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline.manifests import conform, remove_partial_files, write_table
from graft_pipeline.schemas import Dataset
from graft_pipeline.shards import (
    ShardWriter,
    StoredItem,
    is_whole,
    next_shard_number,
    shard_name,
    spend_numbers,
    spent_numbers,
)
from graft_pipeline.unfinished import Unfinished

if TYPE_CHECKING:
    from upath import UPath

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Longest time that a failed row is left in peace, days.
MAX_BACK_OFF_DAYS = 32
#: Memory that fetched items may take while an earlier one is waited for.
MOST_WAITING_BYTES = 256_000_000
#: Reasons of rejected rows that asking once more cannot change: what came was compared with other items.
FINAL_REASONS = ("near_duplicate",)


def most_ahead(concurrency: int, item_bytes: int) -> int:
    """How far ahead of one that is late others are fetched: the further, the less a failing service costs.

    Where one answer in fifty fails or stalls, 4 items a thread keep half of a service's pace, 16 three quarters
    (benchmarks/chips.py).

    Args:
        concurrency: number of threads.
        item_bytes: most memory that one result takes.

    Returns:
        Items: 16 for each thread, fewer if they took more than MOST_WAITING_BYTES, but 4.
    """
    return max(4 * concurrency, min(16 * concurrency, MOST_WAITING_BYTES // item_bytes))


def ordered_map(
    call: Callable[[Item], Result], items: Iterable[Item], concurrency: int, ahead: int | None = None
) -> Generator[tuple[Item, Result], None, None]:
    """Call a function on items in threads; results come in the order of the items, whatever the timing.

    When a call raises, or the consumer stops, calls that have not begun are dropped and those under way are waited
    for.

    Args:
        call: function of one item, safe to run in threads.
        items: what to call it on.
        concurrency: number of threads.
        ahead: most results that wait or run at any time, which bounds memory; `4 * concurrency` unless given.

    Yields:
        (item, result), in order.

    Raises:
        Exception: whatever a call raised, at its item's turn.
    """
    pool = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="fetch")
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    most = 4 * concurrency if ahead is None else ahead
    try:
        for item in items:
            waiting.append((item, pool.submit(call, item)))
            if len(waiting) >= most:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class StoredItems:
    """The index and the shards of one partition, grown together: a shard, then the index that names it.

    A process killed at any moment leaves an index that is right and at most one shard that no row names; the
    next one overwrites it. Finished shards are never touched again, not even when the index names them no more.
    Which members a shard holds depends on what is added alone: whoever adds the same after a kill (`unfinished` has
    it) makes the same shards.

    Attributes:
        unfinished: items that are fetched but in no shard yet; `finish` and full shards drop them.
        is_changed: whether any file was written.
    """

    def __init__(
        self,
        folder: "UPath | Path",
        dataset: Dataset,
        existing: pa.Table | None,
        *,
        stem: str,
        extension: str,
        shard_size: int,
    ) -> None:
        """Open a partition.

        Args:
            folder: its folder; the index is `{dataset}.parquet` in it.
            dataset: schema of the index, with the columns of a stored item, and of more with a prefix.
            existing: rows that the index holds.
            stem: first part of the shards' names.
            extension: of the members.
            shard_size: members of a shard; then it and the index are written.
        """
        self._folder = folder
        self._dataset = dataset
        self._stem = stem
        self._extension = extension
        self._shard_size = shard_size
        self._table = dataset.empty() if existing is None else existing
        self._rows: list[dict[str, Any]] = []
        self._members = 0
        self._writers: dict[str, ShardWriter] = {}
        self.is_changed = False
        remove_partial_files(folder)
        self.unfinished = Unfinished(folder)

    def add(self, row: dict[str, Any], content: bytes | None = None, **more: bytes | None) -> None:
        """Add a row, or replace the one of the same key.

        Args:
            row: values of the dataset's columns; the stored item's are filled in here.
            content: what is stored for it, if anything.
            **more: what is stored beside it, if anything, by name: of `raw=` in shards `raw-...`, found by the columns
                `raw_shard`, `raw_offset` and so on.
        """
        key = row[self._dataset.key[0]]
        places: dict[str, Any] = {}
        if content is not None:
            places |= vars(self._store(self._stem, "shard", key, content))
            self._members += 1
        for name, extra in more.items():
            if extra is not None:
                place = vars(self._store(name, f"{name}_shard", key, extra))
                places |= {f"{name}_{column}": value for column, value in place.items()}
        blank = dict.fromkeys(self._dataset.schema.names)
        self._rows.append({**blank, **row, **places})
        if self._members >= self._shard_size:
            self._flush()

    def _store(self, stem: str, column: str, key: str, content: bytes) -> StoredItem:
        if stem not in self._writers:
            shards = pc.unique(self._table[column]).to_pylist()
            number = next_shard_number(stem, shards, spent_numbers(self._folder).get(stem, 0))
            writer = ShardWriter(self._folder, shard_name(stem, number))
            writer.__enter__()
            self._writers[stem] = writer
        return self._writers[stem].add(f"{key}.{self._extension}", content)

    def finish(self) -> pa.Table:
        """Finish the shard under way and write the index.

        Returns:
            All rows, as they lie in the index.
        """
        table = self._flush()
        self.unfinished.close()
        return table

    def _flush(self) -> pa.Table:
        writers, rows, before = self._writers, self._rows, self._table
        self._writers, self._rows, self._members = {}, [], 0
        for writer in writers.values():
            writer.__exit__(None, None, None)
        if rows:
            new = pa.Table.from_pylist(rows, schema=self._dataset.schema)
            key = self._dataset.key[0]
            kept = self._table.filter(pc.invert(pc.is_in(self._table[key], new[key].combine_chunks())))
            self._table = pa.concat_tables([kept.cast(self._dataset.schema), new])
        self._table = conform(self._table, self._dataset)
        spend_numbers(self._folder, before, self._table)
        index = self._folder / f"{self._dataset.name}.parquet"
        self.is_changed |= write_table(index, self._table, self._dataset)
        self.unfinished.forget(row[self._dataset.key[0]] for row in rows)
        return self._table

    def __enter__(self) -> "StoredItems":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the shard under way is dropped, its items are not: they make it again, whole, next time.
        writers, self._writers = self._writers, {}
        for writer in writers.values():
            writer.__exit__(kind, error, trace)


def retry_day(attempts: int, today: date) -> date:
    """When a failed item is tried again: 1, 2, 4, 8 ... days after its first, second ... attempt.

    Args:
        attempts: how often it was tried, today's included.
        today: UTC day.

    Returns:
        The UTC day, at most MAX_BACK_OFF_DAYS from today.
    """
    return today + timedelta(days=min(2 ** (attempts - 1), MAX_BACK_OFF_DAYS))


def pending_rows(
    items: pa.Table,
    known: pa.Table,
    key: str,
    max_attempts: int,
    today: date,
    *,
    retry_now: bool = False,
    changed: Collection[str] = (),
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Which items are to be fetched: those without a row, and failed ones below the limit whose day has come.

    Args:
        items: what there is to fetch.
        known: index rows with the columns `status`, `reason`, `attempts` and `retry_on`.
        key: the column that identifies both.
        max_attempts: tries before an item is left alone.
        today: UTC day. A failed row without `retry_on` waits for none.
        retry_now: do not wait for any day, and try rejected rows and those that are left alone once more, too; not
            those rejected for one of FINAL_REASONS.
        changed: keys of rows that are not ok and whose request would be another today: they are fetched as if
            never before; see `changed_requests`.

    Returns:
        The items in their order, and how often each known one of them was tried.
    """
    is_failed = pc.equal(known["status"], "failed")
    if retry_now:
        is_final = pc.fill_null(pc.is_in(known["reason"], pa.array(FINAL_REASONS, pa.string())), False)
        is_again = pc.or_(is_failed, pc.and_(pc.equal(known["status"], "rejected"), pc.invert(is_final)))
    else:
        is_due = pc.fill_null(pc.less_equal(known["retry_on"], pa.scalar(today, pa.date32())), True)
        is_again = pc.and_(pc.and_(is_failed, pc.less(known["attempts"], max_attempts)), is_due)
    is_changed = pc.is_in(known[key], pa.array(list(changed), pa.string()))
    is_changed = pc.and_(is_changed, pc.not_equal(known["status"], "ok"))
    again, anew = known.filter(pc.and_(is_again, pc.invert(is_changed))), known.filter(is_changed)
    is_known = pc.is_in(items[key], known[key].combine_chunks())
    is_wanted = pc.is_in(items[key], pa.concat_tables([again, anew])[key].combine_chunks())
    todo = items.filter(pc.or_(pc.invert(is_known), is_wanted)).to_pylist()
    return todo, dict(zip(again[key].to_pylist(), again["attempts"].to_pylist(), strict=True))


def changed_requests(known: pa.Table, key: str, requests: Mapping[str, str]) -> list[str]:
    """Which known items would be asked for otherwise today.

    Args:
        known: index rows with the column `request_id`; null, of rows of before, is another request.
        key: the column that identifies items.
        requests: by key, what would be asked today.

    Returns:
        Their keys, in the order of `requests`.
    """
    asked = dict(zip(known[key].to_pylist(), known["request_id"].to_pylist(), strict=True))
    return [item for item, request in requests.items() if asked.get(item, request) != request]


def without_damaged(folder: "UPath | Path", known: pa.Table, key: str) -> pa.Table:
    """The rows of an index but those of stored items that were damaged on their disk: gone, cut or changed.

    Every stored byte is read.

    Args:
        folder: folder of the shards.
        known: index rows, with the columns of a stored item, and perhaps of more with a prefix.
        key: the column that identifies items.

    Returns:
        The others, and rows of which nothing is stored, in their order.
    """
    names = [field.name for field in dataclass_fields(StoredItem)]
    damaged: set[str] = set()
    for prefix in [column.removesuffix("shard") for column in known.column_names if column.endswith("shard")]:
        columns = [f"{prefix}{name}" for name in names]
        rows = known.filter(pc.is_valid(known[f"{prefix}shard"])).select([key, *columns])
        # As they lie on the disk.
        rows = rows.sort_by([(f"{prefix}shard", "ascending"), (f"{prefix}offset", "ascending")])
        for item, *values in zip(*(rows[name].to_pylist() for name in rows.column_names), strict=True):
            if not is_whole(folder, StoredItem(*values)):
                damaged.add(item)
    if damaged:
        logger.warning(
            "%d stored items of %s are damaged, such as %s: fetched anew", len(damaged), folder, min(damaged)
        )
    return known.filter(pc.invert(pc.is_in(known[key], pa.array(sorted(damaged), pa.string()))))


def sample_rows(table: pa.Table, count: int, seed: int) -> list[dict[str, Any]]:
    """A random few of the stored rows of an index.

    Args:
        table: index rows; only ok ones are chosen.
        count: how many at most.
        seed: of the choice.

    Returns:
        Rows in the table's order.
    """
    ok = table.filter(pc.equal(table["status"], "ok"))
    chosen = np.random.default_rng(seed).permutation(ok.num_rows)[:count]
    rows: list[dict[str, Any]] = ok.take(pa.array(np.sort(chosen))).to_pylist()
    return rows
