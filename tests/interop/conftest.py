"""Readers run in processes of their own, with libraries that are nobody else's."""

from tests.unit.conftest import here as here  # noqa: PLC0414 - a fixture

collect_ignore = ["readers"]
