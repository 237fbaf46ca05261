"""The application's client as it would be without fedomc, in the manner of Flower's examples: a baseline.

``benchmarks.deployment`` puts it in the place of ``fedomc_speech.client``. It runs on the nodes.
"""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedomc_speech import features, model
from fedomc_speech.client import client_data, identify, read_settings

app = ClientApp()
app.query()(identify)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Do a step of SGD on this node's first utterances."""
    torch.set_num_threads(1)
    settings = read_settings(message.content["config"])
    clients, tokenizer = client_data(settings)
    utterances = clients[int(context.node_config["partition-id"])][: settings.batch]
    network = model.build(settings.model, tokenizer.vocab_size, seed=0)
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.client_learning_rate)
    ready = features.pad([features.log_mel(utterance.audio(), network.mels) for utterance in utterances])
    loss = network.ctc_loss(ready.features, ready.frames, [tokenizer.encode(one.text) for one in utterances])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
    optimizer.step()
    held = sum(parameter.nbytes for parameter in network.parameters())
    metrics = MetricRecord({"num-examples": len(utterances), "loss": float(loss.detach()), "parameter-bytes": held})
    return Message(RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics}), reply_to=message)
