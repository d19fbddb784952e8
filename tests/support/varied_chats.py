"""Chat templates made at random of what real ones do: dates, switches, tools, aliases, messages of their own."""

from __future__ import annotations

import functools
import json
import random
from dataclasses import dataclass

from tests.support.chats import CHATML, Family, make_chat_tokenizer

WRAPS = {  # special tokens, what opens a message, what closes it
    "chatml": (("<|im_start|>", "<|im_end|>"), "'<|im_start|>' + {} + '\\n'", "<|im_end|>\\n"),
    "header": (("<|h|>", "<|/h|>", "<|eot|>"), "'<|h|>' + {} + '<|/h|>\\n\\n'", "<|eot|>"),
    "kimi": (
        ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|mid|>", "<|im_end|>"),
        "('<|im_' + ({0} if {0} in ['user', 'assistant'] else 'system') + '|>' + {0} + '<|mid|>')",
        "<|im_end|>",
    ),
}
CONTROL = ("<think>", "</think>", "<|think|>")
TOOLS = [
    {"type": "function", "function": {"name": "fox", "description": "jumps", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "dog", "description": "sleeps", "parameters": {"type": "object"}}},
]
DATES = (None, "inside", "behind", "message", "default")
SWITCHES = (None, "text", "marker", "answer")
TOOL_PLACES = (None, "message before", "before", "after", "message behind")


@dataclass(frozen=True)
class Style:
    """What a template does. Where a preference belongs, ``template`` writes ``system`` or ``user``."""

    wrap: str
    bos: bool
    alias: str
    date: str | None
    switch: str | None
    tools: str | None
    default: bool
    strips: bool

    @classmethod
    def random(cls, seed: int) -> Style:
        rng = random.Random(seed)
        pick = rng.choice
        return cls(
            wrap=pick(list(WRAPS)),
            bos=pick((True, False)),
            alias=pick(("system", "developer")),
            date=pick(DATES),
            switch=pick(SWITCHES),
            tools=pick(TOOL_PLACES),
            default=pick((True, False)),
            strips=pick((True, False)),
        )

    def template(self, system: str = "", user: str = "") -> str:
        _, opening, close = WRAPS[self.wrap]
        opens = lambda role: "{{ " + opening.format(role) + " }}"  # noqa: E731
        content = "(m.content | trim)" if self.strips else "m.content"
        lines = [
            "{{ bos_token }}" if self.bos else "",
            "{% set day = date_string if date_string is defined else strftime_now('%d %B %Y') %}" if self.date else "",
            "{% if messages[0].role in ['system', 'developer'] %}{% set own = messages[0].content"
            + (" | trim" if self.strips else "")
            + " %}{% set rest = messages[1:] %}{% else %}{% set own = "
            + ("'You are of the old town.'" + (" + ' Today is ' + day" if self.date == "default" else ""))
            * self.default
            + "''" * (not self.default)
            + " %}{% set rest = messages %}{% endif %}",
            "{% set before = ("
            + " + ".join(
                [
                    "''",
                    *(["'Today is ' + day + '.\\n\\n'"] if self.date == "inside" else []),
                    *(["'Effort: ' + (effort or 'low') + '\\n\\n'"] if self.switch == "text" else []),
                    *(
                        ["('# Tools\\n' + (tools | tojson) + '\\n\\n' if tools else '')"]
                        if self.tools == "before"
                        else []
                    ),
                ]
            )
            + ") %}",
            "{% set after = "
            + ("('\\n\\n# Tools\\n' + (tools | tojson) if tools else '')" if self.tools == "after" else "''")
            + (" + '\\n\\nToday is ' + day + '.'" if self.date == "behind" else "")
            + " %}",
            "{% set has_system = own or before or after %}",
        ]
        if self.date == "message":
            hook = "{{ '" + system + "' if not has_system }}"
            lines.append(opens("'system'") + "{{ 'Date: ' + day + ' it is.' }}" + hook + close)
        if self.tools == "message before":
            lines.append("{% if tools %}" + opens("'tool_declare'") + "{{ tools | tojson }}" + close + "{% endif %}")
        marker = "{% if thinking %}<|think|>{% endif %}" if self.switch == "marker" else ""
        lines.append(
            "{% if has_system %}" + opens(f"'{self.alias}'") + marker + "{{ before + own + after }}" + system + close
        )
        lines.append("{% endif %}")
        if self.tools == "message behind":
            lines.append("{% if tools %}" + opens("'available_tools'") + "{{ tools | tojson }}" + close + "{% endif %}")
        has_none = "not has_system" + (" and false" if self.date == "message" else "")
        hook = "{% if loop.first and " + has_none + " %}" + user + "{% endif %}"
        lines.append("{% for m in rest %}" + opens("m.role") + hook + "{{ " + content + " }}" + close + "{% endfor %}")
        lines.append("{% if add_generation_prompt %}" + opens("'assistant'"))
        if self.switch == "answer":
            lines.append("{% if thinking is defined and not thinking %}<think>\\n\\n</think>\\n\\n{% endif %}")
        lines.append("{% endif %}")
        return "".join(lines).replace("\\n", "\n")

    def system_text(self, system: str | None, day: str, variables: dict) -> str | None:
        """What another model's system message says of what this template writes before the first user's; None where
        there is none, or only what the template always writes."""
        tools = variables.get("tools")
        declared = json.dumps(tools, ensure_ascii=False) if tools else ""
        default = "You are of the old town." * self.default + f" Today is {day}" * (
            self.default and self.date == "default"
        )
        own = default if system is None else system.strip() if self.strips else system
        before = f"Today is {day}.\n\n" * (self.date == "inside")
        before += f"Effort: {variables.get('effort') or 'low'}\n\n" * (self.switch == "text")
        before += f"# Tools\n{declared}\n\n" * (self.tools == "before" and bool(tools))
        after = f"\n\n# Tools\n{declared}" * (self.tools == "after" and bool(tools))
        after += f"\n\nToday is {day}." * (self.date == "behind")
        body = before + own + after
        if system is None and body == default and self.date != "default":
            body = ""  # always the same
        parts = [
            f"Date: {day} it is." * (self.date == "message"),
            declared * (self.tools == "message before"),
            (body.strip() if self.strips else body) * bool(body.strip()),
            declared * (self.tools == "message behind"),
        ]
        return "\n\n".join(filter(None, parts)) or None


@functools.cache
def wrapped(wrap: str):
    return make_chat_tokenizer(Family(CHATML, (*WRAPS[wrap][0], *CONTROL), "<s>", True))
