"""The client's side: fills a model from a message, and collects the arrays of the reply."""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import Tensor, nn

from fedomc.codec.heap import heap
from fedomc.errors import PayloadError, PolicyError
from fedomc.flower.arrays import STYPE, framed_array, plain_array, read_dense, read_packed, records_of
from fedomc.flower.base_model import part_to_fill
from fedomc.flower.chunks import ChunkedArray
from fedomc.flower.config import CONFIG, from_config
from fedomc.flower.feedback import Residuals
from fedomc.flower.mapped import nbytes_of
from fedomc.flower.supervision import STEP_DRIFT, STEP_KEPT, STEP_NOISE
from fedomc.serialization import frame
from fedomc.serialization.downlink import as_held
from fedomc.serialization.uplink import Sent, UplinkConfig, reply_frame
from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.tensor.dtypes import DTYPES
from fedomc.training.base_model import TRAINABLE, travelling
from fedomc.training.model import replace_parameters
from fedomc.training.module_state import ModuleState, OwnedValue, some
from fedomc.training.step_report import step_report

_LEAST_TRIM = 32 * 2**20
"""The number of freed bytes below which the C library is not asked to return memory to the system."""


def install(
    model: nn.Module, message: Message | RecordDict, *, consume: bool = False, check_base: bool = True
) -> nn.Module:
    """Fill a model from a message; compressed variables stay packed, and no FP32 copy of them is made.

    A message may have only the variables that are trained, such as the adapters of ``peft``, if it names the base model
    that it is for (``OMCStrategy(base=...)``). The base model is what the message does not have. The model must hold it
    already, packed or plain; it must be frozen and have the digest in the message, and is not touched.

    Args:
        model: the model, which may be on the meta device; its parameters and persistent buffers, or those in the
            message, are replaced. Buffers that are not part of the state_dict must already have values, because no
            message contains them.
        message: the message, with one ``ArrayRecord`` of parameters and persistent buffers, and with the ``fedomc``
            config record if variables are compressed.
        consume: release the message's bytes as they are read, so that message and model are never both in memory.
            Bytes that ``collect`` will need are kept: with an uplink method, those of variables in one part and of
            those that partial quantization left in FP32.
        check_base: whether the digest of the base model is checked. Pass False on the server, where arrays do not come
            with a digest.

    Returns:
        The model.

    Raises:
        BaseModelError: the model has another base model than the message names. The model is unchanged.
        PayloadError: a variable is missing, unknown, damaged or has another shape. The model is unchanged, but with
            ``consume`` the message may be empty.
    """
    _, arrays, config = _content(message)
    state = ModuleState.of(model)
    tied = [name for name in arrays if name in state.aliases]
    if tied:
        raise PayloadError(
            f"{some(tied)} is tied to another variable and must be sent under one name only: send collect(model)"
        )
    state = part_to_fill(state, arrays.keys(), message, check_base=check_base)
    parameters = {name for name, tensor in state.tensors.items() if isinstance(tensor, nn.Parameter)}
    items = _consumed(message, parameters, config) if consume else iter(arrays.items())
    size = sum(map(nbytes_of, arrays.values()))
    del arrays
    state.fill((name, _read(array, name, state.tensors[name], config)) for name, array in items)
    for parameter in model.parameters():
        if is_compressed(parameter):
            parameter.steps.judged_here = False
    if consume:
        _trim_memory(size)
    return model


