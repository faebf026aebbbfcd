// Displays JSON schemas: a table of fields, nested ones folded, and an example body.
import { h } from "./dom.js";

const BOUNDS = [
  ["minimum", "≥"],
  ["maximum", "≤"],
  ["exclusiveMinimum", ">"],
  ["exclusiveMaximum", "<"],
  ["minLength", "characters ≥"],
  ["maxLength", "characters ≤"],
  ["minItems", "items ≥"],
  ["maxItems", "items ≤"],
];
// Example values with which a route works, by field name.
const EXAMPLES = {
  messages: [{ role: "user", content: "What is deep learning?" }],
  max_tokens: 60,
  stream: true,
  inputs: "What is deep learning?",
  prompt: "Deep learning is",
  input: "What is deep learning?",
  parameters: { max_new_tokens: 60 },
  query: "deep learning",
  documents: ["cooking", "neural networks"],
  texts: ["cooking", "neural networks"],
  text_1: "deep learning",
  text_2: ["cooking", "neural networks"],
  instances: [{ inputs: "What is deep learning?", parameters: { max_new_tokens: 20 } }],
  tokens: [1, 2, 3],
};
const OFFERED = ["model", "input", "max_tokens", "stream", "parameters"]; // optional fields to show in examples

/** The named schemas of one document; `model` is the name that examples give the model. */
export class Schemas {
  constructor(named, model) {
    this.named = named;
    this.examples = { ...EXAMPLES, model };
  }

  /** Return the schema that a reference points to. */
  resolve(schema) {
    return schema.$ref ? this.named[schema.$ref.split("/").at(-1)] : schema;
  }

  /** Return the alternatives of a schema, without null. */
  alternatives(schema) {
    const all = schema.anyOf ?? schema.oneOf ?? [schema];
    return all.filter((each) => each.type !== "null");
  }

  /** Return the fields of a schema as an element. */
  view(schema) {
    const all = this.alternatives(schema);
    if (all.length > 1) {
      return h(
        "div",
        { class: "one-of" },
        h("p", { class: "type" }, "One of"),
        all.map((each) => this.folded(each, this.typeOf(each))),
      );
    }
    const own = this.resolve(all[0] ?? {});
    if (own !== all[0] && (own.anyOf || own.oneOf)) return this.view(own);
    if (own.type === "array" && own.items)
      return h(
        "div",
        {},
        h("p", { class: "type" }, this.typeOf(own)),
        this.hasFields(own.items) && this.view(own.items),
      );
    const fields = Object.entries(own.properties ?? {});
    if (!fields.length) return h("p", { class: "type" }, this.typeOf(own));
    return h(
      "dl",
      { class: "fields" },
      fields.map(([name, field]) => this.row(name, field, own.required?.includes(name))),
    );
  }

  row(name, field, isRequired) {
    const own = this.resolve(field);
    const inner = this.alternatives(field)
      .map((each) => this.inner(each))
      .find(Boolean);
    const details = [
      isRequired && h("strong", {}, "required"),
      ...this.bounds(field),
      field.default !== undefined && field.default !== null && `default ${JSON.stringify(field.default)}`,
    ].filter(Boolean);
    return [
      h("dt", {}, h("code", {}, name), " ", h("span", { class: "type" }, this.typeOf(field))),
      h(
        "dd",
        {},
        own.description ?? field.description,
        details.length > 0 &&
          h(
            "span",
            { class: "bounds" },
            details.flatMap((each, i) => (i ? [", ", each] : [each])),
          ),
        inner && this.folded(inner, "Fields"),
      ),
    ];
  }

  /** Return the part of a field that has fields itself, if any. */
  inner(schema) {
    const own = this.resolve(schema);
    if (own.properties) return schema;
    if (own.items && this.hasFields(own.items))
      return this.alternatives(own.items).find((each) => this.hasFields(each));
    return null;
  }

  hasFields(schema) {
    return this.alternatives(schema).some((each) => this.resolve(each).properties);
  }

  /** Schemas may be recursive, so folded contents are created when opened. */
  folded(schema, name) {
    const fold = h("details", {}, h("summary", {}, name));
    fold.addEventListener("toggle", () => {
      if (fold.open && fold.childElementCount === 1) fold.append(this.view(schema));
    });
    return fold;
  }

  typeOf(schema) {
    if (schema.$ref) return schema.$ref.split("/").at(-1);
    const several = schema.anyOf ?? schema.oneOf;
    if (several) return [...new Set(several.map((each) => this.typeOf(each)))].join(" | ");
    if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" | ");
    if (schema.type === "array") return `list of ${schema.items ? this.typeOf(schema.items) : "any"}`;
    return [schema.type ?? "any"].flat().join(" | ");
  }

  bounds(field) {
    const own = [field, ...this.alternatives(field)];
    return BOUNDS.flatMap(([key, sign]) => {
      const found = own.find((each) => each[key] !== undefined);
      return found ? [`${sign} ${found[key]}`] : [];
    });
  }

  /** Return a useful body that a schema allows. */
  example(schema, name = "") {
    const own = this.resolve(this.alternatives(schema)[0] ?? {});
    if (own.anyOf || own.oneOf) return this.example(own, name);
    if (own.properties) {
      const required = own.required ?? [];
      const wanted = Object.keys(own.properties).filter(
        (each) => required.includes(each) || OFFERED.includes(each),
      );
      return Object.fromEntries(
        wanted.map((each) => [each, this.examples[each] ?? this.example(own.properties[each], each)]),
      );
    }
    if (this.examples[name] !== undefined) return this.examples[name];
    const kind = [own.type].flat()[0];
    return (
      { array: [], boolean: false, integer: own.minimum ?? 1, number: own.minimum ?? 1, object: {} }[kind] ??
      own.enum?.[0] ??
      ""
    );
  }
}
