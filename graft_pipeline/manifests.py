"""How tables and bytes reach the storage root and come back: atomic, deterministic, checked by schema.

Which datasets exist is in schemas.py; a deployment's root and its credentials are in resources/storage.py.
"""

import contextlib
import errno
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import pyarrow as pa

from graft_pipeline.errors import DataError, ServiceError
from graft_pipeline.schemas import DATASETS, STATUSES, Dataset

if TYPE_CHECKING:
    import duckdb
    import pyarrow.parquet as pq
    from duckdb import DuckDBPyConnection
    from upath import UPath

logger = logging.getLogger(__name__)

#: Rows of a row group: about 10 MB of pairs, small enough for selective reads from an object store.
ROW_GROUP_ROWS = 131_072

_PARTIAL_SUFFIX = ".partial"

#: How every file is written: same rows, same bytes (for one version of pyarrow).
_PARQUET: dict[str, Any] = {
    "version": "2.6",
    "compression": "zstd",
    "compression_level": 3,
    "write_statistics": True,
}


def partition_folder(root: "UPath | Path", dataset: Dataset, **values: str) -> "UPath":
    """Folder of one partition of a dataset, hive style: `root/tiles/sensor=naip/region=N42W072`.

    Args:
        root: storage root.
        dataset: the dataset.
        **values: one value for each of the dataset's partition columns.

    Returns:
        The folder, which need not exist.

    Raises:
        DataError: if the values are not those of the dataset's partition columns.
    """
    if set(values) != set(dataset.partitions):
        raise DataError(
            f"Dataset {dataset.name} is partitioned by {dataset.partitions}, not by {tuple(values)}: "
            "name each partition column once."
        )
    folder = root / dataset.name
    for column in dataset.partitions:
        folder = folder / f"{column}={values[column]}"
    return cast("UPath", folder)


def partition_file(root: "UPath | Path", dataset: Dataset, **values: str) -> "UPath":
    """Parquet file of one partition: `{dataset}.parquet` in its `partition_folder`.

    Args:
        root: storage root.
        dataset: the dataset.
        **values: one value for each of the dataset's partition columns.

    Returns:
        The file, which need not exist.

    Raises:
        DataError: if the values are not those of the dataset's partition columns.
    """
    return partition_folder(root, dataset, **values) / f"{dataset.name}.parquet"


def is_local(path: "UPath | Path") -> bool:
    """Whether a path is on a file system of this machine, where a rename replaces a file atomically.

    Args:
        path: any path.

    Returns:
        False for object stores and other fsspec protocols.
    """
    return getattr(path, "protocol", "") in ("", "file", "local")


