"""The filters of a job: a pair on the server and a pair on each client.

server out   CompressFilter(policy)      each client's own message
client in    DecompressFilter()          float32, or CompressedTensors
client out   CompressFilter(policy)      weights, or differences of weights
server in    DecompressFilter()          float32, checked against what was sent
"""

from collections.abc import Sequence

from nvflare.client.config import TransferType
from nvflare.recipe.spec import Recipe

from fedomc.errors import PolicyError
from fedomc.nvflare._nvflare import installed_on_sites
from fedomc.nvflare.compress import CompressFilter, needs_differences, whole_weights_error
from fedomc.nvflare.decompress import DecompressFilter
from fedomc.training.policy import CompressionPolicy


def add_filters(
    recipe: Recipe, policy: CompressionPolicy, *, compressed: bool = False, tasks: Sequence[str] = ("train",)
) -> None:
    """Add all four filters to the recipe of a job.

    Args:
        recipe: the recipe of a PyTorch job. Its sites need fedomc installed, and ``fedomc.`` in their
            ``class_allow_list`` if the job has no code of its own.
        policy: how to compress.
        compressed: whether clients get ``CompressedTensor`` instead of float32; see ``DecompressFilter``.
        tasks: names of the tasks whose messages carry models.

    Raises:
        RuntimeError: this version of NVFlare is not supported.
        PolicyError: ``tasks`` has ``*``, which NVFlare 2.9 writes into the job but matches with no task; or the policy
            has an ``update_format`` or an uplink and the recipe's clients send whole weights, NVFlare's default.
    """
    if isinstance(tasks, str) or "*" in tasks:
        raise PolicyError(f"tasks={tasks!r} would filter nothing: list the names, such as ['train', 'validate']")
    if needs_differences(policy) and getattr(recipe, "params_transfer_type", None) == TransferType.FULL:
        sites = (getattr(recipe, "per_site_config", None) or {}).values()
        if not any("params_transfer_type" in site for site in sites):
            raise whole_weights_error("the recipe's clients send", policy)
    recipe.add_server_output_filter(CompressFilter(policy), list(tasks))
    recipe.add_client_input_filter(DecompressFilter(compressed), list(tasks))
    recipe.add_client_output_filter(CompressFilter(policy), list(tasks))
    recipe.add_server_input_filter(DecompressFilter(), list(tasks))
    installed_on_sites(recipe, "fedomc")
