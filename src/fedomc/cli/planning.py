"""``fedomc plan``: how a language model can be trained within a budget of memory."""

import enum
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from fedomc.cli.output import INVALID_INPUT, INVALID_USE, Json, complain, fail, print_json
from fedomc.errors import OMCError
from fedomc.memory.budget import parse_budget
from fedomc.memory.plan import Combination
from fedomc.memory.plan import plan as plan_of

_PATIENCE = 5.0  # seconds that need no announcement


class Optimizer(enum.StrEnum):
    """What trains the model, of ``torch.optim``; ``momentum`` is SGD with momentum."""

    SGD = "sgd"
    MOMENTUM = "momentum"
    ADAM = "adam"
    ADAMW = "adamw"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``fedomc.plan``."""
        if self is Optimizer.MOMENTUM:
            return {"optimizer_class": torch.optim.SGD, "momentum": 0.9}
        classes = {Optimizer.SGD: torch.optim.SGD, Optimizer.ADAM: torch.optim.Adam, Optimizer.ADAMW: torch.optim.AdamW}
        return {"optimizer_class": classes[self]}


def plan(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="The folder of a language model of transformers; weights are not read."),
    ],
    budget: Annotated[str, typer.Option("--budget", help="Memory for training, such as '1 GB' or '512 MiB'.")],
    batch: Annotated[int, typer.Option(min=1, help="Texts in a batch.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens in a text.")] = 128,
    optimizer: Annotated[Optimizer, typer.Option(case_sensitive=False, help="The optimizer.")] = Optimizer.ADAMW,
    max_step_time: Annotated[
        float | None, typer.Option(min=1.0, help="The largest time of a step, relative to FP32.")
    ] = None,
    json: Json = False,
) -> None:
    """Find the most precise formats, with or without checkpoints, in which a model can be trained within a budget."""
    nbytes = parse_budget(budget)
    built, inputs = read_model(model, batch, tokens)
    limit: dict[str, Any] = {} if max_step_time is None else {"max_step_time": max_step_time}
    name = type(built).__name__
    try:
        found = plan_of(
            built,
            inputs,
            nbytes,
            loss=_loss,
            progress=partial(_announce, time.monotonic()),
            **limit,
            **optimizer.arguments(),
        )
    except OMCError:
        raise
    except Exception as error:  # whatever a model makes of its own configuration, or does not do on shapes
        fail(f"{model}: {name} cannot be trained on shapes: {type(error).__name__}: {error}", INVALID_INPUT)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    dtype = str(next(built.parameters()).dtype).removeprefix("torch.")
    if json:
        print_json(
            {
                "model": name, "parameters": parameters, "dtype": dtype, "batch": batch, "tokens": tokens,
                "optimizer": optimizer.value, "budget_bytes": nbytes, "chosen": _as_json(found.chosen),
                "considered": [_as_json(each) for each in found.considered],
            }
        )  # fmt: skip
        return
    typer.echo(
        f"{name}, {parameters / 1e6:.1f} M parameters in {dtype}, {batch} x {tokens} tokens, {optimizer.value}\n"
    )
    typer.echo(str(found))


def read_model(folder: Path, batch: int, tokens: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Build a language model of ``transformers`` on the meta device, and a batch for it; print an error or return them.

    Args:
        folder: with the model's ``config.json``; nothing else is read, and nothing is downloaded.
        batch: texts.
        tokens: in each of them.
    """
    if not (folder / "config.json").is_file():
        fail(
            f"{folder}: no folder with a config.json of transformers; nothing is downloaded, so do that first",
            INVALID_USE,
        )
    try:
        import transformers
    except ImportError as error:
        fail(f"{error}: install it with pip install 'fedomc[huggingface]'", INVALID_USE)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind, labelled = _kind_of(config)
        with torch.device("meta"):
            built: Any = kind.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of what a file says
        fail(f"{folder / 'config.json'}: transformers cannot build this model: {error}", INVALID_INPUT)
    if built.main_input_name != "input_ids" or getattr(config, "vocab_size", None) is None:
        fail(
            f"{folder}: {type(built).__name__} reads more than tokens: call fedomc.plan in Python",
            INVALID_INPUT,
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        fail(f"--tokens {tokens}: the model takes at most {longest}", INVALID_USE)
    built.config.use_cache = False
    ids = torch.zeros(batch, tokens, dtype=torch.int64, device="meta")
    return built, {"input_ids": ids, "labels": ids} if labelled else {"input_ids": ids}


def _kind_of(config: Any) -> tuple[Any, bool]:
    """Return the class that builds the model, and whether it takes labels and returns a loss."""
    import transformers
    from transformers.models.auto import modeling_auto

    architecture = (config.architectures or [None])[0]
    for kind, names in (
        (transformers.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (transformers.AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        (transformers.AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    ):
        if architecture in names.values():
            return kind, True
    return transformers.AutoModel, False


def _loss(output: Any) -> Any:
    return output.loss if "loss" in output else output.last_hidden_state.float().square().mean()


def _announce(began: float, done: int, total: int) -> None:
    """Say after the first pass how long the others will take, if that is worth a word."""
    left = (time.monotonic() - began) * (total - done)
    if done == 1 and left > _PATIENCE:
        complain(f"{total} ways of training are tried on shapes: about {left:.0f} seconds more")


def _as_json(each: Combination) -> dict[str, Any]:
    return {
        "parameters": None if each.policy is None else str(each.policy),
        "activations": None if each.activations is None else str(each.activations),
        "state": None if each.state_format is None else str(each.state_format),
        "checkpointing": each.checkpointing,
        "peak_bytes": each.peak_bytes,
        "step_time": each.step_time,
        "error": each.error,
    }
