"""Links to where a page is edited, in a build of the site that is told `REPO_URL`."""

from typing import Any


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
