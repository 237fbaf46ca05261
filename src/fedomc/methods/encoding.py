"""``Encoding``: how a variable is held during training, and how it travels to a client and back."""

from dataclasses import dataclass, replace
from typing import Any

from fedomc.errors import PolicyError
from fedomc.methods.method import ROUNDINGS, Method
from fedomc.methods.registry import parse_method


@dataclass(frozen=True)
class Encoding:
    """How a variable is held: in one part, or with ``update_format`` as a base and the sum of the local steps.

    Attributes:
        format: the method of the variable, or of its base.
        update_format: the method of the update part; if None, the variable is held in one part.
        transform: the transformation before rounding, for methods that have one; for floats it is ``none``, ``affine``,
            ``scaled`` or ``scaled-affine``. If empty, the method's default is used (``scaled`` for floats).
        rounding: ``stochastic`` or ``nearest``, applied to each change of the variable. Rounding to nearest loses steps
            that are smaller than half the distance between neighbouring codes. Encoding a whole variable, such as one
            that a server sends, always rounds to nearest.
        seed: the seed of stochastic rounding.
        uplink: the method with which a client sends back the change of the variable since its arrival, rounded once
            and stochastically; if None, the client sends back the variable as held.
        downlink: the method in which a server sends the variable, if that is not the one in which a client holds it.
            The client encodes what arrives once more, in ``format``. Only a variable in one part can have one: of two
            parts, the server sends the base.

    Raises:
        FormatError: a format does not exist.
        PolicyError: the transformation or rounding is unknown, a method that cannot hold variables is used outside the
            uplink, or a variable in two parts has a downlink.

    Example:
        >>> str(Encoding.parse("S1E2M3+S1E2M1>DRIVE1"))
        'S1E2M3+S1E2M1>DRIVE1'
        >>> str(Encoding.parse("S1E2M5/64<S1E2M3/256").sent)
        'S1E2M3/256'
    """

    format: Method
    update_format: Method | None = None
    transform: str = ""
    rounding: str = "stochastic"
    seed: int = 0
    uplink: Method | None = None
    downlink: Method | None = None

    def __post_init__(self) -> None:
        parse_formats(self)
        if self.downlink is not None and self.update_format is not None:
            raise PolicyError(
                f"a server sends the base {self.format} of a variable in two parts, so {self.downlink} cannot be "
                f"its downlink: write {self.downlink}+{self.update_format} if the base shall have that format"
            )
        for method in (*self.methods, *([] if self.downlink is None else [self.downlink])):
            if not method.holds:
                raise PolicyError(
                    f"{method} can only be used for the uplink, not for training, where each step would rotate and "
                    f"round all values again: write it after >, as in S1E3M7>{method}"
                )
        if self.rounding not in ROUNDINGS:
            raise PolicyError(f"rounding={self.rounding!r} is unknown: use one of {', '.join(ROUNDINGS)}")
        known = list(dict.fromkeys(name for method in self.methods for name in method.transforms))
        if not self.transform:
            own = (method.default_transform() for method in self.methods if len(method.transforms) > 1)
            object.__setattr__(self, "transform", next(own, known[0]))
        if self.transform not in known:
            raise PolicyError(f"transform={self.transform!r} is unknown to {self}: use one of {', '.join(known)}")

    @classmethod
    def parse(cls, text: "str | Encoding", *, seed: int = 0) -> "Encoding":
        """Parse ``S1E3M7``, ``S1E2M3+S1E2M1`` (two parts), ``S1E3M7>S1E2M1`` (uplink) or ``S1E3M7<S1E2M3`` (downlink).

        An ``Encoding`` is returned unchanged.

        Args:
            text: the names of the methods.
            seed: the seed of stochastic rounding.

        Raises:
            FormatError: a method name is unknown, or there are more than two parts, uplinks or downlinks.
        """
        if isinstance(text, Encoding):
            return text
        rest, up, uplink = text.partition(">")
        held, down, downlink = rest.partition("<")
        base, plus, update = held.partition("+")
        return cls(
            parse_method(base),
            parse_method(update) if plus else None,
            seed=seed,
            uplink=parse_method(uplink) if up else None,
            downlink=parse_method(downlink) if down else None,
        )

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods of the parts: the base, and the update if there is one."""
        return (self.format,) if self.update_format is None else (self.format, self.update_format)

    @property
    def sent(self) -> Method:
        """The method in which a server sends the variable: that of the downlink, of the variable or of its base."""
        return self.format if self.downlink is None else self.downlink

    @property
    def sent_transform(self) -> str:
        """The transformation with which a server encodes the variable."""
        return self.transform if self.transform in self.sent.transforms else self.sent.default_transform()

    @property
    def rewrites_what_arrives(self) -> bool:
        """Whether training rewrites the codes that a server sent, which then need memory of their own."""
        return self.update_format is None and self.downlink is None

    def nbytes(self, numel: int) -> int:
        """Return the number of bytes for a variable of ``numel`` values."""
        return sum(method.nbytes(numel) for method in self.methods)

    def with_format(self, format: Method) -> "Encoding":
        """Return a copy of the encoding with another method for the variable or base."""
        if format == self.format:
            return self
        transform = self.transform
        if transform not in format.transforms and self.update_format is None:
            transform = ""
        return replace(self, format=format, transform=transform)

    def __str__(self) -> str:
        down = "" if self.downlink is None else f"<{self.downlink}"
        return "+".join(map(str, self.methods)) + down + ("" if self.uplink is None else f">{self.uplink}")


def parse_formats(described: Any) -> None:
    """Replace the names of methods in an ``Encoding``, or in what describes several, by the methods.

    Raises:
        FormatError: a format does not exist.
    """
    for name in ("format", "update_format", "uplink", "downlink"):
        value = getattr(described, name)
        if value is not None or name == "format":
            object.__setattr__(described, name, parse_method(value))  # of a frozen dataclass
