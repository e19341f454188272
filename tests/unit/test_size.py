"""The package stays small: its totals rise only in a commit that says what was added."""

import sys

import pytest

from tests.size import Size, lines_of_tests, size_of, total

LIMIT = Size(lines=22_850, tokens=150_665, words=30_730)
TEST_LINES = 43_350

SOURCE = '''"""Two words."""

LIMIT = 3


def half(x):
    """One more sentence of six words."""
    return x / 2  # a comment
'''


def test_a_file_is_counted_by_hand():
    """Line 3 has three tokens, the function's head six, its body four."""
    assert size_of(SOURCE) == Size(lines=8, tokens=13, words=8)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="3.12 splits f-strings into tokens")
def test_the_package_is_no_larger_than_its_limit():
    size = total()
    assert size.lines <= LIMIT.lines
    assert size.tokens <= LIMIT.tokens
    assert size.words <= LIMIT.words


def test_the_tests_are_no_longer_than_their_limit():
    assert lines_of_tests() <= TEST_LINES
