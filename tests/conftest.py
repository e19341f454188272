"""What every test shares: torch warns each time, not once a process, so that the order of tests changes nothing."""

import pytest
import torch

torch.set_warn_always(True)
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder():
    """The real all-MiniLM-L6-v2."""
    from lora.engine import default_model

    return default_model()
