"""The storage root of a deployment: where each dataset lies, and clear words when it cannot be read or written.

How a table is checked and written is in graft_pipeline/manifests.py; which datasets exist, in schemas.py.
"""

import errno
import json
import logging
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from upath import UPath

from graft_pipeline.errors import DataError, InputError, ServiceError, SettingsError
from graft_pipeline.manifests import (
    is_local,
    partition_file,
    partition_folder,
    read_table,
    remove_partial_files,
    write_bytes_atomic,
    write_table,
)
from graft_pipeline.schemas import Dataset
from graft_pipeline.settings import Settings

logger = logging.getLogger(__name__)

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_FOLDER = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
#: A partition's value becomes the name of a folder.
_PLAIN_VALUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Storage:
    """All datasets below one root: a local folder, or any URL that fsspec opens.

    Nothing is opened before the first use.

    Args:
        root: folder or URL such as `s3://bucket/prefix`; credentials come from the environment.
    """

    def __init__(self, root: str | Path | UPath) -> None:
        if not str(root).strip():
            raise SettingsError("The storage root is empty: set GRAFT_ROOT to a folder or a URL.")
        # Absolute at once: a process that changes its folder keeps its root.
        is_plain = isinstance(root, Path) or (isinstance(root, str) and "://" not in root)
        self._given = Path(root).expanduser().absolute() if is_plain else root

    @classmethod
    def from_settings(cls, settings: Settings) -> "Storage":
        """The storage of a deployment."""
        return cls(settings.root)

    def __repr__(self) -> str:
        return f"Storage({str(self._given)!r})"

    @cached_property
    def root(self) -> UPath:
        """The root; a local one is absolute.

        Raises:
            SettingsError: if its kind of URL is unknown, or the package that opens it is not installed.
        """
        import fsspec

        given = self._given
        try:
            root = UPath(given)
            if is_local(root):
                return UPath(Path(root.path).absolute())
            fsspec.get_filesystem_class(root.protocol)
            # Other runs write there too: what was listed once must not be believed for ever.
            root = UPath(given, use_listings_cache=False)
        except ValueError:
            raise SettingsError(f"{given} is no URL that fsspec opens: correct GRAFT_ROOT.") from None
        except ImportError as error:
            raise SettingsError(f"{given} cannot be opened: {error} (pip), or change GRAFT_ROOT.") from None
        return root

    @property
    def areas_folder(self) -> UPath:
        """Folder of registered areas."""
        return self.root / "areas"

    @property
    def models_folder(self) -> UPath:
        """Folder of trained models and checkpoints."""
        return self.root / "models"

    def folder(self, dataset: Dataset, **values: str) -> UPath:
        """Folder of one partition, which need not exist.

        Args:
            dataset: the dataset.
            **values: a value for each of its partition columns.

        Raises:
            InputError: if a value cannot be the name of a folder.
            DataError: if the values are not those of the dataset's partition columns.
        """
        for column, value in values.items():
            if not _PLAIN_VALUE.fullmatch(str(value)):
                raise InputError(
                    f"{column}={value!r} cannot name a folder: use letters, digits, dot and hyphen."
                )
        return partition_folder(self.root, dataset, **values)

    def file(self, dataset: Dataset, **values: str) -> UPath:
        """Parquet file of one partition, which need not exist; arguments and errors as of `folder`."""
        self.folder(dataset, **values)
        return partition_file(self.root, dataset, **values)

    def has(self, dataset: Dataset, **values: str) -> bool:
        """Whether a partition's file exists; arguments and errors as of `read`."""
        with self.explained():
            return bool(self.file(dataset, **values).exists())

    def read(self, dataset: Dataset, **values: str) -> pa.Table:
        """Rows of one partition.

        Args:
            dataset: the dataset.
            **values: a value for each of its partition columns.

        Returns:
            Table of exactly `dataset.schema`; without rows if there is no file yet.

        Raises:
            DataError: if the file does not obey the schema.
            SettingsError, ServiceError: if the root cannot be read.
        """
        file = self.file(dataset, **values)
        with self.explained():
            table = read_table(file, dataset)
        return dataset.empty() if table is None else table

    def write(self, dataset: Dataset, table: pa.Table, **values: str) -> bool:
        """Replace the rows of one partition, atomically.

        Args:
            dataset: the dataset.
            table: its rows, in any order.
            **values: a value for each of its partition columns.

        Returns:
            False if the file held exactly these rows already and was not touched.

        Raises:
            DataError: if the table does not obey the schema; nothing is written.
            SettingsError, ServiceError: if the root cannot be written; the old file is as it was.
        """
        file = self.file(dataset, **values)
        with self.explained():
            # What a killed process left; a partition has one writer at a time.
            remove_partial_files(file.parent)
            return write_table(file, table, dataset)

    def partitions(self, dataset: Dataset, **fixed: str) -> list[dict[str, str]]:
        """Partitions of a dataset that have a file.

        Args:
            dataset: the dataset.
            **fixed: values that the partitions must have.

        Returns:
            Values by partition column, outermost first, sorted; one empty dict for an unpartitioned dataset.

        Raises:
            InputError: if a fixed column is none of the dataset's.
        """
        unknown = set(fixed) - set(dataset.partitions)
        if unknown:
            raise InputError(
                f"{dataset.name} has no partitions by {sorted(unknown)}: use {list(dataset.partitions)}."
            )
        levels = [f"{column}={fixed.get(column, '*')}" for column in dataset.partitions]
        depth = len(levels)
        with self.explained():
            files = list(self.root.glob("/".join([dataset.name, *levels, f"{dataset.name}.parquet"])))
        found = [file.parts[-depth - 1 : -1] for file in files]
        pairs = ([part.partition("=")[::2] for part in parts] for parts in found)
        return sorted((dict(pair) for pair in pairs), key=lambda values: tuple(values.values()))

    def check(self) -> None:
        """Make sure, before hours of work, that the root can be written.

        Raises:
            SettingsError: if it cannot.
            ServiceError: if the disk is full, or the service does not answer.
        """
        probe = self.root / f".graft-{secrets.token_hex(6)}.probe"
        with self.explained():
            if is_local(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
                for leftover in Path(self.root.path).glob(".graft-*.probe"):
                    leftover.unlink(missing_ok=True)
            try:
                probe.write_bytes(b"graft")
            finally:
                # Another run may have taken it for a leftover.
                probe.unlink(missing_ok=True)

    def claim(self, settings: Settings) -> None:
        """Make sure that the root holds one world's data: photos of a planet must never mix with real ones.

        The first run says in `world.json` which world that is.

        Args:
            settings: of the deployment.

        Raises:
            SettingsError: if the data is another world's.
            DataError: if the file is damaged.
        """
        wanted = settings.planet.seed if settings.is_planet else None
        with self.explained():
            if not self._world_file.exists():
                content = {"world": "production"} if wanted is None else {"world": "planet", "seed": wanted}
                write_bytes_atomic(self._world_file, f"{json.dumps(content)}\n".encode())
        if (found := self.planet_seed()) != wanted:
            raise SettingsError(
                f"The storage root {self._given} holds data of {_world_name(found)}, and this deployment talks to "
                f"{_world_name(wanted)}: set GRAFT_ROOT to another folder, or GRAFT_WORLD, GRAFT_PLANET__SEED and the "
                "keys as they were."
            )

    def planet_seed(self) -> int | None:
        """Which planet's data the root holds; None: real data, or none that says so.

        Raises:
            DataError: if `world.json` is damaged.
            SettingsError, ServiceError: if the root cannot be read.
        """
        with self.explained():
            if not self._world_file.exists():
                return None
            text = self._world_file.read_text(encoding="utf-8")
        try:
            content = json.loads(text)
            return int(content["seed"]) if content["world"] == "planet" else None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self._world_file} is damaged: write into it what its data is, "
                '{"world": "production"} or {"world": "planet", "seed": 0}.'
            ) from error

    @property
    def _world_file(self) -> UPath:
        return self.root / "world.json"

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn the operating system's errors inside the context into GraftErrors.

        Raises:
            SettingsError: if the root is not there, not a folder, or not permitted.
            ServiceError: if the disk is full, a bucket does not answer, or anything else fails.
        """
        try:
            yield
        except _client_errors("ConnectionError", "HTTPClientError") as error:
            raise ServiceError(
                f"The storage root {self._given} cannot be reached ({error}): check the network and the bucket's "
                "endpoint, then start the run again: finished work is kept."
            ) from error
        except _client_errors("BotoCoreError") as error:
            raise SettingsError(
                f"The storage root {self._given} cannot be opened ({error}): check GRAFT_ROOT and its credentials."
            ) from error
        except OSError as error:
            raise self._explanation(error) from error

    def _explanation(self, error: OSError) -> ServiceError | SettingsError:
        what = error.strerror or str(error) or type(error).__name__
        where = error.filename or self._given
        if error.errno in _FULL:
            return ServiceError(
                f"Disk full at {where}: free space and start the run again, finished work is kept."
            )
        if error.errno in _REFUSED or isinstance(error, PermissionError):
            return SettingsError(
                f"{where}: {what}. Give this user access to the storage root, or change GRAFT_ROOT."
            )
        if error.errno in _NO_FOLDER or isinstance(error, FileNotFoundError):
            return SettingsError(f"{where}: {what}. GRAFT_ROOT must be a folder, or a bucket that exists.")
        return ServiceError(
            f"{where}: {what}. Check the storage root, then start the run again: finished work is kept."
        )


def _world_name(planet_seed: int | None) -> str:
    return "the real services" if planet_seed is None else f"the planet of seed {planet_seed}"


def _client_errors(*names: str) -> tuple[Any, ...]:
    """Errors of an object store's client that are no OSErrors, such as missing credentials."""
    botocore: Any = sys.modules.get("botocore.exceptions")
    return tuple(getattr(botocore, name) for name in names) if botocore is not None else ()
