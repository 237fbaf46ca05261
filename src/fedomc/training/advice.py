"""What ``advise`` returns: what each format does to a model, and the cheapest that holds it."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedomc.training.policy import CompressionPolicy


@dataclass(frozen=True)
class VariableAdvice:
    """What a format does to one variable.

    Attributes:
        kept: the share of the step that arrives.
        noise: the energy of the step's rounding noise, relative to that of the step.
        drift: the distance by which the noise of all steps moves the values, relative to their norm.
        output_error: the error of the model's output if only this variable is encoded; None if it was not measured.
    """

    kept: float
    noise: float
    drift: float
    output_error: float | None = None


@dataclass(frozen=True)
class FormatAdvice:
    """What a format does to a model.

    Attributes:
        policy: the format as a policy, which may exclude variables that it cannot hold.
        ratio: the bytes of all parameters, as a fraction of those in FP32.
        output_error: the distance of the model's output from that in FP32, relative to how much that varies over
            the batch (the first dimension).
        loss: the loss with the weights encoded.
        kept: the share of the step that arrives; 1 with stochastic rounding, but for chance.
        noise: the energy of the step's rounding noise, relative to that of the step.
        drift: the distance by which the noise of all steps moves the values, relative to their norm.
        function_reason: why the format does not hold the function; empty if it does.
        steps_reason: why it does not hold the steps; empty if it does.
        variables: what the format does to each variable, by qualified name.
    """

    policy: CompressionPolicy
    ratio: float
    output_error: float
    loss: float
    kept: float
    noise: float
    drift: float
    function_reason: str
    steps_reason: str
    variables: Mapping[str, VariableAdvice]

    @property
    def holds(self) -> bool:
        """Whether the format holds the function and the steps."""
        return not self.reason

    @property
    def reason(self) -> str:
        """Why the format does not hold the model; empty if it does."""
        return "; ".join(filter(None, (self.function_reason, self.steps_reason)))


@dataclass(frozen=True)
class Advice:
    """Which formats hold a model; ``print`` shows a table.

    Attributes:
        loss: the loss in FP32.
        formats: a row for each format, the one with the fewest bytes first.
    """

    loss: float
    formats: tuple[FormatAdvice, ...]

    @property
    def policy(self) -> CompressionPolicy | None:
        """The policy with the fewest bytes that holds the model; None if none does."""
        return next((row.policy for row in self.formats if row.holds), None)

    def __str__(self) -> str:
        names = [name_of(row.policy) for row in self.formats]
        width = max(map(len, ("format", *names)))
        lines = [f"{'format':{width}}   bytes  output error      loss     noise    drift  verdict"]
        lines.append(f"{'FP32':{width}}  100.0%          0.0%  {self.loss:8.4g}         0        0")
        for name, row in zip(names, self.formats, strict=True):
            lines.append(
                f"{name:{width}}  {row.ratio:6.1%}  {row.output_error:12.1%}  {row.loss:8.4g}  {row.noise:8.3g} "
                f"{row.drift:8.2g}  {row.reason or 'holds'}"
            )
        return "\n".join(lines)


def name_of(policy: CompressionPolicy) -> str:
    """Return a policy's formats, and how many name patterns it excludes."""
    return f"{policy} ({len(policy.exclude)} excluded)" if policy.exclude else str(policy)
