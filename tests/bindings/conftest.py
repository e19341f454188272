"""PEFT warns and takes long to import, so its binding is imported only where it is asked for."""

collect_ignore = ["peft.py"]
