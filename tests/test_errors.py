"""The errors: their place in the tree, their exit codes, and that they pickle."""

import inspect
import pickle

import pytest

from datakit import errors

ALL = [
    one
    for one in vars(errors).values()
    if inspect.isclass(one) and issubclass(one, errors.DatakitError)
]

PROMISES = {
    errors.InputError: (ValueError, 2),
    errors.RecipeError: (errors.InputError, 2),
    errors.MissingExtra: (ImportError, 2),
    errors.GateFailed: (RuntimeError, 1),
    errors.Stopped: (RuntimeError, 3),
    errors.OutsideError: (OSError, 4),
    errors.EndpointError: (errors.OutsideError, 4),
    errors.NotRecorded: (LookupError, 4),
    errors.BugError: (RuntimeError, 70),
    errors.RowError: (ValueError, 70),
}


@pytest.mark.parametrize(("error", "promise"), PROMISES.items(), ids=lambda one: str(one))
def test_each_error_keeps_its_promise(error, promise):
    base, code = promise
    assert issubclass(error, base)
    assert error.exit_code == code


@pytest.mark.parametrize("error", ALL)
def test_every_error_pickles(error):
    raised = error("reason")
    again = pickle.loads(pickle.dumps(raised))
    assert type(again) is error
    assert str(again) == str(raised)


def test_a_row_error_pickles_with_all_that_it_carries():
    again = pickle.loads(pickle.dumps(errors.Unparsable("no_json", "detail", "raw", "{}")))
    assert (again.reason, again.detail, again.raw, again.partial) == (
        "no_json",
        "detail",
        "raw",
        "{}",
    )


def test_only_unanswered_rows_are_transient():
    transient = [one for one in ALL if getattr(one, "transient", False)]
    assert transient == [errors.Unanswered]
