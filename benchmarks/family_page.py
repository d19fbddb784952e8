"""docs/families.md, of what `benchmarks/families.py` and `tests/families.py` found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

INTRODUCTION = """\
# Families

Which of these families can guide which. `make families` writes this page. It takes the families' own tokenizers and
chat templates, and models with random weights. So the page says what a start finds, and whether engines give the
oracle's tokens. How well a reward model guides is another question ([language.md](../benchmarks/results/language.md)).
The figures are in [families.json](../benchmarks/results/families.json). [tokenizers.md](tokenizers.md) says what groups
and pieces are.
"""
TEMPLATES_INTRODUCTION = """
## Chat templates

A preference belongs at the end of the leading system message, or at the start of the first message where the template
writes none. *right*: the preference stands there, and nothing else changed. *none*: the template has no such thing.
*not read*: transformers encodes a text and does not decode the same one. The text has code, tags, emoji and five
scripts.
"""
ENGINES_INTRODUCTION = """
## Engine and oracle

Tokens that the real engine generated, greedy, in float32, compared with those of the oracle (`tests/oracle.py`), which
reads the chat as the reward model's own template writes it.
"""
PAIRS_INTRODUCTION = """
## Pairs

Candidates are the tokens of the base that guided requests may generate; the columns behind say how many of them are one
of the reward model's tokens, two, and so on. [tokenizers.md](tokenizers.md#what-it-costs) says how long the tables take
to make. Chats: whether the reward model reads conversations of the base's template (a system message or none, several
turns, tools, another day, thinking switched off, markers of other families in a user's text) as its own template would
have written them. *With header*: it also reads what the base's template writes by itself before the system text, such
as the day.
"""
CASES = {
    "system": "system message",
    "no system": "none",
    "tools": "tools",
    "day": "another day",
    "thinking": "thinking",
}
CHAT_CASES = {**CASES, "turns": "turns"}
MISSING = """
## Not run

DeepSeek V3 (b) is DeepSeek V3's folder with `"tokenizer_class": "PreTrainedTokenizerFast"` in its
tokenizer_config.json: with the one that the folder names, transformers loses white space and every script but Latin.

The packages of gpt-oss and Llama 2 have no chat template: their prompts are plain text here. The tokenizers of Mistral
7B, Mistral Small, SmolLM3, Gemma 4, Phi and Kimi K2 are in none of the packages that this command takes.
"""
REFUSED = "refused"


def render_page(
    titles: Mapping[str, str], engines: Sequence[tuple[str, str, str]], results: Mapping[str, Mapping[str, Any]]
) -> str:
    """The page.

    Args:
        titles: of the families, by name.
        engines: base, reward model and runner of those to be held against the oracle.
        results: of families.json.
    """
    parts = [INTRODUCTION, "\n".join(provenance(results)), "\n".join(overview(titles, results))]
    parts += [TEMPLATES_INTRODUCTION, "\n".join(template_table(titles, results))]
    parts += [ENGINES_INTRODUCTION, "\n".join(engine_table(titles, engines, results))]
    parts.append(PAIRS_INTRODUCTION)
    for base, title in titles.items():
        parts.append(f"\n### {title} as the base\n\n" + "\n".join(pair_table(base, titles, results)))
    return "\n".join([*parts, MISSING])


def provenance(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    dates = sorted({entry["date"] for entry in results.values()})
    versions: dict[str, set[str]] = {}
    for entry in results.values():
        for name, version in entry["versions"].items():
            if name != "sources":
                versions.setdefault(name, set()).add(version)
    said = ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(versions.items()))
    machines = " and ".join(sorted({entry["hardware"] for entry in results.values()}))
    yield f"On {machines}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {said}."


def overview(titles: Mapping[str, str], results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "\n## Who guides whom\n\nHow many of the candidates are one token of the reward model's.\n"
    yield "| base \\ reward model | " + " | ".join(titles.values()) + " |"
    yield "| --- |" + " --- |" * len(titles)
    for base, title in titles.items():
        cells = [cell(results.get(f"pair {base} {reward}"), base == reward) for reward in titles]
        yield f"| {title} | " + " | ".join(cells) + " |"
    reasons: dict[str, list[str]] = {}
    for key, entry in results.items():
        if key.startswith("pair ") and "reason" in entry:
            _, base, reward = key.split()
            reason = entry["reason"].rpartition("cannot be translated from that: ")[2]
            reasons.setdefault(reason, []).append(f"{titles[base]} under {titles[reward]}")
    if reasons:
        yield "\nRefused, with these words:\n"
        yield from (f"- {', '.join(those)}: {reason}" for reason, those in reasons.items())


def cell(entry: Mapping[str, Any] | None, is_itself: bool) -> str:
    if is_itself:
        return "same"
    if entry is None:
        return "not run"
    if entry["kind"] == "tables":
        one = entry["pieces"].get("1", 0) / entry["candidates"]
        return f"{one:.0%}" if not entry["wrong"] else "**wrong**"
    return entry["kind"]


def template_table(titles: Mapping[str, str], results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "| | tokens | " + " | ".join(CASES.values()) + " |"
    yield "| --- | ---: |" + " --- |" * len(CASES)
    for name, title in titles.items():
        if (entry := results.get(f"tokenizer {name}")) is None:
            continue
        said = entry.get("template")
        missing = "no template" if entry["reads_text"] else "not read"
        cells = [missing] * len(CASES) if said is None else [short(said[case]) for case in CASES]
        yield f"| {title} | {entry['tokens']:,} | " + " | ".join(cells) + " |"


def short(said: str) -> str:
    return said if said in ("right", "none") else "**wrong**"


def engine_table(
    titles: Mapping[str, str], engines: Sequence[tuple[str, str, str]], results: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    yield "| base | reward model | runner | requests | tokens | |"
    yield "| --- | --- | --- | ---: | ---: | --- |"
    for base, reward, runner in engines:
        entry = results.get(f"engine {base} {reward} {runner}")
        figures = "| | not run"
        if entry is not None:
            verdict = "equal" if not entry["differ"] else f"**{entry['differ']} differ**"
            figures = f"{entry['requests']} | {entry['tokens']} | {verdict}"
        yield f"| {titles[base]} | {titles[reward]} | {runner.upper()} | {figures} |"


def pair_table(base: str, titles: Mapping[str, str], results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "| reward model | candidates | 1 piece | 2 | 3 or 4 | 5 to 8 | largest group | chats |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- |"
    for reward, title in titles.items():
        entry = results.get(f"pair {base} {reward}")
        if entry is None:
            continue
        if entry["kind"] != "tables":
            what = "the same ordinary tokens" if entry["kind"] == "same" else "refused"
            foreign = f", {entry['foreign']} others are no candidates" if entry.get("foreign") else ""
            yield f"| {title} | {what}{foreign} | | | | | | |"
            continue
        counts = {int(n): count for n, count in entry["pieces"].items()}
        parts = [sum(counts.get(n, 0) for n in some) for some in ((1,), (2,), (3, 4), range(5, 100))]
        yield (
            f"| {title} | {entry['candidates']:,} of {entry['tokens']:,} | "
            + " | ".join(f"{count:,}" for count in parts)
            + f" | {entry['largest_group']:,} (`{entry['largest_of']}`) | {chats(entry)} |"
        )


def chats(entry: Mapping[str, Any]) -> str:
    if "chat" not in entry:
        return "plain text"
    wrong = [CHAT_CASES[case] for case, said in entry["chat"].items() if said not in ("right", "header", "none")]
    if wrong:
        return f"**wrong**: {', '.join(wrong)}"
    return "right, with header" if "header" in entry["chat"].values() else "right"
