import subprocess
import sys

import pytest

OPTIONAL = (
    "flwr",
    "transformers",
    "nvflare",
    "matplotlib",
    "typer",
    "rich",
    "jiwer",
    "ray",
    "gfloat",
    "ml_dtypes",
    "wandb",
    "mlflow",
)


@pytest.mark.parametrize("module", ["fedomc", "fedomc.serialization.frame"])
def test_the_core_imports_no_extra(module: str) -> None:
    script = (
        f"import sys, {module}; tops = {{name.partition('.')[0] for name in sys.modules}}; "
        f"print(sorted(tops & set({OPTIONAL})), 'torch' in tops)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.strip() == "[] True"


def modules_after(statement: str) -> set[str]:
    script = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)  # noqa: S603
    return set(done.stdout.split())


def test_no_part_of_torch_is_loaded_that_torch_does_not_load() -> None:
    """The compiler and the tensors without values take seconds, and come with their first use."""
    added = modules_after("import fedomc") - modules_after("import torch")
    assert [name for name in sorted(added) if name.partition(".")[0] in ("torch", "sympy", "mpmath")] == []


def test_all_names_exist() -> None:
    import fedomc

    assert all(hasattr(fedomc, name) for name in fedomc.__all__) and fedomc.__version__
