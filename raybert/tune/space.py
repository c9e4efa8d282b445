"""The search space: a range or choices for each dotted key, and conditions between keys.

    finetune.lr: {log_uniform: [1e-4, 3e-3]}
    finetune.epochs: {integer: [1, 4]}
    finetune.adversarial: {choice: [0, 1]}
    finetune.adversarial_size: {log_uniform: [0.01, 0.1], when: {finetune.adversarial: 1}}

A key whose condition does not hold is inactive: it keeps its configured value. `walk` visits the
active keys, each after the keys of its conditions; random draws, grids and Optuna all use it.
"""

from __future__ import annotations

import difflib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raybert.errors import ConfigError

KINDS = ("uniform", "log_uniform", "integer", "log_integer", "choice")
_SECTION = "tune.space"
_GRID_POINTS = 3  # the default of `points`

Values = dict[str, Any]  # by dotted keys


@dataclass(frozen=True)
class Dimension:
    """The values that a key may have."""

    key: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # key, allowed values
    points: int = _GRID_POINTS  # of a range, in a grid

    @property
    def is_log(self) -> bool:
        """Whether the scale is logarithmic."""
        return self.kind.startswith("log")

    @property
    def is_integer(self) -> bool:
        """Whether values are whole numbers."""
        return self.kind.endswith("integer")

    @property
    def ends(self) -> list[Any]:
        """Both ends of the range, or every choice."""
        if self.kind == "choice":
            return list(self.choices)
        return [self.at(0.0), self.at(1.0)]

    def at(self, fraction: float) -> Any:
        """The value at a fraction of the range, 0 to 1."""
        if self.kind == "choice":
            return self.choices[min(int(fraction * len(self.choices)), len(self.choices) - 1)]
        if self.is_integer:  # each integer gets an equal part of the range
            low, high = self.low - 0.5, self.high + 0.5
            value = _interpolate(low, high, fraction, self.is_log)
            return int(min(max(round(value), self.low), self.high))
        value = _interpolate(self.low, self.high, fraction, self.is_log)
        return min(max(value, self.low), self.high)

    def grid(self) -> list[Any]:
        """The points of a grid, both ends included."""
        if self.kind == "choice":
            return list(self.choices)
        if self.points == 1:
            return [self.at(0.5)]
        fractions = [i / (self.points - 1) for i in range(self.points)]
        return list(dict.fromkeys(self.at(fraction) for fraction in fractions))

    def contains(self, value: Any) -> bool:
        """Whether a value is in the range or among the choices."""
        if self.kind == "choice":
            return value in self.choices
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or (self.is_integer and value != int(value)):
            return False
        return bool(self.low <= value <= self.high)

    def clip(self, value: Any) -> Any:
        """The nearest valid value; the first choice for an invalid one."""
        if self.kind == "choice":
            return value if value in self.choices else self.choices[0]
        inside = min(max(value, self.low), self.high)
        return round(inside) if self.is_integer else inside

    def is_active(self, values: Mapping[str, Any]) -> bool:
        """Whether its conditions hold."""
        return all(values.get(key) in options for key, options in self.when)


class Space:
    """All dimensions, each after the keys of its conditions."""

    def __init__(self, dimensions: Sequence[Dimension]) -> None:
        left = list(dimensions)
        known = {dimension.key for dimension in left}
        self.dimensions: list[Dimension] = []
        while left:
            placed = {d.key for d in self.dimensions}
            ready = [d for d in left if {key for key, _ in d.when} <= placed]
            if not ready:
                _raise_for_conditions(left, known)
            self.dimensions += ready
            left = [d for d in left if d not in ready]

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Space:
        """Parse the space of a configuration; a ConfigError names an invalid key or range."""
        return cls([_dimension(key, value) for key, value in _leaves(raw)])

    def __len__(self) -> int:
        return len(self.dimensions)

    def walk(self, pick: Callable[[Dimension], Any]) -> Values:
        """Choose the value of every active key with `pick`."""
        values: Values = {}
        for dimension in self.dimensions:
            if dimension.is_active(values):
                values[dimension.key] = pick(dimension)
        return values

    def draw(self, draws: random.Random) -> Values:
        """Draw values at random."""
        return self.walk(lambda dimension: dimension.at(draws.random()))

    def grid(self) -> list[Values]:
        """Every combination of the dimensions' points, without the inactive keys."""
        found: dict[str, Values] = {}
        for chosen in itertools.product(*(d.grid() for d in self.dimensions)):
            by_key = dict(zip((d.key for d in self.dimensions), chosen, strict=True))
            values = self.walk(lambda d, by_key=by_key: by_key[d.key])  # type: ignore[misc]
            found.setdefault(repr(values), values)
        return list(found.values())

    def clip(self, values: Mapping[str, Any]) -> Values:
        """Clip values to the space; other keys are kept."""
        inside = {d.key: d.clip(values[d.key]) for d in self.dimensions if d.key in values}
        return {**values, **inside}

    def of(self, settings: Mapping[str, Any]) -> Values:
        """The values of the active keys in settings by dotted keys."""
        return self.walk(lambda dimension: settings.get(dimension.key))

    def contains(self, values: Mapping[str, Any]) -> bool:
        """Whether these values could have been drawn."""
        by_key = {d.key: d for d in self.dimensions}
        active = self.of(values)
        return active.keys() == values.keys() and all(
            by_key[key].contains(value) for key, value in values.items()
        )


