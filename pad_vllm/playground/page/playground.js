// The playground: what the form says becomes two requests, whose streams are shown side by side.

const MOST_SURPRISE = 6; // nats, and more, have the full shade
const $ = (id) => document.getElementById(id);

let about = null; // what the server says of its guidance (GET v1/pad)
let upstream = { server: location.origin, has_key: false };
let running = null; // AbortController of the answers that are being streamed

// ---------------------------------------------------------------- what the server says

async function load() {
  $("server").classList.remove("bad");
  try {
    upstream = await getJSON("server.json");
    const models = (await getJSON("v1/models")).data.map((model) => model.id);
    fill($("model"), models.map((name) => [name, name]));
    $("model-field").hidden = models.length < 2;
    about = await getJSON("v1/pad").catch((error) => {
      if (error.status !== 404) throw error;
      return { guides: false, arguments: [] }; // a server without the plugin
    });
    $("server").textContent = describe(models);
  } catch (error) {
    about = null;
    $("server").textContent = error.message;
    $("server").classList.add("bad");
  }
  offer();
  show();
}

function describe(models) {
  const where = `${models[0]} at ${upstream.server}`;
  if (!about.guides) return `${where}, which guides nobody: it runs without pad-vllm, or without a reward model.`;
  const kinds = {
    served: "itself", served_adapter: "an adapter over it", merged_adapter: "another model with an adapter", model: "another model",
  };
  return `${where}, guided by ${kinds[about.reward_model.kind]}: ${nameOf(about.reward_model.name)}. pad-vllm ${about.version ?? ""}`;
}

/** Of a path its end; a hub's id as it stands. */
const nameOf = (model) => (/^[./~]/.test(model) ? model.replace(/\/+$/, "").split("/").pop() : model);

async function getJSON(path) {
  const response = await reach(path);
  if (!response.ok) throw await refusal(response);
  return response.json();
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(`This page’s own server is gone (${error.message}). Start pad-vllm playground again.`);
  }
}

/** The server's own words for an answer that is none. */
async function refusal(response) {
  const text = await response.text();
  let words = text;
  try {
    const body = JSON.parse(text);
    words = body.error?.message ?? body.error ?? body.detail ?? text;
  } catch { /* no JSON */ }
  const error = new Error(typeof words === "string" && words ? words : `HTTP ${response.status}: ${JSON.stringify(words)}`);
  error.status = response.status;
  return error;
}

// ---------------------------------------------------------------- the form

function fill(select, options) {
  const chosen = select.value;
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  if (options.some(([value]) => value === chosen)) select.value = chosen;
}

/** Offer what the server has, and no more. */
function offer() {
  const { personas = [], default_persona, heads = [], adapters = [], references = [], defaults = {}, limits = {} } = about ?? {};
  const known = new Set(about?.arguments ?? []);
  fill($("persona"), [["", default_persona ? `the server’s: ${default_persona}` : "none"], ...personas.map((name) => [name, name])]);
  $("persona-field").hidden = !personas.length;
  fill($("reference"), [["", `the server’s${defaults.reference ? `: ${defaults.reference}` : ""}`], ...references.map((name) => [name, name])]);
  $("divergence-field").hidden = !known.has("pad_max_divergence");
  $("heads").hidden = !heads.length;
  if ($("head-rows").dataset.of !== heads.join("\n")) $("head-rows").replaceChildren(...heads.map(headRow));
  $("head-rows").dataset.of = heads.join("\n");
  for (const row of rows()) offerAdapters(row);
  $("legend").firstChild.textContent = !isLog()
    ? "Not shaded: this server’s logprobs are logits. "
    : isRaw()
      ? "Shaded: tokens that the served model itself found unlikely. "
      : "Shaded: tokens unlikely in the distribution that they were sampled from; this server’s logprobs are not the base model’s. ";
  $("add").disabled = rows().length >= (limits.preferences ?? 8);
  placeholders();
}

/** What a field that is left empty stands for: the persona's, where it has one, else the server's. */
function placeholders() {
  const { defaults = {}, default_persona } = about ?? {};
  const more = $("persona").value || default_persona ? " or persona’s" : "";
  for (const name of ["beta", "top_k"]) $(name).placeholder = `${defaults[name] ?? "the server’s"}${more}`;
  $("max_divergence").placeholder = "no bound";
  $("seed").placeholder = "any";
}

