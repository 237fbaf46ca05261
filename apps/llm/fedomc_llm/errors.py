"""The errors of the application."""

from fedomc import OMCError


class SettingsError(OMCError):
    """Settings are unknown, impossible or inconsistent; the message names them and says what to do."""


class ModelError(OMCError):
    """A model or a tokenizer cannot be read; the message names the place and says what to do."""


class TextError(OMCError):
    """Texts are missing, empty or too short; the message names them and says what to do."""


class RunStopped(OMCError):
    """The user asked a run to stop."""
