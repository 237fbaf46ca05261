"""The integration with Flower: messages with compressed variables, and a strategy that compresses for each client."""

from fedomc.flower.asynchronous import FedBuff
from fedomc.flower.client import collect, install, step_metrics
from fedomc.flower.grid import StreamingGrid
from fedomc.flower.mapped import open_arrays
from fedomc.flower.mods import omc_mod
from fedomc.flower.strategy import OMCStrategy
from fedomc.flower.tiers import announce
from fedomc.flower.traffic import RoundReport, Traffic
from fedomc.serialization.checkpointing import Checkpoints

__all__ = [
    "Checkpoints",
    "FedBuff",
    "OMCStrategy",
    "StreamingGrid",
    "RoundReport",
    "Traffic",
    "announce",
    "collect",
    "install",
    "omc_mod",
    "open_arrays",
    "step_metrics",
]
