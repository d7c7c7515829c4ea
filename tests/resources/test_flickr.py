import gzip
import itertools
import json
import logging
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
import tenacity
from pydantic import SecretStr

from graft_pipeline.errors import GraftError, InputError, ServiceError, SettingsError
from graft_pipeline.settings import Settings, load_settings
from resources.flickr import PAGE_SIZE, RESULT_LIMIT, FlickrClient, shared_pacing_file
from resources.http import Retries
from resources.world import open_world

KEY, SECRET = "0123456789abcdef0123456789abcdef", "fedcba9876543210"
START = datetime(2015, 1, 1, tzinfo=UTC)
END = START + timedelta(days=64)


def client(url, **options):
    options = {"retries": Retries(attempts=3, wait=tenacity.wait_none()), "calls_per_hour": 10**8, **options}
    return FlickrClient(KEY, SECRET, **{"url": url + "/services/rest/", "timeout_s": 20.0, **options})


def search(flickr, start=START, end=END):
    return list(flickr.search(-71.5, 42.25, 2.0, start, end))


def page(photos, total=None, **changes):
    total = len(photos) if total is None else total
    return json.dumps({"photos": {"photo": photos, "total": total, **changes}, "stat": "ok"}).encode()


def failure(code, message="text"):
    return json.dumps({"stat": "fail", "code": code, "message": message}).encode()


class Uploads:
    """Speaks flickr.photos.search for photos at given seconds, with Flickr's ceiling and its repeats."""

    def __init__(self, reply, seconds, announced=1.0, is_empty=lambda form: False):
        self._reply, self._announced, self._is_empty = reply, announced, is_empty
        self._photos = [(second, str(number)) for number, second in enumerate(sorted(seconds))]

    def __call__(self, request):
        form = request.form
        first, last = int(form["min_upload_date"]), int(form["max_upload_date"])
        found = [photo for photo in self._photos if first <= photo[0] <= last]
        offset = (int(form["page"]) - 1) * PAGE_SIZE
        if offset >= RESULT_LIMIT:
            offset = RESULT_LIMIT - PAGE_SIZE
        rows = [
            {"id": name, "dateupload": str(second)} for second, name in found[offset : offset + PAGE_SIZE]
        ]
        rows = [] if self._is_empty(form) else rows
        return self._reply(page(rows, total=str(int(self._announced * len(found)))))


def test_request_is_what_flickr_documents(scripted, reply):
    server = scripted(lambda request: reply(page([])))
    with client(server.url) as flickr:
        assert search(flickr) == []
    (request,) = server.requests
    form = request.form
    assert (request.method, request.path) == ("POST", "/services/rest/")
    assert request.headers["authorization"].startswith("OAuth ")
    assert f'oauth_consumer_key="{KEY}"' in request.headers["authorization"]
    assert form["method"] == "flickr.photos.search"
    assert (form["lon"], form["lat"], form["radius"], form["radius_units"]) == (
        "-71.5000000",
        "42.2500000",
        "2.0000",
        "km",
    )
    assert form["min_upload_date"] == str(int(START.timestamp()))
    assert form["max_upload_date"] == str(int(END.timestamp()) - 1)
    assert (form["accuracy"], form["has_geo"], form["media"], form["content_type"]) == (
        "1",
        "1",
        "photos",
        "1",
    )
    assert (form["sort"], form["per_page"], form["page"]) == ("date-posted-asc", "250", "1")
    assert form["safe_search"] == "1"
    assert "license" not in form
    assert {"geo", "date_upload", "date_taken", "last_update", "tags", "license", "url_n", "url_l"} <= set(
        form["extras"].split(",")
    )


def test_all_pages_are_read_and_ids_are_unique(scripted, reply):
    second = int(START.timestamp())
    server = scripted(Uploads(reply, [second + number for number in range(601)]))
    flickr = client(server.url)
    assert [row["id"] for row in search(flickr)] == [str(number) for number in range(601)]
    assert flickr.calls == len(server.requests) == 3


