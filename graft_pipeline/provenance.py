"""Fingerprints: what a result was made from (content) and by (code), as short strings.

Where they are shown (Dagster's data and code versions, model cards, snapshots) is up to their users.
"""

import dataclasses
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import date, datetime
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa

from graft_pipeline.manifests import parquet_bytes


def fingerprint(*parts: Any) -> str:
    """Hash of values by content.

    Args:
        *parts: tables (by names, types and rows, whatever their chunks and metadata), arrays, dataclasses, containers,
            str, bytes, numbers, dates, paths, None; nested at will. Order does not count in mappings and
            sets.

    Returns:
        16 hexadecimal digits; equal content gives equal digits in every process.

    Raises:
        TypeError: if a value has no content that could be hashed.
    """
    digest = hashlib.sha256()
    for part in parts:
        _feed(digest, part)
    return digest.hexdigest()[:16]


def _feed(digest: Any, value: Any) -> None:
    def tagged(tag: str, content: bytes) -> None:
        # Length and type before content: ("ab", "c") and ("a", "bc") must differ, and 1, True and "1" too.
        digest.update(f"{tag}:{len(content)}:".encode())
        digest.update(content)

    def nested(tag: str, values: Sequence[Any]) -> None:
        digest.update(f"{tag}[{len(values)}]".encode())
        for item in values:
            _feed(digest, item)

    match value:
        case None | bool() | int() | float() | complex():
            tagged(type(value).__name__, repr(value).encode())
        case str():
            tagged("str", value.encode())
        case bytes() | bytearray() | memoryview():
            tagged("bytes", bytes(value))
        case datetime() | date():
            tagged("time", value.isoformat().encode())
        case Path():
            tagged("path", str(value).encode())
        case pa.Table():
            # As Parquet: chunking, offsets and whatever lies below nulls do not get there. What columns are said to
            # mean does, in their fields' metadata, and is no content.
            bare = pa.schema([field.remove_metadata() for field in value.schema])
            tagged("table", parquet_bytes(pa.table(value.columns, schema=bare)))
        case np.ndarray() | np.generic():
            array = np.asarray(value)
            if array.dtype.hasobject:
                nested("array", array.tolist())
            else:
                tagged(f"array{array.dtype.str}{array.shape}", np.ascontiguousarray(array).tobytes())
        case Mapping():
            nested("map", [part for key in sorted(value, key=repr) for part in (key, value[key])])
        case AbstractSet():
            nested("set", sorted(value, key=repr))
        case list() | tuple():
            nested("list", value)
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
            nested(type(value).__name__, [part for field in fields for part in field])
        case _:
            raise TypeError(f"{type(value).__name__} has no content to fingerprint: pass its data instead.")


def code_version(*modules: ModuleType | str) -> str:
    """Hash of modules' sources; they are not imported for it.

    Args:
        *modules: modules, or their dotted names.

    Returns:
        12 hexadecimal digits; line endings do not count.

    Raises:
        ModuleNotFoundError: if there is no such module.
    """
    names = [module if isinstance(module, str) else module.__name__ for module in modules]
    return fingerprint(*[_source_of(name) for name in names])[:12]


@lru_cache(maxsize=256)
def _source_of(name: str) -> bytes:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No source of a module {name!r} can be found.", name=name)
    return Path(spec.origin).read_bytes().replace(b"\r\n", b"\n")
