"""Sections of a configuration: dataclasses whose fields say which values are allowed, and refuse others by name.

One convention holds for all keys: 0 means off or none, -1 means all, and None is never needed.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar, cast

import numpy as np

MOST = 2**31 - 1  # of an integer, unless a field says less: what 32 bits hold
_LARGEST, _SMALLEST = (float(value) for value in (np.finfo(np.float32).max, np.finfo(np.float32).tiny))
_WHOLE_RUN = "task", "total_steps", "batch_size", "seed"  # keys that are in no section
_SHOWN = 60  # characters of a value in a message


@dataclasses.dataclass(frozen=True)
class Integer:
    """Kind of integers from `least` to `most`, with -1 for all if it is `or_all`. `hint` says what else there is."""

    least: int = 0
    most: int = MOST
    or_all: bool = False
    hint: str = ""

    def __str__(self) -> str:
        upper = "or more" if self.most == MOST else f"to {self.most}"
        return f"an integer, {self.least} {upper}{', or -1 for all' if self.or_all else ''}{self.hint}"

    def read(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError
        number = int(value)
        if not self.least <= number <= self.most and (number != -1 or not self.or_all):
            raise ValueError
        return number


@dataclasses.dataclass(frozen=True)
class Number:
    """Kind of numbers that float32 holds, from `least` to `most`; an open bound is not allowed itself."""

    least: float = 0.0
    most: float = math.inf
    open_least: bool = False
    open_most: bool = False
    hint: str = ""

    def __str__(self) -> str:
        lower = f"above {self.least:g}" if self.open_least else f"{self.least:g} or more"
        upper = "" if self.most == math.inf else f" and {'below' if self.open_most else 'at most'} {self.most:g}"
        return f"a finite number {lower}{upper}{self.hint}"

    def read(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError
        number = float(value)
        inside = self.least < number if self.open_least else self.least <= number
        inside &= number < self.most if self.open_most else number <= self.most
        if not inside or not (number == 0 or _SMALLEST <= abs(number) <= _LARGEST):
            raise ValueError
        return number


@dataclasses.dataclass(frozen=True)
class Switch:
    """Kind of True and False."""

    def __str__(self) -> str:
        return "True or False"

    def read(self, value: object) -> bool:
        if not isinstance(value, bool | np.bool_):
            raise TypeError
        return bool(value)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Kind of texts out of a list."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"

    def read(self, value: object) -> str:
        if not isinstance(value, str) or value not in self.names:
            raise ValueError
        return str(value)


@dataclasses.dataclass(frozen=True)
class Choices:
    """Kind of lists of different texts out of a list, at least one."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"a list, such as ({self.names[0]!r},), of {', '.join(self.names)}"

    def read(self, value: object) -> tuple[str, ...]:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError
        chosen = tuple(Choice(self.names).read(name) for name in value)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError
        return chosen


@dataclasses.dataclass(frozen=True)
class Folder:
    """Kind of names of folders. `hint` says what else there is."""

    hint: str = ""

    def __str__(self) -> str:
        return f"the name of a folder{self.hint}"

    def read(self, value: object) -> str:
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise ValueError
        return str(value)


@dataclasses.dataclass(frozen=True)
class BinShares:
    """Kind of shares of a number of bins, which add up to 1, or none."""

    bins: int

    def __str__(self) -> str:
        return f"{self.bins} shares of 0 or more that add up to 1, or () for none"

    def read(self, value: object) -> tuple[float, ...]:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError
        shares = tuple(Number().read(share) for share in value)
        if shares and (len(shares) != self.bins or not math.isclose(sum(shares), 1, abs_tol=1e-6)):
            raise ValueError
        return shares


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Kind of ascending lengths, at least one."""

    most: int = 1 << 24

    def __str__(self) -> str:
        return f"lengths from 1 to {self.most} in ascending order, such as (64, 128)"

    def read(self, value: object) -> tuple[int, ...]:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError
        lengths = tuple(Integer(1, self.most).read(length) for length in value)
        if not lengths or list(lengths) != sorted(set(lengths)):
            raise ValueError
        return lengths


T = TypeVar("T", bound="Section")
BATCH_SIZE, SEED = Integer(1, 1 << 24), Integer(0, 2**32 - 1)


class Section:
    """Base of the dataclasses that read a section, or the keys outside of all sections if its `name` is empty.

    Each field is annotated with the kind of its values. A value of another type or out of range raises ValueError that
    names the key; integers become floats, and lists tuples, where the field holds these.
    """

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            object.__setattr__(self, field.name, self._read(field, getattr(self, field.name)))

    @classmethod
    def _read(cls, field: dataclasses.Field, value: object) -> object:
        kind = cast(Any, field.type).__metadata__[0]
        try:
            return kind.read(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{cls.given(field.name, value)}: allowed is {kind}") from error

    @classmethod
    def key(cls, field: str) -> str:
        """Return the dotted name of a field in a configuration."""
        return field if field in _WHOLE_RUN or not cls.name else f"{cls.name}.{field}"

    @classmethod
    def given(cls, field: str, value: object) -> str:
        """Return key and value for messages."""
        shown = repr(value)
        return f"{cls.key(field)}={shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '...'}"

    @classmethod
    def of(cls: type[T], values: Any) -> T:
        """Read a section. Raises ValueError for a key that is unknown, and for a value that is not allowed."""
        known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if not isinstance(values, Mapping):
            raise ValueError(f"{cls.name}={values!r}: allowed is a section with the keys {', '.join(known)}")
        for name in values:
            if name not in known:
                raise ValueError(f"{cls.key(str(name))}: there is no such key; known are {', '.join(known)}")
        return cls(**{name: cls._read(known[name], value) for name, value in values.items()})

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the default of every key of the section."""
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return {field.name: field.default for field in fields if not cls.name or field.name not in _WHOLE_RUN}
