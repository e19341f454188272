"""The frozen test vectors of the file format.

Requirements: R24.
"""

from pathlib import Path

from lora.testing import folder_of


def vectors_folder() -> Path:
    """Return the folder with one subfolder for each version of the format."""
    return folder_of("spec") / "vectors"