@contextlib.contextmanager
def atomic_local_file(path: "UPath | Path") -> Iterator[Path]:
    """A temporary name beside a local file that takes its place when the block ends well.

    Args:
        path: final name, on a local file system; missing parents are made.

    Yields:
        Where to write. When the block raises, nothing stays behind and the old file is as it was.

    Raises:
        ServiceError: if the disk is full.
    """
    final = Path(str(path))
    partial = final.with_name(f".{final.name}.{secrets.token_hex(6)}{_PARTIAL_SUFFIX}")
    try:
        with disk_full_explained(path):
            final.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_full_explained(path: "UPath | Path") -> Iterator[None]:
    """Say what to do when the disk is full.

    Args:
        path: what is written.

    Raises:
        ServiceError: if the disk is full; other errors pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ServiceError(
                f"Disk full while writing {path}: free space and start the run again."
            ) from error
        raise


@contextlib.contextmanager
def partial_files(folder: "UPath | Path", *names: str) -> Iterator[tuple[Path, ...]]:
    """Temporary local files for what is named only when it is whole; see `publish`.

    Args:
        folder: where they will belong to; below a local folder they lie in it, so that a rename is enough.
        *names: one for each file, to tell them apart.

    Yields:
        Where to write. Whatever is not published is removed.

    Raises:
        ServiceError: if the disk is full.
    """
    with contextlib.ExitStack() as stack:
        if is_local(folder):
            beside = Path(str(folder))
            beside.mkdir(parents=True, exist_ok=True)
        else:
            beside = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        partials = tuple(beside / f".{name}.{secrets.token_hex(6)}{_PARTIAL_SUFFIX}" for name in names)
        try:
            yield partials
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ServiceError(
                    f"Disk full while writing to {folder}: free space and start the run again."
                ) from error
            raise
        finally:
            for partial in partials:
                partial.unlink(missing_ok=True)


def publish(partial: Path, path: "UPath | Path") -> None:
    """Give a finished file of `partial_files` its name: renamed, or put in one go.

    Args:
        partial: the file.
        path: its final name.
    """
    if not is_local(path):
        remote = cast("UPath", path)
        remote.fs.put_file(str(partial), remote.path)
        return
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    final = Path(str(path))
    final.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(final)


def remove_partial_files(folder: "UPath | Path") -> int:
    """Remove what killed processes left half written in a local folder.

    Args:
        folder: folder with one writer at a time, as Dagster's run queue and pools ensure.

    Returns:
        Number of files removed; 0 on object stores, whose single puts leave nothing.
    """
    if not is_local(folder):
        return 0
    leftovers = list(Path(str(folder)).glob(f".*{_PARTIAL_SUFFIX}"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return len(leftovers)


def write_bytes_atomic(path: "UPath | Path", data: bytes) -> bool:
    """Make a file hold some bytes; readers see the old content or the new, never a part.

    Args:
        path: file on a local disk or an object store.
        data: its whole content.

    Returns:
        False if the file held exactly that already and was not touched.

    Raises:
        ServiceError: if the disk is full.
    """
    if is_local(path):
        local = Path(str(path))
        if local.is_file() and local.stat().st_size == len(data) and local.read_bytes() == data:
            return False
        with atomic_local_file(local) as partial, partial.open("xb") as file:
            file.write(data)
            file.flush()
            # A rename that survives a power cut while its content does not would be half a file after all.
            os.fsync(file.fileno())
        return True
    remote = cast("UPath", path)
    if remote.exists() and remote.stat().st_size == len(data) and remote.read_bytes() == data:
        return False
    remote.fs.pipe_file(remote.path, data)
    return True


def conform(table: pa.Table, dataset: Dataset) -> pa.Table:
    """Cast a table to a dataset's schema, check it and sort it.

    Args:
        table: rows to be written; partition columns of the dataset may be there and are dropped.
        dataset: what they must obey.

    Returns:
        Table of exactly `dataset.schema`, sorted by `dataset.order` and key, in one chunk.

    Raises:
        DataError: on missing or unknown columns, values that do not cast, nulls in a required column,
            repeated keys, or a status that is not one of `schemas.STATUSES`.
    """
    import pyarrow.compute as pc

    wanted = dataset.schema.names
    missing = [name for name in wanted if name not in table.column_names]
    unknown = [name for name in table.column_names if name not in wanted and name not in dataset.partitions]
    if missing or unknown:
        raise DataError(
            f"Dataset {dataset.name}: missing columns {missing}, unknown columns {unknown}. "
            "Build the table from graft_pipeline.schemas."
        )
    columns = []
    for field in dataset.schema:
        try:
            column = table.column(field.name).cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"Dataset {dataset.name}, column {field.name}: {error}. Correct its writer."
            ) from error
        if not field.nullable and column.null_count:
            raise DataError(
                f"Dataset {dataset.name}: {column.null_count} of {len(column)} values of the required column "
                f"{field.name} are missing. Correct its writer."
            )
        columns.append(column)
    result = pa.table(columns, schema=dataset.schema)
    if "status" in wanted:
        wrong = set(pc.unique(result["status"]).to_pylist()) - set(STATUSES)
        if wrong:
            raise DataError(
                f"Dataset {dataset.name}: status {sorted(wrong)} is none of {STATUSES}. Correct its writer."
            )
    distinct = result.select(list(dataset.key)).group_by(list(dataset.key)).aggregate([]).num_rows
    if distinct != result.num_rows:
        raise DataError(
            f"Dataset {dataset.name}: {result.num_rows - distinct} rows repeat a key {dataset.key}. "
            "Correct its writer."
        )
    order = list(dict.fromkeys((*dataset.order, *dataset.key)))
    return result.sort_by([(name, "ascending") for name in order]).combine_chunks()


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as Parquet: same rows, same bytes (for one version of pyarrow).

    Args:
        table: any table.

    Returns:
        The file's content: zstd, fixed row groups, statistics, no timestamps.
    """
    import pyarrow.parquet as pq

    buffer = BytesIO()
    pq.write_table(
        table.combine_chunks(),
        buffer,
        row_group_size=ROW_GROUP_ROWS,
        # Embeddings never repeat: a dictionary of them only costs time.
        use_dictionary=[field.name for field in table.schema if not pa.types.is_list(field.type)],
        **_PARQUET,
    )
    return buffer.getvalue()


