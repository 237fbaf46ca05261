"""NVFlare: filters that compress the models of a job while they travel."""

from fedomc.nvflare.filters import ALGORITHM, CompressFilter, DecompressFilter, add_filters

__all__ = ["ALGORITHM", "CompressFilter", "DecompressFilter", "add_filters"]
