"""Hugging Face's ``transformers``: models are packed while their checkpoint is read, and saved packed."""

from fedomc.huggingface.quantizer import OMCConfig, OMCQuantizer, attach_quantizer

__all__ = ["OMCConfig", "OMCQuantizer", "attach_quantizer"]
