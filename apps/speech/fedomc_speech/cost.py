"""The cost of a run, estimated from one local step before the run starts."""

import time
from dataclasses import dataclass

import torch

import fedomc
from fedomc_speech import federation, pretraining, training
from fedomc_speech.augmentation import Augmentation
from fedomc_speech.client import client_data
from fedomc_speech.settings import Settings, Variant


@dataclass(frozen=True)
class Cost:
    """The cost of a visit to a client.

    Attributes:
        step_seconds: time of a local step on one core.
        visit_bytes: bytes of the arrays, down and up.
    """

    step_seconds: float
    visit_bytes: int


def cost_of(settings: Settings, variant: Variant) -> Cost:
    """Measure a local step of a variant."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on the clients
    parts, tokenizer = client_data(settings)
    network = pretraining.starting_model(settings, tokenizer)
    policy = variant.policy(settings)
    selection = None if policy is None else policy.select(network, round=1, client=0)
    if selection is not None:
        fedomc.compress_(network, selection)
    for _ in range(2):  # the first is slower than the others will be
        began = time.perf_counter()
        training.train_locally(
            network,
            parts[0],
            tokenizer,
            steps=1,
            batch=settings.batch,
            learning_rate=1e-3,
            clip_norm=1.0,
            seed=0,
            augment=Augmentation() if settings.augment else None,
            activations=settings.activations,
        )
        took = time.perf_counter() - began
    torch.set_num_threads(threads)
    return Cost(took, federation.bytes_of_a_visit(network, selection.unquantized if selection else ()))
