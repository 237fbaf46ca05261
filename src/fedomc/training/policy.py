"""Which variables of a model are compressed, for which client, in which round, and how."""

import functools
import hashlib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

from torch import nn

from fedomc.errors import PolicyError
from fedomc.methods import Encoding, Method, parse_method
from fedomc.methods.encoding import parse_formats
from fedomc.training.lazy import check_initialized
from fedomc.training.selection import Selection, check_patterns, held_bytes, matches, shapes_of

DEFAULT = "S1E2M3/64+S1E2M1/64"
"""The formats that ``compress_`` uses if none are given, in the notation of ``CompressionPolicy.parse``.

A value takes ten bits, of which a server sends six. ``docs/results/recipes.md`` has the recipes that were measured.
"""


@dataclass(frozen=True)
class CompressionPolicy:
    """How the models of a federation are compressed.

    Attributes:
        format: the format of each variable, or in two parts of its base, such as ``S1E3M7``.
        update_format: the format of a part of its own for the local steps; None keeps variables in one part.
        transform: the transformation before rounding, ``none``, ``affine``, ``scaled`` or ``scaled-affine``; None is
            ``scaled``.
        weight_matrices_only: whether normalization, biases and scalars stay in FP32: everything without two or more
            dimensions larger than 1. So do matrices of a few values, where the padding of the bit layout takes as many
            bytes as the format saves.
        fraction: the share of the compressible parameters that is compressed. The rest, whole variables drawn at random
            for each client and round, stays in FP32 (partial parameter quantization in the paper).
        rounding: how each change of a variable in training is rounded, ``stochastic`` or ``nearest``. What a server
            sends is rounded to nearest.
        seed: the seed of the random choices.
        include: name patterns (``fnmatch``) of the variables that may be compressed; empty means all.
        exclude: name patterns of those that may not. Unlike other patterns these may match nothing, so that one list
            serves many models.
        format_by_name: formats that some variables have instead of ``format``, by name pattern, such as
            ``{"*.conv.*": "S1E2M3"}``. The first pattern that matches counts. Kept as pairs.
        uplink: the method in which clients send back what they changed, such as ``S1E2M1`` or ``DRIVE1``. The change of
            each variable that may be compressed, also of those that ``fraction`` leaves in FP32, is rounded once,
            stochastically. None sends back what is held.
        uplink_include: name patterns of further variables, such as biases, that are sent and held in FP32 but whose
            change is sent back by the uplink method, if that takes fewer bytes. Do not name running statistics:
            rounding can make a variance negative. With DRIVE1, including biases and normalization left the accuracy of
            a CNN as it was with FedAvg and FedAdam, and cost two points with FedAvgM (scikit-learn's digits, 3 seeds).
        downlink: the method in which a server sends variables in one part; clients encode what arrives once more, in
            ``format``. A coarse broadcast alone can cost no accuracy where training from scratch in the coarse format
            does. None sends variables as they are held.

    Raises:
        FormatError: a format does not exist.
        PolicyError: a fraction outside 0..1, an unknown transformation or rounding, a method that holds no variable,
            outside of the uplink, ``uplink_include`` without an uplink, or a downlink with two parts or with
            ``format_by_name``.
    """

    format: str | Method
    update_format: str | Method | None = None
    transform: str | None = None
    weight_matrices_only: bool = True
    fraction: float = 1.0
    rounding: str = "stochastic"
    seed: int = 0
    include: Sequence[str] = field(default=())
    exclude: Sequence[str] = field(default=())
    format_by_name: Mapping[str, str | Method] | Sequence[tuple[str, str | Method]] = ()
    uplink: str | Method | None = None
    uplink_include: Sequence[str] = field(default=())
    downlink: str | Method | None = None

    @classmethod
    def parse(cls, text: "str | CompressionPolicy", **kwargs: Any) -> "CompressionPolicy":
        """Read formats as ``Encoding.parse`` does, and a fraction behind ``@``; a policy passes through.

        Examples are ``S1E3M7``, ``S1E3M7@0.9``, ``S1E2M3+S1E2M1`` for two parts, ``S1E3M7>DRIVE1@0.9`` with an uplink,
        and ``S1E2M5/64<S1E2M3/256`` with a downlink.

        Args:
            text: what to read.
            **kwargs: further attributes.

        Raises:
            FormatError: a format that does not exist.
            PolicyError: what follows ``@`` is not a number from 0 to 1.
        """
        if isinstance(text, CompressionPolicy):
            return text
        formats, at, fraction = text.partition("@")
        encoding = Encoding.parse(formats)
        if at:
            try:
                kwargs["fraction"] = float(fraction)
            except ValueError:
                raise PolicyError(f"{text!r}: @ must be followed by the share to compress, as in S1E3M7@0.9") from None
        if encoding.uplink is not None:
            kwargs["uplink"] = encoding.uplink
        if encoding.downlink is not None:
            kwargs["downlink"] = encoding.downlink
        return cls(encoding.format, encoding.update_format, **kwargs)

    def __str__(self) -> str:
        """Return the formats and the fraction, as ``parse`` reads them."""
        formats = "|".join(str(self.encoding(each)) for each in self.formats)
        return formats + (f"@{self.fraction:g}" if self.fraction < 1 else "")

    def __post_init__(self) -> None:
        parse_formats(self)
        if not 0 <= self.fraction <= 1:  # also false for NaN
            raise PolicyError(f"fraction={self.fraction} is out of range: it must be from 0 to 1")
        if self.uplink_include and self.uplink is None:
            raise PolicyError(f"uplink_include={self.uplink_include!r} needs an uplink, as in S1E3M7>DRIVE1")
        for name in ("include", "exclude", "uplink_include"):
            if isinstance(getattr(self, name), str):
                raise PolicyError(f"{name}={getattr(self, name)!r} must be a list of patterns, not a string")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "format_by_name", _by_pattern(self.format_by_name))
        if self.downlink is not None and self.format_by_name:
            raise PolicyError(
                f"downlink={self.downlink} cannot be used with format_by_name, because a message says only one format "
                f"to hold variables in, here {self.format}: use one of the two"
            )
        for method in self.formats:
            self.encoding(method)

    @property
    def formats(self) -> tuple[Method, ...]:
        """The formats that variables, or their bases, may have, each once."""
        return tuple(dict.fromkeys(parse_method(fmt) for fmt in [self.format, *dict(self.format_by_name).values()]))

    def format_of(self, name: str) -> Method:
        """Return the format of a variable, or of its base."""
        own = (fmt for pattern, fmt in dict(self.format_by_name).items() if matches(name, (pattern,)))
        return parse_method(next(own, self.format))

    def encoding(self, format: Method | None = None, *, round: int = 0, client: str | int = "") -> Encoding:
        """Return the encoding of those of a client's variables that have a format.

        Args:
            format: one of ``formats``; None is ``format``.
            round: number of the round.
            client: name or number of the client; stochastic rounding is the round's and the client's own.
        """
        seed = _hash(self.seed, "rounding", round, client)
        update = None if self.update_format is None else parse_method(self.update_format)
        method = parse_method(format or self.format)
        uplink = None if self.uplink is None else parse_method(self.uplink)
        downlink = None if self.downlink is None else parse_method(self.downlink)
        return Encoding(method, update, self.transform or "", self.rounding, seed, uplink, downlink)

    def compressible(self, variables: nn.Module | Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Return the names and sizes of all variables that the policy may compress, in the model's order.

        Args:
            variables: a model, or the shapes of its variables by name.

        Raises:
            PolicyError: no variable may be compressed, the model has a lazy module that has not run yet, or a pattern
                of ``include`` or ``format_by_name`` matches no variable.
        """
        if isinstance(variables, nn.Module):
            check_initialized(variables)
        return dict(_compressible(self, tuple(shapes_of(variables).items())))

    def uplinked(self, variables: nn.Module | Mapping[str, Sequence[int]]) -> tuple[str, ...]:
        """Return the names of the variables whose change goes up in the uplink, in the model's order.

        Args:
            variables: a model, or the shapes of its float32 variables by name.

        Raises:
            PolicyError: as ``compressible``; or a pattern of ``uplink_include`` matches no variable.
        """
        sizes, shapes = self.compressible(variables), shapes_of(variables)
        if self.uplink is None:
            return ()
        check_patterns("uplink_include", self.uplink_include, shapes)
        uplink = parse_method(self.uplink)
        return tuple(
            name
            for name, shape in shapes.items()
            if name in sizes
            or (matches(name, self.uplink_include) and 0 < uplink.nbytes(math.prod(shape)) < 4 * math.prod(shape))
        )

    def _find_compressible(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        for field_name, patterns in (("include", self.include), ("format_by_name", dict(self.format_by_name))):
            check_patterns(field_name, patterns, shapes)
        sizes = {name: math.prod(shape) for name, shape in shapes.items() if self._may_compress(name, shape)}
        if not sizes:
            raise PolicyError(
                f"none of {len(shapes)} variables can be compressed with include={list(self.include)}, "
                f"exclude={list(self.exclude)}, weight_matrices_only={self.weight_matrices_only}. "
                "Loosen the patterns; very small matrices are compressed only with weight_matrices_only=False"
            )
        return sizes

    def select(
        self, variables: nn.Module | Mapping[str, Sequence[int]], *, round: int = 0, client: str | int = ""
    ) -> Selection:
        """Select the variables that one client compresses in one round.

        A random set of whole variables stays FP32: in an order that depends on seed, round and client alone (the same
        on every machine), each is taken that still fits into ``1 - fraction`` of the compressible parameters; then one
        more if that comes closer. A variable larger than that share is therefore always compressed.

        Args:
            variables: a model, or the shapes of its variables by name.
            round: number of the round.
            client: name or number of the client.

        Raises:
            PolicyError: as ``compressible``.
        """
        selector = self.selector(variables)
        left = selector.unquantized(round, client)
        encodings = {fmt: self.encoding(fmt, round=round, client=client) for fmt in self.formats}
        chosen = {name: encodings[fmt] for name, fmt in selector.formats.items() if name not in left}
        return Selection(chosen, [name for name in selector.uplinked or selector.formats if name not in chosen])

    def selector(self, variables: nn.Module | Mapping[str, Sequence[int]]) -> "Selector":
        """Return what draws the variables of each client and round; a server needs one for all clients of a round.

        Args:
            variables: a model, or the shapes of its variables by name.

        Raises:
            PolicyError: as ``compressible``.
        """
        return Selector(self, self.compressible(variables), self.uplinked(variables))

    def _may_compress(self, name: str, shape: Sequence[int]) -> bool:
        if self.weight_matrices_only and (
            sum(size > 1 for size in shape) < 2 or self._padding_eats_savings(name, shape)
        ):
            return False
        if math.prod(shape) == 0 or (self.include and not matches(name, self.include)):
            return False
        return not matches(name, self.exclude)

    def _padding_eats_savings(self, name: str, shape: Sequence[int]) -> bool:
        """Tell whether a variable would hold no less than in FP32; never of formats that save nothing at any size."""
        encoding, numel = self.encoding(self.format_of(name)), math.prod(shape)
        bits = sum(method.code_bits for method in encoding.methods)
        return bits < 32 and encoding.nbytes(numel) >= 4 * numel


class Selector:
    """Draws the variables that a client compresses in a round, from a policy and the variables of a model.

    Args:
        policy: the policy.
        sizes: the sizes of the variables that may be compressed, by name.
        uplinked: the names of those whose change goes up in the uplink.

    Attributes:
        formats: the format of each variable that may be compressed, in the model's order.
        uplinked: as given.
    """

    def __init__(self, policy: CompressionPolicy, sizes: Mapping[str, int], uplinked: Sequence[str]) -> None:
        self.formats = {name: policy.format_of(name) for name in sizes}
        self.uplinked = tuple(uplinked)
        self._policy = policy
        self._sizes = dict(sizes)
        self._target = (1 - policy.fraction) * sum(sizes.values())

    def unquantized(self, round: int, client: str | int) -> frozenset[str]:
        """Return the variables that one client leaves in FP32 in one round; ``CompressionPolicy.select`` says which.

        Raises:
            PolicyError: these are all.
        """
        if self._policy.fraction == 1:
            return frozenset()
        hasher, sizes = _hasher(self._policy.seed, "partial", round, client, ""), self._sizes
        kept: set[str] = set()
        total = 0
        rest: list[str] = []
        for name in sorted(sizes, key=lambda name: _number(hasher, name)):
            if total + sizes[name] <= self._target:
                kept.add(name)
                total += sizes[name]
            else:
                rest.append(name)
        if rest:
            smallest = min(rest, key=sizes.__getitem__)
            if total + sizes[smallest] - self._target < self._target - total:
                kept.add(smallest)
        if len(kept) == len(sizes):
            raise PolicyError(f"fraction={self._policy.fraction} leaves no variable to compress: raise it")
        return frozenset(kept)


@dataclass(frozen=True)
class TieredPolicy:
    """Policies for clients with unequal memory: each client is sent the model in a format that it can hold.

    Attributes:
        tiers: the policies by the name of the tier, the most precise first; None is FP32.
        default: the tier of clients that announce nothing; empty means the last.

    Raises:
        PolicyError: there is no tier, or the default is not one of them.
    """

    tiers: Mapping[str, CompressionPolicy | None]
    default: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiers", dict(self.tiers))
        if not self.tiers:
            raise PolicyError("a tiered policy needs at least one tier")
        if not self.default:
            object.__setattr__(self, "default", list(self.tiers)[-1])
        self.choose(tier=self.default)

    def choose(
        self,
        variables: nn.Module | Mapping[str, Sequence[int]] | None = None,
        *,
        tier: str | None = None,
        memory_bytes: int | None = None,
        round: int = 0,
        client: str | int = "",
    ) -> CompressionPolicy | None:
        """Return the policy of a client, by what it announced.

        Args:
            variables: a model, or the shapes of its variables by name; needed with ``memory_bytes``.
            tier: the client's tier.
            memory_bytes: how many bytes the client's parameters may take. The first tier in which they fit is chosen,
                or the last if there is none.
            round: the number of the round.
            client: the name or number of the client.

        Raises:
            PolicyError: there is no such tier, or the budget is not positive.
        """
        if tier is not None:
            if tier not in self.tiers:
                raise PolicyError(f"tier={tier!r} is unknown: use one of {', '.join(self.tiers)}")
            return self.tiers[tier]
        if memory_bytes is None:
            return self.tiers[self.default]
        if memory_bytes <= 0 or variables is None:
            raise PolicyError(f"memory_bytes={memory_bytes} is invalid: announce a positive number of bytes")
        for policy in self.tiers.values():
            selection = None if policy is None else policy.select(variables, round=round, client=client)
            if held_bytes(variables, selection) <= memory_bytes:
                return policy
        return policy


@functools.lru_cache(maxsize=64)  # a server asks for every client in every round
def _compressible(policy: CompressionPolicy, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, int]:
    return policy._find_compressible(dict(shapes))


def _by_pattern(formats: Any) -> tuple[tuple[str, Method], ...]:
    """Parse formats by name pattern; as pairs they can be hashed."""
    try:
        pairs = list(dict(formats).items())
    except (TypeError, ValueError):
        pairs = [(None, formats)]
    for pattern, _ in pairs:
        if not isinstance(pattern, str):
            raise PolicyError(f"format_by_name={formats!r} must map name patterns to formats")
    return tuple((pattern, parse_method(fmt)) for pattern, fmt in pairs)


def _hash(*key: str | SupportsIndex) -> int:
    """Hash to 63 bits, the same on every machine and in every process."""
    return _number(_hasher(*key), "")


def _hasher(*key: str | SupportsIndex) -> "hashlib.blake2b":
    """Begin to hash a key, of which the last part may be continued."""
    text = "\x1f".join(f"s{part}" if isinstance(part, str) else f"i{operator.index(part)}" for part in key)
    return hashlib.blake2b(text.encode(), digest_size=8)


def _number(hasher: "hashlib.blake2b", rest: str) -> int:
    """Return the hash of a key that is continued by ``rest``."""
    own = hasher.copy()
    own.update(rest.encode())
    return int.from_bytes(own.digest(), "little") >> 1
