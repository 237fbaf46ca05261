"""Compression methods: their common interface, the methods themselves, and packed variables."""

from fedomc.methods.encoding import Encoding
from fedomc.methods.floats import FloatFormat
from fedomc.methods.interchange import Interchange
from fedomc.methods.method import Field, Method, Writing
from fedomc.methods.packed import Packed, encode
from fedomc.methods.registry import method_from_header, parse_method, register, registered, unregister

__all__ = [
    "Encoding",
    "Field",
    "FloatFormat",
    "Interchange",
    "Method",
    "Packed",
    "Writing",
    "encode",
    "method_from_header",
    "parse_method",
    "register",
    "registered",
    "unregister",
]
