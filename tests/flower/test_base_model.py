"""Adapters on a packed, frozen base model: they alone travel, and a client with another base model is refused."""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAvg
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fedomc
from fedomc.errors import BaseModelError, PayloadError, PolicyError
from fedomc.flower import Checkpoints, OMCStrategy, collect, install, omc_mod
from fedomc.flower.arrays import STYPE
from fedomc.flower.base_model import RECORD
from fedomc.serialization import frame
from fedomc.tensor import compressed
from tests.flower.test_aggregation import Network

BASE = "S1E3M7"
LORA = peft.LoraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=True)
TOKENS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(1))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapted(format: str | None = BASE, *, wrapped_first: bool = False) -> nn.Module:
    """Make a model with adapters on a base in a format; None is FP32."""
    model: nn.Module = llama()
    if not wrapped_first and format:
        fedomc.compress_(model, format)
    torch.manual_seed(2)
    model = peft.get_peft_model(model, LORA)
    if wrapped_first and format:
        fedomc.compress_(model, fedomc.CompressionPolicy.parse(format, exclude=["*lora_*"]))
    return model


def base_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}


def train(model: nn.Module, steps: int = 3, rate: float = 1e-2) -> list[float]:
    """Train what is trainable with AdamW, and return the losses."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(learning, lr=rate), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


class Federation:
    """A server and nodes whose clients keep their models."""

    def __init__(
        self,
        policy: str | None,
        make: Callable[[], nn.Module] = adapted,
        nodes: int = 2,
        *,
        dense_adapters: bool = False,
        **options: object,
    ) -> None:
        self.server = adapted()
        self.make, self.models, self.dense_adapters = make, dict[int, nn.Module](), dense_adapters
        options = {"base": fedomc.base_digest(self.server), **options}
        parsed = None if policy is None else fedomc.CompressionPolicy.parse(policy, weight_matrices_only=False)
        self.strategy = OMCStrategy(FedAvg(fraction_evaluate=0.0), parsed, **options)  # type: ignore[arg-type]
        self.network = Network(nodes, self.answer)
        self.replies: list[ArrayRecord] = []
        self.errors: list[Exception] = []

    def answer(self, message: Message) -> Message:
        try:
            return self.trained(message)
        except Exception as error:  # as in Flower's engines
            self.errors.append(error)
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, repr(error)), reply_to=message)

    def trained(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node not in self.models:
            self.models[node] = self.make()
        model = install(self.models[node], message)
        if self.dense_adapters:
            fedomc.decompress_(model, ["*lora_*"])
        metrics = MetricRecord({"num-examples": 4, "loss": train(model)[0]})
        self.replies.append(collect(model, message))
        return Message(RecordDict({"arrays": self.replies[-1], "metrics": metrics}), reply_to=message)

    def run(self, rounds: int = 3) -> tuple[ArrayRecord, list[float]]:
        result = self.strategy.start(self.network, collect(self.server), num_rounds=rounds)  # type: ignore[arg-type]
        assert result.arrays is not None
        return result.arrays, [float(metrics["loss"]) for metrics in result.train_metrics_clientapp.values()]  # type: ignore[arg-type]


@pytest.mark.parametrize("wrapped_first", [False, True])
@pytest.mark.parametrize(
    ("policy", "dense"),
    [(None, False), ("S1E4M3", False), ("S1E4M3", True), ("S1E3M7+S1E2M3", False), ("S1E4M3>DRIVE2", True)],
)
def test_adapters_alone_travel_and_learn(
    policy: str | None, dense: bool, wrapped_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation(policy, lambda: adapted(wrapped_first=wrapped_first), dense_adapters=dense)
    decoded: list[str] = []
    whole = compressed.CompressedTensor.dequantize
    monkeypatch.setattr(
        compressed.CompressedTensor,
        "dequantize",
        lambda t: decoded.append(t.variable) or whole(t),  # type: ignore[func-returns-value]
    )
    arrays, losses = federation.run()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05
    assert all("lora_" in name for name in arrays) and set(arrays) == set(collect(federation.server))
    assert len(federation.replies) == 6 and not federation.errors
    for reply in federation.replies:
        assert set(reply) == set(arrays)
        stypes = {array.stype for array in reply.values()}
        assert stypes == ({"numpy.ndarray"} if policy is None else {STYPE})
    fp32 = 4 * sum(p.numel() for p in federation.server.parameters())
    assert federation.strategy.traffic[-1].up_bytes / 2 < 0.12 * fp32
    for model in federation.models.values():  # as it was made, bit for bit, and not compressed a second time
        expected = base_of(adapted(wrapped_first=wrapped_first))
        for name, parameter in base_of(model).items():
            assert isinstance(parameter, fedomc.CompressedTensor) == (parameter.dim() == 2), name
            if isinstance(parameter, fedomc.CompressedTensor):
                assert torch.equal(parameter.base.codes, expected[name].base.codes) and parameter.base.state.draws == 1
    assert all("lora_" in name for name in decoded)
    filled = install(federation.server, RecordDict({"arrays": arrays}), check_base=False)
    with torch.no_grad():
        assert float(filled(TOKENS, labels=TOKENS).loss) < losses[0]


def test_training_on_a_packed_base_is_training_on_its_decompressed_values() -> None:
    packed, plain = adapted(), adapted()
    fedomc.decompress_(plain)
    assert train(packed, 5) == pytest.approx(train(plain, 5), rel=1e-5)
    assert fedomc.base_digest(packed) == fedomc.base_digest(plain)


def test_a_base_comes_from_its_own_file(tmp_path: Path) -> None:
    """The client never holds the base in FP32: meta device, file, adapters, message."""
    fedomc.save_model(fedomc.compress_(llama(), BASE), tmp_path / "base.safetensors")

    def make() -> nn.Module:
        with torch.device("meta"):
            model = llama()
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffers are in no file
        return peft.get_peft_model(fedomc.load_model(model, tmp_path / "base.safetensors"), LORA)

    federation = Federation("S1E4M3", make)
    _, losses = federation.run(2)
    assert losses[-1] < losses[0]


def test_clients_with_another_base_are_refused_before_they_train(flower_log: pytest.LogCaptureFixture) -> None:
    """Node 1 has the base, node 2 holds it in other bits, and is not part of the mean."""
    makes = iter([adapted, lambda: adapted("S1E2M3")])
    federation = Federation(None, lambda: next(makes)())
    other = fedomc.base_digest(adapted("S1E2M3"))
    arrays, _ = federation.run(1)
    assert federation.strategy.traffic[-1].received == 1
    (error,) = federation.errors
    assert isinstance(error, BaseModelError)
    for digest in (other, fedomc.base_digest(federation.server)):
        assert digest in str(error) and digest in flower_log.text
    (first,) = federation.replies
    for name, array in arrays.items():
        assert array.numpy() == pytest.approx(first[name].numpy(), rel=1e-5, abs=1e-7)


def test_a_server_can_accept_a_base_in_several_formats() -> None:
    bases = [fedomc.base_digest(adapted(format)) for format in (None, BASE, "NF4")]
    makes = iter([lambda: adapted("NF4"), lambda: adapted(None)])
    federation = Federation("S1E4M3", lambda: next(makes)(), base=bases)
    _, losses = federation.run(2)
    assert losses[-1] < losses[0] and federation.strategy.traffic[-1].received == 2


def sent(policy: str | None = None, *, base: str | None = None, model: nn.Module | None = None) -> Message:
    """Return a message of the server with adapters."""
    model = model or adapted()
    strategy = OMCStrategy(
        FedAvg(min_train_nodes=1, min_available_nodes=1),
        None if policy is None else fedomc.CompressionPolicy.parse(policy),
        base=fedomc.base_digest(model) if base is None else base,
    )
    network = Network(1, lambda message: None)
    (message,) = strategy.configure_train(1, collect(model), ConfigRecord(), network)  # type: ignore[arg-type]
    return message


def changed(change: Callable[[nn.Module], object]) -> nn.Module:
    model = adapted()
    change(model)
    return model


def names_of_all(record: ArrayRecord) -> ArrayRecord:
    other = ArrayRecord()
    for name, array in record.items():
        other[f"x.{name}"] = array
    return other


@pytest.mark.parametrize(
    ("model", "spoil", "error", "says"),
    [
        (lambda: changed(lambda m: (train(m), m.merge_adapter())), None, BaseModelError, "is for the base model"),
        (lambda: adapted(None), None, BaseModelError, "in the same format"),
        (lambda: changed(lambda m: m.base_model.model.model.norm.requires_grad_(True)), None, PayloadError,
         r"model\.norm\.weight is trained: call requires_grad_"),
        (lambda: changed(lambda m: m.to("meta")), None, PayloadError, "meta device"),
        (llama, None, PayloadError, "unknown"),
        (adapted, lambda c: c.pop(RECORD), PayloadError, r"pass base=fedomc\.base_digest"),
        (adapted, lambda c: c.update({RECORD: ConfigRecord({"digests": 3})}), PayloadError, "no list of digests"),
        (adapted, lambda c: c.update({RECORD: ConfigRecord({})}), PayloadError, "no list of digests"),
        (adapted, lambda c: c.update({"arrays": names_of_all(c["arrays"])}), PayloadError, "unknown"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("consume", [False, True])
def test_what_does_not_fit_is_refused_and_changes_nothing(
    model: Callable[[], nn.Module], spoil: Callable[[RecordDict], object] | None, error: type, says: str, consume: bool
) -> None:
    message, filled = sent("S1E4M3"), model()
    if spoil:
        spoil(message.content)
    before = {name: id(tensor) for name, tensor in filled.named_parameters()}
    with pytest.raises(error, match=says):
        install(filled, message, consume=consume)
    assert {name: id(tensor) for name, tensor in filled.named_parameters()} == before


def test_a_whole_model_may_name_no_base_and_a_part_is_filled_on_the_server_without_one() -> None:
    message = Message(RecordDict({"arrays": collect(adapted(None), variables="all")}), 1, "train")
    install(adapted(None), message)
    install(adapted(None), RecordDict({"arrays": collect(adapted())}), check_base=False)
    with pytest.raises(BaseModelError):  # all is sent, and yet for a base
        message.content[RECORD] = ConfigRecord({"digests": [fedomc.base_digest(adapted())]})
        install(adapted(None), message)


def test_consumed_messages_fill_the_adapters_and_the_base_stays() -> None:
    model, message = adapted(), sent("S1E4M3", model=changed(train))
    bases = {name: id(tensor) for name, tensor in base_of(model).items()}
    install(model, message, consume=True)
    assert {name: id(tensor) for name, tensor in base_of(model).items()} == bases
    assert all(
        isinstance(p, fedomc.CompressedTensor) and p.requires_grad for n, p in model.named_parameters() if "lora_" in n
    )
    train(model)
    record = collect(model, message, consume=True)
    assert set(record) == set(message.content["arrays"])
    assert {p.is_meta for n, p in model.named_parameters() if "lora_" in n} == {True}
    assert {name: id(tensor) for name, tensor in base_of(model).items()} == bases
    train(install(model, sent("S1E4M3")))


def test_patterns_choose_what_travels() -> None:
    model = adapted()
    record = collect(model, variables=["*lora_A*"])
    assert record and all("lora_A" in name for name in record)
    with pytest.raises(PolicyError, match="matches none"):
        collect(model, variables=["*ia3*"])
    with pytest.raises(PayloadError, match="which the model does not have"):
        collect(llama(), sent())


def test_merging_puts_the_adapters_into_the_base_and_unloading_returns_the_model() -> None:
    """Into a packed base, up to its rounding; a base in FP32 gives what was trained."""
    model = adapted()
    train(model, 20)
    with torch.no_grad():
        expected = model(TOKENS).logits
        without = llama()(TOKENS).logits
    plain = copy.deepcopy(model)
    fedomc.decompress_(plain)
    for held, error in ((model, 0.02), (plain, 1e-5)):
        merged = held.merge_and_unload()
        assert type(merged) is LlamaForCausalLM and not any("lora_" in name for name, _ in merged.named_parameters())
        weight = merged.model.layers[0].self_attn.q_proj.weight
        assert isinstance(weight, fedomc.CompressedTensor) is (held is model)
        with torch.no_grad():
            found = merged(TOKENS).logits
        assert (found - expected).norm() < error * expected.norm() < 0.5 * (without - expected).norm()


def test_gradient_checkpointing_gives_the_same_losses() -> None:
    model = adapted()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert train(model) == train(adapted())


def test_a_mod_passes_the_base_on_to_the_app() -> None:
    seen: list[RecordDict] = []

    def app(message: Message, context: Context) -> Message:
        seen.append(message.content)
        return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)

    reply = omc_mod(sent("S1E4M3"), Context(1, 1, {}, RecordDict(), {}), app)
    assert seen[0][RECORD]["digests"] == [fedomc.base_digest(adapted())]
    assert RECORD not in reply.content and all(a.stype == STYPE for a in reply.content["arrays"].values())


@pytest.mark.parametrize("base", ["", "0" * 31, ["0" * 32, None], "S1E3M7"])
def test_what_is_no_digest_is_named(base: object) -> None:
    with pytest.raises(PolicyError, match="is not a digest"):
        OMCStrategy(FedAvg(), None, base=base)  # type: ignore[arg-type]


def test_a_run_is_not_resumed_with_another_base(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path)
    federation = Federation("S1E4M3", checkpoints=folder)
    federation.run(1)
    federation = Federation("S1E4M3", checkpoints=folder, base="0" * 32)
    with pytest.raises(PayloadError, match="checkpoint was made with"):
        federation.run(2)
    _, losses = Federation("S1E4M3", checkpoints=folder).run(2)
    assert len(losses) == 2


def test_frames_of_adapters_are_variables_or_updates() -> None:
    message = sent("S1E3M7+S1E2M3")
    model = adapted()
    train(install(model, message))
    kinds = {frame.from_bytes(a.data, n).kind for n, a in collect(model, message).items() if a.stype == STYPE}
    assert kinds == {frame.UPDATE}
