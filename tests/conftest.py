"""What every test shares: torch warns each time, not once a process, so that the order of tests
changes nothing.
"""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch

torch.set_warn_always(True)
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder():
    """The real all-MiniLM-L6-v2."""
    from lora.engine import default_model

    return default_model()


@pytest.fixture(scope="session")
def assignments():
    """A context in which every state that is put in the place of another is noted."""
    from lora.state import StateReference

    @contextmanager
    def context():
        assigned = []

        def put(reference, value):
            assigned.append(value)
            reference.__dict__["value"] = value

        noting = property(lambda reference: reference.__dict__["value"], put)
        with mock.patch.object(StateReference, "value", noting, create=True):
            yield assigned

    return context
