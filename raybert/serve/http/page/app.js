// The page of `raybert serve`: two forms, the key that a server may ask for, the recent texts.

import { ask, Refusal, stored, useKey } from "./ask.js";
import { filled, guessBars, labelBars, make, reasons, took, verdict } from "./show.js";

const RECENT = "raybert.recent"; // in localStorage: [{section, text}], the newest first
const MOST_RECENT = 8;
const SHOWN = 120; // characters of a recent text

let mask = "[MASK]"; // until the server says otherwise
let explains = true;
let afterKey = begin; // what is asked again once there is a key

const find = (selector, within = document) => within.querySelector(selector);
const firstField = () => find("section:not([hidden]) textarea");

async function begin() {
  const problem = find("#problem");
  const { signal } = new AbortController();
  problem.textContent = "";
  try {
    const { answer: info } = await ask("info", null, { signal, problem });
    mask = info.mask_token ?? mask;
    explains = info.explain ?? explains;
    find("#model").textContent = info.model_id;
    find("#limit").textContent = `Up to ${info.max_input_length} tokens of it are read.`;
    find("#insert").textContent = `Insert ${mask}`;
    find("#blank").placeholder = `I have watched this ${mask} and it was awesome.`;
    find("#predict").hidden = !info.labels?.length;
    find("#fill").hidden = !info.mask_token;
    showRecent();
  } catch (error) {
    refused(error, problem, begin);
  }
}

async function classify(text, parts) {
  const asked = { inputs: text, truncate: true, raw_scores: false, explain: false };
  const labelled = await ask("predict", asked, parts);
  parts.verdict.replaceChildren(verdict(labelled.answer), took(labelled.took));
  parts.details.replaceChildren(labelBars(labelled.answer));
  if (!explains) return;
  // The label does not wait for its reasons, which take many times as long.
  const explained = await ask("predict", { ...asked, explain: true }, parts);
  parts.details.append(...reasons(text, explained.answer, labelled.answer[0].label));
}

async function fillIn(text, parts) {
  const found = await ask("fill-mask", { inputs: text, top_k: 5 }, parts);
  parts.verdict.replaceChildren(filled(text, mask, found.answer), took(found.took));
  parts.details.replaceChildren(...guessBars(found.answer));
}

/** Let the form of a section be answered: of its requests only the newest counts. */
function serve(name, isReady, answer) {
  const section = find(`#${name}`);
  const [form, field] = [find("form", section), find("textarea", section)];
  const [button, problem] = [find("button", section), find("[role=alert]", section)];
  const [verdict, details] = [find(".verdict", section), find(".details", section)];
  let newest = new AbortController();
  field.addEventListener("input", () => (button.disabled = !isReady(field.value)));
  field.addEventListener("keydown", (event) => {
    const sends = event.key === "Enter" && (event.ctrlKey || event.metaKey);
    if (sends && !button.disabled) form.requestSubmit();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    newest.abort();
    const { signal } = (newest = new AbortController());
    for (const part of [problem, verdict, details]) part.replaceChildren();
    remember(name, field.value);
    try {
      await answer(field.value, { signal, problem, verdict, details });
    } catch (error) {
      if (!signal.aborted) refused(error, problem, () => form.requestSubmit());
    }
  });
}

function refused(error, problem, again) {
  const known = error instanceof Refusal;
  problem.textContent = known ? error.message : "The server's answer can't be read.";
  if (error.status !== 401) return;
  afterKey = again;
  useKey(null);
  find("#key-form").hidden = false;
  find("#key").focus();
}

find("#key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  useKey(find("#key").value);
  find("#key").value = "";
  find("#key-form").hidden = true;
  await afterKey();
  if (find("#key-form").hidden) firstField()?.focus();
});

/** The texts asked for lately, as this browser keeps them. */
function recent() {
  try {
    const isOurs = ({ section, text }) => ["predict", "fill"].includes(section) && text.trim();
    return JSON.parse(stored("localStorage", RECENT)).filter(isOurs);
  } catch {
    return [];
  }
}

function remember(section, text) {
  const others = recent().filter((one) => one.section !== section || one.text !== text);
  const all = [{ section, text }, ...others].slice(0, MOST_RECENT);
  stored("localStorage", RECENT, JSON.stringify(all));
  showRecent();
}

function showRecent() {
  const rows = recent().filter(({ section }) => !find(`#${section}`).hidden);
  const items = rows.map(({ section, text }) => {
    const points = Array.from(text);
    const shown = points.length > SHOWN ? `${points.slice(0, SHOWN).join("")}…` : text;
    const button = make("button", { type: "button" }, shown);
    button.addEventListener("click", () => {
      const field = find(`#${section} textarea`);
      field.value = text;
      typed(field).form.requestSubmit();
    });
    return make("li", {}, button);
  });
  find("#recent ol").replaceChildren(...items);
  find("#recent").hidden = !items.length;
}

/** Take what a script wrote into a field as if people had; returns the field. */
function typed(field) {
  field.dispatchEvent(new Event("input"));
  field.focus();
  return field;
}

find("#clear").addEventListener("click", () => {
  stored("localStorage", RECENT, null);
  showRecent();
  find("#told").textContent = "Recent texts are cleared.";
  firstField()?.focus();
});

find("#insert").addEventListener("click", () => {
  const field = find("#blank");
  field.setRangeText(mask, field.selectionStart, field.selectionEnd, "end");
  typed(field);
});

serve("predict", (text) => text.trim(), classify);
serve("fill", (text) => text.includes(mask), fillIn);
begin();
