"""The only place that uses private parts of NVFlare; ``tests/nvflare/test_nvflare.py`` says when they change."""

from importlib.metadata import version

from nvflare.recipe.spec import Recipe


def installed_on_sites(recipe: Recipe, package: str) -> None:
    """Declare that the sites have a package installed, so that the recipe's job does not carry its Python files.

    Copies in the job would hide the installed package and its compiled kernels. A recipe has no public access to its
    job: ``_job`` is a ``FedJob``, and only the configuration inside it tells the packages declared so far.

    Raises:
        RuntimeError: this version of NVFlare keeps a recipe's job or its packages elsewhere.
    """
    try:
        job = recipe._job
        job.set_app_packages([*job.job.app_packages, package])
    except (AttributeError, TypeError) as error:
        raise RuntimeError(
            f"nvflare {version('nvflare')} does not keep the packages of a job in recipe._job.job.app_packages, as 2.9 "
            f"does ({error}): install nvflare>=2.9,<2.10"
        ) from error
