"""Every error that datakit raises on purpose.

    DatakitError
    ├── InputError(ValueError)          exit 2   the user's recipe, file or option is wrong
    │   ├── RecipeError                          ... with the path inside the recipe
    │   └── MissingExtra(ImportError)            an optional package is not installed
    ├── GateFailed(RuntimeError)        exit 1   the data did not pass its gate
    ├── Stopped(RuntimeError)           exit 3   budget or signal; resumable
    ├── OutsideError(OSError)           exit 4   endpoint, Hub or disk failed; resumable
    │   ├── EndpointError                        the endpoint refuses us (key, model)
    │   └── NotRecorded(LookupError)             offline, and the ledger has no answer
    ├── BugError(RuntimeError)          exit 70  a step or the engine is wrong
    ├── Pending(RuntimeError)                    a row cannot be finished now; never leaves a run
    └── RowError(ValueError)                     one row failed: data, never a crash
        ├── Unparsable    the model's reply has no usable content
        ├── Refused       the model or a content filter declined
        ├── Truncated     the reply was cut by the token limit
        ├── Rejected      a rule says that the row does not belong in the set
        └── Unanswered    no answer arrived after every retry (transient: asked again next time)

A message says what, where, both values, and what to do. All of them pickle.
"""

import contextlib
from collections.abc import Generator
from typing import ClassVar


class DatakitError(Exception):
    """Base of all; catch this to tell datakit's own errors from everything else."""

    exit_code: ClassVar[int] = 70


class InputError(DatakitError, ValueError):
    """The user's input is wrong; nothing was spent."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe is wrong; the message begins with the path that the user typed."""


class MissingExtra(InputError, ImportError):
    """An optional package is not installed; the message ends in the pip line."""


class GateFailed(DatakitError, RuntimeError):
    """The version did not pass its gate; it lies in `candidates/`."""

    exit_code = 1


class Stopped(DatakitError, RuntimeError):
    """Stopped by a signal or a budget; the same command goes on where it stopped."""

    exit_code = 3


class OutsideError(DatakitError, OSError):
    """The outside world failed; the same command goes on where it stopped."""

    exit_code = 4


class EndpointError(OutsideError):
    """An endpoint refuses every call (wrong key, unknown model): the run stops at once."""


class NotRecorded(OutsideError, LookupError):
    """No call may be made, and the ledger holds no answer to this request."""


class Pending(DatakitError, RuntimeError):
    """A row cannot be finished now, and nothing is wrong with it.

    The budget is spent, its model is not up in this pass, or its answer comes with a batch.
    `reason` is a short code (`budget`, `phase`, `batch`). The engine asks again in a later pass or
    run; steps let it through.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class BugError(DatakitError, RuntimeError):
    """A step or the engine broke its contract; the message names step and row."""


@contextlib.contextmanager
def blamed(step: str, doing: str) -> Generator[None]:
    """Turn whatever a step raises by mistake into a BugError that names it and its place."""
    try:
        yield
    except DatakitError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise BugError(f"step {step!r} failed {doing}: {said}") from error


class RowError(DatakitError, ValueError):
    """One row failed. The engine writes it to the rejects with its reason.

    `reason` is a short code that is counted (`tie`, `no_verdict`), `detail` a sentence for a
    person, `raw` the text that could not be used, `partial` what was already paid for, as JSON.
    """

    kind: ClassVar[str] = "RowError"
    transient: ClassVar[bool] = False

    def __init__(self, reason: str, detail: str = "", raw: str = "", partial: str = "") -> None:
        super().__init__(reason, detail, raw, partial)
        self.reason = reason
        self.detail = detail
        self.raw = raw
        self.partial = partial

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class Unparsable(RowError):
    """The reply holds no usable content."""

    kind = "Unparsable"


class Refused(RowError):
    """The model or a content filter declined to answer."""

    kind = "Refused"


class Truncated(RowError):
    """The reply was cut by the token limit."""

    kind = "Truncated"


class Rejected(RowError):
    """A rule of a step says that the row does not belong in the set."""

    kind = "Rejected"


class Unanswered(RowError):
    """No answer arrived after every retry; the next run asks for this row again."""

    kind = "Unanswered"
    transient = True
