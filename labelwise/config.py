"""Every setting, declared once: the field's name is the Python keyword, the TOML key and the option.

Order of precedence: default < recipe < option. A recipe is a TOML file with one table per command;
each command reads its own. `config.toml` of a run is itself a recipe.
"""

import difflib
import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from labelwise.errors import CheckpointError, UsageError
from labelwise.rundir import is_utf8

MOST_DRAWS = 100
SHOWN = 200  # letters of a value that cannot be used
SMALLEST_POOL = 32  # images; SimCLR contrasts each with the others of its batch
METHODS = ("simclr_probe", "simclr", "supervised", "random_probe", "pixels")
_FEATURES = ("encoder", "network", "random")  # what the run's own features are called
ALTERNATIVES = ("imagenet", "imagenet_probe", "dinov2_probe")  # weights that timm fetches


class Settings(BaseModel):
    """What one command needs to know. Never changes after birth."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    table: ClassVar[str]
    _of_recipe: frozenset[str] = PrivateAttr(frozenset())

    def __eq__(self, other: object) -> bool:
        """Settings are their values, wherever those came from."""
        return type(other) is type(self) and dict(self) == dict(other)

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def given(self) -> set[str]:
        """Names of the fields that were given as options or in Python, not by a recipe."""
        return self.model_fields_set - self._of_recipe

    @classmethod
    def resolve(cls, given: dict[str, Any], recipe: dict[str, Any] | None = None) -> Self:
        """Merge defaults, a recipe's table and the options that were given, and check the result.

        Raises:
            UsageError: A key is unknown or a value is out of range; the message names it.
        """
        own = {key: value for key, value in given.items() if value is not None}
        try:
            made = cls.model_validate({**(recipe or {}), **own})
        except ValidationError as error:
            raise UsageError(_in_words(error, cls)) from None
        for name, value in made:
            if isinstance(value, Path) and "\0" in str(value):
                raise UsageError(f"{name} = {str(value)!r}: no path holds a NUL.")
            if isinstance(value, Path) and not is_utf8(str(value)):
                raise UsageError(
                    f"{name} = {value}: a name that is not UTF-8; rename it, or set LC_ALL=C.UTF-8 if it is."
                )
        made._of_recipe = frozenset(recipe or {}) - own.keys()
        return made


Unit = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


def _is_ascending(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError("the first number must not be above the second")
    return values


def _is_method(name: str) -> str:
    if name not in (*METHODS, *ALTERNATIVES) and not name.endswith(".toml"):
        known = ", ".join((*METHODS, *ALTERNATIVES))
        raise ValueError(f"'{name}' is no method; known: {known}, or a .toml file of your own weights")
    return name


Method = Annotated[str, AfterValidator(_is_method)]

_LONGEST_SECONDS = 366 * 24 * 3600.0


def parse_duration(text: str) -> float:
    """Read `90s`, `30m`, `2h` or `1h30m` as seconds.

    Raises:
        ValueError: It is none of these.
    """
    parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip())
    if not text.strip() or parts is None:
        raise ValueError("write it like 90s, 30m, 2h or 1h30m")
    hours, minutes, seconds = (float(part or 0) for part in parts.groups())
    total = hours * 3600 + minutes * 60 + seconds
    if total > _LONGEST_SECONDS:
        raise ValueError("longer than a year")
    return total


def _is_duration(text: str) -> str:
    parse_duration(text)
    return text


def _is_count_or_all(text: str) -> str:
    if text != "all" and not (text.isdecimal() and int(text) >= 1):
        raise ValueError("give a number, or all")
    return text


ShareRange = Annotated[tuple[Share, Share], AfterValidator(_is_ascending)]
RatioRange = Annotated[tuple[Ratio, Ratio], AfterValidator(_is_ascending)]
Duration = Annotated[str, AfterValidator(_is_duration)]
Devices = Annotated[str, AfterValidator(_is_count_or_all)]


_DEEPEST = 8


def _is_shallow(value: Any, left: int = _DEEPEST) -> Any:
    """What TOML, JSON and Python can all write down."""
    if not left:
        raise ValueError(f"nested deeper than {_DEEPEST}")
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for part in parts:
        _is_shallow(part, left - 1)
    return value


BackboneArguments = Annotated[dict[str, Any], AfterValidator(_is_shallow)]


class PretrainSettings(Settings):
    """Train an encoder on unlabeled images with SimCLR."""

    table: ClassVar[str] = "pretrain"

    images: Path = Field(
        description="folder of images, searched recursively, or hf://NAME of the Hugging Face hub",
        json_schema_extra={"panel": "Data"},
    )
    out: Path | None = Field(
        None, description="run folder; default runs/<folder name>", json_schema_extra={"panel": "Data"}
    )
    stream: bool = Field(
        False,
        description="read shards (.parquet, .tar) anew in each pass and keep a sample only; their place may be an address",
        json_schema_extra={"panel": "Data"},
    )
    shuffle_buffer: int = Field(
        10_000,
        ge=1,
        description="stream: images that are shuffled among each other",
        json_schema_extra={"panel": "Data"},
    )
    keep_decoded: bool = Field(
        False,
        description="stream: keep its images decoded on this disk; each process keeps those that it reads",
        json_schema_extra={"panel": "Data"},
    )
    labels: Path | None = Field(
        None,
        description="label file (CSV, TSV, JSONL) or folder of class folders",
        json_schema_extra={"panel": "Data"},
    )
    labels_root: Path | None = Field(
        None, description="folder the label file's paths start from", json_schema_extra={"panel": "Data"}
    )
    group_column: str | None = Field(
        None,
        description="column of the label file whose images stay on one side of the split: patient, site, video",
        json_schema_extra={"panel": "Data"},
    )
    test: Path | None = Field(
        None, description="folder of test images (class folders)", json_schema_extra={"panel": "Data"}
    )
    holdout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share held out as test images when none are given; default 0.2; 0: the labels are tested in turn",
        json_schema_extra={"panel": "Data"},
    )

    holdout_seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="seed of that draw; the images held out do not depend on --seed",
        json_schema_extra={"panel": "Data"},
    )

    backbone: str = Field("resnet18", description="any timm model", json_schema_extra={"panel": "Model"})
    backbone_args: BackboneArguments = Field(
        default_factory=dict,
        description="arguments passed to timm, as JSON",
        json_schema_extra={"panel": "Model"},
    )
    stem: Literal["auto", "small", "half", "stock"] = Field(
        "auto",
        description="small: no stride, no pooling (images below 96 px); half: no pooling",
        json_schema_extra={"panel": "Model"},
    )
    init: str | None = Field(
        None,
        description="'pretrained' (timm weights) or a run folder to go on from",
        json_schema_extra={"panel": "Model"},
    )
    head: Literal["none", "linear", "nonlinear"] = Field(
        "nonlinear", description="projection head", json_schema_extra={"panel": "Model"}
    )
    head_layers: Literal[2, 3] = Field(
        2, description="layers of a nonlinear head", json_schema_extra={"panel": "Model"}
    )
    head_width: int | None = Field(
        None,
        ge=1,
        description="hidden width; default the encoder's feature width",
        json_schema_extra={"panel": "Model"},
    )
    projection_width: int = Field(
        128, ge=1, description="output width of the head", json_schema_extra={"panel": "Model"}
    )

    image_size: int | None = Field(
        None,
        ge=8,
        le=1024,
        description="side of a view in pixels; default from the images",
        json_schema_extra={"panel": "Views"},
    )
    cache_side: int | None = Field(
        None,
        ge=8,
        le=2048,
        description="side of the cached squares; default 1.25 x image size",
        json_schema_extra={"panel": "Views"},
    )
    crop_scale: ShareRange = Field(
        (0.08, 1.0), description="area range of the random crop", json_schema_extra={"panel": "Views"}
    )
    crop_ratio: RatioRange = Field(
        (3 / 4, 4 / 3), description="aspect range of the random crop", json_schema_extra={"panel": "Views"}
    )
    flip: Unit = Field(0.5, description="chance of a horizontal flip", json_schema_extra={"panel": "Views"})
    color_strength: float = Field(
        1.0,
        ge=0,
        le=2,
        description="strength s of the colour distortion",
        json_schema_extra={"panel": "Views"},
    )
    color: Unit = Field(0.8, description="chance of colour jitter", json_schema_extra={"panel": "Views"})
    grayscale: Unit = Field(
        0.2, description="chance of dropping colour", json_schema_extra={"panel": "Views"}
    )
    blur: Unit | None = Field(
        None,
        description="chance of Gaussian blur; default 0.5, or 0 at 64 px and below",
        json_schema_extra={"panel": "Views"},
    )
    rotation: float = Field(
        0.0,
        ge=0,
        le=180,
        description="largest rotation, degrees either way",
        json_schema_extra={"panel": "Views"},
    )
    shear: float = Field(
        0.0,
        ge=0,
        le=45,
        description="largest shear, degrees either way",
        json_schema_extra={"panel": "Views"},
    )
    intensity: Unit = Field(
        0.0,
        description="largest change of intensity: scale 1 +/- x, shift +/- x/2",
        json_schema_extra={"panel": "Views"},
    )

    initial_scale: float = Field(
        1.0,
        ge=0.25,
        le=1,
        description="side of the views in the first 60 % of the epochs, as a share of the image size; 1: all alike",
        json_schema_extra={"panel": "Views"},
    )

    epochs: int = Field(
        100, ge=1, description="passes over the images", json_schema_extra={"panel": "Training"}
    )
    batch_size: int = Field(
        256, ge=2, description="images per step (2 views each)", json_schema_extra={"panel": "Training"}
    )
    micro_batch_size: int | None = Field(
        None,
        ge=2,
        description="images per pass of a batch too large for memory, same gradient; default what fits",
        json_schema_extra={"panel": "Training"},
    )
    loss: Literal["nt_xent", "dcl"] = Field(
        "nt_xent",
        description="dcl: decoupled, without the pair itself in the denominator",
        json_schema_extra={"panel": "Training"},
    )
    temperature: float = Field(
        0.2, gt=0, description="temperature of NT-Xent", json_schema_extra={"panel": "Training"}
    )
    similarity: Literal["cosine", "dot"] = Field(
        "cosine",
        description="of projections; dot: not normalised, for temperatures of 10 and more",
        json_schema_extra={"panel": "Training"},
    )
    optimizer: Literal["lars", "sgd", "adamw"] = Field(
        "adamw", description="lars is for batches of 1,024 and more", json_schema_extra={"panel": "Training"}
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="rate at batch 256; default per optimizer",
        json_schema_extra={"panel": "Training"},
    )
    rate_scaling: Literal["sqrt", "linear", "none"] = Field(
        "sqrt", description="how the rate grows with the batch", json_schema_extra={"panel": "Training"}
    )
    weight_decay: float | None = Field(
        None, ge=0, description="default per optimizer", json_schema_extra={"panel": "Training"}
    )
    warmup_epochs: float | None = Field(
        None,
        ge=0,
        description="default a tenth of the epochs, at most 10",
        json_schema_extra={"panel": "Training"},
    )
    time_limit: Duration | None = Field(
        None,
        description="for example 30m or 2h: choose the epochs that fit",
        json_schema_extra={"panel": "Training"},
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="auto times both and keeps the faster that agrees",
        json_schema_extra={"panel": "Training"},
    )
    device: str = Field("auto", description="auto, cpu, cuda or mps", json_schema_extra={"panel": "Training"})
    devices: Devices = Field(
        "1",
        description="GPUs of this machine to train on together, or all; with --device cpu processes",
        json_schema_extra={"panel": "Training"},
    )
    rank_timeout: Duration = Field(
        "10m",
        description="with several devices or machines: a process that does not answer for so long is given up",
        json_schema_extra={"panel": "Training"},
    )
    tracker: Literal["none", "tensorboard"] = Field(
        "none",
        description="tensorboard: the numbers of metrics.jsonl for TensorBoard too, in RUN/tensorboard",
        json_schema_extra={"panel": "Training"},
    )
    deterministic: bool = Field(
        False,
        description="off by default: the same bits on a GPU too however often it is interrupted; slower (a CPU always gives them)",
        json_schema_extra={"panel": "Training"},
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="seed of every other random draw",
        json_schema_extra={"panel": "Training"},
    )


class FinetuneSettings(Settings):
    """Train classifiers on few labels, from the run's encoder and from scratch, and compare them."""

    table: ClassVar[str] = "finetune"

    run: Path = Field(Path("runs/latest"), description="run folder", json_schema_extra={"panel": "Data"})
    fraction: tuple[Share, ...] | None = Field(
        None,
        description="share of the non-test images to use as labels, e.g. 0.01,0.1",
        json_schema_extra={"panel": "Data"},
    )
    label_counts: tuple[Count | Literal["all"], ...] | None = Field(
        None, description="numbers of labels, e.g. 25,50,all", json_schema_extra={"panel": "Data"}
    )
    draws: int = Field(
        5,
        ge=1,
        le=MOST_DRAWS,
        description="random label draws per number of labels",
        json_schema_extra={"panel": "Data"},
    )
    labels: Path | None = Field(
        None, description="label file or folder of class folders", json_schema_extra={"panel": "Data"}
    )
    labels_root: Path | None = Field(
        None, description="folder the label file's paths start from", json_schema_extra={"panel": "Data"}
    )
    group_column: str | None = Field(
        None,
        description="column of the label file whose images stay on one side of the split: patient, site, video",
        json_schema_extra={"panel": "Data"},
    )
    test: Path | None = Field(
        None, description="labels arrived later: folder of test images", json_schema_extra={"panel": "Data"}
    )
    methods: tuple[Method, ...] = Field(
        METHODS,
        description=f"which methods to compare; {', '.join(ALTERNATIVES)} fetch weights; a .toml file names your own",
        json_schema_extra={"panel": "Training"},
    )
    batch_size: int = Field(64, ge=2, description="images per step", json_schema_extra={"panel": "Training"})
    crop_scale: ShareRange = Field(
        (0.25, 1.0),
        description="area range of the random crop in training",
        json_schema_extra={"panel": "Training"},
    )
    steps: int | None = Field(
        None,
        ge=1,
        description="steps of simclr; default from the labels",
        json_schema_extra={"panel": "Training"},
    )
    scratch_rate: float = Field(
        3e-3,
        gt=0,
        description="learning rate of supervised, AdamW; a third of it is tried too",
        json_schema_extra={"panel": "Training"},
    )
    scratch_steps: int | None = Field(
        None,
        ge=1,
        description="steps of supervised; default four times as many",
        json_schema_extra={"panel": "Training"},
    )
    pretrain_seeds: int = Field(
        1,
        ge=1,
        le=20,
        description="encoders to compare, the others pretrained beside the run; 3 give the gain an interval over them too",
        json_schema_extra={"panel": "Training"},
    )
    time_limit: Duration | None = Field(
        None,
        description="for example 30m or 2h: compare what fits; the same command goes on",
        json_schema_extra={"panel": "Training"},
    )
    device: str = Field("auto", description="auto, cpu, cuda or mps", json_schema_extra={"panel": "Training"})
    devices: Devices = Field(
        "1",
        description="GPUs of this machine to deal trainings out to, or all; with --device cpu processes",
        json_schema_extra={"panel": "Training"},
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="seed of every random draw", json_schema_extra={"panel": "Training"}
    )


