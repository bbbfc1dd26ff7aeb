"""A command runs on a cluster that somebody else started, and its fate is told."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from typer.testing import CliRunner

from cluster import jobs
from cluster.errors import JobError
from cluster.job_files import SECRET_FILES
from cluster.jobs import forwarded_environment, submit_job, wait_for_job
from pipelines.cli import app
from sgmd_core.errors import ConfigError


def test_variables_go_along_by_pattern_and_keys_only_by_name():
    environment = {
        "AWS_ENDPOINT_URL_S3": "http://store",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "WANDB_API_KEY": "secret",
        "WANDB_MODE": "offline",
        "HOME": "/root",
    }
    usual = {"AWS_ENDPOINT_URL_S3": "http://store", "WANDB_MODE": "offline"}
    assert forwarded_environment(environment=environment) == usual
    named = forwarded_environment(["WANDB_API_KEY"], environment)
    assert named == {**usual, "WANDB_API_KEY": "secret"}
    with pytest.raises(ConfigError, match="AWS_ROLE not set"):
        forwarded_environment(["AWS_ROLE"], environment)


def test_an_endpoint_goes_along_without_the_user_and_password_in_it():
    environment = {
        "AWS_ENDPOINT_URL": "https://user:top-secret@store:9000/path?x=1",
        "WANDB_BASE_URL": "https://wandb.local",
    }
    assert forwarded_environment(environment=environment) == {
        "AWS_ENDPOINT_URL": "https://store:9000/path?x=1",
        "WANDB_BASE_URL": "https://wandb.local",
    }
    named = forwarded_environment(["AWS_ENDPOINT_URL"], environment)
    assert "top-secret" in named["AWS_ENDPOINT_URL"]


def test_what_ray_leaves_at_home_by_itself_holds_the_same_secrets():
    listed = (Path(__file__).parents[2] / ".rayignore").read_text().splitlines()
    assert set(SECRET_FILES) <= set(listed)


def test_a_job_server_that_is_not_there_is_told(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(JobError, match=r"reaching the job server at http://127\.0\.0\.1:9: Conn"):
        submit_job("http://127.0.0.1:9", ["true"], Path())


def test_an_address_that_ray_would_override_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265")
    with pytest.raises(JobError, match="Unset RAY_ADDRESS"):
        submit_job("http://127.0.0.1:9", ["true"], Path())


@contextmanager
def dashboard(answers: list[int]) -> Iterator[str]:
    """A dashboard that answers so about a job, one after the other: 0 hangs up, 200 is its end."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/api/version":
                code, said = 200, {"version": "4", "ray_version": ray.__version__, "ray_commit": ""}
            else:
                code = answers.pop(0) if len(answers) > 1 else answers[0]
                said = {"type": "SUBMISSION", "submission_id": "job"}
                said |= {"status": "SUCCEEDED", "entrypoint": "true"}
            if not code:
                self.connection.close()
                return
            body = json.dumps(said).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(jobs, "_RECONNECT_S", 0.01)


@pytest.mark.usefixtures("impatient")
def test_a_job_is_waited_for_over_dropped_connections_and_bad_gateways():
    answers = [0, 502, 0, 200]
    with dashboard(answers) as address:
        wait_for_job(address, "job")
    assert answers == [200]


@pytest.mark.usefixtures("impatient")
def test_a_dashboard_that_stays_away_leaves_open_what_became_of_the_job():
    with dashboard([502]) as address, pytest.raises(JobError, match="11 times") as caught:
        wait_for_job(address, "job")
    assert "The job may go on" in str(caught.value)


@pytest.mark.usefixtures("impatient")
def test_a_job_is_unknown_where_the_cluster_says_so():
    with dashboard([404]) as address, pytest.raises(JobError, match="a job that this cluster"):
        wait_for_job(address, "job")


@pytest.mark.usefixtures("impatient")
def test_a_job_that_succeeded_is_no_failure_where_its_results_are_not_told():
    command = ["submit", "--follow", "job", "--wait", "--address"]
    with dashboard([200, 502]) as address:
        done = CliRunner().invoke(app, [*command, address])
    assert done.exit_code == 0, done.output
    assert "where its results are is not known" in done.output


ASKING = """
import json, os, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import ray
from cluster.errors import JobError
from cluster.jobs import job_client

class Asking(BaseHTTPRequestHandler):
    def do_GET(self):
        knows = self.headers.get("Authorization") == "Bearer " + "a" * 64
        body = {"ray_version": ray.__version__} if knows else {}
        self.send_response(200 if knows else 401)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Asking)
threading.Thread(target=server.serve_forever, daemon=True).start()
try:
    job_client(f"http://127.0.0.1:{server.server_port}")
    print("taken", os.environ["RAY_AUTH_MODE"])
except JobError as error:
    print("refused", "RAY_AUTH_TOKEN or ~/.ray/auth_token" in error.expected)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({}, "refused True"),
        ({"RAY_AUTH_TOKEN": "a" * 64}, "taken token"),
        ({"RAY_AUTH_TOKEN": "a" * 64, "RAY_AUTH_MODE": "disabled"}, "refused True"),
    ],
)
def test_a_job_server_that_asks_for_a_token_gets_the_one_that_is_there(tmp_path, own, told):
    """As of a cluster that `ray start` makes where a token lies in the home folder."""
    left_out = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run(
        [sys.executable, "-c", ASKING],
        env=environment | {"HOME": str(tmp_path)} | own,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == told, done.stderr