def test_repeats_between_pages_are_dropped(scripted, reply):
    photos = [{"id": number} for number in range(PAGE_SIZE)]
    server = scripted(lambda request: reply(page(photos, total=600)))
    assert len(search(client(server.url))) == PAGE_SIZE


def test_large_answers_are_split_by_upload_time(scripted, reply):
    second = int(START.timestamp())
    seconds = [second + 17 + 37 * number for number in range(9000)] + [int(END.timestamp()) - 1]
    server = scripted(Uploads(reply, [*seconds, second - 1, int(END.timestamp())]))
    flickr = client(server.url)
    assert sorted(int(row["dateupload"]) for row in search(flickr)) == sorted(seconds)
    assert flickr.unreachable_results == 0
    windows = {
        (form["min_upload_date"], form["max_upload_date"]) for form in (r.form for r in server.requests)
    }
    assert len(windows) > 1


@pytest.mark.parametrize(("photos", "announced"), [(601, 0.5), (500, 0.3), (750, 1.0), (5200, 0.4)])
def test_a_total_that_is_too_small_loses_nothing(scripted, reply, photos, announced):
    """Also where it hides that there are more than Flickr hands out."""
    second = int(START.timestamp())
    seconds = [second + 997 * number for number in range(photos)]
    server = scripted(Uploads(reply, seconds, announced))
    found = search(client(server.url))
    assert sorted(int(row["dateupload"]) for row in found) == seconds


@pytest.mark.parametrize("announced", [1.0, 0.8, 1.5])
@pytest.mark.parametrize(("empty_page", "times"), [("1", 1), ("2", 1), ("2", 9), ("3", 99)])
def test_pages_that_are_empty_for_a_while_lose_nothing(scripted, reply, announced, empty_page, times):
    """Asked for again, or looked for in smaller windows; also where the total is wrong."""
    left = iter(range(times))
    whole = (str(int(START.timestamp())), str(int(END.timestamp()) - 1))

    def is_empty(form):
        window = form["min_upload_date"], form["max_upload_date"]
        return form["page"] == empty_page and window == whole and next(left, None) is not None

    seconds = [int(START.timestamp()) + 997 * number for number in range(1400)]
    server = scripted(Uploads(reply, seconds, announced, is_empty))
    flickr = client(server.url)
    assert sorted(int(row["dateupload"]) for row in search(flickr)) == seconds
    assert flickr.calls <= 40


def test_a_total_that_is_too_large_ends_well(scripted, reply):
    """As Flickr's are: what it counts it does not always hand out."""
    second = int(START.timestamp())
    server = scripted(Uploads(reply, [second + 997 * number for number in range(600)], 1.5))
    flickr = client(server.url)
    assert len(search(flickr)) == 600
    assert (flickr.calls, flickr.unreachable_results) == (6, 300)
    flickr = client(scripted(lambda request: reply(page([], total=3))).url)
    assert search(flickr) == []
    assert (flickr.calls, flickr.unreachable_results) == (4, 3)


def test_a_search_that_stays_empty_though_there_are_many_photos_fails(scripted, reply):
    server = scripted(lambda request: reply(page([], total=1200)))
    with pytest.raises(ServiceError, match="announces 1200 photos and hands out none"):
        search(client(server.url))
    assert len(server.requests) == 4


def test_one_second_beyond_the_ceiling_is_counted(scripted, reply, caplog):
    second = int(START.timestamp())
    server = scripted(Uploads(reply, [second] * 4300))
    flickr = client(server.url)
    rows = search(flickr, START, START + timedelta(seconds=4))
    assert len(rows) == RESULT_LIMIT
    assert flickr.unreachable_results == 300
    assert "4300" in caplog.text


def test_types_of_the_answer_are_coerced(scripted, reply, caplog):
    rows = [{"id": 7}, {"id": "8"}, {"title": "no id"}, "no record", {"id": ""}]
    server = scripted(lambda request: reply(page(rows, total="many", pages=None)))
    assert [row["id"] for row in search(client(server.url))] == ["7", "8"]
    assert "3 records without an id" in caplog.text