Augmentation = Literal["crop", "cutout", "color", "sobel", "noise", "blur", "rotate"]  # SimCLR, Fig. 5


def _in_the_papers_order(names: tuple[Augmentation, ...]) -> tuple[Augmentation, ...]:
    return tuple(name for name in get_args(Augmentation) if name in names)


class StudySettings(Settings):
    """Try a finding of the paper on the user's own images, by many short trainings."""

    table: ClassVar[str] = "study"

    name: Literal["augmentations", "color", "head", "readout", "batch"] = Field(description="which finding")
    images: Path = Field(
        description="folder of images, searched recursively", json_schema_extra={"panel": "Data"}
    )
    out: Path | None = Field(
        None,
        description="folder to write; default runs/study-<name>-<folder name>",
        json_schema_extra={"panel": "Data"},
    )
    labels: Path | None = Field(
        None,
        description="label file (CSV, TSV, JSONL) or folder of class folders",
        json_schema_extra={"panel": "Data"},
    )
    labels_root: Path | None = Field(
        None, description="folder the label file's paths start from", json_schema_extra={"panel": "Data"}
    )
    group_column: str | None = Field(
        None,
        description="column of the label file whose images stay on one side of a fold: patient, site, video",
        json_schema_extra={"panel": "Data"},
    )
    most_images: int = Field(
        10_000,
        ge=100,
        description="images a trial trains on, at most",
        json_schema_extra={"panel": "Training"},
    )
    epochs: int = Field(
        20, ge=1, description="epochs of the usual trial, at most", json_schema_extra={"panel": "Training"}
    )
    seeds: int = Field(
        3,
        ge=1,
        le=20,
        description="times each trial is run; fewer than three claim nothing",
        json_schema_extra={"panel": "Training"},
    )
    symmetric: bool = Field(
        False,
        description="augmentations: in both branches, not in one as the paper does",
        json_schema_extra={"panel": "Training"},
    )
    pairs: Annotated[tuple[Augmentation, ...], AfterValidator(_in_the_papers_order)] | None = Field(
        None,
        description="augmentations: pairs of these and nothing else, e.g. crop,color; default all seven",
        json_schema_extra={"panel": "Training"},
    )
    temperature: bool = Field(
        False,
        description="batch: temperature and normalisation of the loss too",
        json_schema_extra={"panel": "Training"},
    )
    time_limit: Duration = Field(
        "1h",
        description="images, epochs and seeds are chosen to fit; the same command goes on",
        json_schema_extra={"panel": "Training"},
    )
    device: str = Field("auto", description="auto, cpu, cuda or mps", json_schema_extra={"panel": "Training"})
    devices: Devices = Field(
        "1",
        description="GPUs of this machine to deal trials out to, or all; with --device cpu processes",
        json_schema_extra={"panel": "Training"},
    )


