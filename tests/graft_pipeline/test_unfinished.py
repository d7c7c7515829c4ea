from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from upath import UPath

from graft_pipeline.unfinished import FOLDER, Unfinished


def test_the_next_process_takes_what_was_kept_for_the_same_request(root: UPath) -> None:
    assert Unfinished(root).take("a", "url") is None
    with ThreadPoolExecutor(8) as pool:
        unfinished = Unfinished(root)
        list(
            pool.map(lambda n: unfinished.keep(f"p-{n}", f"url {n}", {"n": n}, b"\n%d\n" % n * n), range(40))
        )
    later = Unfinished(root)
    assert [later.take(f"p-{n}", f"url {n}") for n in range(40)] == [
        ({"n": n}, b"\n%d\n" % n * n) for n in range(40)
    ]
    assert later.take("p-3", "url 4") is None
    assert later.take("p-40", "url 40") is None


def test_what_is_forgotten_is_gone_and_closing_leaves_nothing(root: UPath) -> None:
    unfinished = Unfinished(root)
    for key in "abc":
        unfinished.keep(key, "url", {})
    unfinished.forget(["a", "c", "never kept"])
    assert unfinished.take("a", "url") is None
    assert {key for key in "abc" if Unfinished(root).take(key, "url")} == {"b"}
    unfinished.close()
    assert not [file for file in root.rglob("*") if file.is_file()]
    assert not (root / FOLDER).exists()


@pytest.mark.parametrize("length", [0, 5, 120, -1])
def test_a_torn_item_is_none(tmp_path: Path, length: int) -> None:
    Unfinished(tmp_path).keep("a", "url", {"n": 1}, b"content")
    (file,) = (tmp_path / FOLDER).iterdir()
    file.write_bytes(file.read_bytes()[:length])
    unfinished = Unfinished(tmp_path)
    assert unfinished.take("a", "url") is None
    unfinished.keep("a", "url", {"n": 2})
    assert unfinished.take("a", "url") == ({"n": 2}, b"")
    unfinished.close()
    assert not (tmp_path / FOLDER).exists()