def test_an_odd_byte_or_mark_costs_no_page(scripted, reply):
    rows = page([{"id": "1", "title": "caf@"}, {"id": "2"}])
    server = scripted(lambda request: reply(b"\xef\xbb\xbf" + rows.replace(b"@", b"\xe9\x03\n")))
    assert [row["id"] for row in search(client(server.url))] == ["1", "2"]


@pytest.mark.parametrize(
    "bad",
    [
        {"body": b"", "status": 429, "headers": {"Retry-After": "0"}},
        {"body": b"oops", "status": 500},
        {"body": b"<html>busy</html>", "status": 502},
        {"body": b"<html>portal</html>"},
        {"body": b""},
        {"body": page([{"id": "1"}])[:-9]},
        {"body": b"null"},
        {"body": b"[1]"},
        {"body": b'{"stat": "fail"}'},
        {"body": b'{"stat": "ok"}'},
        {"body": b'{"stat": "ok", "photos": {"photo": null}}'},
        {"body": failure(105)},
        {"body": failure(10)},
        {"body": failure("105")},
        {"body": page([{"id": "1"}]), "announced": 9999},
        {"status": 302, "headers": {"Location": "https://portal.example/login?key=1"}},
    ],
)
def test_passing_trouble_is_retried_with_a_new_signature(scripted, reply, bad):
    answers = iter([reply(**bad), reply(page([{"id": "1"}]))])
    server = scripted(lambda request: next(answers))
    assert [row["id"] for row in search(client(server.url))] == ["1"]
    signatures = {request.headers["authorization"] for request in server.requests}
    assert len(signatures) == len(server.requests) == 2


def test_silent_server_is_asked_again(scripted, reply):
    answers = iter([reply(hangs=True)])
    server = scripted(lambda request: next(answers, reply(page([{"id": "1"}]))))
    flickr = client(server.url, timeout_s=0.3, retries=Retries(attempts=20, wait=tenacity.wait_none()))
    assert [row["id"] for row in search(flickr)] == ["1"]


def test_lasting_trouble_ends_in_a_service_error(scripted, reply):
    server = scripted(lambda request: reply(b"", 503))
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:\d+.*HTTP 503.*again later"):
        search(client(server.url))
    assert len(server.requests) == 3


def test_answers_are_bounded_in_bytes_time_and_depth(scripted, reply, monkeypatch):
    monkeypatch.setattr("resources.flickr.MAX_BYTES", 10_000)
    large = page([{"id": str(number)} for number in range(2000)])
    for bad, message in [
        (reply(large), "too large"),
        (reply(gzip.compress(large), headers={"Content-Encoding": "gzip"}), "too large"),
        (reply(large, drip_s=0.05), "too large"),
        (reply(page([{"id": "1"}]), drip_s=0.02), "no complete answer"),
        (reply(b"[" * 9000), "no JSON"),
    ]:
        server = scripted(lambda request, bad=bad: bad)
        with pytest.raises(ServiceError, match=message):
            search(client(server.url, timeout_s=0.2, retries=Retries(attempts=1)))


@pytest.mark.parametrize("code", [96, 98, 100, "100"])
def test_refused_key_is_a_settings_error_at_once(scripted, reply, code):
    server = scripted(lambda request: reply(failure(code, f"Invalid API Key ({KEY})")))
    with pytest.raises(SettingsError, match="GRAFT_FLICKR_KEY") as caught:
        search(client(server.url))
    assert KEY not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_refused_signature_is_a_settings_error(scripted, reply, status):
    server = scripted(lambda request: reply(b"oauth_problem=signature_invalid", status))
    with pytest.raises(SettingsError, match=str(status)):
        search(client(server.url))


@pytest.mark.parametrize(
    ("code", "error"),
    [(3, InputError), (18, InputError), (999, InputError), (112, ServiceError), (116, ServiceError)],
)
def test_other_failures_are_permanent(scripted, reply, code, error):
    server = scripted(lambda request: reply(failure(code)))
    with pytest.raises(error, match=str(code)):
        search(client(server.url))
    assert len(server.requests) == 1


