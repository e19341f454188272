"""Digests of the code that figures were measured on.

Comments, docstrings and line breaks do not count: they change no figure.
"""

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable

from lora.testing import CHECKOUT

WITHOUT_MEANING = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}


def digests(names: Iterable[str]) -> dict[str, str]:
    """Return 12 digits of the SHA-256 of the code of each Python file, relative to the checkout.

    A file that is gone has none.
    """
    paths = {name: CHECKOUT / name for name in names}
    return {
        name: digest_of(path.read_text(encoding="utf-8")) if path.is_file() else ""
        for name, path in paths.items()
    }


def digest_of(source: str) -> str:
    """Return 12 digits of the SHA-256 of a source's tokens."""
    docstrings = {
        node.body[0].lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node, clean=False) is not None
    }
    tokens = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in WITHOUT_MEANING
        and not (token.type == tokenize.STRING and token.start[0] in docstrings)
    ]
    return hashlib.sha256("".join(tokens).encode()).hexdigest()[:12]
