"""Local training on a client, the loss of held-out text, and samples."""

import math
import random
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

import fedomc
from fedomc_llm.errors import ModelError
from fedomc_llm.models import ADAPTERS

STATE_FORMAT = "S1E4M3/64"
"""The format of AdamW's moments where parameters are compressed."""


@dataclass(frozen=True)
class LocalResult:
    """The result of local training on a client.

    Attributes:
        loss: mean cross-entropy of a token, over all steps, in nats.
        tokens: number of tokens that were predicted, with repetitions.
        held_bytes: bytes of the parameters and of the optimizer's state.
    """

    loss: float
    tokens: int
    held_bytes: int


def train_locally(
    model: nn.Module,
    sequences: Tensor,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    checkpointing: bool = False,
    activations: str = "",
    head_slice: int = 0,
) -> LocalResult:
    """Train in place what is not frozen, with AdamW that steps in the backward pass.

    Args:
        model: plain or compressed. Adapters that arrived compressed are decompressed, as they are small.
        sequences: token numbers ``[N, T]``.
        steps: number of steps.
        batch: sequences in a step, drawn without replacement while there are enough.
        learning_rate: of AdamW.
        seed: of the batches and of dropout.
        checkpointing: whether layers are computed again in the backward pass.
        activations: the format in which activations are held; empty leaves them as they are.
        head_slice: see ``loss_of``.
    """
    if any(not parameter.requires_grad for parameter in model.parameters()):
        fedomc.decompress_(model, [ADAPTERS])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    packed = any(isinstance(parameter, fedomc.CompressedTensor) for parameter in trained)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    order = list(range(len(sequences)))
    random.Random(seed).shuffle(order)  # noqa: S311
    torch.manual_seed(seed)
    stepping = fedomc.step_in_backward(
        model, torch.optim.AdamW, lr=learning_rate, weight_decay=0.0, state_format=STATE_FORMAT if packed else None
    )
    model.train()
    losses = []
    try:
        called = _backbone(model) if head_slice else model
        with fedomc.compress_activations(called, activations) if activations else nullcontext():
            for step in range(steps):
                chosen = [order[(step * batch + i) % len(order)] for i in range(min(batch, len(order)))]
                loss = loss_of(model, sequences[chosen], head_slice)
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(float(loss.detach()))
        held = fedomc.parameter_bytes(model).total + _state_bytes(stepping.optimizer)
    finally:
        stepping.remove()
    seen = steps * min(batch, len(order)) * (sequences.shape[1] - 1)
    return LocalResult(math.fsum(losses) / len(losses), seen, held)


def loss_of(model: nn.Module, sequences: Tensor, head_slice: int = 0) -> Tensor:
    """Return the mean cross-entropy of each token ``[B, T]`` given those before it, in nats.

    Args:
        model: of ``transformers``, with adapters or without.
        sequences: token numbers ``[B, T]``.
        head_slice: entries of the vocabulary whose logits are in memory at a time; see
            ``fedomc.linear_cross_entropy``. 0 is all, in the model's own loss.

    Raises:
        ModelError: logits are to be sliced, but those of this model are not the product of its head alone.
    """
    if not head_slice:
        loss: Tensor = model(input_ids=sequences, labels=sequences, use_cache=False).loss
        return loss
    whole: Any = _without_adapters(model)
    if any(getattr(whole.config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")):
        raise ModelError(f"head_slice={head_slice}: {type(whole).__name__} changes its logits, so set it to 0")
    head = whole.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        name = type(whole).__name__
        raise ModelError(f"head_slice={head_slice}: the head of {name} is more than a matrix, so set it to 0")
    hidden = _backbone(model)(input_ids=sequences, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)  # [N, D]
    return fedomc.linear_cross_entropy(hidden, head.weight, sequences[:, 1:].flatten(), classes=head_slice)


def _without_adapters(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _backbone(model: nn.Module) -> nn.Module:
    """Return the part of a causal language model before its head, which alone is called where logits are sliced."""
    return cast(nn.Module, _without_adapters(model).base_model)


def held_out_loss(model: nn.Module, sequences: Tensor, batch: int, head_slice: int = 0) -> tuple[float, int]:
    """Measure the mean loss of a token, and count the tokens that were predicted."""
    model.eval()
    total = 0.0
    with torch.no_grad():
        for part in torch.split(sequences, batch):
            total += float(loss_of(model, part, head_slice)) * len(part)
    return total / len(sequences), len(sequences) * (sequences.shape[1] - 1)


def sample(model: nn.Module, tokenizer: Any, prompt: str, tokens: int, seed: int) -> str:
    """Continue a prompt with random tokens, of the 20 most likely each; the result begins with the prompt."""
    model.eval()
    torch.manual_seed(seed)
    begin = tokenizer(prompt, return_tensors="pt", add_special_tokens=True).input_ids
    with torch.no_grad():
        made = model.generate(  # type: ignore[operator]
            begin,
            attention_mask=torch.ones_like(begin),
            max_new_tokens=tokens,
            do_sample=True,
            top_k=20,
            temperature=0.8,
            pad_token_id=0,
        )
    text: str = tokenizer.decode(made[0], skip_special_tokens=True)
    return text


def perplexity(loss: float) -> float:
    """Return the perplexity of a token at a loss in nats; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.nbytes for tensor in tensors)
