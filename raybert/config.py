"""Configuration: pydantic models next to the code that they configure, one YAML file, overrides.

Every error is one line that names key, value and remedy; an unknown key, the nearest known one.
"""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

from raybert.errors import ConfigError, one_line, printable
from raybert.yaml_values import parse_yaml, write_yaml


class Settings(BaseModel):
    """A section of the configuration: immutable, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    #: Keys of which one has a value; an override of one replaces another's.
    alternatives: ClassVar[Sequence[str]] = ()


class Range(Settings):
    """The integers from `min` to `max`."""

    min: int
    max: int

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}; lower min or raise max")
        return self


class KeyOf:
    """Annotates a string setting: a key of a registry, also one added later, or one of `others`."""

    def __init__(self, registry: Mapping[str, Any], *others: str) -> None:
        self._registry, self._others = registry, others

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": self._known(), "type": "string"}

    def _known(self) -> list[str]:
        return [*self._others[:1], *self._registry, *self._others[1:]]

    def _check(self, name: Any) -> Any:
        if name not in self._known():
            *others, last = map(repr, self._known())
            known = f"{', '.join(others)} or {last}" if others else last
            raise PydanticCustomError("unknown_name", "Input should be {known}", {"known": known})
        return name


S = TypeVar("S", bound=Settings)
R = TypeVar("R", bound=Range)

#: A positive number or a range. The tag limits errors to the type that was given.
NumberOrRange = Annotated[
    Annotated[int, Field(ge=1), Tag("number")] | Annotated[R, Tag("range")],
    Discriminator(lambda value: "range" if isinstance(value, dict | Range) else "number"),
]

_MAX_HINTS = 8  # suggested keys
_MAX_DEPTH = 8  # of sections; YAML anchors can make a recursive mapping
_SHOWN_CHARS = 200  # of a value in a message


def load(
    root: type[S],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    options: str = "--set",
    adapt: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> S:
    """Read a configuration file, if any, apply `key.path=value` overrides, and validate the result.

    A missing file, a syntax error, an unknown key or an invalid value is a ConfigError, which names
    the file or `options`, the command-line options of the overrides. `adapt` changes the values
    before they are validated.
    """
    source = str(path) if path else "the defaults"
    before, values = read_values(path), read_values(path, overrides)
    _drop_alternatives(root, values, overrides)
    values = adapt(values)
    try:
        return build(root, values, "")
    except ConfigError as error:
        message = str(error)
    try:
        build(root, before, "")
    except ConfigError as error:  # the same error without the overrides comes from the file
        options = source if str(error) == message else options
    raise ConfigError(f"{options}: {message}")


def read_values(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a configuration file, if any, with overrides, not validated yet."""
    values: Any = {}
    if path is not None:
        try:
            content = Path(path).read_bytes()
            # Windows PowerShell writes UTF-16 where output is redirected to a file.
            is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            text = content.decode("utf-16" if is_wide else "utf-8-sig")
        except (OSError, ValueError) as error:
            raise ConfigError(f"--config {path}: {one_line(error)}") from None
        values = parse_yaml(text, str(path)) or {}
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path}: expected `section:` keys at the top, got {type(values).__name__}"
            )
    for override in overrides:
        _override(values, override)
    return dict(values)


def build(root: type[S], values: Mapping[str, Any], source: str) -> S:
    """Validate a mapping as `root`; a ConfigError begins with `source` unless that is empty."""
    try:
        found = root.model_validate(values)
    except ValidationError as error:
        message = _format_error(root, error)
    except UnicodeEncodeError:  # pydantic itself, for a key or a choice
        message = "a text has a lone surrogate such as \\ud800, which no UTF-8 file has; remove it"
    else:
        return found
    raise ConfigError(f"{source}: {message}" if source else message)


def dump(settings: Settings) -> str:
    """Return a configuration as YAML, with all keys in the order of their declaration."""
    return write_yaml(settings.model_dump(mode="json"))


def comment_out(text: str, keys: Iterable[str]) -> str:
    """Turn the lines of keys `section.key` of what `dump` returned into comments."""
    wanted, section, lines = set(keys), "", []
    for line in text.splitlines():
        name = line.split(":")[0]
        section = name if name == name.lstrip() else section
        is_wanted = f"{section}.{name.removeprefix('  ')}" in wanted
        lines.append(f"  # {line.lstrip()}" if is_wanted else line)
    return "\n".join(lines) + "\n"


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of a nested mapping as (dotted key, value)."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys on which two nested mappings differ, as key -> (old, new)."""
    before, after = dict(flatten(old)), dict(flatten(new))
    keys = list(before) + [key for key in after if key not in before]
    return {
        key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    }


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: expected `key=value`, as in --set pretrain.lr=3e-4")
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        if not isinstance(values.get(parent), dict):
            values[parent] = {}
        values = values[parent]
    values[leaf] = parse_yaml(text, f"--set {key}")