def test_wrong_address_is_explained(scripted, reply):
    server = scripted(lambda request: reply(b"not here", 404))
    with pytest.raises(ServiceError, match="GRAFT_FLICKR_URL"):
        search(client(server.url))


def test_unreachable_host_is_named(free_url):
    with pytest.raises(ServiceError, match=free_url.removeprefix("http://")) as caught:
        search(client(free_url))
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments", [(200, 42, 2), (-71, 95, 2), (-71, 42, 0), (-71, 42, 32), (float("nan"), 1, 1)]
)
def test_arguments_out_of_range(free_url, arguments):
    with pytest.raises(InputError):
        list(client(free_url).search(*arguments, START, END))


def test_times_need_a_zone_and_empty_windows_need_no_call(free_url):
    with pytest.raises(InputError, match="time zone"):
        search(client(free_url), START.replace(tzinfo=None), END)
    assert search(client(free_url), END, START) == []
    assert search(client(free_url), START, START) == []


def test_neither_key_nor_secret_shows_anywhere(scripted, reply, everything_logged):
    """Not in logs at DEBUG of any library, nor in errors with their whole chain, nor in reprs."""
    import traceback

    def respond(request):
        leak = request.headers["authorization"] + KEY + SECRET
        return next(answers, reply(leak.encode(), 500))

    answers = iter([reply(failure(105, KEY)), reply(page([{"id": "1"}])), reply(b"", 429)])
    server = scripted(respond)
    shown = []
    with client(server.url) as flickr:
        search(flickr)
        for url in (server.url, "http://127.0.0.1:9"):
            try:
                search(client(url))
            except GraftError as error:
                shown.append(
                    "".join(traceback.TracebackException.from_exception(error, capture_locals=False).format())
                )
        shown += [repr(flickr), str(flickr), repr(flickr._opened), repr(vars(flickr)["_opened"][0])]
    text = everything_logged() + "".join(shown)
    assert "Flickr" in text
    assert KEY not in text
    assert SECRET not in text


def test_settings_name_everything(scripted, reply, tmp_path):
    server = scripted(lambda request: reply(page([])))
    settings = Settings(
        world="planet",
        flickr_key=SecretStr(KEY),
        flickr_secret=SecretStr(SECRET),
        flickr_url=server.url + "/elsewhere/",
        flickr_calls_per_hour=10**8,
        flickr_licenses="4,5",
        flickr_safe_search="restricted",
        flickr_pacing_file=tmp_path / "pace.sqlite",
    )
    search(FlickrClient.from_settings(settings))
    assert server.requests[0].path == "/elsewhere/"
    form = server.requests[0].form
    assert (form["license"], form["safe_search"]) == ("4,5", "3")
    assert (tmp_path / "pace.sqlite").is_file()


@pytest.mark.parametrize("missing", ["flickr_key", "flickr_secret"])
def test_missing_key_is_a_settings_error(missing):
    settings = Settings(world="planet", flickr_key=SecretStr(KEY), flickr_secret=SecretStr(SECRET))
    with pytest.raises(SettingsError, match="GRAFT_FLICKR_KEY"):
        FlickrClient.from_settings(settings.model_copy(update={missing: None}))


@pytest.mark.parametrize("url", ["", "api.flickr.com", "file:///etc/passwd", "http://[broken", "https://"])
def test_unusable_address_is_a_settings_error(url):
    with pytest.raises(SettingsError, match="GRAFT_FLICKR_URL"):
        FlickrClient(KEY, SECRET, url=url)


def test_pace_is_kept_over_restarts(scripted, reply, tmp_path):
    """The pacing file remembers calls of a client that is gone."""
    server = scripted(lambda request: reply(page([])))
    file = tmp_path / "state" / "pace.sqlite"
    for _ in range(2):
        with client(server.url, pacing_file=file, calls_per_hour=3600 * 50) as flickr:
            search(flickr)
    import sqlite3

    with sqlite3.connect(file) as database:
        assert database.execute("select count(*) from rate_bucket").fetchone()[0] == 2


