"""A hook of mkdocs: links from the documents into the repository become plain text on the site.

On a code host ``[the tasks](../lrmc_ray/tasks/README.md)`` leads to a file. The site has only what
is in ``docs/``, so a link that leaves this folder would lead nowhere.
"""

import re

_OUTWARD = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """The page's Markdown without links to what is beside ``docs/``."""
    return _OUTWARD.sub(r"\1", markdown)
