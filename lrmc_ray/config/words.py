"""What a setting allows and what it is by default, in words, for the help and the documents."""

import json
from collections.abc import Mapping
from typing import Any

_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}
_KINDS = {
    "boolean": "`true` or `false`",
    "integer": "whole number",
    "number": "number",
    "string": "text",
}


def default_text(value: Any) -> str:
    """A default as it stands in TOML."""
    if value is None:
        return "not set"
    if value in ([], {}):
        return "none"
    return f"`{json.dumps(value)}`"


def allowed_text(field: Mapping[str, Any]) -> str:
    """In words, the values that the JSON schema ``field`` allows."""
    if "anyOf" in field:
        kinds = [kind for kind in field["anyOf"] if kind.get("type") != "null"]
        return " or ".join(allowed_text(kind) for kind in kinds)
    if "enum" in field or "const" in field:
        return ", ".join(default_text(value) for value in field.get("enum", [field.get("const")]))
    kind = field.get("type")
    if kind == "array" and "prefixItems" in field:
        items = [allowed_text(item) for item in field["prefixItems"]]
        return f"list of {len(items)}: {items[0]}"
    if kind == "array":
        least = ", at least one" if field.get("minItems") else ""
        return f"list{least}: {allowed_text(field['items'])}"
    if kind == "object":
        inner = field["additionalProperties"]
        return f"table: {allowed_text({} if inner is True else inner)}"
    if kind is None:
        return "any value"
    bounds = [text.format(_number(field[key])) for key, text in _BOUNDS.items() if key in field]
    if "maxLength" in field:
        bounds.append(f"at most {field['maxLength']} characters")
    if "pattern" in field:
        bounds.append(f"as `{field['pattern']}`")
    return ", ".join([_KINDS[kind], *bounds])


def _number(value: float) -> str:
    return "2^32" if value == 2**32 else f"{value:g}"
