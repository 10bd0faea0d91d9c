"""`labelwise annotate`: a page to label images on, random test images first, then those that `suggest` chose."""

import csv
import os
import secrets
import webbrowser
from typing import Any

import numpy as np
import torch

from labelwise import terminal
from labelwise.annotations import by_row, read_annotations, read_classes, served
from labelwise.config import FinetuneSettings
from labelwise.environment import this_user
from labelwise.errors import DataError, LabelwiseError, UsageError
from labelwise.images.cache import ImageCache
from labelwise.images.decoding import UnreadableImage
from labelwise.images.pictures import read_picture
from labelwise.images.source import ImageSet
from labelwise.images.splits import hash_names
from labelwise.interruption import stop_between_steps
from labelwise.learning.precision import choose_device
from labelwise.models.features import extract_features
from labelwise.models.weights import load_encoder
from labelwise.reports.html import get_template
from labelwise.rundir import RunDirectory
from labelwise.serving import Reply, choose_token, is_loopback, refuse, reply_json, serve
from labelwise.stages.asking import Hints, Item, OutdatedError, Session, check_class
from labelwise.stages.benching import open_separated, remember_sources
from labelwise.stages.classifier import chances_of, load_classifier
from labelwise.stages.suggesting import suggest

_MOST_NEIGHBOURS = 5000  # labeled images that neighbours are looked for among


def annotate(
    run: RunDirectory,
    *,
    test_images: int = 100,
    budget: int = 50,
    classes: tuple[str, ...] = (),
    who: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    token: str | None = None,
    browser: bool = True,
) -> None:
    """Serve the page until it is interrupted.

    Args:
        run: Pretrained; answers are kept in it.
        test_images: How many of the locked test images to ask about, drawn at random, before anything else.
        budget: How many images to ask about that `suggest` chose; chosen now, where those of its last call are answered.
        classes: To choose from, besides those that are known.
        who: Answers; default: this user.
        host, port, token: See `serving`.
        browser: Open it.

    Raises:
        DataError: There is nothing to ask.
        Interrupted: Somebody ended it, as everybody does; every answer is kept.
        ResourceError: The run cannot be written to.
        UsageError: A class's name cannot be used, the address cannot be had, or another page asks about the run already.
    """
    token = choose_token(host, token)
    try:
        classes = tuple(check_class(name) for name in classes)
    except ValueError as error:
        raise UsageError(f"--classes: {error}") from None
    with served(run):  # before what is there is looked at: nobody else may answer from here on
        session, images, cache = open_session(run, test_images, budget, classes, who or this_user())
        nonce = secrets.token_urlsafe(16)
        page = get_template("annotate.html.jinja").render(nonce=nonce, run=run.path.name)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data:; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

        def get(path: str) -> Reply | None:
            if path == "/":
                return Reply(page.encode(), "text/html; charset=utf-8", policy=policy)
            number = path.removeprefix("/image/")
            row = (
                session.row(int(number))
                if number != path and number.isdecimal() and len(number) < 10
                else None
            )
            if row is None:
                return None
            try:
                kind, picture = read_picture(images, row, cache)
            except UnreadableImage as error:
                return refuse("410 Gone", f"{images.names[row]}: cannot be shown any more: {error}")
            return Reply(picture, kind)

        def post(path: str, given: dict[str, Any]) -> Reply | None:
            try:
                if path == "/state":
                    return reply_json(session.state(given))
                if path == "/answer":
                    return reply_json(session.answer(given))
                if path == "/undo":
                    return reply_json(session.undo(given))
            except OutdatedError as error:
                return refuse("409 Conflict", str(error))
            except ValueError as error:
                return refuse("400 Bad Request", str(error))
            except (LabelwiseError, OSError) as error:
                terminal.warn(str(error))
                return refuse("500 Internal Server Error", f"Not kept: {error}")
            return None

        with stop_between_steps() as stop:
            serve(
                get,
                post,
                host=host,
                port=port,
                token=token,
                ready=lambda at: _announce(host, at, token, browser=browser),
                stop=stop,
            )
            stop.check(
                f"{session.labeled():,} of the images that it asked about have a label, kept in {run.annotations}; next: labelwise finetune --run {run.path}"
            )


