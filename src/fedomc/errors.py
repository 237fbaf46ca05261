"""The errors that fedomc raises, all under one base class."""


class OMCError(ValueError):
    """The base class: fedomc cannot use an input; the message names the input and says what to do instead."""


class FormatError(OMCError):
    """A number format does not exist or is out of range."""


class PolicyError(OMCError):
    """A compression policy is impossible, or applies to no variable of the model."""


class NonFiniteError(OMCError):
    """A value is NaN or infinite, which no code of any format represents."""


class PayloadError(OMCError):
    """Bytes from outside are not a valid compressed variable, or do not fit the model."""


class BaseModelError(PayloadError):
    """A message is for another base model than the one that the client has; the message names both digests."""


class RoundsFailedError(OMCError):
    """In too many consecutive rounds, no client sent a usable reply."""


class FolderLockedError(OMCError):
    """Another process is already writing to a folder that only one process may write to."""


class BudgetError(OMCError):
    """No way of training fits into a budget of memory; ``smallest`` is the one with the smallest peak."""

    def __init__(self, message: str, smallest: object) -> None:
        super().__init__(message)
        self.smallest = smallest