def test_a_clock_that_is_set_back_holds_up_no_call(scripted, reply, tmp_path):
    """As where a machine starts with a wrong clock, which is corrected later: a day ahead here."""
    import sqlite3

    server = scripted(lambda request: reply(page([])))
    file = tmp_path / "pace.sqlite"
    with client(server.url, pacing_file=file, calls_per_hour=3600) as flickr:
        search(flickr)
        with sqlite3.connect(file) as database:
            database.execute("update rate_bucket set item_timestamp = item_timestamp + 86400000")
        _, limiter = flickr._opened
        assert limiter.try_acquire("flickr", timeout=5)


def test_calls_are_paced(scripted, reply):
    server = scripted(lambda request: reply(page([])))
    with client(server.url, calls_per_hour=1) as flickr:
        search(flickr)
        _, limiter = flickr._opened
        assert not limiter.try_acquire("flickr", blocking=False)


#: Reads the settings as a run does and says whether one more call is allowed now.
ANOTHER_RUN = """
from graft_pipeline.settings import load_settings
from resources.flickr import FlickrClient
_, limiter = FlickrClient.from_settings(load_settings())._open()
print("may call" if limiter.try_acquire("flickr", timeout=1) else "must wait")
"""


def test_all_runs_share_the_pace_of_a_key_by_default(scripted, reply, tmp_path, monkeypatch):
    """At a call an hour, so that no machine is too slow: the next run, in its own process, must wait."""
    server = scripted(lambda request: reply(page([])))
    for name, value in {
        "DAGSTER_HOME": str(tmp_path),
        "GRAFT_WORLD": "production",
        "GRAFT_FLICKR_KEY": KEY,
        "GRAFT_FLICKR_SECRET": SECRET,
        "GRAFT_EE_PROJECT": "p",
        "GRAFT_FLICKR_URL": server.url + "/services/rest/",
        "GRAFT_FLICKR_CALLS_PER_HOUR": "1",
    }.items():
        monkeypatch.setenv(name, value)

    def another_run():
        done = subprocess.run([sys.executable, "-c", ANOTHER_RUN], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    with FlickrClient.from_settings(load_settings()) as flickr:
        search(flickr)
    assert another_run() == "must wait"
    with FlickrClient.from_settings(load_settings()) as again:
        _, limiter = again._open()
        assert not limiter.try_acquire("flickr", timeout=1)
    monkeypatch.setenv("GRAFT_FLICKR_KEY", KEY[::-1])
    assert another_run() == "may call"
    names = [file.name for file in tmp_path.iterdir() if file.suffix == ".sqlite"]
    assert len(names) == 2
    assert not any(KEY[:8] in name or KEY[::-1][:8] in name for name in names)


def test_without_dagster_home_the_pace_is_kept_in_the_users_state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert tmp_path in shared_pacing_file(KEY).parents


def test_on_the_planet_no_pace_is_shared(planet, tmp_path, monkeypatch):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    settings = Settings(_env_file=None, planet={"url": planet.url})
    with open_world(settings) as world, FlickrClient.from_settings(world) as flickr:
        search(flickr)
    assert not list(tmp_path.iterdir())


def test_damaged_pacing_file_is_explained(free_url, tmp_path):
    file = tmp_path / "pace.sqlite"
    file.write_bytes(b"no database" * 1000)
    with pytest.raises(SettingsError, match=r"pace\.sqlite.*delete"):
        search(client(free_url, pacing_file=file))


def test_importing_the_client_loads_no_flickrapi():
    code = "import sys, resources.flickr; assert 'flickrapi' not in sys.modules and 'ee' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_client_opens_again_after_close(scripted, reply):
    server = scripted(lambda request: reply(page([])))
    flickr = client(server.url)
    search(flickr)
    flickr.close()
    flickr.close()
    search(flickr)
    assert flickr.calls == 2
    assert not any(type(entry).__name__ == "Redaction" for entry in logging.getLogger("flickrapi").filters)


# --- the planet ---

PLACE = (-71.4, 42.3)
ALL_TIME = (datetime(2004, 2, 10, tzinfo=UTC), datetime(2024, 1, 1, tzinfo=UTC))


def searchable(photos):
    """Ids that a search for photos may return."""
    return {str(photo["photo_id"]) for photo in photos}


def test_planet_search_is_complete(planet):
    from resources.planet.world import World

    flickr = client(planet.url)
    rows = list(flickr.search(*PLACE, 4.0, *ALL_TIME))
    ids = [row["id"] for row in rows]
    assert len(ids) > 100
    assert len(set(ids)) == len(ids)
    photos = World(0).photos_near(*PLACE, 4.0)
    # The world knows kinds that are no photos; whatever is found is one of its rows, and nearly all are found.
    assert set(ids) <= searchable(photos)
    assert len(ids) > 0.7 * len(photos)
    assert len({int(row["accuracy"]) for row in rows}) > 1
    for row in rows:
        assert ALL_TIME[0].timestamp() <= int(row["dateupload"]) < ALL_TIME[1].timestamp()
        assert {"latitude", "longitude", "datetaken", "tags", "license", "owner"} <= set(row)


def test_planet_windows_add_up(planet):
    flickr = client(planet.url)
    middle = datetime(2020, 6, 1, 12, 30, 15, tzinfo=UTC)
    whole = {row["id"] for row in flickr.search(*PLACE, 3.0, *ALL_TIME)}
    early = {row["id"] for row in flickr.search(*PLACE, 3.0, ALL_TIME[0], middle)}
    late = {row["id"] for row in flickr.search(*PLACE, 3.0, middle, ALL_TIME[1])}
    assert early | late == whole
    assert not early & late


def test_planet_is_asked_for_licences_and_safety(planet):
    every = list(client(planet.url, safe_search="restricted").search(*PLACE, 3.0, *ALL_TIME))
    some = list(client(planet.url, safe_search="restricted", licenses="4,5").search(*PLACE, 3.0, *ALL_TIME))
    wanted = {row["id"] for row in every if row["license"] in ("4", "5")}
    assert 0 < len(wanted) < len(every)
    assert {row["id"] for row in some} == wanted
    found = [
        len(list(client(planet.url, safe_search=level).search(*PLACE, 6.0, *ALL_TIME)))
        for level in ("safe", "moderate", "restricted")
    ]
    assert found[0] < found[1] < found[2]


def test_planet_search_beyond_the_ceiling_is_split(planet):
    """Whole, though Flickr repeats itself after 4,000 results of one query."""
    flickr = client(planet.url)
    wide = {row["id"] for row in flickr.search(*PLACE, 20.0, *ALL_TIME)}
    assert len(wide) > RESULT_LIMIT
    assert flickr.unreachable_results == 0
    years = [datetime(year, 1, 1, tzinfo=UTC) for year in (2004, 2018, 2020, 2022, 2024)]
    windows = itertools.pairwise(years)
    assert {row["id"] for window in windows for row in flickr.search(*PLACE, 20.0, *window)} == wide


def test_planet_full_of_faults_yields_the_same_photos(planet, make_planet):
    wanted = [row["id"] for row in client(planet.url).search(*PLACE, 3.0, *ALL_TIME)]
    rough = make_planet(seed=0, fault_rate=0.4, stall_s=0.5)
    flickr = client(rough.url, retries=Retries(attempts=15, wait=tenacity.wait_none()))
    assert [row["id"] for row in flickr.search(*PLACE, 3.0, *ALL_TIME)] == wanted
    for _ in range(5):
        list(flickr.search(*PLACE, 1.0, *ALL_TIME))
    assert sum(count for name, count in rough.stats().items() if name.startswith("fault_")) > 0
    assert flickr.calls == rough.stats()["search"]


def test_planet_refuses_a_bad_key(planet):
    with pytest.raises(SettingsError, match=r"100.*GRAFT_FLICKR_KEY"):
        search(FlickrClient("invalid", SECRET, url=planet.url + "/services/rest/"))
