"""Every error class fills its template from the facts that its docstring names."""

import copy
import inspect
import pickle
import re
import string
import warnings

import pytest

from micromix_compile import errors
from micromix_compile._torch_compat import raised_through_dynamo

CLASSES = [
    cls
    for cls in (getattr(errors, name) for name in errors.__all__)
    if cls not in (errors.MicroMixError, errors.MicroMixWarning)
]


def template_facts(cls):
    return {name for _, name, _, _ in string.Formatter().parse(cls.template) if name}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_message_holds_every_fact(cls):
    facts = {name: [f"<{name}>"] for name in template_facts(cls)}
    error = cls(**facts)
    assert all(f"<{name}>" in str(error) for name in facts)
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(twin) is cls
        assert str(twin) == str(error)
        assert twin.facts == error.facts


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_docstring_names_the_facts(cls):
    documented = re.search(r"Facts: (.*)", inspect.getdoc(cls), re.DOTALL).group(1)
    assert all(name in documented for name in template_facts(cls))


def test_all_lists_every_class():
    defined = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__ and name[0] != "_"
    }
    assert defined == set(errors.__all__)


def test_long_lists_are_cut():
    message = str(errors.PlanMismatchError(differences=[f"layer {i}" for i in range(100)]))
    assert "layer 7" in message
    assert "layer 8" not in message
    assert "and 92 more" in message


def test_bad_values_and_bad_files_are_value_errors():
    files = [errors.PlanFileError, errors.StatisticsFileError, errors.CheckpointError]
    files += [errors.PackageError, errors.FileVersionError]
    for cls in (errors.RecipeError, errors.OptionError, errors.InvalidPlanError, *files):
        assert issubclass(cls, ValueError)


def test_warnings_are_user_warnings():
    with pytest.warns(UserWarning, match=r"\(7\) have no plan attached and run in MXFP8"):
        warnings.warn(errors.NoPlanWarning(layers=7), stacklevel=1)


def test_an_error_that_dynamo_hands_on_survives_pickling():
    error = raised_through_dynamo(errors.StrictError(layers=["a: b"]))
    assert isinstance(error, errors.StrictError)
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is errors.StrictError and str(twin) == str(error)