const rows = () => [...$("rows").children];

function addRow() {
  const row = $("row").content.firstElementChild.cloneNode(true);
  row.querySelector(".remove").onclick = () => {
    const next = row.nextElementSibling ?? row.previousElementSibling;
    row.remove();
    number();
    (next?.querySelector(".text") ?? $("add")).focus();
    show();
  };
  $("rows").append(row);
  offerAdapters(row);
  number();
  return row;
}

function number() {
  rows().forEach((row, i) => {
    const name = `Preference ${i + 1}`;
    row.setAttribute("aria-label", name);
    row.querySelector(".text").setAttribute("aria-label", name);
    row.querySelector(".adapter").setAttribute("aria-label", `Adapter of preference ${i + 1}`);
    row.querySelector(".weight").setAttribute("aria-label", `Weight of preference ${i + 1}`);
    row.querySelector(".remove").setAttribute("aria-label", `Remove preference ${i + 1}`);
  });
  $("add").disabled = rows().length >= (about?.limits?.preferences ?? 8);
}

function offerAdapters(row) {
  const adapters = about?.adapters ?? [];
  const select = row.querySelector(".adapter");
  fill(select, [["", "through no adapter"], ...adapters.map((name) => [name, `through ${name}`])]);
  select.hidden = !adapters.length;
}

function headRow(name, i) {
  const row = document.createElement("div");
  row.className = "row head";
  const label = Object.assign(document.createElement("label"), { htmlFor: `head-${i}`, textContent: name });
  const weight = Object.assign(document.createElement("input"), { type: "range", min: -3, max: 3, step: 0.1, value: 1, id: `head-${i}` });
  weight.className = "weight";
  row.append(label, weight, document.createElement("output"));
  return row;
}

/** A number as it was typed; what is none goes to the server as text, which says so better. */
function numberOf(id) {
  const field = $(id);
  if (field.validity.badInput) throw new Error(`${labelOf(field)}: this is no number.`);
  return field.value === "" ? undefined : Number(field.value);
}

const labelOf = (field) => field.labels[0].firstChild.textContent.trim();

/** The arguments of the guided request. Throws an Error for what no request can say. */
function guidance() {
  const xargs = {};
  const asked = rows()
    .map((row, i) => ({
      number: i + 1,
      text: row.querySelector(".text").value.trim(),
      adapter: row.querySelector(".adapter").hidden ? "" : row.querySelector(".adapter").value,
      weight: Number(row.querySelector(".weight").value),
    }))
    .filter((row) => row.text || row.adapter);
  for (const [key, name, what] of [["text", "pad_preference", "words"], ["adapter", "pad_adapter", "an adapter"]]) {
    const has = asked.filter((row) => row[key]);
    const without = asked.find((row) => !row[key]);
    if (has.length && without) throw new Error(`Preference ${without.number} has not got ${what}: give it to all of them, or to none.`);
    if (has.length) xargs[name] = has.length > 1 ? has.map((row) => row[key]) : has[0][key];
  }
  if (asked.length > 1 || (asked.length && asked[0].weight !== 1)) xargs.pad_preference_weights = asked.map((row) => row.weight);
  if ($("persona").value) xargs.pad_persona = $("persona").value;
  if (!$("heads").hidden && $("use-heads").checked) {
    xargs.pad_weights = [...document.querySelectorAll("#head-rows .weight")].map((weight) => Number(weight.value));
  }
  for (const name of ["beta", "top_k", "max_divergence"]) {
    const value = $(name).closest("[hidden]") ? undefined : numberOf(name);
    if (value !== undefined) xargs[`pad_${name}`] = value;
  }
  if ($("reference").value) xargs.pad_reference = $("reference").value;
  return xargs;
}

const isChat = () => document.querySelector("[name=kind]:checked").value === "chat";
const path = () => (isChat() ? "/v1/chat/completions" : "/v1/completions");

/** A request's body, without what the page asks for its own sake. */
function bodyOf(xargs) {
  const body = { model: $("model").value };
  if (isChat()) {
    body.messages = [{ role: "user", content: $("prompt").value }];
    if ($("system").value.trim()) body.messages.unshift({ role: "system", content: $("system").value });
  } else body.prompt = $("prompt").value;
  for (const name of ["max_tokens", "temperature", "seed"]) {
    const value = numberOf(name);
    if (value !== undefined) body[name] = value;
  }
  if (Object.keys(xargs).length) body.vllm_xargs = xargs;
  return body;
}

