// Edits a profile: changed keys of an existing profile. The server checks it, and writes the file.

import { curve } from "./curve.js";
import { make } from "./dom.js";
import { object } from "./events.js";
import { percent, say, word } from "./words.js";
import { said } from "./arm.js";

/** The value of a dotted key. */
const value = (profile, key) => key.split(".").reduce((inner, name) => inner?.[name], profile);

/** The prompts that can be edited, by group. */
function prompts(profile) {
  const questions = profile.method === "hardened"
    ? Object.keys(profile.questions).flatMap(name => [`questions.${name}.system`, `questions.${name}.template`])
    : ["detect.template"];
  return {
    "p-questions": questions,
    "step-3": ["caption.template"],
    "step-4": ["safe.template", "safe.plain", "safe.strict", "refusal"],
  };
}

export class Editor {
  #container;
  #facts;
  #changes = {};
  #base;
  #check;

  constructor(container, facts) {
    [this.#container, this.#facts, this.#base] = [container, facts, facts.usual];
    this.#build();
  }

  /** The profile in the format of the server. */
  get profile() {
    return { base: this.#base, name: this.name.value.trim() || word("default-name"), changes: this.#changes };
  }

  /** Whether the calibration is that of the base profile. */
  get isCalibrated() {
    return this.#base === this.#facts.usual;
  }

  #build() {
    const profile = this.#facts.profiles.find(profile => profile.name === this.#base);
    this.name ??= make("input", { id: "profile-name", maxlength: 60, value: word("default-name"), autocomplete: "off" });
    this.name.oninput = () => this.#scheduleCheck();
    const names = this.#facts.profiles.map(({ name }) => [name, attributes => make("option", attributes, name)]);
    const base = this.#select("profile-base", names, this.#base, name => this.#askToRebase(name));
    this.question = make("div", { class: "confirm", role: "alert", hidden: true });
    this.problem = make("p", { class: "problem", role: "alert", hidden: true });
    this.changed = make("span", { class: "note" });
    this.toml = make("div");
    const children = [
      said("editor-note", {}, "p", { class: "note" }),
      make("div", { class: "pair" }, this.#field("base", base), this.#field("name", this.name)),
      this.question,
      ...this.#threshold(profile),
      this.#field("gate", this.#choice("gate", profile, ["detected", "always", "never"], "gate")),
      said("prompts", {}, "h4"),
      said(profile.method === "hardened" ? "prompts-note-hardened" : "prompts-note", {}, "p", { class: "note" }),
      ...Object.entries(prompts(profile)).map(([group, keys]) => this.#prompts(group, keys, profile)),
      this.problem,
      make("div", { class: "buttons" },
        said("download", {}, "button", { type: "button", onclick: () => this.#download() }),
        said("toml", {}, "button", { type: "button", onclick: () => this.#show() }),
        said("reset", {}, "button", { type: "button", onclick: () => { this.#changes = {}; this.#build(); } }),
        this.changed),
      this.toml,
    ];
    this.#container.replaceChildren(this.#container.querySelector("summary"), ...children);
    this.#showCount();
  }

  /** Changes the base. If that would drop changes, the user is asked first. */
  #askToRebase(name) {
    const count = Object.keys(this.#changes).length;
    if (count === 0) {
      this.#rebase(name);
      return;
    }
    const select = this.#container.querySelector("#profile-base");
    const keep = () => {
      select.value = this.#base;
      this.question.hidden = true;
      select.focus();
    };
    const drop = said("switch-drop", {}, "button", { type: "button", onclick: () => this.#rebase(name) });
    this.question.replaceChildren(said("switch", { count }, "p"),
      make("div", { class: "buttons" }, drop, said("switch-keep", {}, "button", { type: "button", onclick: keep })));
    this.question.hidden = false;
    drop.focus();
  }

  #rebase(name) {
    [this.#base, this.#changes] = [name, {}];
    this.#build();
    this.#container.querySelector("#profile-base").focus();
  }

  #field(name, control) {
    return make("div", { class: "field" }, said(name, {}, "label", { for: control.id }), control);
  }

  /** A select; each option is its key and a function that makes its element from attributes. */
  #select(id, options, chosen, change) {
    const select = make("select", { id, onchange: () => change(select.value) },
      ...options.map(([key, option]) => option({ value: key, selected: key === chosen })));
    return select;
  }

  /** A key with a few possible values. */
  #choice(key, profile, values, words) {
    const original = value(profile, key), known = values.includes(original) ? values : [original, ...values];
    const current = this.#changes[key] ?? original;
    const option = name => attributes => (word(name) ? said(name, {}, "option", attributes) : make("option", attributes, name));
    return this.#select(`key-${key}`, known.map(name => [name, option(`${words}-${name}`)]), current, chosen => this.#set(key, chosen, original));
  }

  /** The threshold as a slider and, if there is a calibration, its effect. */
  #threshold(profile) {
    const isPaper = profile.method === "paper";
    const key = isPaper ? "detect.threshold" : "threshold";
    const original = value(profile, key), current = this.#changes[key] ?? original;
    const output = make("output", { for: "threshold" }, percent(current));
    const shown = this.#facts.calibration && this.isCalibrated && !isPaper ? curve(this.#facts.calibration, current) : null;
    const slider = make("input", { id: "threshold", type: "range", min: 0.01, max: 0.99, step: 0.01, value: current, oninput: () => {
      const threshold = Number(slider.value);
      output.textContent = percent(threshold);
      shown?.move(threshold);
      this.#set(key, threshold, original);
    } });
    const field = make("div", { class: "field" }, said("threshold", {}, "label", { for: "threshold" }),
      make("div", { class: "slider" }, slider, output));
    if (!isPaper) return [field, shown?.element ?? said("no-curve", {}, "p", { class: "note" })];
    const parser = this.#choice("detect.parser", profile, ["paper", "fail-closed", "score"], "parser");
    return [this.#field("parser", parser), field, said("parser-note", {}, "p", { class: "note" })];
  }

  #prompts(group, keys, profile) {
    return make("details", { class: "prompts" }, said(group, {}, "summary"), ...keys.map(key => {
      const original = value(profile, key) ?? "", id = `key-${key}`;
      const area = make("textarea", { id, rows: Math.min(8, 1 + original.split("\n").length), spellcheck: "false" });
      area.value = this.#changes[key] ?? original;
      area.addEventListener("input", () => this.#set(key, area.value, original));
      return make("div", { class: "field" }, make("label", { for: id }, make("code", {}, key)), area);
    }));
  }

  #set(key, current, original) {
    if (current === original) delete this.#changes[key];
    else this.#changes[key] = current;
    this.toml.replaceChildren();
    this.#showCount();
    this.#scheduleCheck();
  }

  #showCount() {
    say(this.changed, "changed", { count: Object.keys(this.#changes).length });
  }

  /** Checks the profile once the user stops typing for a moment. */
  #scheduleCheck() {
    clearTimeout(this.#check);
    this.#check = setTimeout(() => this.#validate(), 400);
  }

  async #validate() {
    for (const marked of this.#container.querySelectorAll("[aria-invalid]")) marked.removeAttribute("aria-invalid");
    this.problem.hidden = true;
    try {
      return await object("profile", this.profile);
    } catch (failure) {
      this.complain(failure);
      return null;
    }
  }

  /** Shows what is wrong, and where. */
  complain({ code, message, key }) {
    this.problem.hidden = false;
    this.problem.replaceChildren(said(word(`e-${code}`) ? `e-${code}` : "failed"), " ", said("told", { message }));
    const field = document.getElementById({ name: "profile-name", threshold: "threshold" }[key] ?? `key-${key}`);
    field?.setAttribute("aria-invalid", "true");
    const group = field?.closest("details");
    if (group) group.open = true;
  }

  async #show() {
    const result = await this.#validate();
    if (!result) return;
    const text = make("textarea", { id: "toml", rows: 14, readonly: true, spellcheck: "false" });
    text.value = result.toml;
    this.toml.replaceChildren(this.#field("in-toml", text));
    text.focus();
  }

  async #download() {
    const result = await this.#validate();
    if (!result) return;
    const url = URL.createObjectURL(new Blob([result.toml], { type: "application/toml" }));
    make("a", { href: url, download: `${this.profile.name.replace(/[^\p{L}\p{N}_-]+/gu, "-")}.toml` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }
}
