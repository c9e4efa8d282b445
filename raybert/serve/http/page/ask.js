// Asking the server, and what a browser keeps for it.

const KEY = "raybert.key"; // in sessionStorage: gone with the tab
const RETRIES = 5; // of a request for which the server was too busy
const LONGEST_WAIT = 60; // seconds between two of them
const REFUSALS = {
  401: "The server does not answer without its key.",
  413: "This is more than the server takes at once; shorten it.",
  422: "The server can't read this text.",
  429: "The server is still busy; try again in a while.",
  504: "The server took too long; try again, or shorten the text.",
};

/** An answer that did not come, in words for the reader; its HTTP status, 0 where there is none. */
export class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Use a storage of the browser's; where that is forbidden, or full, nothing is kept. */
export function stored(storage, name, value) {
  try {
    if (value === null) window[storage].removeItem(name);
    else if (value !== undefined) window[storage].setItem(name, value);
    return window[storage].getItem(name);
  } catch {
    return null;
  }
}

/** Send this key from now on; null: none. */
export const useKey = (key) => stored("sessionStorage", KEY, key);

/**
 * Ask the server; returns its answer and the milliseconds that it took.
 * While the server is busy, waits as long as it says, and tells so in `problem`.
 */
export async function ask(path, body, { signal, problem }) {
  for (let retries = 0; ; retries += 1) {
    const key = stored("sessionStorage", KEY);
    const headers = { "Content-Type": "application/json" };
    if (key) headers.Authorization = `Bearer ${key}`;
    const how = body ? { method: "POST", body: JSON.stringify(body) } : {};
    const begun = performance.now();
    const response = await fetch(path, { ...how, headers, signal }).catch(() => null);
    const answer = await response?.json().catch(() => null);
    signal.throwIfAborted();
    if (response?.ok && answer) return { answer, took: performance.now() - begun };
    if (response?.status !== 429 || retries === RETRIES) throw refusal(response, answer);
    const wish = Number(response.headers.get("Retry-After")) || 1;
    const seconds = Math.min(LONGEST_WAIT, Math.max(1, wish));
    problem.textContent = `The server is busy; trying again in ${seconds} s.`;
    await pause(seconds, signal);
    problem.textContent = "";
  }
}

function refusal(response, answer) {
  if (!response) {
    const why = navigator.onLine ? "The server can't be reached" : "You are offline";
    return new Refusal(`${why}; try again in a while.`, 0);
  }
  const { status } = response;
  const told = (status === 413 || status === 422) && answer?.error;
  return new Refusal(
    told || (REFUSALS[status] ?? `The server can't answer now (${status}).`), status);
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)));
  });
}
