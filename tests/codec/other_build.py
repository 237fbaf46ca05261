"""A pytest plugin that tests another build of the kernels than the installed one: FEDOMC_BUILD names its folder."""

import importlib.util
import os
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "fedomc.codec._native", next(Path(os.environ["FEDOMC_BUILD"]).glob("_native*.so"))
)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
sys.modules[_spec.name] = _module
