"""Settings as command-line options: a field's name, help, panel and default, said once in `config`."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from labelwise.config import SHOWN, Settings
from labelwise.errors import UsageError


def parameters(
    settings: type[Settings], arguments: tuple[str, ...] = (), skip: tuple[str, ...] = ()
) -> list[inspect.Parameter]:
    """Make a Typer parameter of every field.

    Args:
        settings: Where the fields are.
        arguments: Fields that are given by place, not by option.
        skip: Fields that the command gets in its own way.

    Returns:
        Keyword parameters whose default is None, "not given", except for arguments.
    """
    result = []
    for name, field in settings.model_fields.items():
        if name in skip:
            continue
        kind: Any = _typed(field)
        annotation: Any
        if name in arguments:
            annotation = Annotated[kind, typer.Argument(help=field.description, show_default=False)]
            result.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation))
            continue
        option = typer.Option(
            f"--{name.replace('_', '-')}",
            help=_help(field),
            rich_help_panel=_panel(field),
            show_default=False,
            metavar=_metavar(field),
        )
        annotation = Annotated[kind | None, option]
        result.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    return result


def with_parameters(command: Callable[..., Any], extra: list[inspect.Parameter]) -> Callable[..., Any]:
    """Give a command the parameters of some settings, in place of its `**given`."""
    own = [
        parameter
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    kept = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    required = [parameter for parameter in [*extra, *kept] if parameter.default is inspect.Parameter.empty]
    others = [parameter for parameter in [*extra, *kept] if parameter.default is not inspect.Parameter.empty]
    command.__signature__ = inspect.Signature([*required, *others])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*required, *others]}
    return command


def parse(settings: type[Settings], given: dict[str, Any]) -> dict[str, Any]:
    """Turn texts of the command line into values: `0.01,0.1` a tuple, `{"a": 1}` a table.

    Raises:
        UsageError: A text cannot be read.
    """
    return {
        name: _value(name, settings.model_fields[name], value)
        for name, value in given.items()
        if value is not None
    }


def _value(name: str, field: FieldInfo, value: Any) -> Any:
    option = f"--{name.replace('_', '-')}"
    if not isinstance(value, str):
        return value
    if _is(field, dict):
        try:
            table = json.loads(value, parse_constant=_refuse)
        except json.JSONDecodeError as error:
            raise UsageError(f"{option} {value[:SHOWN]}: not JSON ({error}).") from None
        except (ValueError, RecursionError):
            raise UsageError(
                f"{option} {value[:SHOWN]}: nested too deep, or holds a number that is none."
            ) from None
        return table
    if _is(field, tuple):
        return tuple(_number(part.strip()) for part in value.split(","))
    return value


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _typed(field: FieldInfo) -> Any:
    """Type Typer sees: what it cannot express comes as text and is checked by the settings."""
    if get_origin(field.annotation) is Literal:
        return int if all(isinstance(choice, int) for choice in get_args(field.annotation)) else str
    kinds = [kind for kind in _members(field) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (bool, int, float, Path) else str


def _members(field: FieldInfo) -> list[Any]:
    """The types a field may have, bare: `Annotated[float, ...] | None` gives float and None."""
    is_union = get_origin(field.annotation) in (Union, UnionType)
    members = get_args(field.annotation) if is_union else (field.annotation,)
    bare = [get_args(member)[0] if get_origin(member) is Annotated else member for member in members]
    return [get_origin(member) or member for member in bare]


def _is(field: FieldInfo, kind: type) -> bool:
    return kind in _members(field)


def _help(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    words = field.description or ""
    if default is None or default == {} or "default" in words:
        return words
    values = default if isinstance(default, tuple) else (default,)
    shown = ",".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in values)
    return f"{words} (default {shown})"


def _metavar(field: FieldInfo) -> str | None:
    if get_origin(field.annotation) is Literal:
        return "|".join(map(str, get_args(field.annotation)))
    if _is(field, tuple):
        return "A,B"
    return "JSON" if _is(field, dict) else None


def _panel(field: FieldInfo) -> str | None:
    extra = field.json_schema_extra
    return str(extra["panel"]) if isinstance(extra, dict) and "panel" in extra else None
