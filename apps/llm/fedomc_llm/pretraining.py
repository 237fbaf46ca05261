"""The embedded model's pretraining, on text that no client has."""

import os
import random
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import torch

from fedomc_llm import models, texts
from fedomc_llm.errors import RunStopped
from fedomc_llm.training import loss_of

BATCH, LENGTH, LEARNING_RATE = 16, 128, 3e-3


def prepared(
    output: Path, steps: int, seed: int, progress: Callable[[int, float], bool] = lambda step, loss: False
) -> Path:
    """Return the folder of the embedded model in a folder of runs; it is pretrained if it is not there.

    Args:
        output: the folder of all runs.
        steps: of the pretraining.
        seed: of the model and its batches.
        progress: called after each step with its number and its loss; returns whether to stop.

    Raises:
        RunStopped: ``progress`` stopped the pretraining.
    """
    folder = output / f"base-{steps}-{seed}"
    if folder.is_dir():
        return folder
    torch.manual_seed(seed)
    model, tokenizer = models.embedded(), models.byte_tokenizer()
    sequences = texts.blocks(texts.public(), tokenizer, LENGTH, "text for the pretraining")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1)
    draw = random.Random(seed)  # noqa: S311
    model.train()
    for step in range(1, steps + 1):
        loss = loss_of(model, sequences[draw.sample(range(len(sequences)), BATCH)])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if progress(step, float(loss.detach())):
            raise RunStopped("the pretraining was stopped: nothing of it is kept")
    being_written = output / f".base-{uuid.uuid4().hex}"
    model.save_pretrained(being_written)  # type: ignore[operator]
    tokenizer.save_pretrained(being_written)
    try:
        os.replace(being_written, folder)
    except OSError:  # another run was faster
        shutil.rmtree(being_written)
        if not folder.is_dir():
            raise
    return folder
