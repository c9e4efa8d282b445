// Elements for responses. Text of users and servers becomes text nodes, never markup.

const MAX_LABELS = 6; // with bars
const MAX_WORDS = 5; // with listed weights, on each side
const MIN_TINTED = 0.08; // share of the largest weight below which words are not tinted

/** Make an element with attributes and children; strings become text nodes. */
export function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** The duration of a request. */
export function took(ms) {
  const shown = ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
  return make("p", { class: "quiet" }, `Answered in ${shown}`);
}

/** A note where the text was longer than the model reads. */
export function cutNote(answer) {
  if (!answer.some(({ truncated }) => truncated)) return [];
  return [make("p", { class: "quiet" }, "The text is too long for the model; a part was left out.")];
}

/** For each form of answers: the answer in short, and its details. */
export const ANSWERS = {
  labels: { verdict: likeliest, details: labelBars },
  decisions: { verdict: selectedLabels, details: labelBars },
  numbers: { verdict: estimates, details: () => "" },
  entities: { verdict: markedEntities, details: () => "" },
};

/** The most probable label; the scores are sorted. */
function likeliest([{ label, score }]) {
  return make("p", {}, make("strong", {}, label), ` ${percent(score)} sure`);
}

/** The labels' scores as bars. */
function labelBars(scores) {
  return bars(scores.slice(0, MAX_LABELS).map(({ label, score }) => [label, score]));
}

/** All labels that reach their thresholds. */
function selectedLabels(scores) {
  const labels = scores.filter(({ selected }) => selected).map(({ label }) => label);
  return make("p", {}, make("strong", {}, labels.join(", ") || "none of the labels"));
}

/** Numbers with their 90% intervals. */
function estimates(numbers) {
  const rows = numbers.map(({ label, score, low, high }) => {
    const interval = low === undefined ? "" : ` ${number(low)} to ${number(high)} (90%)`;
    const name = numbers.length > 1 ? `${label}: ` : "";
    return make("p", {}, name, make("strong", {}, number(score)), interval);
  });
  return make("div", {}, ...rows);
}

/** The text with its entities marked, a colour for each type. */
function markedEntities(entities, text) {
  const points = Array.from(text); // the server counts code points, JavaScript UTF-16 units
  const types = [...new Set(entities.map(({ entity_group: type }) => type))].sort();
  const shown = make("p", { class: "text" });
  let at = 0;
  for (const { start, end, entity_group: type, score } of entities) {
    const hue = Math.round((360 * types.indexOf(type)) / types.length);
    const part = points.slice(start, end).join("");
    const mark = make("mark", { class: "entity", title: percent(score) }, part, make("sup", {}, type));
    mark.style.setProperty("--hue", hue);
    shown.append(points.slice(at, start).join(""), mark);
    at = end;
  }
  shown.append(points.slice(at).join(""));
  if (!entities.length) shown.append(make("span", { class: "quiet" }, " (no entity)"));
  return shown;
}

const number = (value) => String(Number(value.toPrecision(5)));

/** The sentence with its masks replaced by the most probable tokens. */
export function filled(text, mask, blanks) {
  const sentence = make("p", { class: "text" });
  text.split(mask).forEach((part, index) => {
    const guess = blanks[index - 1]?.[0]?.token_str ?? mask;
    if (index) sentence.append(make("b", {}, guess));
    sentence.append(part);
  });
  return sentence;
}

/** The tokens for every mask, as bars under headings. */
export function guessBars(blanks) {
  return blanks.flatMap((guesses, index) => {
    const title = blanks.length > 1 ? `Blank ${index + 1}` : "What would fit";
    return [
      make("h3", {}, title),
      bars(guesses.map(({ token_str, score }) => [token_str, score])),
    ];
  });
}

/** The text with words tinted by weight, and two lists of the largest weights. */
export function reasons(text, { words, error, label }) {
  const points = Array.from(text); // the server counts code points, JavaScript UTF-16 units
  const textOf = ({ start, end }) => points.slice(start, end).join("");
  const largest = words.reduce((most, { weight }) => Math.max(most, Math.abs(weight)), 1e-9);
  const shown = make("p", { class: "text" });
  let at = 0;
  for (const word of words) {
    const share = Math.abs(word.weight) / largest;
    const mark = make("mark", { class: word.weight > 0 ? "for" : "against" }, textOf(word));
    mark.style.setProperty("--weight", share);
    shown.append(textOf({ start: at, end: word.start }), share < MIN_TINTED ? textOf(word) : mark);
    at = word.end;
  }
  shown.append(textOf({ start: at }));

  const side = (title, sign) => {
    const ours = words.filter(({ weight }) => sign * weight > 0);
    ours.sort((one, other) => sign * (other.weight - one.weight));
    const rows = ours.slice(0, MAX_WORDS).map((word) => {
      const weight = (sign > 0 ? "+" : "−") + Math.abs(word.weight).toFixed(2);
      return make("li", {}, make("span", {}, textOf(word)), figure(weight));
    });
    if (!rows.length) rows.push(make("li", {}, "no word"));
    const sample = make("mark", { class: title.toLowerCase() }, title);
    const heading = make("h3", {}, sample, ` ${label}`);
    return make("div", {}, heading, make("ol", { role: "list" }, ...rows));
  };
  return [
    make("h3", {}, "The words that decided it"),
    shown,
    make("div", { class: "weights" }, side("For", 1), side("Against", -1)),
    make("p", { class: "quiet" }, `The weights sum to the decision within ${error.toFixed(3)}.`),
  ];
}

function bars(items) {
  const rows = items.map(([name, share]) => {
    const bar = make("span", { class: "bar" });
    bar.style.setProperty("--share", share);
    return make("li", {}, make("span", {}, name), bar, figure(percent(share)));
  });
  return make("ol", { class: "bars", role: "list" }, ...rows);
}

function percent(share) {
  if (share > 0.999) return "> 99.9%";
  return share < 0.001 ? "< 0.1%" : `${(100 * share).toFixed(1)}%`;
}

const figure = (text) => make("span", { class: "figure" }, text);
