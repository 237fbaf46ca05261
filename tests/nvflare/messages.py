"""Models, messages and filters as NVFlare's processes have them."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import FilterChainType, FilterContextKey
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import Shareable, make_copy
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import TransferType
from nvflare.fuel.utils import fobs
from torch import nn

import fedomc
from fedomc.nvflare import CompressFilter, DecompressFilter
from fedomc.nvflare.messages import ModelFilter
from fedomc.serialization import frame
from tests.conftest import randn

EXAMPLE = Path(__file__).parents[2] / "examples" / "nvflare"
CLIENTS = ("site-1", "site-2", "site-3", "site-4")
NAMES = [f"layers.{i}.weight" for i in range(8)]


def policy(**kwargs: object) -> fedomc.CompressionPolicy:
    return fedomc.CompressionPolicy(**{"format": "S1E3M7", "fraction": 0.6, "seed": 5, **kwargs})  # type: ignore[arg-type]


def context_of(name: str, peer: str, manager: FLContextManager | None = None) -> FLContext:
    """Make the context that a filter gets: of one call, with the props of its process and who is at the other end."""
    context = (manager or FLContextManager(identity_name=name, job_id="job")).new_context()
    other = FLContext()
    other.put(ReservedKey.IDENTITY_NAME, peer, private=False, sticky=False)
    context.set_peer_context(other)
    return context


def in_chain(chain: str, found: ModelFilter) -> Any:
    found.set_prop(FilterContextKey.CHAIN_TYPE, chain)
    return found


def server_out(chosen: fedomc.CompressionPolicy) -> CompressFilter:
    return in_chain(FilterChainType.TASK_DATA_CHAIN, CompressFilter(chosen))


def client_in(compressed: bool = False) -> DecompressFilter:
    return in_chain(FilterChainType.TASK_DATA_CHAIN, DecompressFilter(compressed))


def client_out(chosen: fedomc.CompressionPolicy) -> CompressFilter:
    return in_chain(FilterChainType.TASK_RESULT_CHAIN, CompressFilter(chosen))


def server_in() -> DecompressFilter:
    return in_chain(FilterChainType.TASK_RESULT_CHAIN, DecompressFilter())


def model(library: str = "numpy", seed: int = 0) -> dict[str, Any]:
    """Weights of a model as NVFlare has them: matrices, a bias, and a counter that is no float."""
    values = {name: randn(48, 40, seed=seed + i, scale=0.05) for i, name in enumerate(NAMES)}
    values |= {"layers.0.bias": randn(48, seed=seed + 99), "norm.count": torch.tensor(seed + 3)}
    return {name: value.numpy() for name, value in values.items()} if library == "numpy" else values


def message(
    data: dict[str, Any], kind: str = DataKind.WEIGHTS, round: int | None = 1, meta: dict[str, Any] | None = None
) -> Shareable:
    shareable = DXO(kind, data=data, meta=meta).to_shareable()
    if round is not None:
        shareable.set_header(AppConstants.CURRENT_ROUND, round)
    return shareable


def data_of(shareable: Shareable) -> dict[str, Any]:
    return from_shareable(shareable).data


def over_the_wire(shareable: Shareable) -> Shareable:
    return fobs.loads(fobs.dumps(shareable))


def same(a: Any, b: Any) -> bool:
    """Compare recursively, type by type and bit by bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, DXO):
        return same(a.to_dict(), b.to_dict())
    if isinstance(a, np.ndarray):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and same(a.numpy(), b.numpy())
    return bool(a == b)


def packed_names(shareable: Shareable) -> set[str]:
    return {name for name, value in data_of(shareable).items() if isinstance(value, bytes)}


def send(found: CompressFilter, task: Shareable, client: str, manager: FLContextManager) -> Shareable:
    """Filter a task for one client as the server does: of a shallow copy."""
    return found.process(make_copy(task), context_of("server", client, manager))


def decoded(data: bytes) -> torch.Tensor:
    parsed = frame.from_bytes(data)
    return parsed.packed.decode(torch.empty(parsed.packed.numel))


def example_net() -> nn.Module:
    """Make the example's model; NVFlare looks for its file by the name of its module."""
    spec = importlib.util.spec_from_file_location("model", EXAMPLE / "model.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Net()


def recipe(transfer: TransferType = TransferType.FULL) -> FedAvgRecipe:
    script = str(EXAMPLE / "client.py")
    return FedAvgRecipe(model=example_net(), min_clients=2, train_script=script, params_transfer_type=transfer)
