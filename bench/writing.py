"""What a sweep does where its folder cannot be written: it stops, says at which case, and can go on later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Unwritable(OSError):
    """The run folder cannot be written: no fault of a case, so the run stops, to be resumed."""


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Within it, an OSError becomes an Unwritable that names `what`, and says how to go on."""
    try:
        yield
    except OSError as error:
        raise Unwritable(
            error.errno,
            f"the results of {what} cannot be written ({error}); make room or mend the rights and run again, which "
            f"goes on from what is done",
        ) from error
