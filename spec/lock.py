"""Write spec/lock.toml from the chapters; refuse a sentence that changed without a new revision."""

import sys
from pathlib import Path

SPEC = Path(__file__).parent
sys.path.insert(0, str(SPEC.parent))

from lora.testing.requirements import read_spec  # noqa: E402 - after the path
from tests.trace import lock_faults, lock_text, read_lock  # noqa: E402 - as above


def main() -> None:
    """Lock what is new; exit 1 if a sentence changed under its revision."""
    spec, path = read_spec(SPEC), SPEC / "lock.toml"
    faults = lock_faults(spec, read_lock(path)) if path.exists() else []
    if unnoticed := [fault for fault in faults if "raise" in fault]:
        sys.exit("\n".join(unnoticed))
    path.write_text(lock_text(spec), encoding="utf-8")


if __name__ == "__main__":
    main()