def collect(
    model: nn.Module,
    message: Message | RecordDict | None = None,
    *,
    variables: str | Sequence[str] | None = None,
    consume: bool = False,
    error_feedback: Context | None = None,
) -> ArrayRecord:
    """Return a model's parameters and persistent buffers as arrays; compressed variables stay packed.

    Of a model with frozen parameters, only what is trained is returned, unless ``variables`` says otherwise; of a
    variable in two parts only the update, because the receiver already has the base.

    Args:
        model: the model, plain or compressed.
        message: the message that the model was filled from. If it is given, the arrays are encoded as the server
            requested, see ``serialization.uplink.reply_frame``: as changes by an uplink method, or entropy coded.
            Variables that were received compressed but are dense in the model are then compressed again.
        variables: what is returned: ``trainable``: parameters that require gradients, and the buffers of modules that
            have such parameters themselves; ``all``; or name patterns, such as ``["*lora_*"]``. None is what the
            message has, or, without a message, ``trainable``.
        consume: release each parameter once it is written, so that model and arrays are never both in memory, and
            store the arrays in the form in which Flower sends them, so that sending makes no copy. Afterwards, the
            parameters are on the meta device and have no gradients; ``install`` can fill the model again.
        error_feedback: the client's context, in whose state the residual of each variable is kept: what the receiver
            still lacks of the changes so far is added to the next change. It needs an uplink in the server's policy,
            and a byte for each value that goes up in it. ``flower.feedback`` says when it helps and when it does harm:
            not with momentum on the server.

    Returns:
        The arrays by qualified name; tied parameters appear once.

    Raises:
        NonFiniteError: a variable that has to be encoded has a value or a change that is NaN or infinite.
        PayloadError: a variable has a dtype that neither numpy has nor is bfloat16; or the message is damaged, belongs
            to another model, or no longer has the bytes that are needed.
        PolicyError: the server requests entropy coding, but zstandard is not installed; or, with ``consume``, a
            parameter is stepped in backward; or error feedback is requested without a message, or the server's
            policy has no uplink; or ``variables`` names none, or has a pattern that matches none.
    """
    if error_feedback is not None and message is None:
        raise PolicyError("error feedback needs the message that the model was filled from: pass it to collect")
    model_key, sent, config = ("", {}, None) if message is None else _content(message)
    # A client that is sent FP32 sends FP32, which loses nothing.
    residuals = None if error_feedback is None or config is None else Residuals(error_feedback, model_key, config)
    state = _collected(ModuleState.of(model), variables, sent)
    record, written = ArrayRecord(), [0]

    def emptied() -> Iterator[tuple[str, Tensor]]:
        for name in list(state):
            tensor = state.pop(name)
            array = _written(tensor, name, sent.get(name), config, residuals)
            written[0] += len(array.data)
            record[name] = ChunkedArray(array) if consume else array
            del array
            if consume and isinstance(tensor, nn.Parameter):
                tensor.grad = None
                yield name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    names = list(state)
    replace_parameters(model, emptied())
    if residuals is not None:
        residuals.keep(names)
    if consume:
        _trim_memory(written[0])
    return record


def step_metrics(model: nn.Module) -> dict[str, float]:
    """Return metrics for the reply that say how much of the training steps took effect; see ``fedomc.step_report``.

    The server warns if the noise of rounding spoils training; a client cannot judge it, as the mean over clients has
    less of it.

    Args:
        model: the trained model, before ``collect(consume=True)``.

    Returns:
        ``fedomc.step-kept``, ``fedomc.step-noise`` and ``fedomc.step-drift``; an empty dict if no step was measured, as
        for an FP32 model.
    """
    report = step_report(model)
    if not report.variables:
        return {}
    return {STEP_KEPT: report.total.kept, STEP_NOISE: report.total.noise, STEP_DRIFT: report.total.drift}


def _collected(
    state: ModuleState, variables: str | Sequence[str] | None, sent: Mapping[str, Array]
) -> dict[str, Tensor]:
    """Return the variables that are returned to the sender."""
    if variables is None and sent:
        if unknown := [name for name in sent if name not in state.tensors]:
            raise PayloadError(f"the message has {some(unknown)}, which the model does not have")
        return state.part(sent.keys()).tensors
    return state.part(travelling(state, variables or TRAINABLE)).tensors


def _content(message: Message | RecordDict) -> tuple[str, Mapping[str, Array], UplinkConfig | None]:
    """Return the name of the record of the model, its arrays, and what the sender asks for."""
    content = message.content if isinstance(message, Message) else message
    records = records_of(content, ArrayRecord)
    if len(records) != 1:
        raise PayloadError(f"the message has {len(records)} array records, but exactly one is expected")
    ((key, arrays),) = records.items()
    config = records_of(content, ConfigRecord).get(CONFIG)
    return key, arrays, None if config is None else from_config(config)


