// The page of `raybert serve`: two forms, the form for a key, and recent texts.

import { request, RequestError, stored, useKey } from "./client.js";
import { ANSWERS, cutNote, filled, guessBars, make, reasons, took } from "./render.js";

const RECENT = "raybert.recent"; // in localStorage: [{section, text}], the newest first
const MAX_RECENT = 8;
const MAX_SHOWN = 120; // characters of a recent text

let mask = "[MASK]"; // until /info is read
let explains = true;
let form = "labels"; // of answers: a key of ANSWERS
let readsPairs = false;
let afterKey = begin; // repeats the request that was rejected for want of a key

const find = (selector, within = document) => within.querySelector(selector);
const firstField = () => find("section:not([hidden]) textarea");

async function begin() {
  const problem = find("#problem");
  const { signal } = new AbortController();
  problem.textContent = "";
  try {
    const { answer: info } = await request("info", null, { signal, problem });
    mask = info.mask_token ?? mask;
    explains = info.explain ?? explains;
    form = info.answer_form ?? form;
    readsPairs = info.reads_pairs ?? readsPairs;
    find("#second-field").hidden = !readsPairs;
    find("#model").textContent = info.model_id;
    find("#limit").textContent = `Up to ${info.max_input_length} tokens of it are read.`;
    find("#insert").textContent = `Insert ${mask}`;
    find("#blank").placeholder = `I have watched this ${mask} and it was awesome.`;
    find("#predict").hidden = !info.labels?.length;
    find("#fill").hidden = !info.mask_token;
    showRecent();
  } catch (error) {
    showError(error, problem, begin);
  }
}

async function classify(text, parts) {
  const inputs = readsPairs ? [text, find("#second").value] : text;
  const body = { inputs, truncate: true, raw_scores: false, explain: false };
  const { answer, took: ms } = await request("predict", body, parts);
  const { verdict, details } = ANSWERS[form];
  parts.verdict.replaceChildren(verdict(answer, text), ...cutNote(answer), took(ms));
  parts.details.replaceChildren(details(answer));
  if (!explains) return;
  // The answer is shown first: the explanation takes many times as long.
  const explained = await request("predict", { ...body, explain: true }, parts);
  const { words, ...rest } = explained.answer;
  [inputs].flat().forEach((input, index) => {
    const its = words.filter((word) => (word.input ?? 0) === index);
    parts.details.append(...reasons(input, { words: its, ...rest }));
  });
}

async function fillIn(text, parts) {
  const found = await request("fill-mask", { inputs: text, top_k: 5 }, parts);
  parts.verdict.replaceChildren(filled(text, mask, found.answer), took(found.took));
  parts.details.replaceChildren(...guessBars(found.answer));
}

/** Handle the form of a section; a new request aborts the previous one. */
function handleForm(name, isReady, answer) {
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
      if (!signal.aborted) showError(error, problem, () => form.requestSubmit());
    }
  });
}

function showError(error, problem, retry) {
  const known = error instanceof RequestError;
  problem.textContent = known ? error.message : "The server's answer can't be read.";
  if (error.status !== 401) return;
  afterKey = retry;
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

/** The recent texts, from the browser's storage. */
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
  const all = [{ section, text }, ...others].slice(0, MAX_RECENT);
  stored("localStorage", RECENT, JSON.stringify(all));
  showRecent();
}

function showRecent() {
  const rows = recent().filter(({ section }) => !find(`#${section}`).hidden);
  const items = rows.map(({ section, text }) => {
    const points = Array.from(text);
    const shown = points.length > MAX_SHOWN ? `${points.slice(0, MAX_SHOWN).join("")}…` : text;
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

/** Dispatch the event for a text that a script has written; return the field. */
function typed(field) {
  field.dispatchEvent(new Event("input"));
  field.focus();
  return field;
}

find("#clear").addEventListener("click", () => {
  stored("localStorage", RECENT, null);
  showRecent();
  find("#announcement").textContent = "Recent texts are cleared.";
  firstField()?.focus();
});

find("#insert").addEventListener("click", () => {
  const field = find("#blank");
  field.setRangeText(mask, field.selectionStart, field.selectionEnd, "end");
  typed(field);
});

handleForm("predict", (text) => text.trim(), classify);
handleForm("fill", (text) => text.includes(mask), fillIn);
begin();
