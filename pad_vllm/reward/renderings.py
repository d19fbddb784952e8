"""Conversations rendered by a chat template, under all the variables that it names.

A template is a program: what it writes hangs on the day, on tools and documents, on switches of a request. It is asked
which variables it reads, and renders each conversation with several values of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, meta, nodes

from pad_vllm.reward.rendering import bounded_render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = ("qzxjkvqw", "vwqkzjxq")
"""Values of variables: what varies between renderings is text."""
GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
"""A tag that only transformers knows."""
NOT_VARIED = {"messages", "add_generation_prompt", "raise_exception", "namespace", "range", "dict", "loop", "caller"}
MAX_VARIANTS = 96


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": f"Of {name}.", "parameters": parameters}}


TOOLS = ([tool("qzf", q={"type": "string", "description": "Of q."})], [tool("vwg"), tool("kzh")])
DOCUMENTS: tuple[list[dict[str, str]], ...] = (
    [{"title": text, "text": text, "content": text, "doc_id": text} for text in TEXTS],
    [],
)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], generate: bool = True, **variables: Any
) -> str | None:
    """A conversation as the chat template writes it; None where it refuses, or leaves a content out. All that is
    rendered goes through here.

    Args:
        messages: of ``role`` and ``content``, a text.
        generate: with the generation prompt.
        variables: of the template.
    """
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    for form in (list(messages), parts):  # some templates read texts, some lists of parts
        try:
            text = bounded_render(tokenizer, form, add_generation_prompt=generate, **variables)
        except Exception:  # a template raises what it likes
            continue
        if isinstance(text, str) and _holds(text, [m["content"].strip() for m in messages]):
            return text
    return None


def _holds(text: str, contents: Sequence[str]) -> bool:
    """Whether each content stands in a text, in a time that grows with the text where most stand in this order."""
    at = 0
    for content in contents:
        if (found := text.find(content, at)) < 0 and (found := text.find(content)) < 0:
            return False
        at = found
    return True


def variants(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """What a request or a day may say to the chat template: for each variable that it names several values, by
    themselves, and then many at once."""
    values = dict(_values(_template(tokenizer)))
    found: list[dict[str, Any]] = [{"tools": tools} for tools in TOOLS]
    found += [{name: value} for name, several in values.items() for value in several]
    together = {name: several[0] for name, several in values.items()}
    found = found[: MAX_VARIANTS - 4]
    found += [{**together, "tools": tools} for tools in TOOLS]
    dates = {name: several[0] for name, several in values.items() if name == "strftime_now" or "date" in name}
    return [*found, *({**dates, "tools": tools} for tools in TOOLS if dates)]


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return tokenizer.get_chat_template()
    except (ValueError, AttributeError):
        return tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""


def _values(template: str) -> Iterator[tuple[str, list[Any]]]:
    """Variables and their values: those that the template compares them with, switches, and texts."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION.sub("", template))
        names = meta.find_undeclared_variables(tree)
    except TemplateError:
        return
    compared: dict[str, list[Any]] = {}
    for node in tree.find_all(nodes.Compare):
        for operand in node.ops:
            _compare(node.expr, operand, compared)
    for name in sorted(names - NOT_VARIED):
        if name == "tools" or name.endswith("_token"):
            continue
        if name == "strftime_now":
            yield name, [lambda form: "1", lambda form: "2"]
        elif "document" in name:
            yield name, list(DOCUMENTS)
        else:
            yield name, [*compared.get(name, [])[:6], True, False, *TEXTS]


def _compare(expr: nodes.Expr, operand: nodes.Operand, compared: dict[str, list[Any]]) -> None:
    other = operand.expr
    if isinstance(expr, nodes.Name) and isinstance(other, nodes.Const):
        compared.setdefault(expr.name, []).append(other.value)
    elif isinstance(expr, nodes.Const) and isinstance(other, nodes.Name):  # "browser" in builtin_tools
        compared.setdefault(other.name, []).append([expr.value] if operand.op in ("in", "notin") else expr.value)
    elif isinstance(expr, nodes.Name) and isinstance(other, (nodes.List, nodes.Tuple)):
        compared.setdefault(expr.name, []).extend(item.value for item in other.items if isinstance(item, nodes.Const))
