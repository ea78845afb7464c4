"""Errors cross processes: each class keeps its type, its words and its data."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest

from rollout_ft import errors
from rollout_ft.errors import RolloutFTError


def subclasses(base: type[RolloutFTError]) -> list[type[RolloutFTError]]:
    found = [base]
    for each in base.__subclasses__():
        if each.__module__.startswith("rollout_ft"):
            found += subclasses(each)
    return found


def sample(cls: type[RolloutFTError]) -> RolloutFTError:
    """An instance whose every field has a value of its own."""
    if cls.__init__ is RolloutFTError.__init__:
        return cls("what happened")
    values: dict[str, Any] = {}
    for i, (name, parameter) in enumerate(list(inspect.signature(cls).parameters.items())):
        kind = str(parameter.annotation)
        values[name] = {"int": 400 + i, "int | None": 400 + i, "bool": True}.get(kind, f"{name}-{i}")
    return cls(**values)


CLASSES = subclasses(RolloutFTError)


def test_all_classes_of_the_taxonomy_are_looked_at():
    named = {v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, BaseException)}
    assert named <= set(CLASSES)
    assert len(CLASSES) > 10


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_an_error_survives_a_pickle_round_trip(cls: type[RolloutFTError], protocol: int):
    error = sample(cls)
    back = pickle.loads(pickle.dumps(error, protocol))
    assert (type(back), str(back), back.args, vars(back)) == (cls, str(error), error.args, vars(error))


@pytest.mark.parametrize("cls", [c for c in CLASSES if c.__init__ is not RolloutFTError.__init__], ids=lambda c: c.__name__)
def test_every_field_of_an_error_is_an_attribute_of_it(cls: type[RolloutFTError]):
    error = sample(cls)
    names = inspect.signature(cls).parameters
    assert [getattr(error, name) for name in names] == list(error.args)
    assert names


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_an_error_says_something_in_one_line(cls: type[RolloutFTError]):
    assert len(str(sample(cls)).splitlines()) == 1
