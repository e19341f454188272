"""One thread for small matrices: two threads of BLAS wait for each other longer than they work.

Requirements: R20.
"""

from functools import cache
from typing import Any


def one_thread() -> Any:
    """Return a context in which NumPy's matrix products and factorisations use one thread.

    The number of threads belongs to the process: of several Python threads the first sets it, and
    restores it.
    """
    return _controller().limit(limits=1, user_api="blas")


@cache
def _controller() -> Any:
    from threadpoolctl import ThreadpoolController  # noqa: PLC0415 - for factorisations alone

    return ThreadpoolController()
