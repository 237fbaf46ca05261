import pytest
from nvflare.apis.fl_context import FLContextManager
from nvflare.apis.utils.decomposers import flare_decomposers
from nvflare.app_common.decomposers import common_decomposers, numpy_decomposers
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs


@pytest.fixture(scope="session", autouse=True)
def decomposers() -> None:
    """What NVFlare's processes register when they start."""
    flare_decomposers.register()
    common_decomposers.register()
    numpy_decomposers.register()
    fobs.register(TensorDecomposer)


@pytest.fixture
def server() -> FLContextManager:
    return FLContextManager(identity_name="server", job_id="job")
