"""The errors of the speech application."""

from fedomc import OMCError


class CorpusError(OMCError):
    """A corpus that is missing, damaged or empty, or does not fit; the message names it and the way out."""


class RoundError(OMCError):
    """A round in which no client returned a model; the message names the reasons."""


class SettingsError(OMCError):
    """Settings of a run that are unknown, impossible or do not fit; the message names them and the way out."""


class RecognitionError(OMCError):
    """Audio that is not recognised in the order or with the chunks that a streaming model allows."""


class DeploymentError(OMCError):
    """A process of a deployment does not start or does not answer."""


class ExperimentError(OMCError):
    """Experiments of which runs failed, or that another process is at; the message names them."""
