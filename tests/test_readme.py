"""The examples of the README, of docs/ and of docstrings run as they are printed, to their end."""

import ast
import copy
import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from torch.optim.swa_utils import AveragedModel

import fedomc
import fedomc.flower.tensorboard
import fedomc.nvflare
from tests.flower.conftest import flower_log, identity  # noqa: F401  (fixtures)
from tests.flower.test_aggregation import Network

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = {page: (REPOSITORY / f"docs/{page}.md").read_text(encoding="utf-8") for page in ("training", "flower")}
SENTENCES = ("training", "performance", "flower", "nvflare", "formats", "speech", "installation")
"""The pages whose calls in sentences run."""
ROUNDS = 3


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Execute the blocks of Python one after the other, in an empty folder; give the names that they define."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", "".join(PAGES.values()), flags=re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, Any] = {"__name__": "pages"}
    for block in blocks:
        exec(block, names)  # noqa: S102
    return names


def test_the_readme_has_what_fits_on_a_page() -> None:
    assert len(README.split()) <= 700


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", text)
    pages = re.findall(r"`((?:docs|src|tests|apps|examples)/[\w/.-]+)`", text)
    for link in links:
        assert (REPOSITORY / page).parent.joinpath(link).exists(), link
    for name in pages:
        assert REPOSITORY.joinpath(name).exists(), name


def test_the_readmes_pretrained_model_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(block, {"__name__": "readme"})  # noqa: S102
    printed = re.search(r"(\d+)% of FP32", capsys.readouterr().out)
    assert printed is not None and 30 < int(printed[1]) < 35
    assert (tmp_path / "model.safetensors").stat().st_size > 10**6


@pytest.mark.parametrize("sign", ["-", "+"])
def test_the_readmes_flower_app_runs_as_it_was_and_as_it_is(sign: str) -> None:
    (block,) = re.findall(r"```diff\n(.*?)```", README, flags=re.DOTALL)
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
        reply = names["client"](copy.copy(message), Context(1, message.metadata.dst_node_id, {}, RecordDict(), {}))
        sizes.append(sum(len(array.data) for array in reply.content["arrays"].values()))  # type: ignore[union-attr]
        return reply

    names["server"](Grid(2, answer), Context(1, 0, {}, RecordDict(), {}))
    assert len(sizes) == 2 * ROUNDS
    fp32 = 4 * (64 * 64 + 64 + 64 * 8 + 8)
    assert all(size < 0.35 * fp32 if sign == "+" else size > fp32 for size in sizes)


def test_the_first_example_prints_what_it_says(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    printed = re.search(r"([0-9.]+)% of FP32", capsys.readouterr().out)
    assert printed is not None
    assert 31.2 < float(printed[1]) < 33  # ten bits of 32, and the biases


def test_the_advice_is_followed_as_it_says(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(names["network"][0].weight, fedomc.CompressedTensor)
    held = fedomc.parameter_bytes(names["network"]).ratio
    assert held == min(row.ratio for row in names["advice"].formats if row.holds) < 0.36
    assert str(names["advice"]) in capsys.readouterr().out


def test_activations_take_what_it_says(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert "28% of the activations' bytes" in capsys.readouterr().out
    assert not names["layers"]._forward_hooks


def test_a_file_is_read_without_fedomc_as_it_says(names: dict[str, Any]) -> None:
    assert names["tensors"].keys() == {"weight", "weight_scale", "bias"}
    assert names["tensors"]["weight"].dtype is torch.float8_e4m3fn and names["tensors"]["weight_scale"].shape == (64, 8)
    assert torch.equal(names["weight"], names["layer"].weight.dequantize())


def test_the_federated_example_runs_to_its_end(
    names: dict[str, Any],
    flower_log: pytest.LogCaptureFixture,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two nodes answer through the ClientApp, the ServerApp runs all its rounds, and the model changes."""
    results, replies = [], list[Message]()
    start = fedomc.flower.OMCStrategy.start

    def watched(strategy: Any, *args: Any, **kwargs: Any) -> Any:
        results.append((strategy, start(strategy, *args, **kwargs), kwargs["initial_arrays"]))
        return results[-1][1]

    def answer(message: Message) -> Message:
        node = message.metadata.dst_node_id
        try:
            reply = names["client"](copy.copy(message), Context(1, node, {}, RecordDict(), {}))
        except Exception as error:  # as Flower's engines do
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, repr(error)), reply_to=message)
        replies.append(reply)
        return reply

    monkeypatch.setattr(fedomc.flower.OMCStrategy, "start", watched)
    names["server"](Network(2, answer), Context(1, 0, {}, RecordDict(), {}))
    assert [str(reply.error) for reply in replies if reply.has_error()] == [] and "left out" not in flower_log.text
    ((strategy, result, initial),) = results
    assert len(replies) == 2 * ROUNDS and [row.received for row in strategy.traffic] == [2] * ROUNDS
    for name, array in result.arrays.items():
        assert torch.from_numpy(array.numpy() != initial[name].numpy()).float().mean() > 0.9, name
    assert strategy.traffic[-1].down_bytes < 0.25 * 2 * 4 * 80 * 81


def inline() -> list[str]:
    """List the calls that stand in the sentences of pages and are whole expressions."""
    text = "\n".join((REPOSITORY / f"docs/{page}.md").read_text(encoding="utf-8") for page in SENTENCES)
    texts = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = []
    for text in texts:
        code = text.removeprefix("with ").removesuffix(":").removeprefix("checkpoints=")
        if "(" in code and "..." not in code:
            ast.parse(code, mode="eval")  # it is Python, or the page says something that cannot be written
            found.append(code)
    return found


def test_calls_in_sentences_run(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = torch.nn.Sequential(torch.nn.Linear(80, 64))
    stepping = fedomc.step_in_backward(copy.deepcopy(names["model"]), torch.optim.SGD, lr=0.1)
    known = {
        **names,
        **vars(fedomc),
        "AveragedModel": AveragedModel,
        "ClientApp": ClientApp,
        "StreamingGrid": fedomc.flower.StreamingGrid,
        "accumulate": stepping.accumulate,
        "app": ClientApp(),
        "bytes": 10**6,
        "copy": copy,
        "grid": Network(2, lambda message: None),
        "recipe": MagicMock(),
        "report": fedomc.memory_report(plain, torch.randn(4, 80), loss=lambda y: y.mean(), measure=False),
        "source": plain.state_dict(),
        "stepping": stepping,
    }
    calls = inline()
    assert len(calls) > 10
    for call in calls:
        with torch.device("meta" if "materialize_" in call else "cpu"):
            model = torch.nn.Sequential(torch.nn.Linear(80, 64))
        selection = names["policy"].select(model)
        if not call.startswith(("fedomc.materialize_", "fedomc.compress_")):
            fedomc.compress_(model, selection)
        try:
            eval(call, {**known, "model": model, "selection": selection})  # noqa: S307
        except Exception as error:
            raise AssertionError(f"`{call}` in docs/: {error!r}") from error
        finally:
            torch.compiler.set_stance("default")  # which one of the calls changes for the whole process
    assert known["recipe"].add_server_output_filter.called


def test_examples_in_docstrings_give_what_they_say() -> None:
    attempted = 0
    for found in pkgutil.walk_packages(fedomc.__path__, "fedomc."):
        if found.name == "fedomc.codec._native":
            continue
        module = importlib.import_module(found.name)
        result = doctest.testmod(module, extraglobs={"fedomc": fedomc, "torch": torch})
        assert result.failed == 0, found.name
        attempted += result.attempted
    assert attempted >= 2
