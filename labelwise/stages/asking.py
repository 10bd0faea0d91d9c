"""What `labelwise annotate` asks and what was answered: an answer is on the disk before the next image is named."""

import math
import threading
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from labelwise.annotations import UNDO, Annotation, add_annotations, keep_classes
from labelwise.environment import now
from labelwise.images.cache import ImageCache
from labelwise.images.labels import holds_several
from labelwise.images.source import ImageSet
from labelwise.rundir import RunDirectory
from labelwise.views.mosaic import encode_thumbnail

PARTS = ("test", "suggested")
_ANSWERS = ("label", "unsure", "skip")
_NEIGHBOURS = 5
_LONGEST_LABEL = 100  # letters
_LONGEST_NAME = 40  # letters, of a page
_LONGEST_LOOK = 24 * 3600.0  # seconds
_MOST_PAGES = 100  # that are remembered
_FEWEST = 10  # labels that tell anything
_PRECISIONS = (0.1, 0.075, 0.05, 0.03)  # of an accuracy, worth labeling more test images for


@dataclass(frozen=True)
class Item:
    """An image to ask about: its row, which of `PARTS`, and why it was chosen."""

    row: int
    part: str
    why: str


@dataclass(frozen=True)
class Hints:
    """What helps with images that are not for testing.

    Attributes:
        rows: Images that may be shown as neighbours, or have some.
        features: Theirs, (R, F).
        guesses: Class and probability that the kept classifier gives to a row, if there is one.
    """

    rows: list[int]
    features: Tensor
    guesses: dict[int, tuple[str, float]]


class OutdatedError(ValueError):
    """A page shows what is no longer so."""


