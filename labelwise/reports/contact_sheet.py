"""Suggested images as a page of small pictures."""

from typing import Any

from labelwise.reports.html import get_template


def render(document: dict[str, Any], thumbnails: list[str]) -> str:
    """Write the page.

    Args:
        document: What `labelwise suggest` found.
        thumbnails: Of the first suggestions, PNG in base64.
    """
    template = get_template("suggestions.html.jinja")
    return template.render(document=document, thumbnails=thumbnails)
