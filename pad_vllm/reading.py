"""Read JSON and YAML that users wrote. Any mistake in it is a ValueError that says where it is."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from typing import Any

import yaml

from pad_vllm.checks import shown

MAX_DEPTH = 100
"""Most lists and objects inside one another. Python itself fails at some hundreds."""
_JSON_PARTS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def read_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: with the line and column; a key that is given twice, by its name.
    """
    depth = 0
    for part in _JSON_PARTS.finditer(text) if text.count("[") + text.count("{") > MAX_DEPTH else ():
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(part[0], 0)
        if depth > MAX_DEPTH:
            raise json.JSONDecodeError(f"more than {MAX_DEPTH} lists and objects in one another", text, part.start())
    return json.loads(text, object_pairs_hook=_unique, parse_int=_int)


def json_object(option: str, text: str) -> dict[str, Any]:
    """What a JSON object says. Raises ValueError naming ``option``."""
    try:
        read = read_json(text)
    except ValueError as error:
        raise ValueError(f"{option} {shown(text)} is not JSON: {error}") from None
    if not isinstance(read, dict):
        raise ValueError(f'{option} {shown(text)}: must be an object, such as \'{{"preference": "Be concise."}}\'')
    return read


def read_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        ValueError: with the line and column; a key that is given twice, by its name.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _int(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python reads no more than 4,300 digits
        raise ValueError(f"a number of {len(digits)} digits, {digits[:20]}...") from None


def _unique(pairs: list[tuple[Hashable, Any]]) -> dict:
    """A dict of ``pairs``; ValueError if one would be lost."""
    read = dict(pairs)
    if len(read) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return read


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that is given twice, and says where a value is none."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            words = f"more than {MAX_DEPTH} lists and objects in one another"
            raise yaml.composer.ComposerError(None, None, words, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except Exception as error:  # yaml reads what looks like a timestamp, a number, ..., and raises what comes
            if not isinstance(node, yaml.ScalarNode) or isinstance(error, yaml.YAMLError):
                raise
            words = f"{node.value[:60]!r} is no {node.tag.rpartition(':')[2]} ({error})"
            raise yaml.constructor.ConstructorError(None, None, words, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        _unique([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_mapping)
