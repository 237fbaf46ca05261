"""The quantizer of ``transformers``, registered under the name ``fedomc`` when this module is imported.

The loader of ``transformers`` reads a tensor, converts it to the form that the model has (which may merge experts or
split projections), and passes it to ``_Pack``, before it reads the next one. A saved model has a frame, as uint8, in
the place of each packed tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fedomc.errors import PayloadError, PolicyError
from fedomc.methods import Encoding
from fedomc.serialization import frame
from fedomc.tensor.compressed import CompressedTensor, is_compressed
from fedomc.training.fidelity import Distance, warn_of_losses
from fedomc.training.model import check_dtype, compress_measured, decompress_
from fedomc.training.module_state import some
from fedomc.training.policy import CompressionPolicy

METHOD = "fedomc"
"""The name of the method in a ``config.json``."""


@register_quantization_config(METHOD)
class OMCConfig(QuantizationConfigMixin):
    """How the parameters of a model are packed: ``from_pretrained(path, quantization_config=OMCConfig("S1E2M3/64"))``.

    Attributes:
        format: as ``CompressionPolicy.parse`` takes it, such as ``S1E3M7`` or ``S1E2M3/64+S1E2M1/64``.
        include: name patterns of the variables that may be packed; empty means all weight matrices.
        exclude: name patterns of those that stay dense.

    Raises:
        FormatError: no such format.
        PolicyError: a pattern is not in a list.
    """

    def __init__(self, format: str, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # those of transformers are an enumeration
        self.format = format
        self.include, self.exclude = list(include), list(exclude)
        self.policy()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read what a ``config.json`` says; entries that are not known are ignored."""
        known = {name: config_dict[name] for name in ("format", "include", "exclude") if name in config_dict}
        return super().from_dict(known, return_unused_kwargs, **kwargs)  # type: ignore[no-untyped-call]

    def policy(self) -> CompressionPolicy:
        """Return the policy."""
        return CompressionPolicy.parse(self.format, include=self.include, exclude=self.exclude)


