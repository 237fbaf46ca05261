"""The private parts of NVFlare that are used, and what is said when they change."""

import pytest

from fedomc.nvflare._nvflare import installed_on_sites
from tests.nvflare.messages import recipe


def test_a_recipe_keeps_the_packages_of_its_job_where_they_are_looked_for() -> None:
    job = recipe()
    before = list(job._job.job.app_packages)
    installed_on_sites(job, "fedomc")
    assert job._job.job.app_packages == [*before, "fedomc"]


@pytest.mark.parametrize("missing", ["_job", "app_packages"])
def test_another_place_is_an_error_that_names_it_and_the_version_to_install(missing: str) -> None:
    job = recipe()
    owner = job if missing == "_job" else job._job.job
    delattr(owner, missing)
    error = rf"nvflare \d.*recipe._job.job.app_packages.*{missing}.*install nvflare>=2.9"
    with pytest.raises(RuntimeError, match=error):
        installed_on_sites(job, "fedomc")
