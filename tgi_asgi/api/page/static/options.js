// The user's settings for all answers, stored in the browser.
import { byId, h } from "./dom.js";

const NAME = "tgi-asgi.options";

// An empty field leaves the value to the server. `help` briefly describes the effect of a value.
const FIELDS = [
  {
    name: "system",
    label: "System prompt",
    kind: "text",
    rows: 4,
    help: "Said to the model before the conversation.",
  },
  {
    name: "temperature",
    label: "Temperature",
    min: 0,
    max: 2,
    step: 0.05,
    help: "0 takes the likeliest token; more is more varied.",
  },
  {
    name: "top_p",
    label: "Top p",
    min: 0.01,
    max: 1,
    step: 0.01,
    help: "Only the likeliest tokens that have this share together.",
  },
  { name: "top_k", label: "Top k", min: 1, step: 1, help: "Only so many of the likeliest tokens." },
  {
    name: "min_p",
    label: "Min p",
    min: 0,
    max: 1,
    step: 0.01,
    help: "Only tokens with this share of the likeliest one's.",
  },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    min: 0.05,
    step: 0.05,
    help: "Above 1, what was said becomes less likely.",
  },
  {
    name: "max_tokens",
    label: "Maximum tokens",
    min: 1,
    step: 1,
    help: "Of an answer. Empty: what the context holds.",
  },
  { name: "seed", label: "Seed", min: 0, step: 1, help: "The same seed gives the same answer." },
  { name: "stop", label: "Stop at", kind: "lines", rows: 2, help: "Texts that end an answer, one a line." },
  {
    name: "reasoning_effort",
    label: "Reasoning",
    kind: "choice",
    choices: ["", "none", "low", "medium", "high"],
    help: "For models that think first, where their template knows it.",
  },
  {
    name: "tools",
    label: "Tools",
    kind: "json",
    rows: 5,
    help: "OpenAI's list of functions, as JSON. You are asked for what they give: this page runs none.",
  },
];

/** Return the options that have a value. */
export function readOptions() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? {};
  } catch {
    return {};
  }
}

/** Fill the settings dialog; `onChange(options)` is called when it closes with valid values. */
export function setUpOptions(onChange) {
  const dialog = byId("settings-dialog");
  const inputs = new Map(FIELDS.map((field) => [field, inputOf(field)]));
  byId("fields").append(...FIELDS.map((field) => labelled(field, inputs.get(field))));
  const fill = (options) => {
    for (const [field, input] of inputs) {
      input.value = written(field, options[field.name]);
      input.setCustomValidity("");
    }
  };
  const collect = () => {
    const options = {};
    for (const [field, input] of inputs) {
      const value = valueOf(field, input);
      if (value !== undefined) options[field.name] = value;
    }
    return options;
  };
  byId("settings").addEventListener("click", () => {
    fill(readOptions());
    dialog.showModal();
  });
  byId("reset").addEventListener("click", () => fill({}));
  dialog.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const options = collect();
    try {
      localStorage.setItem(NAME, JSON.stringify(options));
    } catch {
      /* kept only for this visit */
    }
    onChange(options);
    dialog.close();
  });
}

function inputOf({ name, kind, rows, min, max, step, choices }) {
  const id = `option-${name}`;
  const described = { id, "aria-describedby": `${id}-help` };
  if (kind === "choice")
    return h(
      "select",
      described,
      choices.map((each) => h("option", { value: each }, each || "as the model does")),
    );
  if (kind) {
    const area = h("textarea", {
      ...described,
      rows,
      spellcheck: kind === "text" ? null : "false",
      class: kind === "json" ? "code" : null,
    });
    if (kind === "json") area.addEventListener("input", () => area.setCustomValidity(faultOf(area.value)));
    return area;
  }
  return h("input", {
    ...described,
    type: "number",
    min,
    max,
    step: step < 1 ? "any" : step,
    placeholder: "default",
    inputmode: "decimal",
  });
}

function labelled({ label, help }, input) {
  const isShort = input.type === "number" || input.tagName === "SELECT";
  return h(
    "div",
    { class: isShort ? "field short" : "field" },
    h("label", { for: input.id }, label),
    input,
    h("p", { id: `${input.id}-help` }, help),
  );
}

function written({ kind }, value) {
  if (value === undefined) return "";
  if (kind === "json") return JSON.stringify(value, null, 2);
  return kind === "lines" ? value.join("\n") : String(value);
}

function valueOf({ kind }, input) {
  const text = input.value;
  if (!text.trim()) return undefined;
  if (kind === "json") return JSON.parse(text);
  if (kind === "lines") return text.split("\n").filter(Boolean);
  return kind ? text : Number(text);
}

function faultOf(text) {
  if (!text.trim()) return "";
  try {
    return Array.isArray(JSON.parse(text)) ? "" : "This must be a list of functions.";
  } catch (error) {
    return error.message;
  }
}
