"""The conformance kit: hold this library, or any other implementation, to the specification."""

from pathlib import Path

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]


def folder_of(part: str) -> Path:
    """Return the folder of "spec", "benchmarks" or "tests/properties".

    In a wheel it lies beside this file, in a checkout at the top.
    """
    packed = HERE / Path(part).name
    return packed if packed.is_dir() else CHECKOUT / part
