"""NVFlare: filters that compress the models of a job while they travel."""

from fedomc.nvflare.compress import CompressFilter
from fedomc.nvflare.decompress import DecompressFilter
from fedomc.nvflare.messages import ALGORITHM
from fedomc.nvflare.recipe import add_filters

__all__ = ["ALGORITHM", "CompressFilter", "DecompressFilter", "add_filters"]
