"""A peer that sends or takes a byte now and then ends every kind of request in bounded time, with a named error."""

import io
import socket
import threading

import pytest

from ropeway.orchestration import alert_sender, serving_check
from ropeway.orchestration.alert_sender import AlertSender
from ropeway.orchestration.alerts import Alert, AlertLimits
from ropeway.runtime import least_rate
from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.runtime.least_rate import LEAST_BYTES_PER_SECOND, LeastRateSocket, SlowTransferError, finish_within
from ropeway.stages.fetch import objects, web
from ropeway.stages.fetch.remote import download
from ropeway.storage import open_store
from tests.support.fake_s3 import fake_s3

WINDOW = 0.1  # seconds, in which 819 bytes must arrive


class Clock:
    """A clock that the peer moves, and the peer: it passes `pieces` of bytes, each after so many seconds."""

    def __init__(self, pieces):
        self.now, self.pieces = 0.0, list(pieces)

    def __call__(self):
        return self.now

    def send(self, view, _flags):
        seconds, count = self.pieces.pop(0)
        self.now += seconds
        return min(count, len(view))

    def makefile(self, _mode, buffering):
        assert buffering == 0
        peer = self

        class Raw(io.RawIOBase):
            def readable(self):
                return True

            def readinto(self, buffer):
                if not peer.pieces:
                    return 0
                count = peer.send(buffer, 0)
                buffer[:count] = b"x" * count
                return count

        return Raw()


def watched(pieces):
    clock = Clock(pieces)
    return LeastRateSocket(clock, window=300, clock=clock), clock


def test_a_byte_now_and_then_is_too_slow_after_the_window():
    connection, clock = watched([(5, 1)] * 1000)
    with pytest.raises(SlowTransferError, match="60 bytes in 300 s"):
        connection.makefile("rb").read(1000)
    assert clock.now == 300


def test_headers_line_by_line_are_watched_as_well():
    connection, clock = watched([(59, 1)] * 1000)
    with pytest.raises(SlowTransferError):
        connection.makefile("rb").readline()
    assert clock.now == 354  # the window, and the read that was under way


def test_a_slow_answer_within_the_window_and_the_least_rate_for_long_are_enough():
    connection, _ = watched([(290, 1)])
    assert connection.makefile("rb").read() == b"x"
    connection, clock = watched([(1, LEAST_BYTES_PER_SECOND)] * 3000)
    assert len(connection.makefile("rb").read()) == 3000 * LEAST_BYTES_PER_SECOND
    assert clock.now == 3000
    connection, clock = watched([(1, LEAST_BYTES_PER_SECOND - 1)] * 3000)
    with pytest.raises(SlowTransferError):
        connection.makefile("rb").read()
    assert clock.now == 300


def test_each_request_and_each_response_has_a_window_of_its_own():
    connection, clock = watched([(200, 10)] * 6)
    file = connection.makefile("rb", 0)
    for _ in range(3):
        connection.sendall(b"0123456789")
        assert file.read(10) == b"x" * 10
    assert clock.now == 1200


def test_a_peer_that_takes_a_byte_now_and_then_is_too_slow():
    connection, clock = watched([(5, 1)] * 1000)
    with pytest.raises(SlowTransferError):
        connection.sendall(b"x" * 1000)
    assert clock.now == 300


def test_a_real_socket_is_read_and_written_and_closed():
    ours, theirs = socket.socketpair()
    connection = LeastRateSocket(ours)
    connection.settimeout(5)
    connection.sendall(memoryview(b"question\n"))
    assert theirs.makefile("rb").readline() == b"question\n"
    theirs.sendall(b"answer")
    theirs.shutdown(socket.SHUT_WR)
    file = connection.makefile("rb")
    connection.close()  # http.client does so, and reads on
    assert file.read() == b"answer"
    file.close()
    assert ours.fileno() == -1
    theirs.close()


def test_what_does_not_finish_in_time_is_named():
    assert finish_within(60, lambda: 3, what="x") == 3
    with pytest.raises(ConfigError, match="inside"):
        finish_within(60, lambda: (_ for _ in ()).throw(ConfigError("inside")), what="x")
    go = threading.Event()
    with pytest.raises(TemporaryError, match="the receiver"):
        finish_within(0.01, go.wait, what="the receiver")
    go.set()


# Real clients and a server that drips


@pytest.fixture(params=["body", "headers"])
def server(request, monkeypatch, tmp_path):
    """A server that sends a byte every 2 ms from its body or headers on; it stops when a client hangs up."""
    monkeypatch.setattr(least_rate, "WINDOW_SECONDS", WINDOW)
    monkeypatch.setattr("ropeway.storage.s3_stream.sleep_with_backoff", lambda _: None)
    settings = {
        "ACCESS_KEY_ID": "x",
        "SECRET_ACCESS_KEY": "x",
        "MAX_ATTEMPTS": "2",
        "CONFIG_FILE": str(tmp_path / "no"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    over = threading.Event()
    with fake_s3() as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", running.endpoint)
        running.objects["/bucket/registry/key"] = b"x" * (1 << 20)
        running.objects["/bucket/data.jsonl"] = b"x" * (1 << 20)
        running.objects["/v1/models"] = b" " * (1 << 20)

        def drip():
            if over.wait(0.002):
                raise BrokenPipeError

        running.begin = lambda: (
            setattr(running, "drip", drip),
            setattr(running, "drips_headers", request.param == "headers"),
        )
        yield running
        over.set()


def test_a_read_from_s3_ends(server):
    store = open_store("s3://bucket/registry")
    assert store.exists("key")
    server.begin()
    with pytest.raises(TemporaryError, match=r"bytes/s|ReadTimeoutError"):
        store.get("key")
    with pytest.raises(TemporaryError, match=r"bytes/s|ReadTimeoutError"):
        store.get_many(["key"] * 16)
    with pytest.raises(TemporaryError, match=r"bytes/s|ReadTimeoutError"), store.open_stream("key") as stream:
        stream.read(1)


def test_a_source_on_s3_ends(server, tmp_path):
    [remote] = objects.look_up("s3://bucket/data.jsonl")
    server.begin()
    with pytest.raises(TemporaryError, match="bytes/s for"):
        download(remote, tmp_path)


def test_a_source_on_the_web_ends(server, tmp_path):
    remote = web.look_up(f"{server.endpoint}/bucket/data.jsonl")
    server.begin()
    with pytest.raises(TemporaryError, match="too slow"):
        download(remote, tmp_path)


def test_the_receiver_of_an_alert_is_waited_for_in_bounded_time(server, tmp_path, monkeypatch):
    monkeypatch.setattr(alert_sender, "_ANSWER_SECONDS", WINDOW)
    server.begin()
    server.drips_headers = True  # its answer has no body
    sender = AlertSender(tmp_path, "http://127.0.0.1:1", f"{server.endpoint}/canary-path", AlertLimits(24, 30))
    fault = sender._post(Alert("1", "failed", "text", "", ""))
    assert (fault.words, fault.is_final) == ("did not end its answer within 0.1 s", False)


def test_a_serving_engine_is_waited_for_in_bounded_time(server, monkeypatch):
    monkeypatch.setattr(serving_check, "_SECONDS", WINDOW)
    server.begin()
    with pytest.raises(TemporaryError, match="whole answer"):
        serving_check.check_server(server.endpoint, [])