class OwnWeights(BaseModel):
    """Weights of the user's own, to be compared: frozen with a linear probe, or fine-tuned whole."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    backbone: str
    weights: Path
    backbone_args: BackboneArguments = {}
    finetune: bool = False
    image_size: int | None = Field(None, ge=8, le=1024)
    mean: tuple[float, float, float] | None = None
    std: tuple[Ratio, Ratio, Ratio] | None = None


def read_own_weights(path: Path) -> dict[str, OwnWeights]:
    """Read a file with one table for each network, `[NAME]`; its paths start from its folder.

    Raises:
        UsageError: The file cannot be read, or a table is not understood; the message names it.
    """
    found = {}
    tables = _read_toml(path, "no such file of weights")
    if not tables:
        raise UsageError(f"{path}: names no weights; docs/protocol.md shows how.")
    for name, table in tables.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in (*METHODS, *ALTERNATIVES, *_FEATURES):
            raise UsageError(
                f"{path}: [{name}]: choose a name of small letters, digits and _ that no method has."
            )
        try:
            own = OwnWeights.model_validate(table)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, (name, *problem["loc"])))
            raise UsageError(f"{path}: {place}: {problem['msg']}") from None
        if "\0" in str(own.weights):
            raise UsageError(f"{path}: {name}.weights: no path holds a NUL.")
        found[name] = own.model_copy(update={"weights": path.parent / own.weights})
    return found


def read_recipe(path: Path, settings: type[Settings]) -> dict[str, Any]:
    """Read one command's table from a recipe.

    Raises:
        UsageError: The file is missing, is not TOML, or has a table no command reads.
    """
    tables = _read_toml(path, "no such recipe; `labelwise recipes` lists those that ship")
    known = [PretrainSettings.table, FinetuneSettings.table, StudySettings.table]
    for name in tables:
        if name not in known:
            raise UsageError(f"{path}: no command reads the table [{name}]{_did_you_mean(name, known)}")
    table = tables.get(settings.table, {})
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {settings.table} must be one table, [{settings.table}].")
    for key in table:
        if key not in settings.model_fields:
            raise UsageError(
                f"{path}: [{settings.table}] has no setting '{key}'{_did_you_mean(key, list(settings.model_fields))}"
            )
    return table


def _read_toml(path: Path, missing: str) -> dict[str, Any]:
    try:
        return _parse_toml(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: {missing}.") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise UsageError(f"{path}: not a TOML file ({error}).") from None


def _parse_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; ValueError where it is none, or none that a person wrote."""
    text = path.read_text(encoding="utf-8")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError:  # Python's words on digits
        raise ValueError("a number of too many digits") from None


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}."


