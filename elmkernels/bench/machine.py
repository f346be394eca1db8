"""Whether other work keeps this machine busy, which distorts every figure that is measured here."""

import os

BUSY = 0.5  # load a processor from which figures come with a warning


def load() -> float | None:
    """How many threads wanted a processor, on average of the last minute; None if unknown."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def busy() -> str | None:
    """What distorts the figures, in words, or None. Ask before anything is measured: the load
    counts one's own work too.

    The load is of the whole machine, so it is compared with all of its processors, also if this
    process may use only some of them.
    """
    found, processors = load(), os.cpu_count() or 1
    if found is None or found <= BUSY * processors:
        return None
    return f"busy: a load of {found:.1f} on {processors} processors distorts all figures"
