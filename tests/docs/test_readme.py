"""The README: short, and its two examples run as they are printed."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from tests.docs.execution import check_command, commands
from tests.docs.pages import README, blocks
from tests.flower.conftest import identity  # noqa: F401  (a fixture)
from tests.flower.test_aggregation import Network

ROUNDS = 3


def block_in(language: str) -> str:
    (block,) = [block for block in blocks(README) if block.language == language]
    return block.code


def test_it_fits_on_a_page() -> None:
    assert len(README.split()) <= 700


def test_its_commands_exist() -> None:
    for block in blocks(README):
        for words in commands(block.code) if block.language == "console" else []:
            check_command(words, "README.md")


def test_the_pretrained_model_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block_in("python"), {"__name__": "readme"})  # noqa: S102
    printed = re.search(r"(\d+)% of FP32", capsys.readouterr().out)
    assert printed is not None and 30 < int(printed[1]) < 35
    assert (tmp_path / "model.safetensors").stat().st_size > 10**6


@pytest.mark.parametrize("sign", ["-", "+"])
def test_the_flower_app_runs_as_it_was_and_as_it_is(sign: str) -> None:
    block = block_in("diff")
    lines = [line for line in block.splitlines() if line[:1] in ("", " ", sign)]
    assert 0 < sum(line.startswith("+") for line in block.splitlines()) <= 10  # or it is no small change
    sizes: list[int] = []

    class Grid(Network):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
            return [answer(message) for message in messages]

    def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.randn(16, 64), torch.randint(8, (16,)))]

    def net() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))

    names: dict[str, Any] = {"__name__": "app", "Net": net, "batches": batches}
    exec("\n".join(line[1:] for line in lines), names)  # noqa: S102

    def answer(message: Message) -> Message:
        reply: Message = names["client"](
            copy.copy(message), Context(1, message.metadata.dst_node_id, {}, RecordDict(), {})
        )
        sizes.append(sum(len(array.data) for array in reply.content["arrays"].values()))  # type: ignore[union-attr]
        return reply

    names["server"](Grid(2, answer), Context(1, 0, {}, RecordDict(), {}))
    assert len(sizes) == 2 * ROUNDS
    fp32 = 4 * (64 * 64 + 64 + 64 * 8 + 8)
    assert all(size < 0.35 * fp32 if sign == "+" else size > fp32 for size in sizes)
