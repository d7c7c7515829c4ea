"""No secret shows in anything that runs write, say or show: searched in all of it, after runs that use every key."""

import base64
import io
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from graft_pipeline import areas
from graft_pipeline.definitions import build_defs
from graft_pipeline.settings import load_settings
from resources.images import ImageFetcher

REGION = "N42.00W071.50"
BOX = {
    "type": "Polygon",
    "coordinates": [[[-71.4, 42.1], [-71.3, 42.1], [-71.3, 42.2], [-71.4, 42.2], [-71.4, 42.1]]],
}
TOKEN = "ya29.recognisable-access-token"
SECRETS = {
    "GRAFT_FLICKR_KEY": "recognisableflickrkey0123456789ab",
    "GRAFT_FLICKR_SECRET": "recognisable/flickr secret",
    "GRAFT_ANSWER_KEY": "sk-recognisable-answer-key",
    "AWS_SECRET_ACCESS_KEY": "recognisable+aws/secret",
}
LOUD = {"loggers": {"console": {"config": {"log_level": "DEBUG"}}}}


@contextmanager
def google(refuses: bool = False) -> Iterator[str]:
    """Where service accounts get their tokens; refusing, it repeats what it was sent, as Flickr would."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = f"{self.headers} {self.rfile.read(int(self.headers['content-length'])).decode()}"
            answer = {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}
            body = json.dumps(
                {"error": "invalid_grant", "error_description": sent} if refuses else answer
            ).encode()
            self.send_response(403 if refuses else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/token"
        server.shutdown()


def key_file(path: Path, token_uri: str) -> tuple[Path, str]:
    """A service account's key, and a line of it."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    account = {
        "type": "service_account", "project_id": "p", "private_key_id": "k", "private_key": pem,
        "client_email": "graft@p.iam.gserviceaccount.com", "client_id": "1", "token_uri": token_uri,
    }  # fmt: skip
    path.write_text(json.dumps(account))
    return path, pem.splitlines()[3]


