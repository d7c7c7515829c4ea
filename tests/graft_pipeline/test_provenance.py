import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from graft_pipeline import shards
from graft_pipeline.imagery import NAIP, SENTINEL2
from graft_pipeline.provenance import code_version, fingerprint


@dataclass(frozen=True)
class Config:
    steps: int
    name: str | None = None


TABLE = pa.table({"a": [1, 2, None], "b": ["x", None, "z"]})


def described(field: pa.Field) -> pa.Field:
    """A column of a schema in other words."""
    return field.with_metadata({"description": "what it means"})


#: Values that must all differ from one another.
VALUES: list[tuple[Any, ...]] = [
    (),
    (None,),
    ("",),
    (b"",),
    (0,),
    (False,),
    (0.0,),
    ("ab", "c"),
    ("a", "bc"),
    (["a", "bc"],),
    ({"a": "bc"},),
    ({"a", "bc"},),
    (Config(1),),
    (Config(2),),
    (Config(1, "a"),),
    (TABLE,),
    (TABLE.slice(0, 2),),
    (TABLE.rename_columns(["a", "c"]),),
    (np.zeros(3, np.float32),),
    (np.zeros(3, np.float64),),
    (np.zeros((3, 1), np.float32),),
    (datetime(2020, 1, 1, tzinfo=UTC),),
    (Path("a"),),
    ("a",),
    (NAIP,),
    (SENTINEL2,),
]


def test_different_content_different_fingerprint() -> None:
    prints = [fingerprint(*value) for value in VALUES]
    assert len(set(prints)) == len(VALUES)
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in prints)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({3, 1, 2}, {1, 2, 3}),
        (TABLE, pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1)])),
        (TABLE, pa.table(TABLE.columns, schema=pa.schema([described(field) for field in TABLE.schema]))),
        (np.arange(6).reshape(2, 3), np.arange(6).reshape(3, 2).reshape(2, 3)),
        (np.arange(12)[::2], np.arange(0, 12, 2)),
    ],
)
def test_same_content_same_fingerprint(one: Any, other: Any) -> None:
    assert fingerprint(one) == fingerprint(other)


def test_fingerprints_do_not_depend_on_the_process() -> None:
    program = "from graft_pipeline.provenance import fingerprint; print(fingerprint({'b', 'a'}, {'x': 1}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint({"b", "a"}, {"x": 1})


@pytest.mark.parametrize("value", [object(), Config, lambda: 0])
def test_values_without_content_are_refused(value: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="no content"):
        fingerprint(value)


def test_code_version_follows_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_version(shards) == code_version("graft_pipeline.shards")
    assert code_version(shards) != code_version("graft_pipeline.photos")
    assert code_version(shards, "graft_pipeline.photos") != code_version(shards)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "one_module.py").write_bytes(b"A = 1\n")
    (tmp_path / "same_module.py").write_bytes(b"A = 1\r\n")
    assert code_version("one_module") == code_version("same_module")
    with pytest.raises(ModuleNotFoundError):
        code_version("graft_pipeline.no_such_module")
