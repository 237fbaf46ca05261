"""Options of ``OMCStrategy`` that cannot work are refused when it is made, rather than after a round."""

from typing import Any

import pytest
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp.strategy import FedAvg

from fedomc import PolicyError
from fedomc.flower import FedBuff, OMCStrategy


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"failed_rounds": 0}, "failed_rounds=0: use 1 or more"),
        ({"checkpoints": "folder"}, r"checkpoints='folder': pass fedomc\.flower\.Checkpoints\(folder\)"),
        ({"observers": print}, "observers=<built-in function print>: pass a list of functions"),
        ({"observers": ["print"]}, "pass a list of functions"),
        ({"unquantized_format": "S1E5M10+S1E2M1"}, r"'S1E5M10\+S1E2M1' has more than one format: use S1E5M10"),
        ({"unquantized_format": "S1E5M10>DRIVE1"}, "has more than one format"),
        ({"unquantized_format": "DRIVE1"}, "can only be used for the uplink"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        OMCStrategy(FedAvg(), "S1E3M7", **options)


@pytest.mark.parametrize(("inner", "name"), [(None, "NoneType"), (LegacyFedAvg(), r"flwr\.server\.strategy\.fedavg")])
def test_what_is_no_strategy_of_the_present_api_is_named(inner: Any, name: str) -> None:
    with pytest.raises(PolicyError, match=rf"{name}.* is not a strategy of flwr\.serverapp\.strategy"):
        OMCStrategy(inner)


def test_a_buffer_holds_whole_replies() -> None:
    with pytest.raises(PolicyError, match=r"buffer_size=2\.5"):  # which no number of replies would ever be
        FedBuff(FedAvg(), buffer_size=2.5)  # type: ignore[arg-type]