// How many to ask for, so that the likeliest token is told beside the one that was sampled: vLLM counts that in chats only.
const TOP_OF_CHATS = 2;
const TOP_OF_TEXTS = 1;
const mostLogprobs = () => (about?.max_logprobs == null || about.max_logprobs < 0 ? TOP_OF_CHATS : about.max_logprobs);

/** What makes the stream show tokens: their log-probabilities, and the likeliest. */
function streamed(body) {
  const most = mostLogprobs();
  const shown = isChat() ? { logprobs: true, top_logprobs: Math.min(TOP_OF_CHATS, most) } : { logprobs: Math.min(TOP_OF_TEXTS, most) };
  return { ...body, stream: true, ...shown };
}

// ---------------------------------------------------------------- requests to copy

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** Texts, numbers, and lists and objects of them: JSON and Python write them alike. */
function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, one]) => `${literal(name)}: ${literal(one)}`).join(", ")}}`;
}

function asCurl(body) {
  const key = upstream.has_key ? ` \\\n  -H "Authorization: Bearer $VLLM_API_KEY"` : "";
  const fields = Object.entries(body).map(([name, value]) => `  ${literal(name)}: ${literal(value)}`);
  const json = quoted(`{\n${fields.join(",\n")}\n}`);
  return `curl ${upstream.server}${path()} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d ${json}`;
}

function asPython(body) {
  const { vllm_xargs: xargs, ...rest } = body;
  const lines = Object.entries(rest).map(([name, value]) => `    ${name}=${literal(value)},`);
  if (xargs) lines.push(`    extra_body={"vllm_xargs": ${literal(xargs)}},`);
  const [call, text] = isChat() ? ["chat.completions", "message.content"] : ["completions", "text"];
  const [os, key] = upstream.has_key ? ["import os\n\n", 'os.environ["VLLM_API_KEY"]'] : ["", '"-"'];
  return `${os}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(`${upstream.server}/v1`)}, api_key=${key})