def _read(array: Array, name: str, old: Tensor, config: UplinkConfig | None) -> Tensor | OwnedValue:
    """Read a variable; dense values may be views of the message, and are not checked here."""
    if tuple(array.shape) != tuple(old.shape):
        raise PayloadError(f"{name} has shape {tuple(array.shape)}, but {tuple(old.shape)} in the model")
    if array.stype != STYPE:
        return read_dense(array, name, check=False)
    if config is None:
        raise PayloadError(f"{name} is compressed, but the message has no {CONFIG!r} config record")
    # A base is never rewritten, so it may be a view of the message; a variable in one part needs its own memory.
    parsed = read_packed(array, name, copy=config.encoding.rewrites_what_arrives)
    if parsed.kind == frame.UPDATE:
        raise PayloadError(f"{name} contains only an update, from which a model cannot be filled: send the variable")
    if parsed.kind != frame.DENSE:
        dtype = old.dtype if old.dtype in DTYPES else torch.float32
        held = as_held(parsed.packed, config.encoding, name)
        return CompressedTensor.from_packed(held, config.encoding, parsed.shape, name, dtype)
    if parsed.packed.method != config.unquantized_format:
        raise PayloadError(
            f"{name} is in {parsed.packed.method}, but the message says unquantized_format={config.unquantized_format}"
        )
    values = torch.empty(parsed.packed.numel, dtype=torch.float32, device="cpu")
    decoded = parsed.packed.decode(values).view(parsed.shape)
    return OwnedValue(decoded.to(old.dtype) if old.dtype in DTYPES else decoded)


def _consumed(
    message: Message | RecordDict, parameters: Collection[str], config: UplinkConfig | None
) -> Iterator[tuple[str, Array]]:
    """Yield a message's arrays and release them one by one; their data are removed from the message."""
    content = message.content if isinstance(message, Message) else message
    ((key, record),) = records_of(content, ArrayRecord).items()
    pending = deque(record.items())
    if isinstance(message, Message):  # other messages may share the content and the record, so replace, do not modify
        message.content = content = RecordDict(dict(content.items()))
    content[key] = _without_data(record, parameters, config)
    del record
    while pending:
        yield pending.popleft()


def _without_data(record: Mapping[str, Array], parameters: Collection[str], config: UplinkConfig | None) -> ArrayRecord:
    emptied = ArrayRecord()
    for name, array in record.items():
        keep = _needed_by_collect(array, name, name in parameters, config)
        emptied[name] = array if keep else Array(array.dtype, tuple(array.shape), array.stype, b"")
    return emptied


def _needed_by_collect(array: Array, name: str, parameter: bool, config: UplinkConfig | None) -> bool:
    """Return whether ``collect`` will read this array, for a difference to its values or for its format."""
    if config is None or array.stype != STYPE:
        return config is not None and config.asks_for_change(name)
    dense = not parameter or config.unquantized_format is not None  # buffers are dense in the model
    return dense or (_differs_from_codes(config) and config.encoding.update_format is None)


def _differs_from_codes(config: UplinkConfig) -> bool:
    """Return whether a variable in one part is sent back as a difference to the received codes."""
    # What was sent in another method than it is held in has no codes to which the held ones could be near.
    return (config.entropy_coding and config.encoding.downlink is None) or config.uplink is not None


def _written(
    tensor: Tensor, name: str, array: Array | None, config: UplinkConfig | None, residuals: Residuals | None
) -> Array:
    """Encode a variable for the reply; the array is the one that was received for it."""
    if array is not None and tuple(array.shape) != tuple(tensor.shape):
        raise PayloadError(f"{name} has shape {tuple(tensor.shape)}, but was received with {tuple(array.shape)}")
    shape = tuple(tensor.shape)
    feedback = None if residuals is None else residuals.feedback(name, shape)
    data = reply_frame(tensor, _sent(tensor, name, array, config), config, name, feedback)
    if residuals is not None and feedback is not None:
        residuals.add(name, shape, feedback)
    if data is not None:
        return framed_array(data, shape)
    return plain_array(tensor, name)


def _sent(tensor: Tensor, name: str, array: Array | None, config: UplinkConfig | None) -> Sent | None:
    """Read a variable from the received array if the reply depends on it; otherwise return None."""
    if array is None or config is None or (array.stype != STYPE and not config.asks_for_change(name)):
        return None
    if is_compressed(tensor) and (tensor.update is not None or not _differs_from_codes(config)):
        return None
    if not nbytes_of(array):
        raise PayloadError(
            f"{name} is no longer compressed, so its reply needs the received bytes, which install(consume=True) has "
            "released: install without consume, or call collect before decompressing the model"
        )
    if array.stype != STYPE:
        return read_dense(array, name, check=False)
    return read_packed(array, name, copy=False)


def _trim_memory(freed: int) -> None:
    """Have the C library return freed memory to the system; only glibc keeps enough of it to matter.

    A message arrives in pieces of many sizes, interleaved with other allocations. Without trimming, a client's process
    stays larger by more than the size of the message: by 240 of 1000 MB for a message of 190 MB. A few megabytes are
    not returned, because training needs them again; returning them would cost a small model an eighth of its round.
    """
    if freed >= _LEAST_TRIM:
        heap.trim()
