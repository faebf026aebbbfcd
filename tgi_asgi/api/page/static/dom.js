// Creates elements. Text always becomes a text node: no code of the pages writes HTML.
import { PATHS } from "./icons.js";

const SVG = "http://www.w3.org/2000/svg";

/** Create an element: h("button", { class: "quiet", onclick: run }, icon("copy"), "Copy"). */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== undefined && child !== null && child !== false),
  );
  return element;
}

/** Return an icon, hidden from screen readers: its parent has a label. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** Return a button with only an icon; its name is a tooltip and for screen readers. */
export function iconButton(name, label, onclick, more = {}) {
  return h(
    "button",
    { type: "button", class: "quiet", title: label, "aria-label": label, onclick, ...more },
    icon(name),
  );
}

/** Replace `<i data-icon="name">` in the HTML with icons, and make `data-close` buttons close their dialogs. */
export function prepare(root = document) {
  for (const place of root.querySelectorAll("[data-icon]")) place.replaceWith(icon(place.dataset.icon));
  for (const button of root.querySelectorAll("[data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  for (const dialog of root.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  }
}

export const byId = (id) => document.getElementById(id);

/** Set up the theme button, which shows the current theme and switches to the next. */
export function setUpTheme(button) {
  const label = () => {
    const theme = document.documentElement.dataset.theme;
    const text = `Theme: ${theme === "auto" ? "as the system's" : theme}`;
    button.replaceChildren(icon({ auto: "contrast", light: "sun", dark: "moon" }[theme]));
    button.title = text;
    button.setAttribute("aria-label", text);
  };
  label();
  button.addEventListener("click", () => {
    window.nextTheme();
    label();
  });
}

/** Copy a text, also on pages without TLS, for which browsers provide no clipboard. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = h("textarea", { class: "unseen", "aria-hidden": "true" });
  area.value = text;
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
  focused?.focus();
}

/** Return a button that copies the result of `text()`, and confirms it. */
export function copyButton(text, label = "Copy") {
  const button = iconButton("copy", label, async () => {
    await copy(text());
    button.replaceChildren(icon("check"));
    button.setAttribute("aria-label", "Copied");
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.setAttribute("aria-label", label);
    }, 1500);
  });
  return button;
}

/** Save a text as a file through the browser. */
export function save(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Return a short random name; `crypto.randomUUID` does not exist on pages without TLS. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
