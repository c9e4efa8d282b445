// What answers look like. Whatever people or servers wrote becomes text nodes, never markup.

const MOST_LABELS = 6; // of them have bars
const MOST_WORDS = 5; // on each side have their weights listed
const FAINT = 0.08; // words of less than this share of the largest weight are not tinted

/** Make an element with attributes and children; strings among the children are text. */
export function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** How long an answer took. */
export function took(ms) {
  const shown = ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
  return make("p", { class: "quiet" }, `Answered in ${shown}`);
}

/** The likeliest label, of scores that come sorted. */
export function verdict([{ label, score }]) {
  return make("p", {}, make("strong", {}, label), ` ${percent(score)} sure`);
}

/** The labels' scores as bars. */
export function labelBars(scores) {
  return bars(scores.slice(0, MOST_LABELS).map(({ label, score }) => [label, score]));
}

/** A sentence with its blanks filled by the likeliest guesses. */
export function filled(text, mask, blanks) {
  const sentence = make("p", { class: "text" });
  text.split(mask).forEach((part, index) => {
    const guess = blanks[index - 1]?.[0]?.token_str ?? mask;
    if (index) sentence.append(make("b", {}, guess));
    sentence.append(part);
  });
  return sentence;
}

/** Every blank's guesses, as bars under headings. */
export function guessBars(blanks) {
  return blanks.flatMap((guesses, index) => {
    const title = blanks.length > 1 ? `Blank ${index + 1}` : "What would fit";
    return [
      make("h3", {}, title),
      bars(guesses.map(({ token_str, score }) => [token_str, score])),
    ];
  });
}

/** The text with its words tinted by weight, and the heaviest of them in two lists. */
export function reasons(text, { words, error }, label) {
  const points = Array.from(text); // the server counts code points, JavaScript UTF-16 units
  const textOf = ({ start, end }) => points.slice(start, end).join("");
  const largest = words.reduce((most, { weight }) => Math.max(most, Math.abs(weight)), 1e-9);
  const shown = make("p", { class: "text" });
  let at = 0;
  for (const word of words) {
    const share = Math.abs(word.weight) / largest;
    const mark = make("mark", { class: word.weight > 0 ? "for" : "against" }, textOf(word));
    mark.style.setProperty("--weight", share);
    shown.append(textOf({ start: at, end: word.start }), share < FAINT ? textOf(word) : mark);
    at = word.end;
  }
  shown.append(textOf({ start: at }));

  const side = (title, sign) => {
    const ours = words.filter(({ weight }) => sign * weight > 0);
    ours.sort((one, other) => sign * (other.weight - one.weight));
    const rows = ours.slice(0, MOST_WORDS).map((word) => {
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
