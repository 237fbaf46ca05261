"""The errors that fedomc raises, all under one base class."""


class OMCError(ValueError):
    """Something that fedomc was given cannot be used; the message names it and the way out."""


class FormatError(OMCError):
    """A number format that does not exist or is out of range."""


class PolicyError(OMCError):
    """A compression policy that is impossible, or that fits no variable of the model."""


class NonFiniteError(OMCError):
    """A NaN or an infinity where a finite value must be: no code of any format stands for it."""


class PayloadError(OMCError):
    """Bytes from outside that are not a valid compressed variable or do not fit the model."""


class RoundsFailedError(OMCError):
    """Round after round no client sent a usable reply."""


class FolderLockedError(OMCError):
    """A folder that one process at a time may write to, and another process does."""