def write_table(path: "UPath | Path", table: pa.Table, dataset: Dataset) -> bool:
    """Write one whole Parquet file of a dataset, atomically.

    Args:
        path: the file, see `partition_file`.
        table: its rows, in any order; see `conform` for what is checked.
        dataset: schema, key and order.

    Returns:
        False if the file held exactly these rows already and was not touched.

    Raises:
        DataError: if the table does not obey the schema; nothing is written.
        ServiceError: if the disk is full.
    """
    changed = write_bytes_atomic(path, parquet_bytes(conform(table, dataset)))
    logger.debug("%s %s (%d rows)", "Wrote" if changed else "Unchanged:", path, table.num_rows)
    return changed


def read_table(path: "UPath | Path", dataset: Dataset, names: Sequence[str] | None = None) -> pa.Table | None:
    """Read one Parquet file of a dataset.

    Args:
        path: the file, see `partition_file`.
        dataset: what it must obey.
        names: columns to read; None: all of the schema.

    Returns:
        Table of exactly these columns, None if there is no such file. Nullable columns that the file lacks, as
        an earlier version wrote it, are null.

    Raises:
        DataError: if the file is not Parquet, or lacks some of the others.
    """
    wanted = dataset.schema.names if names is None else list(names)
    with open_table(path, dataset, wanted) as file:
        if file is None:
            return None
        try:
            table = file.read(wanted)
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} is damaged ({error}): delete it and materialise it again.") from error
    schema = pa.schema([dataset.schema.field(name) for name in wanted], dataset.schema.metadata)
    for name in wanted:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, schema.field(name).type))
    try:
        return table.select(wanted).cast(schema)
    except (pa.ArrowInvalid, ValueError) as error:
        raise DataError(f"{path} does not obey its schema ({error}): materialise it again.") from error


@contextlib.contextmanager
def open_table(
    path: "UPath | Path", dataset: Dataset, names: Sequence[str] | None = None
) -> "Iterator[pq.ParquetFile | None]":
    """Open one Parquet file of a dataset, to read it in pieces; a replacement meanwhile does not show.

    Args:
        path: the file, see `partition_file`.
        dataset: what it must obey.
        names: columns that it must have, nullable ones aside; None: all of the schema.

    Yields:
        The open file, None if there is no such file.

    Raises:
        DataError: if the file is not Parquet, or lacks some of them.
    """
    import pyarrow.parquet as pq

    try:
        # Opened by us: given a name, pyarrow would add the hive columns of its folders.
        stream = path.open("rb")
    except FileNotFoundError:
        yield None
        return
    with stream:
        try:
            file = pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{path} is not a Parquet file ({error}): delete it and materialise it again."
            ) from error
        missing = [
            name
            for name in names or dataset.schema.names
            if name not in file.schema_arrow.names and not dataset.schema.field(name).nullable
        ]
        if missing:
            raise DataError(f"{path} lacks the columns {missing}: materialise it again with this version.")
        yield file


