"""A progress bar on stderr, for training and for the command line.

Requirements: R17, R25.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[..., None]]:
    """Draw a bar on stderr; yields a function of step, steps and, if there is one, the loss."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, loss="")

        def progress(step: int, total: int, loss: float | None = None) -> None:
            text = "" if loss is None else f"loss {loss:.3f}"
            bar.update(task, completed=step, total=total, loss=text)

        try:
            yield progress
        except BaseException:  # leave nothing but the error
            bar.live.transient = True
            bar.console.quiet = not bar.console.is_terminal
            raise
