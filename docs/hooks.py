"""Links to files of the repository, which lead to pages that are made; links to where a page is
edited, in a build of the site that is told `REPO_URL`; names of tests that break between words; and
what a picture shows, below it.
"""

import re
from typing import Any

FROM_FILE = r"\]\((?:\.\./)+(?:benchmarks|docs|lora|spec|tests)[/\w.]*#([\w.-]+)\)"


def on_config(config: Any) -> Any:
    """Link pages to where they are edited, if the repository has an address."""
    if config.repo_url:
        config.edit_uri = "edit/main/docs/"
    return config


def on_page_context(context: Any, page: Any, **_: Any) -> Any:
    """Leave that out where a page is generated."""
    if page.file.src_uri.startswith("generated/"):
        page.edit_url = None
    return context


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let a link to a file outside of the pages lead to the page that its fragment names: in the
    repository, ``../lora/files.py#lora.save`` shows the file.
    """
    up = "../" * page.file.src_uri.count("/")
    return re.sub(FROM_FILE, rf"]({up}generated/\1.md)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Let the name of a test break after an underscore, a slash or colons, not within a word; and
    write below a picture in two themes what it shows.
    """
    html = re.sub(
        r"<code>[\w./]+::\w+</code>",
        lambda name: re.sub(r"(_|(?<!<)/|::)(?=\w)", r"\1<wbr>", name[0]),
        html,
    )
    pictures = r'<p>(<img alt="([^"]+)"[^>]+#only-light"[^>]*>\s*<img [^>]+#only-dark"[^>]*>)</p>'
    return re.sub(pictures, r"<figure>\1<figcaption>\2</figcaption></figure>", html)