def _interpolate(low: float, high: float, fraction: float, is_log: bool) -> float:
    if is_log:
        return math.exp(math.log(low) + fraction * (math.log(high) - math.log(low)))
    return low + fraction * (high - low)


def _leaves(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each dotted key with its range; `--set tune.space.finetune.lr=...` nests the keys."""
    for name, value in raw.items():
        key = f"{prefix}{name}"
        if value is None:  # removed with --set
            continue
        nested = isinstance(value, Mapping) and value and not {*KINDS, "when"} & set(value)
        if nested and all(isinstance(inner, Mapping | None) for inner in value.values()):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _dimension(key: str, value: Any) -> Dimension:
    where = f"{_SECTION}: {key}"
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{where}: {value!r} is one value; give a range or choices, as in "
            "{log_uniform: [1.0e-5, 1.0e-3]}"
        )
    unknown = [name for name in value if name not in (*KINDS, "when", "points")]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), KINDS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(KINDS)}, when, points"
        raise ConfigError(f"{where}: unknown kind {unknown[0]}; {hint}")
    given = [kind for kind in KINDS if kind in value]
    if len(given) != 1:
        raise ConfigError(f"{where}: give exactly one of {', '.join(KINDS)}")
    [kind] = given
    when = _conditions(where, value.get("when") or {})
    if kind == "choice":
        choices = value[kind]
        if not isinstance(choices, list) or not choices:
            raise ConfigError(f"{where}: choice={choices!r} is empty; list the values to try")
        return Dimension(key, kind, choices=tuple(choices), when=when)
    points = value.get("points", _GRID_POINTS)
    if not isinstance(points, int) or points < 1:
        raise ConfigError(f"{where}: points={points!r}: give a whole number from 1 up")
    low, high = _range(where, kind, value[kind])
    return Dimension(key, kind, low, high, when=when, points=points)


def _range(where: str, kind: str, value: Any) -> tuple[float, float]:
    is_pair = isinstance(value, list) and len(value) == 2
    numbers = is_pair and all(
        isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end)
        for end in value
    )
    if not numbers:
        raise ConfigError(
            f"{where}: {kind}={value!r}: give two numbers, the lowest and the highest"
        )
    low, high = value
    if low >= high:
        raise ConfigError(
            f"{where}: {kind}={value} is empty; the first number must be less than the second"
        )
    if kind.startswith("log") and low <= 0:
        raise ConfigError(f"{where}: {kind}={value}: a logarithmic range needs numbers above 0")
    if kind.endswith("integer") and (low != int(low) or high != int(high)):
        raise ConfigError(f"{where}: {kind}={value}: give whole numbers, or use uniform")
    return low, high


def _conditions(where: str, given: Any) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: when={given!r}: give other keys and their values")
    return tuple(
        (str(key), tuple(options) if isinstance(options, list) else (options,))
        for key, options in given.items()
    )


def _raise_for_conditions(left: Sequence[Dimension], known: set[str]) -> None:
    for dimension in left:
        for key, _ in dimension.when:
            if key not in known:
                raise ConfigError(
                    f"{_SECTION}: {dimension.key}: its condition names {key}, which is not "
                    "searched; add that key to the space, or leave the condition out"
                )
    keys = ", ".join(dimension.key for dimension in left)
    raise ConfigError(f"{_SECTION}: the conditions of {keys} are circular; leave one out")
