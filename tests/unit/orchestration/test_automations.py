"""A Prefect server whose database is busy is asked again; one that refuses is not."""

import json
import sqlite3
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from uuid import uuid4

import pytest
import sqlalchemy
from prefect.server.database import orm_models

from ropeway.orchestration import prefect_requests
from ropeway.orchestration.automations import (
    CRASHED,
    PATIENCE,
    apply_automations,
    await_heartbeats,
    crashed_automation,
)
from ropeway.runtime.errors import TemporaryError


@pytest.fixture
def server(monkeypatch):
    """Return (address, answers to give to the next PUTs, methods asked, what the one automation that exists has)."""
    monkeypatch.setattr(prefect_requests, "_PAUSE_SECONDS", 0.0)
    codes, asked, stored = [], [], {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked.append(self.command)
            code = codes.pop(0) if self.command == "PUT" and codes else 200
            found = [{"id": "1", "name": CRASHED, "enabled": False, **stored}] if self.path.endswith("/filter") else {}
            body = json.dumps(found).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = answer  # noqa: N815 - names of http.server

        def log_message(self, *_):
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}/api", codes, asked, stored
        served.shutdown()


def test_a_busy_database_is_asked_again(server):
    url, codes, asked, _ = server
    codes += [503, 503, 429]
    assert apply_automations(url)
    assert asked.count("PUT") == 4


def test_a_database_that_stays_busy_and_a_refusal_are_reported(server, monkeypatch):
    url, codes, asked, _ = server
    monkeypatch.setattr(prefect_requests, "_BUSY_SECONDS", -1.0)
    codes += [503, 503]
    with pytest.raises(TemporaryError, match=r"refused PUT .* 503"):
        apply_automations(url)
    codes[:] = [422]
    with pytest.raises(TemporaryError, match="422"):
        apply_automations(url)
    assert asked.count("PUT") == 2


def test_an_equal_automation_is_left_alone_since_an_update_drops_what_it_waits_for(server):
    url, _, asked, stored = server
    stored |= json.loads(json.dumps(crashed_automation(silent_seconds=90)))
    stored["trigger"] |= {"id": "2", "within": 90.0, "expect": stored["trigger"]["expect"][::-1]}
    apply_automations(url)
    assert "PUT" not in asked
    stored["trigger"]["within"] = 91.0
    apply_automations(url)
    assert asked.count("PUT") == 1


@pytest.fixture
def database(tmp_path, monkeypatch):
    """Prefect's own tables, with a window of a run that ended an hour ago in each of two automations."""
    for name in ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"):
        monkeypatch.delenv(name, raising=False)
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path / 'prefect.db'}")
    tables = [orm_models.Automation.__table__, orm_models.AutomationBucket.__table__]
    orm_models.Base.metadata.create_all(engine, tables=tables)
    then, trigger = datetime.now(UTC) - timedelta(hours=1), crashed_automation(silent_seconds=90)["trigger"]
    with engine.begin() as connection:
        for name in (CRASHED, "of a user"):
            number = uuid4()
            row = {"id": number, "name": name, "description": "", "enabled": True, "actions": []}
            more = {"tags": [], "actions_on_trigger": [], "actions_on_resolve": [], "trigger": trigger}
            connection.execute(tables[0].insert().values(**row, **more))
            window = {"automation_id": number, "trigger_id": uuid4(), "bucketing_key": ["run"], "count": 0}
            connection.execute(tables[1].insert().values(**window, start=then, end=then + timedelta(seconds=90)))
    yield engine
    engine.dispose()


def read_ends(engine):
    automation, window = orm_models.Automation.__table__, orm_models.AutomationBucket.__table__
    chosen = sqlalchemy.select(automation.c.name, window.c.end).where(automation.c.id == window.c.automation_id)
    with engine.connect() as connection:
        return dict(connection.execute(chosen).all())


def test_a_server_that_starts_waits_for_the_heartbeats_that_runs_kept(database, tmp_path):
    before = read_ends(database)
    assert await_heartbeats(tmp_path) == 1
    after = read_ends(database)
    assert after["of a user"] == before["of a user"]
    assert abs(after[CRASHED] - datetime.now(UTC) - PATIENCE) < timedelta(minutes=1)


def test_a_window_of_a_clock_that_was_ahead_is_brought_back(database, tmp_path):
    window = orm_models.AutomationBucket.__table__
    with database.begin() as connection:
        connection.execute(window.update().values(end=datetime.now(UTC) + timedelta(days=365)))
    assert await_heartbeats(tmp_path) == 1
    assert abs(read_ends(database)[CRASHED] - datetime.now(UTC) - PATIENCE) < timedelta(minutes=1)


def test_a_home_without_a_database_of_prefect_is_left_alone(tmp_path):
    assert await_heartbeats(tmp_path) == 0
    assert not (tmp_path / "prefect.db").exists()
    sqlite3.connect(tmp_path / "prefect.db").close()
    assert await_heartbeats(tmp_path) == 0


def test_a_database_that_cannot_be_changed_is_an_error_with_its_path(tmp_path):
    (tmp_path / "prefect.db").write_bytes(b"no database" * 100)
    with pytest.raises(OSError, match=r"prefect\.db"):
        await_heartbeats(tmp_path)