class TableWriter:
    """Writes a Parquet file of a dataset from pieces that come in its order; memory holds a row group.

    Row groups are full whatever the pieces, so same rows give same bytes. A Bloom filter for each column of the
    key tells readers which row groups cannot hold a value where the order does not.
    """

    def __init__(self, path: Path, dataset: Dataset) -> None:
        """Open the file.

        Args:
            path: local file, see `partial_files`.
            dataset: schema, key and order.
        """
        import pyarrow.parquet as pq

        self._dataset = dataset
        self._order = list(dict.fromkeys((*dataset.order, *dataset.key)))
        self._writer = pq.ParquetWriter(
            path,
            dataset.schema,
            sorting_columns=pq.SortingColumn.from_ordering(
                dataset.schema, [(name, "ascending") for name in self._order]
            ),
            bloom_filter_options={name: {"ndv": ROW_GROUP_ROWS, "fpp": 0.01} for name in dataset.key},
            **_PARQUET,
        )
        self._waiting = dataset.empty()
        self._last = dataset.empty()

    def write(self, piece: pa.Table) -> None:
        """Add rows.

        Args:
            piece: rows of exactly the dataset's schema, sorted, all after those of earlier pieces.

        Raises:
            DataError: if they are not.
        """
        if piece.num_rows == 0:
            return
        piece = piece.cast(self._dataset.schema)
        if not is_increasing(pa.concat_tables([self._last, piece]).select(self._order), self._order):
            raise DataError(
                f"Dataset {self._dataset.name}: rows are not sorted by {self._order}, or repeat a key. "
                "Correct its writer."
            )
        self._last = piece.slice(piece.num_rows - 1)
        self._waiting = pa.concat_tables([self._waiting, piece])
        while self._waiting.num_rows >= ROW_GROUP_ROWS:
            self._flush(ROW_GROUP_ROWS)

    def _flush(self, count: int) -> None:
        self._writer.write_table(self._waiting.slice(0, count).combine_chunks(), row_group_size=count)
        self._waiting = self._waiting.slice(count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._waiting.num_rows:
            self._flush(self._waiting.num_rows)
        self._writer.close()


def is_increasing(table: pa.Table, names: Sequence[str]) -> bool:
    """Whether each row comes after the one before it, by some columns.

    Args:
        table: any table.
        names: columns, the first counts most.

    Returns:
        False where two rows are equal or a value is null; True for a table of at most one row.
    """
    import pyarrow.compute as pc

    before, after = table.slice(0, max(table.num_rows - 1, 0)), table.slice(1)
    result = pa.scalar(False)
    for name in reversed(names):
        less, same = pc.less(before[name], after[name]), pc.equal(before[name], after[name])
        result = pc.or_(less, pc.and_(same, result))
    return bool(pc.all(result, skip_nulls=False, min_count=0).as_py())


def summarise(table: pa.Table) -> dict[str, int]:
    """Count rows by status and reason.

    Args:
        table: rows of any dataset; without a `status` column only the rows are counted.

    Returns:
        `rows`, each status (also those that no row has), and `status/reason` for each pair that occurs.
    """
    counts = {"rows": table.num_rows}
    if "status" not in table.column_names:
        return counts
    counts.update(dict.fromkeys(STATUSES, 0))
    grouped = table.group_by(["status", "reason"]).aggregate([([], "count_all")]).to_pylist()
    for row in sorted(grouped, key=lambda row: (row["status"], row["reason"] or "")):
        counts[row["status"]] = counts.get(row["status"], 0) + row["count_all"]
        if row["reason"] is not None:
            counts[f"{row['status']}/{row['reason']}"] = row["count_all"]
    return counts


def connect(
    root: "UPath | Path", datasets: Iterable[Dataset] = tuple(DATASETS.values())
) -> "DuckDBPyConnection":
    """Open DuckDB, in memory, with one view for each dataset of a storage root.

    Views read the Parquet files as they lie; hive partition columns are strings. Columns that a file lacks, as an
    earlier version wrote it, are null. A dataset without files is an empty view with its columns.

    Args:
        root: storage root, local or on any fsspec file system.
        datasets: those to make views of: each lists its partitions, and reads the footers of all its files.

    Returns:
        A DuckDB connection; close it.

    Raises:
        DataError: if a file is damaged.
        ServiceError: if a file cannot be read.
    """
    import duckdb

    connection = duckdb.connect(":memory:")
    # Progress bars and local time zones do not belong into results.
    connection.execute("SET TimeZone = 'UTC'; CREATE SCHEMA whole")
    local = is_local(root)
    base = str(Path(str(root)).absolute()) if local else str(root).rstrip("/")
    base = literal(base)
    if not local:
        connection.register_filesystem(cast("UPath", root).fs)
    for dataset in datasets:
        name, depth = dataset.name, len(dataset.partitions)
        pattern = "/".join([name, *["*"] * depth, f"{name}.parquet"])
        fields = [*dataset.schema, *(pa.field(column, pa.string()) for column in dataset.partitions)]
        if next(iter(root.glob(pattern)), None) is None:
            connection.register(name, pa.schema(fields).empty_table())
            continue
        connection.register("_fields", pa.schema(fields).empty_table())
        connection.execute(f"CREATE TABLE whole.{_quoted(name)} AS FROM _fields")
        connection.unregister("_fields")
        hive = ", ".join(f"{_quoted(column)}: VARCHAR" for column in dataset.partitions)
        types = f", hive_types = {{{hive}}}" if hive else ""
        source = f"{base}/{pattern}".replace("'", "''")
        files = f"read_parquet('{source}', hive_partitioning = {str(bool(hive)).lower()}{types}, union_by_name = true)"
        # By name, below a table of every column: files of earlier versions may lack some, here and there or all. And
        # no others, such as a folder `a=b` of the root makes.
        try:
            connection.execute(
                f"CREATE VIEW {_quoted(name)} AS SELECT {', '.join(_quoted(field.name) for field in fields)} "
                f"FROM (FROM whole.{_quoted(name)} UNION ALL BY NAME FROM {files})"
            )
        except duckdb.Error as error:
            connection.close()
            raise unreadable(f"A file of {name}", error) from error
    return connection


def unreadable(what: str, error: "duckdb.Error") -> DataError | ServiceError:
    """What DuckDB's error at a file means: only a damaged one is ever to be deleted.

    Args:
        what: the file, in words.
        error: InvalidInputException where the file's content is at fault, anything else where it cannot be had.
    """
    import duckdb

    # Errors of object stores come with their traceback.
    why = str(error).strip().splitlines()[-1] if "Traceback" in str(error) else str(error).split("\n\n")[0]
    if isinstance(error, duckdb.InvalidInputException):
        return DataError(f"{what} is damaged ({why}): delete it and materialise it again.")
    return ServiceError(f"{what} cannot be read ({why}): give this user access to it, or try again.")


def named_in(sql: str) -> list[Dataset]:
    """Datasets whose views a query needs: those that it names; all, if it names none."""
    named = [of for name, of in DATASETS.items() if re.search(rf"\b{name}\b", sql, re.IGNORECASE)]
    return named or list(DATASETS.values())


def literal(path: str) -> str:
    """A path as DuckDB takes it, which reads patterns: folders of people may have names that mean something there."""
    return re.sub(r"([*?\[])", r"[\1]", path)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def columns(table: pa.Table, *names: str) -> tuple[Any, ...]:
    """Columns of a table as NumPy arrays.

    Args:
        table: any table.
        *names: columns.

    Returns:
        One array each: numbers in their own dtype, timestamps as datetime64 (nulls NaT), strings as object.
    """
    return tuple(table.column(name).combine_chunks().to_numpy(zero_copy_only=False) for name in names)