def _in_words(error: ValidationError, settings: type[Settings]) -> str:
    lines = []
    for problem in error.errors():
        key = str(problem["loc"][0]) if problem["loc"] else settings.table
        if problem["type"] == "extra_forbidden":
            lines.append(
                f"{settings.table} has no setting '{key}'{_did_you_mean(key, list(settings.model_fields))}"
            )
        else:
            words = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{key} = {repr(problem['input'])[:SHOWN]}: {words[0].lower()}{words[1:]}.")
    return "\n".join(dict.fromkeys(lines))


def to_toml(tables: dict[str, dict[str, Any]]) -> str:
    """Write flat tables as TOML; a JSON scalar or list of scalars is one in TOML too."""
    lines: list[str] = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {_toml_value(value)}" for key, value in table.items()), ""]
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        items = (
            f"{_toml_value(key)} = {_toml_value(item)}" for key, item in value.items() if item is not None
        )
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_run_config(path: Path, of: type[Settings] | None = None) -> dict[str, Any]:
    """Read the table of a run's own config.toml: of pretraining, or of these settings, empty if not there yet.

    Raises:
        CheckpointError: It is damaged.
    """
    settings = of or PretrainSettings
    try:
        tables = _parse_toml(path)
        table = tables["pretrain"] if of is None else tables.get(of.table, {})
        if not isinstance(table, dict):
            raise ValueError(f"{settings.table} is no table")
    except (OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); put it back from a copy.") from None
    return table