def _drop_alternatives(
    root: type[Settings], values: Mapping[str, Any], overrides: Sequence[str]
) -> None:
    """Remove a file's value where an override sets an alternative, minutes for epochs."""
    keys = {override.partition("=")[0].strip() for override in overrides}
    for name, field in root.model_fields.items():
        alternatives = getattr(field.annotation, "alternatives", ())
        section = values.get(name)
        given = [each for each in alternatives if f"{name}.{each}" in keys]
        if isinstance(section, dict) and any(section[each] is not None for each in given):
            for each in set(alternatives) - set(given):
                section.pop(each, None)


def _format_error(root: type[Settings], error: ValidationError) -> str:
    """Format the first error in one line: key, value, cause, remedy."""
    first = error.errors(include_url=False)[0]
    path = _path(root, first["loc"], unknown=first["type"] == "extra_forbidden")
    key = ".".join(path) or "(top level)"
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}; {_hint(root, path, first.get('input'))}"
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "value_error":  # raised by our own validators, which name their keys
        named = _with_section(root, message, path)
        has_key = not path or re.search(rf"(?<![\w.]){re.escape(key)}\b", named)
        return named if has_key else f"{key}: {named}"
    if first["type"] == "missing":
        return f"{key} is missing; add it, or pass --set {key}=VALUE"
    return f"{key}={_shown(first.get('input'))}: {message[0].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def _hint(root: type[BaseModel], path: Sequence[str], value: Any) -> str:
    """Suggest known keys for an unknown one.

    A similar key of the section, else keys of the same name below it or anywhere, else a less
    similar one, else all keys of the section.
    """
    prefix, known = "".join(f"{part}." for part in path[:-1]), _known_keys(root, path[:-1])
    leaf = path[-1]
    for _ in range(_MAX_DEPTH):  # in an unknown section, use the first key that was set
        if not isinstance(value, Mapping) or not value:
            break
        leaf, value = next(iter(value.items()))
    name = str(leaf).replace("-", "_")
    same = [key for key in _all_keys(root) if key.rpartition(".")[2] == name]
    likely = (
        _nearest(prefix, path[-1], known, 0.8)
        or [key for key in same if prefix and key.startswith(prefix)]
        or same
        or _nearest(prefix, path[-1], known, 0.5)
    )
    if 0 < len(likely) <= _MAX_HINTS:
        return f"did you mean {' or '.join(likely)}?"
    return f"known keys{' of ' + prefix[:-1] if prefix else ''}: {', '.join(known)}"


def _nearest(prefix: str, key: str, known: Sequence[str], cutoff: float) -> list[str]:
    return [prefix + near for near in difflib.get_close_matches(key, known, n=1, cutoff=cutoff)]


def _path(root: type[BaseModel], loc: Sequence[int | str], *, unknown: bool) -> list[str]:
    """Return the user's keys of an error's location, without the names of union members."""
    path: list[str] = []
    for at, part in enumerate(loc):
        is_unknown_key = unknown and at == len(loc) - 1
        if is_unknown_key or isinstance(part, int) or part in _known_keys(root, path):
            path.append(printable(str(part), _SHOWN_CHARS))
    return path


def _with_section(root: type[BaseModel], message: str, path: Sequence[str]) -> str:
    """Prefix the section to keys that its validator names as `key=value`."""
    known = "|".join(map(re.escape, _known_keys(root, path)))
    if not path or not known:
        return message
    return re.sub(rf"(?<![\w.])(?:{known})(?==)", rf"{'.'.join(path)}.\g<0>", message)


def _known_keys(root: type[BaseModel], path: Sequence[str]) -> list[str]:
    model: Any = root
    for part in path:
        field = model.model_fields.get(part)
        candidates = _models_in(field.annotation) if field else []
        if not candidates:
            return []
        model = candidates[0]
    return list(model.model_fields)


def _all_keys(root: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a configuration."""
    for name, field in root.model_fields.items():
        yield prefix + name
        for model in _models_in(field.annotation)[:1]:
            yield from _all_keys(model, f"{prefix}{name}.")


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in getattr(annotation, "__args__", ()) for m in _models_in(arg)]
