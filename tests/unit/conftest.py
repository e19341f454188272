"""The command line in this process, for the tests of its commands."""

import io
import sys

import pytest

from lora.cli import main


@pytest.fixture
def here(monkeypatch, capsys):
    """The command in this process: exit code, standard output, standard error."""

    def run(*argv, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["lora", *map(str, argv)])
        stream = stdin
        if isinstance(stdin, bytes):
            stream = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run
