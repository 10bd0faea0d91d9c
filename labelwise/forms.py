"""What the files of a run must hold for us to read them: one of another form is as damaged as one that is cut."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError


class _Form(BaseModel):
    """Keys that are read; others may be there, and those with a default need not."""

    model_config = ConfigDict(strict=True)


class _Sources(_Form):
    images: str
    labels: str | None
    labels_root: str | None
    test: str | None
    group_column: str | None = None
    stream: bool = False


class _Quarantined(_Form):
    file: str
    reason: str


class _Data(_Form):
    root: str
    sources: _Sources
    images: int
    pool: int
    pool_sha256: str
    pretrained_on: int = 0
    test: int
    test_method: str
    excluded_duplicates: int
    excluded_groups: int = 0
    grouped: dict[str, int] = {}
    quarantined: list[_Quarantined]
    classes: dict[str, int]
    image_size: int
    cache_side: int
    intensity_range: list[float] | None


class _Plan(_Form):
    precision: str
    layout: str
    reason: str


class _Precision(_Form):
    number: str
    layout: str
    reason: str


class _Environment(_Form):
    asked: dict[str, Any]
    plan: _Plan
    precision: _Precision
    finished: str | None
    seconds: float
    commands: list[Any]
    trouble: str | None = None
    distilling_tested: int = 0


class _TestLock(_Form):
    method: str
    names: list[str]
    keys: list[int]
    seed: int
    sha256: str
    excluded_duplicates: list[str]
    excluded_groups: list[str] = []
    excluded_groups_keys: list[int] = []
    earlier_keys: list[int] = []


class _Draw(_Form):
    order: list[str]
    sha256: dict[str, str]


class _Metric(_Form):
    kind: str
    step: int


class _Step(_Metric):
    epoch: int
    loss: float


class _Epoch(_Metric):
    epoch: int
    loss: float | None
    chance: float
    knn: float | None
    seconds: float


class _Result(_Form):
    method: str
    labels: int
    draw: int
    fraction: float | None
    seed: int
    n_test: int
    labels_there: int
    accuracy: float
    balanced: bool
    seconds: float
    folds: int = 0
    frozen: bool = True
    series: str = "random"
    suggested: int = 0
    draw_sha256: str
    signature: str


class _Suggested(_Form):
    at: str
    budget: int
    files: list[str]
    as_if_unlabeled: bool


class _Neighbour(_Form):
    name: str
    label: str | None
    thumbnail: str


class _Near(_Neighbour):
    similarity: float


class _Query(_Neighbour):
    neighbours: list[_Near]


class _Neighbours(_Form):
    queries: list[_Query]


class _Pair(_Form):
    names: list[str]
    thumbnails: list[str] = []


class _Derived(_Form):
    signature: str


class _Pairs(_Derived):
    pairs: list[_Pair]


class _Lookalikes(_Pairs):
    tested: int


class _Suspect(_Form):
    name: str
    label: str
    looks_like: str
    has_other_copy: bool
    thumbnail: str = ""


class _LabelCheck(_Derived):
    checked: int
    doubted: int
    copies: int = 0
    suspects: list[_Suspect]


class _Encoder(_Form):
    backbone: Json[str]
    backbone_args: Json[dict[str, Any]]
    stem: Json[str]
    image_size: Json[int]
    mean: Json[list[float]]
    std: Json[list[float]]


class _Gain(_Form):
    mean: float
    low: float | None
    high: float | None


class _OnTest(_Gain):
    before: float
    after: float
    accuracy: float
    by_class: bool
    n_test: int


class _Distilled(_Form):
    images: int
    gain: _Gain | None
    test: _OnTest | None


class _Classifier(_Derived):
    classes: list[str]
    labels: int
    encoder: _Encoder
    method: str = "simclr"
    steps: int
    way: str
    distilled: _Distilled | None = None


class _Annotation(_Form):
    file: str
    key: int
    answer: Literal["label", "unsure", "skip", "undo"]
    label: str | None
    part: str
    who: str
    at: str
    seconds: float | None


class _Classes(_Form):
    classes: list[str]


class _Calibration(_Derived):
    classifier: str
    labels: int
    scored: int
    suggested: int = 0
    folds: int
    temperature: float = Field(gt=0)
    scores: list[float]


class _Mean(_Form):
    mean: float


class _Column(_Form):
    labels: int
    arms: dict[str, _Mean]


class _Gains(_Form):
    gains: list[Any]


class _Reported(_Form):
    method: str
    labels: int
    draw: int


class _Report(_Form):
    results: list[_Reported] = []
    summary: list[_Column]
    over_encoders: _Gains | None = None


class _Images(_Form):
    root: str


class _Study(_Form):
    study: str
    images: _Images
    advice: Any
    trials: int
    missing: int


_FORMS: dict[str, type[_Form]] = {
    "data.json": _Data,
    "environment.json": _Environment,
    "test.json": _TestLock,
    "metrics.jsonl": _Metric,
    "results.jsonl": _Result,
    "annotations.jsonl": _Annotation,
    "classes.json": _Classes,
    "suggested.jsonl": _Suggested,
    "neighbours.json": _Neighbours,
    "near_copies.json": _Pairs,
    "lookalikes.json": _Lookalikes,
    "label_check.json": _LabelCheck,
    "classifier.json": _Classifier,
    "calibration.json": _Calibration,
    "report.json": _Report,
    "study.json": _Study,
}


_METRICS: dict[str, type[_Form]] = {"step": _Step, "epoch": _Epoch}


def check_form(file: str, value: Any) -> None:
    """Check what was read from a file, or one row of it.

    Args:
        file: Its name, without a folder.
        value: JSON.

    Raises:
        ValueError: It is not of the form that a file of this name has; the message says where.
    """
    if not isinstance(value, dict):
        raise ValueError("not a table of names and values")
    form = _Draw if file.startswith("draw-") else _FORMS.get(file)
    if form is _Metric:
        form = _METRICS.get(str(value.get("kind")), form)
    if form is None:
        return
    try:
        form.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