class Session:
    """Questions and answers of one start of the command; its methods may be called from several threads.

    Several browsers may have the page open, each with a name of its own for all its tabs, which it sends as `page`: while one shows
    an image others are asked about other ones, if there are any, and each takes back its own answers.

    Args:
        run: Where answers are kept.
        images, cache: Of the run, with the labels that are known.
        items: What to ask, in order; what was answered before is among it.
        said: Answer that was given before, by row.
        classes: Known ones, in the order that they are shown in.
        who: Answers.
        hints: Never used for test images.
        tests_there: How many test images could be asked about.
    """

    def __init__(
        self,
        run: RunDirectory,
        images: ImageSet,
        cache: ImageCache,
        items: list[Item],
        said: dict[int, Annotation],
        classes: list[str],
        who: str,
        hints: Hints,
        tests_there: int,
    ) -> None:
        self._run, self._images, self._cache, self._who = run, images, cache, who
        self._items, self._unit = items, F.normalize(hints.features, dim=1)
        self._hints, self._place = hints, {row: place for place, row in enumerate(hints.rows)}
        self._lock, self._tests_there = threading.Lock(), tests_there
        number_of = {item.row: number for number, item in enumerate(items)}
        self._said = {number_of[row]: each for row, each in said.items() if row in number_of}
        self._skipped = {number for number, each in self._said.items() if each.answer == "skip"}
        self._history = [
            ("", number)
            for number, each in self._said.items()
            if number not in self._skipped and each.seconds is not None
        ]
        self._shown: dict[str, int] = {}  # number of the image that a page shows
        self._labels = {
            item.row: self._said[number].label if number in self._said else None
            for number, item in enumerate(items)
        }
        self._classes, self._added = dict.fromkeys(classes), set[str]()

    def state(self, given: dict[str, Any]) -> dict[str, Any]:
        """What a page shows: the image to ask about, classes, guess, neighbours, progress.

        Args:
            given: Its name as `page`.
        """
        with self._lock:
            return self._state(_page(given))

    def answer(self, given: dict[str, Any]) -> dict[str, Any]:
        """Keep an answer, and give the state after it.

        Args:
            given: `page`, `number` and `key` of the image, `answer`, `label`, and for how many `seconds` it was looked at.

        Raises:
            CheckpointError: The run is gone.
            OutdatedError: Another image has this number now, or it is answered already.
            ValueError: It answers nothing that is asked.
        """
        number, answer, seconds = given.get("number"), given.get("answer"), given.get("seconds")
        if type(number) is not int or not 0 <= number < len(self._items):
            raise ValueError("number: none of the images.")
        if given.get("key") != self._key(number):
            raise OutdatedError("Since a new start another image has this number; here is what is asked now.")
        if answer not in _ANSWERS:
            raise ValueError(f"answer: one of {', '.join(_ANSWERS)}.")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
            seconds = None
        label = given.get("label") if answer == "label" else None
        page = _page(given)
        with self._lock:
            if answer == "label" and not (isinstance(label, str) and label in self._classes):
                label = check_class(label)
                composed = {unicodedata.normalize("NFC", name): name for name in self._classes}
                label = composed.get(label, label)  # as a folder's name spells it
            before = self._said.get(number)
            if before is not None and before.answer != "skip":
                raise OutdatedError(f"It is answered already: {_in_words(before)}.")
            self._keep(
                page,
                number,
                answer,
                label,
                None if seconds is None else round(min(seconds, _LONGEST_LOOK), 1),
            )
            return self._state(page)

    def undo(self, given: dict[str, Any]) -> dict[str, Any]:
        """Take a page's last answer back, or one of an earlier start, and give the state after it, which asks the same again.

        Args:
            given: `page`, and what it believes that it takes back as `last`.

        Raises:
            CheckpointError: The run is gone.
            OutdatedError: Another answer would be taken back.
        """
        page = _page(given)
        with self._lock:
            if given.get("last") != self._last(page):
                raise OutdatedError("What would be taken back is another answer now; look again.")
            number = self._last_number(page)
            if number is not None:
                self._keep(page, number, UNDO, None, None)
                self._shown[page] = number
            return self._state(page)

    def row(self, number: int) -> int | None:
        """Row of the image that is asked about by a number; None where none is."""
        return self._items[number].row if 0 <= number < len(self._items) else None

    def labeled(self) -> int:
        """How many of the images have a label now."""
        return sum(label is not None for label in self._labels.values())

    def _keep(self, page: str, number: int, answer: str, label: str | None, seconds: float | None) -> None:
        item, classes = self._items[number], dict(self._classes)
        if label is not None:
            classes.setdefault(label)
        if answer == UNDO and (unused := self._unused_without(number)) is not None:
            del classes[unused]
        keep_classes(self._run, classes)
        name, key = self._images.names[item.row], int(self._cache.keys[item.row])
        if number in self._said:  # it may have been moved since
            name = self._said[number].file
        said = Annotation(name, key, answer, label, item.part, self._who, now(), seconds)
        add_annotations(self._run, [said])
        self._added = (self._added | (classes.keys() - self._classes)) & classes.keys()
        self._classes = classes
        self._skipped.discard(number)
        self._history = [each for each in self._history if each[1] != number]
        self._said.pop(number, None)
        if answer != UNDO:
            self._said[number] = said
            self._history.append((page, number))
        self._labels[item.row] = label

    def _unused_without(self, number: int) -> str | None:
        """The class that is there for one answer alone, if it has the last place, so that no other one loses its key with it."""
        last, label = next(reversed(self._classes), None), self._said[number].label
        others = (each.label for other, each in self._said.items() if other != number)
        return (
            last
            if last is not None and last == label and last in self._added and last not in others
            else None
        )

    def _waiting(self, page: str) -> list[int]:
        """Numbers of the images that a page may ask about: the one that it shows, then all in their order, those that others show last."""
        waiting = [
            number
            for number in range(len(self._items))
            if number not in self._said or number in self._skipped
        ]
        elsewhere = {number for other, number in self._shown.items() if other != page}
        mine = self._shown.pop(page, None)
        waiting.sort(key=lambda number: (number != mine, number in elsewhere))
        if waiting:
            self._shown[page] = waiting[0]
        if len(self._shown) > _MOST_PAGES:
            del self._shown[next(iter(self._shown))]
        return waiting

    def _state(self, page: str) -> dict[str, Any]:
        waiting = self._waiting(page)
        counts = Counter(each.label for each in self._said.values())
        state: dict[str, Any] = {
            "number": None,
            "classes": [{"name": name, "count": counts[name]} for name in self._classes],
            "last": self._last(page),
            "untrained": self._untrained(),
            "parts": [self._progress(part) for part in PARTS],
            "next": f"labelwise finetune --run {self._run.path}",
        }
        if not waiting:
            return state
        number, item = waiting[0], self._items[waiting[0]]
        near = [] if item.part == "test" else self._neighbours(item.row)
        return state | {
            "number": number,
            "after": {"number": waiting[1], "key": self._key(waiting[1])} if len(waiting) > 1 else None,
            "key": self._key(number),
            "file": self._images.names[item.row],
            "part": item.part,
            "why": item.why,
            "neighbours": near,
            "guess": None if item.part == "test" else self._guess(item.row, near),
        }

    def _key(self, number: int) -> str:
        """Of an image's pixels, as a text: JavaScript knows no integers as large."""
        return str(self._cache.keys[self._items[number].row])

    def _last_number(self, page: str) -> int | None:
        """Of the image that a page's undo is about."""
        return next((number for by, number in reversed(self._history) if by in ("", page)), None)

    def _last(self, page: str) -> dict[str, str] | None:
        """What undo would take back."""
        number = self._last_number(page)
        if number is None:
            return None
        return {
            "file": self._images.names[self._items[number].row],
            "said": _in_words(self._said[number]),
        }

    def _untrained(self) -> list[str]:
        """Classes that only test images have: there is nothing to learn them from."""
        said = self._said.values()
        learned = {label for row in self._hints.rows if (label := self._label(row))}
        learned |= {each.label for each in said if each.label and each.part != "test"}
        return [
            name for name in self._classes if name not in learned and any(each.label == name for each in said)
        ]

    def _progress(self, part: str) -> dict[str, Any]:
        numbers = [number for number, item in enumerate(self._items) if item.part == part]
        said = [self._said[number] for number in numbers if number in self._said]
        labels = sum(each.label is not None for each in said)
        return {
            "part": part,
            "of": len(numbers),
            "labels": labels,
            "unsure": sum(each.answer == "unsure" for each in said),
            "skipped": sum(each.answer == "skip" for each in said),
            "words": precision_in_words(labels, len(numbers), self._tests_there)
            if part == "test" and numbers
            else "",
        }

    def _neighbours(self, row: int) -> list[dict[str, Any]]:
        """The labeled images most like one, none of them for testing, the most similar first."""
        places = [place for each, place in self._place.items() if each != row and self._label(each)]
        if row not in self._place or not places:
            return []
        similarity = self._unit[places] @ self._unit[self._place[row]]
        near = similarity.topk(min(_NEIGHBOURS, len(places)))
        rows = [self._hints.rows[places[at]] for at in near.indices.tolist()]
        return [
            {
                "file": self._images.names[each],
                "label": self._label(each),
                "similarity": round(value, 3),
                "thumbnail": encode_thumbnail(self._cache.evaluations[each]),
            }
            for each, value in zip(rows, near.values.tolist(), strict=True)
        ]

    def _label(self, row: int) -> str | None:
        return self._labels[row] if row in self._labels else self._images.labels[row]

    def _guess(self, row: int, neighbours: list[dict[str, Any]]) -> dict[str, Any] | None:
        """What the classifier says; without one, what most of the neighbours are."""
        if row in self._hints.guesses:
            label, chance = self._hints.guesses[row]
            return {"label": label, "by": "classifier", "chance": round(chance, 3)}
        if not neighbours:
            return None
        label, votes = Counter(each["label"] for each in neighbours).most_common(1)[0]
        return {"label": label, "by": "neighbours", "votes": votes, "of": len(neighbours)}