def forms(secret: str) -> set[str]:
    """How a secret may be written."""
    encoded = base64.b64encode(secret.encode()).decode().rstrip("=")
    return {
        secret,
        quote(secret),
        quote(secret, safe=""),
        repr(secret)[1:-1],
        encoded[: len(encoded) // 4 * 4],
    }


def texts(name: str, content: bytes) -> str:
    """A file's content as text: databases and tables decoded, anything else as it lies."""
    if name.endswith(".db"):
        # Not as it lies: long values are spread over pages.
        with closing(sqlite3.connect(name)) as database:
            return "\n".join(database.iterdump())
    if name.endswith(".parquet"):
        table = pq.read_table(io.BytesIO(content))
        return f"{table.schema.metadata} {table.to_pylist()}"
    return content.decode(errors="replace")


QUERIES = (
    "{ instance { info daemonHealth { allDaemonStatuses { daemonType lastHeartbeatErrors { message } } } } }",
    """{ runsOrError(limit: 50) { ... on Runs { results { runId status runConfigYaml tags { key value }
        assetMaterializations { partition metadataEntries { label description ... on TextMetadataEntry { text }
          ... on MarkdownMetadataEntry { mdStr } ... on JsonMetadataEntry { jsonString } } } } } } }""",
    """{ workspaceOrError { ... on Workspace { locationEntries { displayMetadata { key value } locationOrLoadError {
        ... on PythonError { message stack } ... on RepositoryLocation { repositories { name
          allTopLevelResourceDetails { name description resourceType configuredValues { key value type }
            configFields { name defaultValueAsJson } } } } } } } } }""",
    """{ assetNodes { id description opNames jobNames metadataEntries { label description }
        configField { configType { key } defaultValueAsJson }
        assetMaterializations(limit: 5) { runId stepKey metadataEntries { label
          ... on TextMetadataEntry { text } ... on MarkdownMetadataEntry { mdStr } } } } }""",
)
LOGS = """query Logs($run: ID!) { logsForRun(runId: $run) { ... on EventConnection { events {
    ... on MessageEvent { message stepKey level } ... on ExecutionStepFailureEvent { error { message stack
      errorChain { error { message stack } } } } ... on LogsCapturedEvent { logKey } } } } }"""


@contextmanager
def webserver(home: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """The Dagster UI of a deployment, asked as a browser asks it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        "-m",
        "dagster_webserver",
        "-m",
        "graft_pipeline.definitions",
        "-p",
        str(port),
        "-h",
        "127.0.0.1",
    ]
    process = subprocess.Popen([sys.executable, *command], env={**os.environ, "DAGSTER_HOME": str(home)})
    url = f"http://127.0.0.1:{port}"

    def ask(query: str, **variables: str) -> dict[str, Any]:
        answer = requests.post(f"{url}/graphql", json={"query": query, "variables": variables}, timeout=120)
        assert answer.ok, answer.text
        found: dict[str, Any] = answer.json()
        assert "errors" not in found, found
        return found

    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None
            try:
                requests.get(f"{url}/server_info", timeout=5)
                break
            except requests.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield ask
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def test_no_secret_shows_in_anything_that_is_written_said_or_shown(
    planet: Any,
    s3_root: str,
    deploy: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "deployment-1"))
    shown: list[str] = []
    with google() as gives, google(refuses=True) as refuses:
        good, line = key_file(tmp_path / "good.json", gives)
        bad, other_line = key_file(tmp_path / "bad.json", refuses)
        broken = tmp_path / "broken.json"
        broken.write_text(json.dumps({"private_key": line, "type": "service_account"}))
        # Production, as far as the pipeline knows; only images may not come from loopback there.
        deployment = deploy(
            root=s3_root,
            flickr_url=f"{planet.url}/services/rest/",
            ee_url=planet.url,
            ee_project="p",
            ee_key_file=str(good),
            search_locations_per_region="1",
            search_radius_km="1",
        )
        fetcher = ImageFetcher(static_url=f"{planet.url}/static")
        deployment.definitions = build_defs(load_settings(), images=fetcher)
        area = tmp_path / "area.geojson"
        area.write_text(json.dumps({"type": "Feature", "properties": {}, "geometry": BOX}))
        areas.register_area(deployment.storage.areas_folder, areas.read_area(area))
        deployment.materialise("regions", run_config=LOUD)
        ground = ["search_locations", "flickr_photos", "ground_images"]
        deployment.materialise(*ground, "naip/scenes", partition=REGION, run_config=LOUD)
        assert TOKEN not in json.dumps(planet.stats())

        # What goes wrong is told with all of its causes, but without the keys.
        for key, changes in {
            "naip/scenes": {"GRAFT_EE_KEY_FILE": str(bad)},
            "sentinel2/scenes": {"GRAFT_EE_KEY_FILE": str(broken)},
            "flickr_photos": {"GRAFT_FLICKR_URL": refuses},
            "search_locations": {"GRAFT_ROOT": "s3://nobodys/data"},
        }.items():
            with monkeypatch.context() as patch:
                for name, value in changes.items():
                    patch.setenv(name, value)
                with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is, it is searched
                    deployment.materialise(key, partition=REGION, run_config=LOUD)
                shown += traceback.format_exception(caught.value)
        with webserver(deployment.folder) as ask:
            answers = [ask(query) for query in QUERIES]
            runs = answers[1]["data"]["runsOrError"]["results"]
            answers += [ask(LOGS, run=run["runId"]) for run in runs]
        assert len(runs) == 6
        ui = json.dumps(answers)

    said = "".join(capfd.readouterr())
    home = {str(path): path.read_bytes() for path in deployment.folder.rglob("*") if path.is_file()}
    read = {name: texts(name, content) for name, content in {**home, **deployment.contents()}.items()}
    read |= {"the UI": ui, "standard output and error": said, "errors": "".join(shown)}
    # What must be found is found: the search reaches events, data, answers of the UI, logs and errors.
    databases = "".join(text for name, text in read.items() if name.endswith(".db"))
    for place, text in {"events": databases, "the UI": ui, "said": said}.items():
        assert REGION in text, place
        assert "GRAFT_EE_KEY_FILE" in text, place
    assert any("staticflickr.com" in text for name, text in read.items() if name.endswith(".parquet"))
    secrets = {*SECRETS.values(), line, other_line, TOKEN}
    leaks = [
        f"{secret} in {name}"
        for name, text in read.items()
        for secret in secrets
        if any(form in text for form in forms(secret))
    ]
    assert not leaks
