from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fedomc
from fedomc.serialization.contents import read_contents
from tests.serialization.models import POLICIES, trained


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "fp32"])
def test_the_bytes_are_all_that_the_file_has_beside_its_header(policy: str, path: Path) -> None:
    model = trained(policy)
    fedomc.save_model(model, path)
    contents = read_contents(path, verify=True)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert contents.nbytes == path.stat().st_size - header
    named = {variable.name: variable for variable in contents.variables}
    assert contents.tied == {"output.weight": "embedding.weight"} and contents.described
    for name, parameter in model.named_parameters():
        assert named[name].shape == tuple(parameter.shape)
        assert named[name].packed == isinstance(parameter, fedomc.CompressedTensor)
        assert named[name].fp32 == 4 * parameter.numel()
    assert named["buffer_bool"].fp32 == named["buffer_bool"].nbytes == 3


def test_variables_for_other_programs_are_counted_with_their_scales(path: Path) -> None:
    model = fedomc.compress_(torch.nn.Linear(64, 64), "MXFP8")
    fedomc.save_model(model, path, interchange=True)
    bias, weight = read_contents(path, verify=True).variables
    assert (weight.held, weight.packed, weight.nbytes) == ("MXFP8", True, 64 * 64 + 64 * 2)
    assert (bias.held, bias.packed, bias.nbytes) == ("F32", False, 256)


def test_floats_of_another_width_are_compared_with_fp32(path: Path) -> None:
    save_file({"half": torch.ones(4, dtype=torch.bfloat16), "count": torch.ones(4, dtype=torch.int64)}, path)
    count, half = read_contents(path).variables
    assert (count.fp32, half.nbytes, half.fp32) == (32, 8, 16)
