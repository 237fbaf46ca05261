"""The errors of the speech application."""

from fedomc import OMCError


class CorpusError(OMCError):
    """A corpus is missing, damaged, empty or not the expected one; the message names it and says what to do."""


class RoundError(OMCError):
    """No client returned a model in a round; the message names the reasons."""


class SettingsError(OMCError):
    """Settings are unknown, impossible or inconsistent; the message names them and says what to do."""


class RecognitionError(OMCError):
    """A streaming recognizer is used in a way that its model does not allow."""


class DeploymentError(OMCError):
    """A process of a deployment does not start or does not respond."""


class ExperimentError(OMCError):
    """Runs of an experiment failed, or another process works in the same folder; the message names them."""
