"""Where the frozen test vectors of the file format lie.

Requirements: R24.
"""

from pathlib import Path


def vectors_folder() -> Path:
    """The folder with one subfolder for each version: in a wheel beside this file, in a checkout
    under ``spec``.
    """
    packed = Path(__file__).parent / "spec" / "vectors"
    return packed if packed.is_dir() else Path(__file__).parents[2] / "spec" / "vectors"
