// Requests to the server, and what the browser stores.

const KEY = "raybert.key"; // in sessionStorage: gone with the tab
const RETRIES = 5; // after 429
const MAX_WAIT = 60; // seconds between two of them
const MESSAGES = {
  401: "The server does not answer without its key.",
  413: "This is more than the server takes at once; shorten it.",
  422: "The server can't read this text.",
  429: "The server is still busy; try again in a while.",
  504: "The server took too long; try again, or shorten the text.",
};

/** An error message for the reader, with the HTTP status; 0 without a response. */
export class RequestError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Read or write an item of the browser's storage; where that is forbidden or full, store nothing. */
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
 * Send a request; return the response's body and the milliseconds that it took.
 * After 429 wait as long as Retry-After says, show so in `problem`, and retry.
 */
export async function request(path, body, { signal, problem }) {
  for (let retries = 0; ; retries += 1) {
    const key = stored("sessionStorage", KEY);
    const headers = { "Content-Type": "application/json" };
    if (key) headers.Authorization = `Bearer ${key}`;
    const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
    const begun = performance.now();
    const response = await fetch(path, { ...options, headers, signal }).catch(() => null);
    const answer = await response?.json().catch(() => null);
    signal.throwIfAborted();
    if (response?.ok && answer) return { answer, took: performance.now() - begun };
    if (response?.status !== 429 || retries === RETRIES) throw toError(response, answer);
    const retryAfter = Number(response.headers.get("Retry-After")) || 1;
    const seconds = Math.min(MAX_WAIT, Math.max(1, retryAfter));
    problem.textContent = `The server is busy; trying again in ${seconds} s.`;
    await pause(seconds, signal);
    problem.textContent = "";
  }
}

function toError(response, answer) {
  if (!response) {
    const why = navigator.onLine ? "The server can't be reached" : "You are offline";
    return new RequestError(`${why}; try again in a while.`, 0);
  }
  const { status } = response;
  const message = (status === 413 || status === 422) && answer?.error;
  return new RequestError(
    message || (MESSAGES[status] ?? `The server can't answer now (${status}).`), status);
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)));
  });
}
