"""Actions of the page tests, with waiting; elements are found by their visible text."""

import time

TIMEOUT_MS = 30_000

CONTRASTS = """
() => {
  const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
    .getContext("2d", { willReadFrequently: true });
  const painted = (colours) => {
    for (const colour of colours) {
      context.fillStyle = "#010203";
      context.fillStyle = colour;
      if (context.fillStyle === "#010203") throw new Error(`not a colour: ${colour}`);
      context.fillRect(0, 0, 1, 1);
    }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (element, colour) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const { backgroundColor, opacity } = getComputedStyle(at);
      if (opacity !== "1") throw new Error("text that is seen through");
      layers.unshift(backgroundColor);
    }
    const under = luminance(painted(["white", ...layers]));
    const over = luminance(painted(["white", ...layers, colour]));
    return (Math.max(under, over) + 0.05) / (Math.min(under, over) + 0.05);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || element.getBoundingClientRect().width < 2) continue;
    found.push([text.slice(0, 40), ratio(element, getComputedStyle(element).color)]);
  }
  for (const field of document.querySelectorAll("textarea")) {
    const { color, opacity } = getComputedStyle(field, "::placeholder");
    if (opacity !== "1") throw new Error("a placeholder that is seen through");
    found.push([field.placeholder, ratio(field, color)]);
  }
  return found;
}
"""


def expect(thing):
    from playwright.sync_api import expect

    return expect(thing)


def until(holds):
    ends = time.monotonic() + TIMEOUT_MS / 1000
    while not holds():
        assert time.monotonic() < ends, "the condition does not become true"
        time.sleep(0.01)


def text_field(page):
    return page.get_by_role("textbox", name="Your text")


def blank_field(page):
    return page.get_by_role("textbox", name="A sentence with a blank")


def verdict(page):
    return page.locator("#predict").get_by_role("status")


def problem(page):
    return page.locator("#predict").get_by_role("alert")


def send(page, text):
    text_field(page).fill(text)
    page.get_by_role("button", name="Classify").click()


def classify(page, text):
    """Send a text and wait until its complete answer is shown."""
    send(page, text)
    expect(page.get_by_role("heading", name="The words that decided it")).to_be_visible()


def fill_in(page, text):
    blank_field(page).fill(text)
    page.get_by_role("button", name="Fill in").click()
    expect(page.locator("#fill").get_by_role("status")).to_contain_text("Answered in")
