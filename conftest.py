"""The documentation's examples run in a folder of their own."""

import pytest


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(request, monkeypatch, tmp_path):
    if request.path.suffix == ".md":
        monkeypatch.chdir(tmp_path)
