"""What a site runs: an ordinary script of NVFlare's client API that knows nothing of compression."""

import zlib

import nvflare.client as flare
import torch
from model import Net, accuracy, stripes

torch.set_num_threads(1)


def main() -> None:
    """Train on the site's own images whenever a model comes."""
    flare.init()
    images, labels = stripes(1024, seed=zlib.crc32(flare.get_site_name().encode()))
    model = Net()
    while flare.is_running():
        received = flare.receive()
        model.load_state_dict(received.params)
        before = accuracy(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(received.current_round))
        steps = order.split(32)
        for batch in steps:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
        print(f"round {received.current_round}: accuracy {before:.3f} as received, loss {float(loss):.3f} at the end")
        flare.send(
            flare.FLModel(
                params=model.state_dict(),
                metrics={"accuracy": before},
                meta={"NUM_STEPS_CURRENT_ROUND": len(steps)},
            )
        )


if __name__ == "__main__":
    main()
