"""Federated averaging in NVFlare's simulator, in FP32 and compressed; prints accuracy and bytes."""

import argparse
import re
import tempfile
from pathlib import Path

import torch
from model import Net, accuracy
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import TransferType
from nvflare.recipe import SimEnv

from fedomc import CompressionPolicy
from fedomc.nvflare import add_filters

HERE = Path(__file__).parent


def run(name: str, policy: CompressionPolicy | None, options: argparse.Namespace, workspace: Path) -> None:
    """Run one job and print its line of the table."""
    recipe = FedAvgRecipe(
        name=name,
        model=Net(),
        min_clients=options.clients,
        num_rounds=options.rounds,
        train_script=str(HERE / "client.py"),
        params_transfer_type=TransferType.DIFF if options.differences else TransferType.FULL,
    )
    if policy is not None:
        add_filters(recipe, policy)
    recipe.execute(SimEnv(num_clients=options.clients, workspace_root=str(workspace)))
    folder = workspace / name
    model = Net()
    saved = torch.load(next(folder.rglob("FL_global_model.pt")), weights_only=True)
    model.load_state_dict(saved["model"])
    print(f"| {name} | {accuracy(model):.1%} | {traffic(folder, 'to')} | {traffic(folder, 'from')} |", flush=True)


def traffic(folder: Path, direction: str) -> str:
    """Add up the bytes of the models in one direction, as the filters logged them."""
    logs = {line for file in folder.rglob("log.txt") for line in file.read_text().splitlines()}
    found = [re.search(rf" {direction} \S+: .* (\d+) -> (\d+) bytes", line) for line in logs]
    pairs = [(int(match[1]), int(match[2])) for match in found if match]
    before, after = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (0, 0)
    return f"{after / 1e6:.2f} of {before / 1e6:.2f} MB" if pairs else "all"


def main() -> None:
    """Read the options and run both jobs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--format", default="S1E3M7")
    parser.add_argument("--fraction", type=float, default=0.7, help="of the parameters that is compressed")
    parser.add_argument("--differences", action="store_true", help="clients send what they changed")
    parser.add_argument("--workspace", type=Path, help="keep NVFlare's files here")
    options = parser.parse_args()
    policy = CompressionPolicy(options.format, fraction=options.fraction)
    with tempfile.TemporaryDirectory() as folder:
        print("| job | accuracy | to the clients | from the clients |\n|---|---|---|---|", flush=True)
        for name, chosen in (("FP32", None), (options.format, policy)):
            run(name, chosen, options, options.workspace or Path(folder))


if __name__ == "__main__":
    main()
