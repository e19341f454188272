"""PEFT is there only in ``make test-all``, so its binding is imported only where it is asked for."""

collect_ignore = ["peft.py"]
