"""Readers run in processes of their own, with libraries that are nobody else's."""

collect_ignore = ["readers"]