@register_quantizer(METHOD)
class OMCQuantizer(HfQuantizer):
    """Packs the tensors of a checkpoint as they are read, or takes packed ones as they are.

    Warns once, when all are packed, if the format cannot hold some of them, as ``training.fidelity`` explains.
    """

    quantization_config: OMCConfig
    requires_calibration = False

    def __init__(self, quantization_config: OMCConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._selected: dict[str, Encoding] = {}
        self._empty: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._distances: dict[str, Distance] = {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self._selected = dict(self.quantization_config.policy().select(model))
        for name in self._selected:
            parameter = model.get_parameter(name)
            check_dtype(name, parameter)
            self._empty[name] = tuple(parameter.shape), parameter.dtype
        if self.pre_quantized:  # missing ones are initialized and tied right after the last was read
            mark_tied = model.mark_tied_weights_as_initialized

            def unpack_first(*args: Any, **kwargs: Any) -> Any:
                self._unpack_frames(model)
                return mark_tied(*args, **kwargs)  # type: ignore[no-untyped-call]

            model.mark_tied_weights_as_initialized = unpack_first  # type: ignore[method-assign]

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Tell whether a parameter is packed."""
        return param_name in self._selected

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that packs what has been read."""
        return _Pack(self)

    def pack(self, name: str, values: Tensor) -> CompressedTensor:
        """Pack the values of a selected parameter in its dtype.

        Raises:
            PayloadError: they have another shape than the model.
            NonFiniteError: a value is NaN or infinite.
        """
        shape, dtype = self._empty[name]
        if tuple(values.shape) != shape:
            raise PayloadError(f"{name} has shape {tuple(values.shape)} in the checkpoint, but {shape} in the model")
        return compress_measured(values, self._selected[name], name, self._distances, dtype)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model._weight_conversions = []  # type: ignore[assignment]  # frames cannot be split or merged into the checkpoint's former tensors
        if self.pre_quantized:
            del model.mark_tied_weights_as_initialized
            missing = [name for name in self._selected if not is_compressed(model.get_parameter(name))]
            if missing:
                raise PayloadError(f"{some(missing)}: not packed in the checkpoint, although the configuration says so")
        warn_of_losses(self._distances, self._selected, stacklevel=2)
        return model

    def _unpack_frames(self, model: PreTrainedModel) -> None:
        for module_name, module in model.named_modules():
            for key, parameter in list(module._parameters.items()):
                name = f"{module_name}.{key}" if module_name else key
                if parameter is None or name not in self._selected or is_compressed(parameter) or parameter.is_meta:
                    continue
                if parameter.dtype is not torch.uint8:
                    raise PayloadError(f"{name} is {parameter.dtype} in the checkpoint, but should be packed")
                (shape, dtype), encoding = self._empty[name], self._selected[name]
                source = parameter.detach().cpu()
                # The codes stay in the file, which safetensors maps privately: what trains them writes copies of pages.
                is_aligned = source.data_ptr() % 4 == 0
                read = frame.from_bytes(source.numpy().data, name, copy=not is_aligned, shape=shape)
                if read.kind != frame.VARIABLE or read.packed.method != encoding.format:
                    raise PayloadError(
                        f"{name}: {read.packed.method} of kind {read.kind}, but {encoding.format} expected"
                    )
                value = CompressedTensor.from_packed(read.packed, encoding, shape, name, dtype)
                if not value.is_finite():
                    raise PayloadError(f"{name} has values beyond {dtype}")
                module._parameters[key] = nn.Parameter(value)
                module._parameters[key]._is_hf_initialized = True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the state of a model with a frame instead of each packed tensor.

        Raises:
            PolicyError: a variable has an update beside its base, or is not packed as the configuration says.
        """
        if not getattr(model, "_hf_peft_config_loaded", False):  # of those only adapters are written
            self._check_described(model)
        return packed_state(model), {}

    def _check_described(self, model: PreTrainedModel) -> None:
        described = self.quantization_config.policy().select(model)
        for name, parameter in model.named_parameters():
            found = str(parameter.format) if is_compressed(parameter) else "dense"
            expected = str(described[name].format) if name in described else "dense"
            if found != expected:
                raise PolicyError(
                    f"{name} is {found}, but {expected} in the model's configuration, so that what is saved could not "
                    "be loaded: compress_ it again, or fedomc.huggingface.attach_quantizer(model) for a configuration "
                    "of what is packed now, or model.dequantize() to save it dense"
                )

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> nn.Module:
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # save_pretrained leaves the name
        return decompress_(model).to(kind)

    def is_serializable(self) -> bool:
        """Return True: packed tensors are written as frames."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: packed parameters are trained as dense ones."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True, so that ``Trainer`` trains the parameters themselves and does not ask for adapters."""
        return True


def attach_quantizer(model: PreTrainedModel) -> PreTrainedModel:
    """Let ``save_pretrained`` write a model that ``compress_`` packed as one that was loaded with an ``OMCConfig``.

    Args:
        model: its configuration will say how it is packed, and it gets a quantizer; parameters stay as they are.

    Returns:
        The model.

    Raises:
        PolicyError: nothing is packed, or variables are packed in ways that one ``OMCConfig`` does not describe, as
            it has one format, and the transformation and rounding of a ``CompressionPolicy`` by default.
    """
    found = {name: p.encoding for name, p in model.named_parameters() if is_compressed(p)}
    if not found:
        raise PolicyError("no parameter of the model is compressed: compress_ it first, or save it as it is")
    config = OMCConfig(str(next(iter(found.values()))), include=list(found))
    described = config.policy().select(model)
    for name, encoding in found.items():
        if name not in described or replace(encoding, seed=described[name].seed) != described[name]:
            raise PolicyError(
                f"{name} is {encoding!r}, but an OMCConfig would describe it as {described.get(name)!r}: use "
                "fedomc.save_model, or compress_ the model in one format and with the other settings of a policy by "
                "default"
            )
    model.hf_quantizer = OMCQuantizer(config)  # type: ignore[assignment]
    model.config.quantization_config = config
    model._weight_conversions = []  # type: ignore[assignment]  # as after loading
    return model


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state with a frame instead of each packed tensor; tied names share one.

    Raises:
        PolicyError: a variable has an update beside its base.
    """
    state: dict[str, Tensor] = {}
    frames: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not is_compressed(tensor) or id(tensor) in frames:
            state[name] = frames.get(id(tensor), tensor.detach())
            continue
        if tensor.update is not None and not tensor.update.is_zero:
            raise PolicyError(
                f"{name} has been trained in two parts, which save_pretrained cannot write: use fedomc.save_model"
            )
        data = frame.to_bytes(tensor.base, tuple(tensor.shape), name=name)
        state[name] = frames[id(tensor)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return state


class _Pack(ConversionOps):
    """Packs the selected ones of the tensors that one conversion made."""

    def __init__(self, quantizer: OMCQuantizer) -> None:
        self._quantizer = quantizer

    def convert(  # type: ignore[override]  # patterns are of no use here
        self, input_dict: Mapping[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        """Replace each tensor by a parameter with its codes; a list has one."""
        packed: dict[str, Any] = {}
        for name, value in input_dict.items():
            values = value[0] if isinstance(value, list) else value
            selected = self._quantizer.param_needs_quantization(kwargs["model"], name)
            packed[name] = nn.Parameter(self._quantizer.pack(name, values)) if selected else values
        return packed
