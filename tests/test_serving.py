"""Who is let in: one token, no other site's page, no path that leads anywhere."""

import io
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from labelwise.errors import UsageError
from labelwise.interruption import StopRequest
from labelwise.serving import Reply, choose_token, guard, reply_json, serve

TOKEN = "a-token-of-sixteen-letters"
Answer = tuple[int, dict[str, str], bytes]


def ask(
    path: str = "/", method: str = "GET", query: str = f"token={TOKEN}", body: bytes = b"", is_local: bool = True, **headers: str
) -> Answer:  # fmt: skip
    """Send a request to a guarded program that says what got through."""
    got: list[Any] = []
    app = guard(
        lambda path: Reply(path.encode(), "text/plain") if path == "/" else None,
        lambda path, given: reply_json([path, given]) if path == "/answer" else None,
        TOKEN,
        is_local=is_local,
    )
    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "HTTP_HOST": "127.0.0.1:8707",
        "CONTENT_TYPE": "application/json",
        "wsgi.input": io.BytesIO(body),
        **headers,
    }
    found = b"".join(app(environ, lambda status, pairs: got.extend((status, dict(pairs)))))
    return int(got[0][:3]), got[1], found


def post(body: bytes = b"{}", path: str = "/answer", **headers: str) -> Answer:
    return ask(path, "POST", "", body, **{"HTTP_AUTHORIZATION": f"Bearer {TOKEN}", **headers})


def test_the_token_opens_the_page_and_nothing_else_does() -> None:
    assert ask()[0] == 200
    for query in ("", "token=", "token=wrong", f"token={TOKEN}x", f"token={TOKEN.upper()}", "token=%00%ff"):
        assert ask(query=query)[0] == 403


def test_an_address_does_not_change_anything() -> None:
    assert (
        ask("/answer", "POST", f"token={TOKEN}", b"{}")[0] == 403
    )  # which a link of another site could hold
    assert post(HTTP_AUTHORIZATION="Bearer wrong")[0] == 403
    assert post(b'{"a": 1}')[2] == b'["/answer", {"a": 1}]'


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8707", "127.0.0.1.evil.example", "", "0.0.0.0"]
)
def test_a_site_that_calls_itself_this_machine_is_refused(host: str) -> None:
    assert ask(HTTP_HOST=host)[0] == 403
    assert post(HTTP_HOST=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1:1", "127.0.0.2:80", "[::1]:8707", "LOCALHOST"])
def test_names_of_this_machine_are_let_in_through_any_tunnel(host: str) -> None:
    assert ask(HTTP_HOST=host)[0] == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9", "https://127.0.0.1:87070"]
)
def test_a_page_of_another_site_is_refused(origin: str) -> None:
    assert post(HTTP_ORIGIN=origin)[0] == 403
    assert post(HTTP_ORIGIN="http://127.0.0.1:8707")[0] == 200


def test_where_others_reach_it_the_token_alone_decides() -> None:
    assert ask(is_local=False, HTTP_HOST="box.lan:8707")[0] == 200
    assert ask(is_local=False, HTTP_HOST="box.lan:8707", query="token=no")[0] == 403
    assert ask(is_local=False, HTTP_HOST="box.lan:8707", HTTP_ORIGIN="http://evil.example")[0] == 403


@pytest.mark.parametrize(
    "path", ["/image/../../etc/passwd", "/../config.toml", "//etc/passwd", "/answer", "/%2e%2e/"]
)
def test_no_path_of_the_disk_is_served(path: str) -> None:
    assert ask(path)[0] == 404


def test_what_is_no_question_of_ours_is_refused() -> None:
    assert ask(method="PUT")[0] == 405
    assert ask(method="OPTIONS")[0] == 405
    assert post(CONTENT_TYPE="text/plain")[0] == 415  # a form of another site sends it without asking first
    for body in (b"", b"[]", b"nonsense", b"\xff", b"[" * 50_000):
        assert post(body)[0] == 400
    assert post(path="/other")[0] == 404


def test_every_answer_carries_a_strict_policy() -> None:
    for answer in (ask(), ask(query=""), post(), ask("/nothing")):
        assert "default-src 'none'" in answer[1]["Content-Security-Policy"]
        assert answer[1]["X-Content-Type-Options"] == "nosniff"
        assert answer[1]["Cache-Control"] == "no-store"
        assert answer[1]["Referrer-Policy"] == "no-referrer"


def test_a_host_that_others_reach_needs_a_token() -> None:
    for host in ("0.0.0.0", "192.168.0.7", "::", "box.lan"):
        with pytest.raises(UsageError, match="choose a --token of 16 letters"):
            choose_token(host, None)
    assert choose_token("0.0.0.0", TOKEN) == TOKEN
    assert len(choose_token("localhost", None)) >= 32
    assert choose_token("127.0.0.1", None) != choose_token("127.0.0.1", None)
    for weak in ("short", "with a space in the middle", "x" * 15, "a&b=c&d=e&f=g&h=i"):
        with pytest.raises(UsageError, match="--token: 16 to 200"):
            choose_token("127.0.0.1", weak)


@pytest.fixture
def port() -> Iterator[int]:
    """A port with a server behind it."""
    stop, opened, ports = StopRequest(), threading.Event(), list[int]()

    def ready(at: int) -> None:
        ports.append(at)
        opened.set()

    def get(path: str) -> Reply | None:
        return Reply(b"here", "text/plain") if path == "/" else None

    def post(path: str, given: dict[str, Any]) -> Reply:
        return reply_json(given)

    keywords: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "token": TOKEN, "ready": ready, "stop": stop}
    thread = threading.Thread(target=serve, args=(get, post), kwargs=keywords)
    thread.start()
    assert opened.wait(10)
    yield ports[0]
    stop.ask(2)
    thread.join(10)
    assert not thread.is_alive()


def test_a_real_server_answers_and_ends(port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/?token={TOKEN}") as reply:
        assert reply.read() == b"here"
        assert "Server" not in reply.headers
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/?token=wrong")
    for path in ("/..%2f..%2fetc/passwd", "/image/..%2f", "/%2e%2e/%2e%2e/etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}?token={TOKEN}")


def test_more_than_a_page_would_send_is_not_read(port: int) -> None:
    body = json.dumps({"label": "x" * 70_000}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/answer", body,
        {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"},
    )  # fmt: skip
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(request)


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        at = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {at}: cannot be opened .*choose another"):
            serve(
                lambda path: None,
                lambda path, given: None,
                host="127.0.0.1",
                port=at,
                token=TOKEN,
                ready=print,
                stop=StopRequest(),
            )
