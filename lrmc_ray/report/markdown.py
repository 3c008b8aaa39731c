"""Texts of others in a page of Markdown: they show themselves, and do nothing."""


def inert(text: str) -> str:
    """``text`` as it stands: it links to nothing, loads no picture, and ends no table's cell."""
    for sign in ("\\", "`", "[", "]", "|"):
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").splitlines())


def inert_code(text: str) -> str:
    """``text`` as a span of code, which it cannot end."""
    return f"`{' '.join(text.replace('`', chr(39)).splitlines())}`"
