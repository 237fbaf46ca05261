"""Write the reports of rounds for TensorBoard; needs the extra ``fedomc[tensorboard]``."""

import os

from fedomc.flower.traffic import RoundReport


class TensorBoard:
    """An observer of ``OMCStrategy`` that writes each round's report for TensorBoard.

    Args:
        folder: the folder for ``tensorboard --logdir``.
        variables: whether to write the figures of each variable too, not only those of the whole model.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, variables: bool = True) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard is not installed: pip install 'fedomc[tensorboard]'") from error
        self.variables = variables
        self._writer = SummaryWriter(str(folder))

    def __call__(self, report: RoundReport) -> None:
        """Write a report and flush it, so that TensorBoard shows it at once."""
        for name, value in report.metrics(variables=self.variables).items():
            self._writer.add_scalar(name, value, report.round)
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        self._writer.close()