answer = client.${call}.create(
${lines.join("\n")}
)
print(answer.choices[0].${text})`;
}

/** Bring the page up to what the form says now. */
function show() {
  for (const weight of document.querySelectorAll(".weight")) {
    const value = Number(weight.value);
    weight.parentElement.querySelector("output").textContent = `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(1)}`;
    if (weight.id) weight.disabled = !$("use-heads").checked;
  }
  $("system-field").hidden = !isChat();
  placeholders();
  try {
    const body = bodyOf(guidance());
    $("curl").textContent = asCurl(body);
    $("python").textContent = asPython(body);
    complain("");
  } catch (error) {
    complain(error.message);
  }
}

function complain(words) {
  $("problem").textContent = words;
  $("problem").hidden = !words;
}

async function copy(button) {
  const block = $(button.dataset.of);
  try {
    await navigator.clipboard.writeText(block.textContent);
  } catch { // not offered to pages that came over plain HTTP from elsewhere
    getSelection().selectAllChildren(block);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

// ---------------------------------------------------------------- an answer

/** The tokens of a stream's event: text, log-probability, and the likeliest token's where the server tells it. */
function tokensOf(choice) {
  const found = choice.logprobs;
  if (!found) return [];
  if (found.content) {
    const isTold = mostLogprobs() >= TOP_OF_CHATS;
    return found.content.map((token) => ({ text: token.token, logprob: token.logprob, top: isTold ? best(token.top_logprobs ?? []) : null }));
  }
  const isTold = mostLogprobs() >= TOP_OF_TEXTS;
  return (found.tokens ?? []).map((text, i) => {
    const tops = Object.entries(found.top_logprobs?.[i] ?? {}).map(([token, logprob]) => ({ token, logprob }));
    return { text, logprob: found.token_logprobs[i], top: isTold ? best(tops) : null };
  });
}

const best = (tokens) => tokens.reduce((a, b) => (a && a.logprob >= b.logprob ? a : b), null);
const isFirst = (token) => token.top.logprob <= token.logprob;

class Answer {
  constructor(id) {
    this.section = $(id);
    [this.speed, this.tokens, this.error, this.detail] = [".speed", ".tokens", ".error", ".detail"].map((s) => this.section.querySelector(s));
    this.tokens.onmouseover = (event) => event.target.told && this.tell(event.target);
    this.tokens.onfocusin = (event) => event.target.told && this.choose(event.target);
    this.tokens.onclick = (event) => event.target.told && event.target.focus();
    this.tokens.onkeydown = (event) => this.move(event);
  }

  clear(note = "") {
    this.tokens.replaceChildren();
    this.all = [];
    this.waiting = []; // tokens whose text has not come: parts of a character
    this.current = null;
    [this.first, this.last, this.numFirst] = [0, 0, 0];
    this.note = note;
    this.finish = "";
    this.fail("");
    this.detail.textContent = "Point at a token, or reach it by Tab and the arrow keys: what the model would rather have said.";
    this.measure();
  }

  /** A stream's event. */
  add(choice) {
    const text = choice.text ?? `${choice.delta?.reasoning ?? choice.delta?.reasoning_content ?? ""}${choice.delta?.content ?? ""}`;
    const tokens = tokensOf(choice);
    if (tokens.length) {
      this.last = performance.now();
      if (!this.all.length) [this.first, this.numFirst] = [this.last, tokens.length];
    }
    this.all.push(...tokens);
    this.waiting.push(...tokens);
    if (text) {
      // Token by token, where their texts are the event's; a part of a character has none, and goes with the next.
      const isSplit = this.waiting.map((token) => token.text).join("") === text;
      let group = [];
      for (const token of this.waiting) {
        group.push(token);
        if (!isSplit || !token.text) continue;
        this.append(token.text, group);
        group = [];
      }
      if (!isSplit) this.append(text, group);
      this.waiting = isSplit ? group : [];
    }
    if (choice.finish_reason) this.end(choice.finish_reason);
    this.measure();
  }

  append(text, tokens, kind = "") {
    const span = document.createElement("span");
    span.className = `token ${kind}`;
    span.textContent = text;
    span.told = tokens;
    span.tabIndex = this.current ? -1 : 0;
    this.current ??= span;
    if (/^[\r\n]+$/.test(text)) span.classList.add("break");
    if (tokens.length && isLog()) {
      const surprise = Math.max(...tokens.map((token) => -token.logprob));
      span.dataset.logprob = -surprise;
      span.style.setProperty("--s", Math.min(1, Math.max(0, surprise / MOST_SURPRISE)).toFixed(3));
    }
    span.setAttribute("aria-describedby", this.detail.id);
    this.tokens.append(span);
  }

  /** Why it ended; tokens without text, as an end-of-turn token, are shown now. */
  end(reason) {
    for (const token of this.waiting) this.append(token.text || "◌", [token], "unseen");
    this.waiting = [];
    this.finish = reason;
    this.measure();
  }

  fail(words) {
    this.error.textContent = words;
    this.error.hidden = !words;
  }

  measure() {
    const parts = [];
    const num = this.all.length;
    if (num) parts.push(`${num} token${num > 1 ? "s" : ""}`);
    if (this.last > this.first) parts.push(`${((1000 * (num - this.numFirst)) / (this.last - this.first)).toFixed(1)} tokens/s`);
    if (num && isLog() && this.all.every((token) => token.top)) {
      const others = this.all.filter((token) => !isFirst(token)).length;
      parts.push(`${Math.round((100 * others) / num)}% not its first choice`);
    }
    if (this.finish) parts.push(this.finish);
    if (this.note) parts.push(this.note);
    this.speed.textContent = parts.join(" · ");
  }

  choose(span) {
    this.current.tabIndex = -1; // one stop of the Tab key for all tokens
    this.current.classList.remove("current");
    this.current = span;
    span.tabIndex = 0;
    span.classList.add("current");
    this.tell(span);
  }

  tell(span) {
    this.detail.replaceChildren(...span.told.flatMap((token, i) => [...(i ? [document.createElement("br")] : []), sentence(token)]));
  }

  move(event) {
    const spans = [...this.tokens.children];
    const to = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -spans.length, End: spans.length }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const at = spans.indexOf(this.current) + to;
    spans[Math.min(Math.max(at, 0), spans.length - 1)]?.focus();
  }
}

const isLog = () => !about?.logprobs_mode || about.logprobs_mode.endsWith("logprobs");
const isRaw = () => !about?.logprobs_mode || about.logprobs_mode.startsWith("raw");
const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 0.1 ? `${p.toFixed(p >= 10 ? 0 : 1)}%` : p >= 0.001 ? `${p.toFixed(3)}%` : "under 0.001%";
};
const shown = (text) => (text ? `“${text.replaceAll("\n", "↵")}”` : "a part of a character");

/** What the served model thought of a token. */
function sentence(token) {
  if (!isLog()) return `${shown(token.text)}: ${token.logprob} (${about.logprobs_mode})`;
  if (!token.top) return `${shown(token.text)}: ${percent(token.logprob)}.`;
  const whose = isRaw() ? "The model’s own first choice" : "The guided first choice";
  const first = isFirst(token) ? "It is the first choice." : `${whose}: ${shown(token.top.token)}, ${percent(token.top.logprob)}.`;
  return `${shown(token.text)}: ${percent(token.logprob)}. ${first}`;
}

// ---------------------------------------------------------------- asking

/** The data of server-sent events, as they come. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    text = `${text}${value ?? ""}`.replaceAll("\r\n", "\n");
    const parts = text.split("\n\n");
    text = done ? "" : parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data) yield data;
    }
    if (done) return;
  }
}

async function ask(answer, body, signal) {
  answer.section.setAttribute("aria-busy", "true");
  try {
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(streamed(body)), signal };
    const response = await reach(path().slice(1), options);
    if (!response.ok) throw await refusal(response);
    let isWhole = false;
    for await (const data of events(response)) {
      if (data === "[DONE]") {
        isWhole = true;
        break;
      }
      let event;
      try {
        event = JSON.parse(data);
      } catch {
        continue; // cut off; what follows says so, or the end does
      }
      if (event.error) throw new Error(event.error.message ?? event.error);
      if (event.choices?.[0]) answer.add(event.choices[0]);
    }
    if (["abort", "error"].includes(answer.finish)) throw new Error(`The server gave this answer up (finish_reason ${answer.finish}): it is stopping, or failed.`);
    if (!isWhole) throw new Error("The answer broke off: the connection to the server is lost.");
  } catch (error) {
    if (signal.aborted) answer.end("stopped");
    else {
      answer.end("failed");
      answer.fail(error instanceof TypeError ? `The answer broke off (${error.message}).` : error.message);
    }
  } finally {
    answer.section.removeAttribute("aria-busy");
  }
}

const unguided = new Answer("unguided");
const guided = new Answer("guided");

async function run() {
  if (running) return;
  running = new AbortController();
  const { signal } = running;
  busy(true);
  try {
    if (!about) await load();
    const xargs = guidance();
    // Where everybody is guided, strength 0 is the way not to be.
    const free = about?.default_persona ? { pad_beta: 0 } : {};
    const bodies = [bodyOf(free), bodyOf(xargs)];
    unguided.clear(about?.default_persona ? "by β 0, as this server guides everybody" : "");
    guided.clear();
    if (!matchMedia("(min-width: 62rem)").matches) $("results").scrollIntoView({ block: "start" });
    const asks = [() => ask(unguided, bodies[0], signal)];
    if (!about) for (const answer of [unguided, guided]) answer.fail($("server").textContent);
    else if (!about.guides) guided.fail("This server would ignore what is asked of guidance: it runs without pad-vllm, or without a reward model.");
    else if (!Object.keys(xargs).length && !about.default_persona) guided.fail("Nothing says how to guide: write a preference, or choose a persona.");
    else asks.push(() => ask(guided, bodies[1], signal));
    if (!about) return;
    if ($("in-turn").checked) {
      for (const one of asks) if (!signal.aborted) await one();
    } else await Promise.all(asks.map((one) => one()));
  } catch (error) {
    complain(error.message);
  } finally {
    running = null;
    busy(false);
  }
}

function busy(is) {
  // Not disabled: what has the focus would lose it.
  $("run").setAttribute("aria-disabled", is);
  $("stop").disabled = !is;
}

// ---------------------------------------------------------------- the page's events

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("form").addEventListener("input", show);
$("add").addEventListener("click", () => {
  addRow().querySelector(".text").focus();
  show();
});
$("stop").addEventListener("click", () => running?.abort());
for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", () => copy(button));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape") running?.abort();
});

addRow();
unguided.clear();
guided.clear();
load();
