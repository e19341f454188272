"""A copy of the project in which one file after the other is changed and tests are run.

Python takes a compiled file for one of a source with its size and its time in whole seconds. Each
text that is written here has a time of its own, and what the project holds has the same time
always, so that all that was not changed is compiled once. The tests run in forks of a process that
``forked.py`` describes.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

PRELOADED = ("hypothesis.extra.numpy", "pyarrow", "torch")
"""What most tests import, of other projects; what is changed is imported by each run anew."""

TWICE = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
"""pytest warns of plugins that were imported before it could rewrite their assertions."""


class Workspace:
    """A copy of a project, and a process that runs tests in it.

    Args:
        root: The project's folder, in a git repository.
        preloaded: The modules that the process imports first.
    """

    def __init__(self, root: Path, preloaded: tuple[str, ...] = PRELOADED) -> None:
        self.preloaded = preloaded
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
        files = [name for name in listed.stdout.split("\0") if (root / name).is_file()]
        self.content = {name: (root / name).read_bytes() for name in files}
        self.time = self.last_time = int(time.time())

    def __enter__(self) -> Self:
        """Write the copy and start the process."""
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name).resolve() / "copy"
        self.restore()
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forked.py")), *self.preloaded],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        """End the process and remove the copy."""
        with self.process:
            self.process.kill()
        self.temporary.cleanup()

    def restore(self) -> None:
        """Make the copy what the project is, whatever was changed; what was compiled stays."""
        files = {self.folder / name: content for name, content in self.content.items()}
        folders = {parent for path in files for parent in path.parents}
        for path in sorted(self.folder.rglob("*"), reverse=True):  # a folder after what it holds
            if path.is_symlink() or path.is_file():
                if path not in files and path.parent.name != "__pycache__":
                    path.unlink()
            elif path not in folders and path.name != "__pycache__":
                shutil.rmtree(path)
        for path, content in files.items():
            if not path.is_file() or path.stat().st_mtime != self.time:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                os.utime(path, (self.time, self.time))

    def change(self, name: str, old: str, new: str) -> None:
        """Replace a text in a file; the file gets a time that none had before."""
        path = self.folder / name
        path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
        self.last_time += 1
        os.utime(path, (self.last_time, self.last_time))

    def run_tests(
        self, arguments: list[str], profile: str, seconds: float
    ) -> tuple[int | None, str]:
        """Return pytest's exit status, None where it took too long, and what it printed."""
        output = self.folder.with_name("output")
        output.unlink(missing_ok=True)  # what the last tests left behind may still write to it
        output.touch()
        request = {"arguments": ["-W", TWICE, *arguments], "profile": profile, "seconds": seconds}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({**request, "output": str(output)}) + "\n")
        self.process.stdin.flush()
        status = json.loads(self.process.stdout.readline())
        return status, output.read_text(encoding="utf-8", errors="replace")
