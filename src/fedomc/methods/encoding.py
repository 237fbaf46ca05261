"""``Encoding``: how a variable is held while it trains, and how a client sends back what changed."""

from dataclasses import dataclass, replace

from fedomc.errors import PolicyError
from fedomc.methods.method import ROUNDINGS, Method
from fedomc.methods.registry import parse_method


@dataclass(frozen=True)
class Encoding:
    """How a variable is held: in one part, or with ``update_format`` in two, a base and the sum of the local steps.

    Attributes:
        format: the method of the variable, or of its base.
        update_format: the method of the update part; None holds the variable in one part.
        transform: the transformation before rounding, of the methods that have any: ``none``, ``affine``, ``scaled``
            or ``scaled-affine`` for floats. Empty, it is ``scaled`` for floats.
        rounding: ``stochastic`` or ``nearest``: how each change of the variable is rounded. Rounding to nearest loses
            the steps that are smaller than half the distance between neighbouring codes. A variable that is encoded
            as a whole, such as what a server sends, is always rounded to nearest.
        seed: of stochastic rounding.
        uplink: the method in which a client sends back the change of the variable since it arrived, rounded once and
            stochastically; None sends back what is held.

    Raises:
        FormatError: no such format.
        PolicyError: an unknown transformation or rounding, or a method that holds no variable, outside of the uplink.

    Example:
        >>> str(Encoding.parse("S1E2M3+S1E2M1>DRIVE1"))
        'S1E2M3+S1E2M1>DRIVE1'
    """

    format: Method
    update_format: Method | None = None
    transform: str = ""
    rounding: str = "stochastic"
    seed: int = 0
    uplink: Method | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", parse_method(self.format))
        if self.update_format is not None:
            object.__setattr__(self, "update_format", parse_method(self.update_format))
        if self.uplink is not None:
            object.__setattr__(self, "uplink", parse_method(self.uplink))
        for method in self.methods:
            if not method.holds:
                raise PolicyError(
                    f"{method} is for what is sent, not for what is held while training, as each step would rotate and "
                    f"round all values anew: write it behind >, as in S1E3M7>{method}"
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
        """Read ``S1E3M7``, ``S1E2M3+S1E2M1`` for two parts, or ``S1E3M7>S1E2M1`` with an uplink.

        An encoding passes through.

        Args:
            text: the methods' names.
            seed: of stochastic rounding.

        Raises:
            FormatError: a name is not that of a method, or there are more than two parts or one uplink.
        """
        if isinstance(text, Encoding):
            return text
        held, sent, uplink = text.partition(">")
        base, plus, update = held.partition("+")
        return cls(
            parse_method(base),
            parse_method(update) if plus else None,
            seed=seed,
            uplink=parse_method(uplink) if sent else None,
        )

    @property
    def methods(self) -> tuple[Method, ...]:
        """The method of each part: the base's, and the update's if there is one."""
        return (self.format,) if self.update_format is None else (self.format, self.update_format)

    def nbytes(self, numel: int) -> int:
        """Count the bytes that a variable of so many values holds."""
        return sum(method.nbytes(numel) for method in self.methods)

    def with_format(self, format: Method) -> "Encoding":
        """Return the same encoding with another method for the variable or base."""
        if format == self.format:
            return self
        transform = self.transform
        if transform not in format.transforms and self.update_format is None:
            transform = ""
        return replace(self, format=format, transform=transform)

    def __str__(self) -> str:
        return "+".join(map(str, self.methods)) + ("" if self.uplink is None else f">{self.uplink}")
