"""A page for one person's browser: the door of waitress. Whoever lacks the token, or comes from another site, is let in nowhere."""

import errno
import hmac
import ipaddress
import json
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import waitress

from labelwise.errors import LabelwiseError, UsageError
from labelwise.interruption import StopRequest

DEFAULT_PORT = 8707
_LARGEST = 1 << 16  # bytes of what a page sends
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,200}")
_LOOKS_SECONDS = 0.1
_PATIENCE_SECONDS = 2.0  # for an answer that is on its way
_WAITING = 2000  # connections
_ALWAYS = (
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("X-Frame-Options", "DENY"),
)
_PLAIN = "text/plain; charset=utf-8"
_POLICY = "default-src 'none'"


@dataclass(frozen=True)
class Reply:
    """What is sent back: bytes, their media type, and the policy for what the page may load."""

    body: bytes
    kind: str = "application/json"
    status: str = "200 OK"
    policy: str = field(default=_POLICY, repr=False)


Get = Callable[[str], Reply | None]  # path to answer; None where there is no such path
Post = Callable[[str, dict[str, Any]], Reply | None]


def reply_json(value: Any, status: str = "200 OK") -> Reply:
    """Answer with JSON."""
    return Reply(json.dumps(value, ensure_ascii=False, allow_nan=False).encode(), status=status)


def refuse(status: str, words: str) -> Reply:
    """Answer that this cannot be had, and why."""
    return Reply(f"{words}\n".encode(), _PLAIN, status)


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach a host."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def choose_token(host: str, token: str | None) -> str:
    """The word that lets a browser in: given, or a new one where only this machine can ask.

    Raises:
        UsageError: A host that others reach needs a given one; or it is too short, or no word.
    """
    if token is None and not is_loopback(host):
        raise UsageError(
            f"--host {host}: others can reach it; choose a --token of 16 letters or more, which the address will hold."
        )
    if token is not None and not _TOKEN.fullmatch(token):
        raise UsageError("--token: 16 to 200 letters, digits, - or _; `openssl rand -hex 16` makes one.")
    return token or secrets.token_urlsafe(24)


def serve(
    get: Get,
    post: Post,
    *,
    host: str,
    port: int | None,
    token: str,
    ready: Callable[[int], None],
    stop: StopRequest,
) -> None:
    """Answer requests until somebody asks to stop.

    Args:
        get, post: What to answer to those that are let in.
        host: Address to listen on.
        port: Port; 0 for any that is free; None for the usual one, or any that is free.
        token: See `choose_token`.
        ready: Called with the port once it is open.
        stop: Whether somebody asked to stop.

    Raises:
        LabelwiseError: The server ended by itself.
        UsageError: The address cannot be had.
    """
    app = guard(get, post, token, is_local=is_loopback(host))
    listening = _listen(host, port)
    logging.getLogger("waitress.queue").setLevel(
        logging.ERROR
    )  # that a browser asks for two images at once is no news
    server = waitress.create_server(
        app,
        sockets=[listening],
        threads=4,
        ident=None,
        connection_limit=_WAITING,
        max_request_body_size=_LARGEST,
        clear_untrusted_proxy_headers=True,
        asyncore_use_poll=True,  # select knows 1,024 files at most
    )

    def run() -> None:
        try:
            server.run()
        except (OSError, ValueError):  # it is closed while it listens, below
            if not stop:
                raise

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready(int(listening.getsockname()[1]))
    while not stop and thread.is_alive():
        time.sleep(_LOOKS_SECONDS)
    server.close()
    thread.join(_PATIENCE_SECONDS)
    if not stop:
        raise LabelwiseError("the page's server ended; start it again, nothing that was answered is lost.")


def guard(get: Get, post: Post, token: str, *, is_local: bool) -> Callable[..., list[bytes]]:
    """Make a WSGI program that asks `get` and `post` only for whom the token lets in.

    Args:
        get, post, token: See `serve`.
        is_local: Only names of this machine are let in as Host, against sites that rename themselves to it.
    """

    def app(environ: dict[str, Any], start: Callable[..., Any]) -> list[bytes]:
        reply = _refusal(environ, token, is_local=is_local) or _answer(environ, get, post)
        headers = [
            ("Content-Type", reply.kind),
            ("Content-Length", str(len(reply.body))),
            ("Content-Security-Policy", reply.policy),
            *_ALWAYS,
        ]
        start(reply.status, headers)
        return [reply.body]

    return app


def _refusal(environ: dict[str, Any], token: str, *, is_local: bool) -> Reply | None:
    """Why a request is not let in; None if it is."""
    host = environ.get("HTTP_HOST", "")
    if is_local and not is_loopback(re.sub(r":\d+$", "", host).lower()):
        return refuse("403 Forbidden", "This page answers to 127.0.0.1 and localhost only.")
    origin = environ.get("HTTP_ORIGIN")
    if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
        return refuse("403 Forbidden", "A request from another site.")
    if environ["REQUEST_METHOD"] == "POST":  # another site can send an address, and no header of its own
        given = environ.get("HTTP_AUTHORIZATION", "").removeprefix("Bearer ")
    else:
        given = parse_qs(environ.get("QUERY_STRING", "")).get("token", [""])[0]
    if not hmac.compare_digest(given.encode("utf-8", "replace"), token.encode()):
        return refuse(
            "403 Forbidden",
            "Open the whole address that `labelwise annotate` printed; each start has another.",
        )
    return None


def _answer(environ: dict[str, Any], get: Get, post: Post) -> Reply:
    path, method = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"]
    if method == "GET":
        return get(path) or refuse("404 Not Found", "Nothing is here.")
    if method != "POST":
        return refuse("405 Method Not Allowed", "GET or POST.")
    if environ.get("CONTENT_TYPE", "").partition(";")[0].strip() != "application/json":
        return refuse("415 Unsupported Media Type", "JSON only.")
    try:
        value = json.loads(environ["wsgi.input"].read(_LARGEST))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        return refuse("400 Bad Request", "Not a JSON object.")
    return post(path, value) or refuse("404 Not Found", "Nothing is here.")


def _listen(host: str, port: int | None) -> socket.socket:
    """Open a port; the usual one where none is named, or any if that one is taken."""
    bare = host.strip("[]")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    try:
        return socket.create_server((bare, DEFAULT_PORT if port is None else port), family=family)
    except OSError as error:
        if port is None and error.errno == errno.EADDRINUSE:
            return _listen(host, 0)
        shown = DEFAULT_PORT if port is None else port
        raise UsageError(
            f"--host {host} --port {shown}: cannot be opened ({error.strerror}); choose another."
        ) from None
