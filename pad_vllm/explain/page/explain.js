"use strict";

for (const answer of document.querySelectorAll(".answer")) {
  const tokens = answer.querySelector(".tokens");
  const detail = answer.querySelector(".detail");
  const all = [...tokens.children];
  let current = all[0];

  /** The token that an event is at, or within. */
  const at = (event) => event.target.closest(".token");

  const tell = (token) => {
    detail.textContent = token.dataset.told;
  };

  /** One stop of the Tab key for all tokens: where it was last. */
  const choose = (token) => {
    current.tabIndex = -1;
    current.classList.remove("current");
    current = token;
    current.tabIndex = 0;
    current.classList.add("current");
    tell(token);
  };

  tokens.onmouseover = (event) => at(event) && tell(at(event));
  tokens.addEventListener("focusin", (event) => at(event) && choose(at(event)));
  tokens.onclick = (event) => at(event)?.focus();
  tokens.onkeydown = (event) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -all.length, End: all.length }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    all[Math.min(Math.max(all.indexOf(current) + by, 0), all.length - 1)].focus();
  };
}