def open_session(
    run: RunDirectory, test_images: int, budget: int, classes: tuple[str, ...], who: str
) -> tuple[Session, ImageSet, ImageCache]:
    """Find out what to ask, and what helps to answer; arguments as of `annotate`."""
    settings = remember_sources(run, FinetuneSettings.resolve({"run": run.path}))
    encoder, spec = load_encoder(run.path)
    images, cache, _, lock, _ = open_separated(run, settings, spec)
    answers = read_annotations(run)
    said = by_row(answers, images.names, cache.keys)
    may_ask = [
        bool(cache.readable[row]) and (label is None or row in said)
        for row, label in enumerate(images.labels)
    ]
    locked = set(lock["names"])
    all_tests = _test_items(images, cache, lock, may_ask)
    tests = all_tests[:test_images]
    done = {row for row, each in said.items() if each.answer != "skip"}
    chosen = _suggested_items(
        run,
        images,
        [may and name not in locked for may, name in zip(may_ask, images.names, strict=True)],
        done,
        budget,
    )
    if not tests and not chosen:
        raise DataError(f"{images.root}: every image that could be asked about has a label.")
    known = [
        row
        for row, name in enumerate(images.names)
        if images.labels[row] is not None and cache.readable[row] and name not in locked
    ]
    known = known[:: len(known) // _MOST_NEIGHBOURS + 1]  # of all classes, where rows are in their order
    shown = [item.row for item in chosen]
    rows = np.array(list(dict.fromkeys([*shown, *known])), dtype=np.int64)
    device = choose_device("auto")
    features = torch.zeros(0, 1)
    guesses: dict[int, tuple[str, float]] = {}
    if shown:
        features = extract_features(encoder.to(device), cache.evaluations, rows, spec.normalization, device)
        if run.classifier.exists() and run.classifier_json.exists():
            classifier, _, names = load_classifier(run)
            chances = chances_of(
                extract_features(
                    classifier.to(device), cache.evaluations, np.array(shown), spec.normalization, device
                )
            )
            guesses = {
                row: (names[int(each.argmax())], float(each.max()))
                for row, each in zip(shown, chances, strict=True)
            }
    elsewhere = {label for row, label in enumerate(images.labels) if label is not None and row not in said}
    answered = [each.label for each in answers if each.label is not None]
    session = Session(
        run,
        images,
        cache,
        tests + chosen,
        said,
        [*classes, *read_classes(run), *sorted(elsewhere), *answered],
        who,
        Hints(rows.tolist(), features, guesses),
        len(all_tests),
    )
    return session, images, cache


def _test_items(images: ImageSet, cache: ImageCache, lock: dict[str, Any], may_ask: list[bool]) -> list[Item]:
    """The test images in an order that is random and stays the same, whatever is moved, added or taken away."""
    locked = set(lock["names"])
    rows = [row for row, name in enumerate(images.names) if name in locked and may_ask[row]]
    rows.sort(key=lambda row: (hash_names([str(lock["seed"]), str(cache.keys[row])]), images.names[row]))
    return [Item(row, "test", "drawn at random to test on") for row in rows]


def _suggested_items(
    run: RunDirectory, images: ImageSet, may_ask: list[bool], done: set[int], budget: int
) -> list[Item]:
    """As many of those that `suggest` chose as are asked about at once, the first of them unanswered; where all are, it chooses anew."""
    if not budget:
        return []
    items = _read_suggestions(run, images, may_ask)
    if all(item.row in done for item in items):
        try:
            suggest(run, budget)
        except DataError as error:
            terminal.say(f"note       {error}")
        items = _read_suggestions(run, images, may_ask)
    first = next((place for place, item in enumerate(items) if item.row not in done), 0)
    first -= first % budget
    return items[first : first + budget]


def _read_suggestions(run: RunDirectory, images: ImageSet, may_ask: list[bool]) -> list[Item]:
    """Images of suggestions.csv that may be asked about, in its order."""
    if not run.suggestions.exists():
        return []
    row_of = {name: row for row, name in enumerate(images.names)}
    found: dict[int, Item] = {}
    try:
        with run.suggestions.open(encoding="utf-8", newline="") as file:
            for each in csv.DictReader(file):
                row = row_of.get(os.path.normpath(each["file"]))
                if row is not None and may_ask[row]:
                    found.setdefault(row, Item(row, "suggested", each["why"] or ""))
    except (KeyError, TypeError, ValueError, csv.Error):
        raise DataError(
            f"{run.suggestions}: not as `labelwise suggest` wrote it, a CSV with commas and the columns file and why; move it away."
        ) from None
    return list(found.values())


def _announce(host: str, port: int, token: str, *, browser: bool) -> None:
    """Say where the page is."""
    bare = host.strip("[]")
    name = f"[{bare}]" if ":" in bare else bare
    address = f"http://{name}:{port}/?token={token}"
    terminal.emit(f"page      {address}")
    if not is_loopback(host):
        terminal.warn(
            "others can reach this address, and what is sent is not encrypted: use it in a network that you trust, or through ssh -L."
        )
    if "SSH_CONNECTION" in os.environ or not is_loopback(host):
        terminal.say(
            f"from afar  ssh -L {port}:127.0.0.1:{port} THIS-MACHINE, then open http://127.0.0.1:{port}/?token={token}"
        )
    terminal.say("end        Ctrl-C; every answer is on the disk before the next image shows")
    if browser and is_loopback(host):
        webbrowser.open(address)
