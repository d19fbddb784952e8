"""An explanation as one self-contained HTML page. Its styles and script are inside, and it loads nothing."""

from __future__ import annotations

from html import escape
from pathlib import Path

from pad_vllm.explain.explaining import ExplainedAnswer, ExplainedToken, Explanation
from pad_vllm.explain.words import NO_TEXT, cells_of_token, columns, percent, quoted, readable, shade, signed, summary

FOLDER = Path(__file__).parent / "page"
NOTHING_ELSE = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""What a browser may load for the page."""


def document(explanation: Explanation) -> str:
    """HTML."""
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("explain.css", "explain.js"))
    answers = "\n".join(section(i, answer) for i, answer in enumerate(explanation.answers))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{NOTHING_ELSE}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>pad-vllm explain</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
<h1>pad-vllm explain</h1>
<p class="hint">{shown_text(explanation.model)}, guided by {shown_text(explanation.reward_model)}</p>
</header>
<main>
<p class="prompt">{shown_text(explanation.prompt)}</p>
<p class="legend">Shaded by divergence from the unguided distribution:
<i>0</i><i style="--s:.22">0.25</i><i style="--s:.63">1</i><i style="--s:.95">3</i> nats.
<u>Underlined</u>: not what the base model would have said first.
Point at a token, or reach it by Tab and the arrow keys, for its numbers.</p>
<div class="answers">
{answers}
</div>
</main>
<script>
{script}</script>
</body>
</html>
"""


def shown_text(text: str) -> str:
    """As HTML, in an element or an attribute."""
    return escape(readable(text))


def section(number: int, answer: ExplainedAnswer) -> str:
    tokens = "".join(token_span(i, token, answer, f"detail-{number}") for i, token in enumerate(answer.tokens))
    return f"""<section class="answer" aria-labelledby="title-{number}">
<h2 id="title-{number}">{shown_text(answer.label)}</h2>
<p class="hint">{escape(summary(answer))}</p>
<div class="tokens" role="group" aria-label="The answer, token by token">{tokens}</div>
<p class="detail" id="detail-{number}"></p>
<details><summary>All tokens</summary>
<div class="scrolled" tabindex="0" role="group" aria-label="All tokens"><table>
{table_head(answer)}
{"".join(table_row(token) for token in answer.tokens)}</table></div>
</details>
</section>"""


def token_span(place: int, token: ExplainedToken, answer: ExplainedAnswer, detail: str) -> str:
    """A token's HTML. Only one token of an answer is a stop of the Tab key."""
    other = "" if token.token_id == token.first_id else " other"
    text = shown_text(token.text).replace("\n", '<b aria-hidden="true">↵</b>\n') or NO_TEXT
    return (
        f'<span class="token{other}" style="--s:{shade(token):.3f}" tabindex="{0 if place == 0 else -1}" '
        f'aria-describedby="{detail}" data-told="{escape(sentence(token, answer.contexts))}">{text}</span>'
    )


def sentence(token: ExplainedToken, contexts: tuple[str, ...]) -> str:
    """A sentence on what the base model and guidance did with a token."""
    words = [f"{quoted(token.text)}: {percent(token.probability)} by the base model."]
    if token.token_id == token.first_id:
        words.append("It is the base model's first choice.")
    else:
        words.append(f"Its first choice: {quoted(token.first_text)}, {percent(token.first_probability)}.")
    if token.effect is not None:
        words.append(f"Divergence {token.effect.divergence:.3f} nats.")
        rewards = zip(contexts, token.effect.rewards, strict=True)
        words.append("Reward: " + "; ".join(f"{readable(name)} {signed(value)}" for name, value in rewards) + ".")
    return " ".join(words)


def table_head(answer: ExplainedAnswer) -> str:
    return "<tr>" + "".join(f'<th scope="col">{escape(name)}</th>' for name in columns(answer)) + "</tr>"


def table_row(token: ExplainedToken) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells_of_token(token)) + "</tr>\n"
