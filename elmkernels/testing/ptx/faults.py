"""What an execution finds wrong, as errors that say where and what."""


class PtxError(ValueError):
    """The text can't be executed: an instruction or a form that the executor doesn't know.

    Example:
        >>> raise PtxError("wgmma isn't known")  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        PtxError
    """


class Fault(AssertionError):
    """A kernel does what it must not; `kind` is the checker that found it.

    Kinds: "bounds", "alignment", "uninitialized", "guard", "race", "barrier", "register", "trap".

    Example:
        >>> raise Fault("bounds", "beyond x")  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        Fault
    """

    def __init__(self, kind: str, what: str):
        super().__init__(f"{kind}: {what}")
        self.kind, self.what = kind, what

    def at(self, place: str) -> "Fault":
        """The same, with the instruction that did it."""
        return Fault(self.kind, f"{self.what}, by {place}")