def _page(given: dict[str, Any]) -> str:
    return str(given.get("page", ""))[:_LONGEST_NAME]


def _in_words(said: Annotation) -> str:
    return said.label or {"unsure": "not sure", "skip": "skipped"}[said.answer]


def check_class(label: object) -> str:
    """A class's name as it is kept, if label files could hold it.

    Raises:
        ValueError: It could not be read back from one.
    """
    if not isinstance(label, str):
        raise ValueError("label: a text.")
    name = unicodedata.normalize("NFC", label).strip()
    if not 0 < len(name) <= _LONGEST_LABEL:
        raise ValueError(f"label: 1 to {_LONGEST_LABEL} letters.")
    if not name.isprintable():
        raise ValueError("label: holds signs that cannot be shown.")
    if holds_several(name):
        raise ValueError("label: several in one; a class's name holds no comma, semicolon or |.")
    return name


def precision_in_words(labels: int, planned: int, there: int) -> str:
    """How exact an accuracy on so many labeled test images is, and how many more make it better.

    Args:
        labels: There are.
        planned: Are asked for.
        there: Could be asked for.
    """
    goals = [planned, *(math.ceil(0.25 * (1.96 / goal) ** 2) for goal in _PRECISIONS)]
    goal = next((each for each in goals if labels < each <= there), None)
    more = f"{goal - labels:,} more make it \u00b1{half_width(goal):.0f}" if goal else ""
    if labels < _FEWEST:
        return more.replace("make it", "make an accuracy exact to") + " points" if more else ""
    return ", ".join(
        [f"an accuracy is exact to \u00b1{half_width(labels):.0f} points", *([more] if more else [])]
    )


def half_width(labels: int) -> float:
    """Half of the widest interval that so many test images leave an accuracy, points."""
    return 100 * 1.96 * math.sqrt(0.25 / labels)
