"""Write spec/lock.toml from the chapters; refuse a sentence that changed without a new revision."""

import sys
from pathlib import Path

from lora.testing.trace import lock_faults, lock_text, read_lock, read_spec

SPEC = Path(__file__).parent


def main() -> None:
    """Lock what is new; exit 1 if something changed unnoticed."""
    spec, path = read_spec(SPEC), SPEC / "lock.toml"
    unnoticed = (
        [fault for fault in lock_faults(spec, read_lock(path)) if "raise" in fault]
        if path.exists()
        else []
    )
    if unnoticed:
        sys.exit("\n".join(unnoticed))
    path.write_text(lock_text(spec), encoding="utf-8")


if __name__ == "__main__":
    main()
