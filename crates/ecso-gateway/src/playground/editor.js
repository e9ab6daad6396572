// A profile that is changed in the page. What is changed are keys over a profile that is there; the server checks it, and writes the file.

import { curve } from "./curve.js";
import { make } from "./dom.js";
import { object } from "./events.js";
import { percent, say, word } from "./words.js";
import { said } from "./arm.js";

/** The value behind a dotted key. */
const value = (profile, key) => key.split(".").reduce((inner, name) => inner?.[name], profile);

/** The keys that can be changed, by group. */
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
  #place;
  #facts;
  #changes = {};
  #base;
  #check;

  constructor(place, facts) {
    [this.#place, this.#facts, this.#base] = [place, facts, facts.usual];
    this.#build();
  }

  /** The profile as the server takes it. */
  get profile() {
    return { base: this.#base, name: this.name.value.trim() || word("default-name"), changes: this.#changes };
  }

  /** Whether it begins from the profile that the calibration is of. */
  get isCalibrated() {
    return this.#base === this.#facts.usual;
  }

  #build() {
    const profile = this.#facts.profiles.find(profile => profile.name === this.#base);
    this.name ??= make("input", { id: "profile-name", maxlength: 60, value: word("default-name"), autocomplete: "off" });
    this.name.oninput = () => this.#later();
    const base = this.#select("profile-base", this.#facts.profiles.map(({ name }) => [name, name]), this.#base, name => {
      [this.#base, this.#changes] = [name, {}];
      this.#build();
      this.#place.querySelector("#profile-base").focus();
    });
    this.problem = make("p", { class: "problem", role: "alert", hidden: true });
    this.changed = make("span", { class: "note" });
    this.toml = make("div");
    const children = [
      said("editor-note", {}, "p", { class: "note" }),
      make("div", { class: "pair" }, this.#field("base", base), this.#field("name", this.name)),
      ...this.#threshold(profile),
      this.#field("gate", this.#choice("gate", profile, ["detected", "always", "never"], "gate")),
      said("prompts", {}, "h4"),
      said("prompts-note", {}, "p", { class: "note" }),
      ...Object.entries(prompts(profile)).map(([group, keys]) => this.#prompts(group, keys, profile)),
      this.problem,
      make("div", { class: "buttons" },
        said("download", {}, "button", { type: "button", onclick: () => this.#download() }),
        said("toml", {}, "button", { type: "button", onclick: () => this.#show() }),
        said("reset", {}, "button", { type: "button", onclick: () => { this.#changes = {}; this.#build(); } }),
        this.changed),
      this.toml,
    ];
    this.#place.replaceChildren(this.#place.querySelector("summary"), ...children);
    this.#count();
  }

  #field(name, control) {
    return make("div", { class: "field" }, said(name, {}, "label", { for: control.id }), control);
  }

  #select(id, options, chosen, change) {
    const select = make("select", { id, onchange: () => change(select.value) }, ...options.map(([key, name]) => {
      const selected = key === chosen;
      return word(name) ? said(name, {}, "option", { value: key, selected }) : make("option", { value: key, selected }, name);
    }));
    return select;
  }

  /** A key with a few values. */
  #choice(key, profile, values, words) {
    const was = value(profile, key), known = values.includes(was) ? values : [was, ...values];
    const now = this.#changes[key] ?? was;
    return this.#select(`key-${key}`, known.map(name => [name, `${words}-${name}`]), now, chosen => this.#set(key, chosen, was));
  }

  /** The threshold as a slider and, where there is a calibration, what it does. */
  #threshold(profile) {
    const isPaper = profile.method === "paper";
    const key = isPaper ? "detect.threshold" : "threshold";
    const was = value(profile, key), now = this.#changes[key] ?? was;
    const told = make("output", { for: "threshold" }, percent(now));
    const shown = this.#facts.calibration && this.isCalibrated && !isPaper ? curve(this.#facts.calibration, now) : null;
    const slider = make("input", { id: "threshold", type: "range", min: 0.01, max: 0.99, step: 0.01, value: now, oninput: () => {
      const threshold = Number(slider.value);
      told.textContent = percent(threshold);
      shown?.move(threshold);
      this.#set(key, threshold, was);
    } });
    const field = make("div", { class: "field" }, said("threshold", {}, "label", { for: "threshold" }),
      make("div", { class: "slider" }, slider, told));
    if (!isPaper) return [field, shown?.element ?? said("no-curve", {}, "p", { class: "note" })];
    const parser = this.#choice("detect.parser", profile, ["paper", "fail-closed", "score"], "parser");
    return [this.#field("parser", parser), field, said("parser-note", {}, "p", { class: "note" })];
  }

  #prompts(group, keys, profile) {
    return make("details", { class: "prompts" }, said(group, {}, "summary"), ...keys.map(key => {
      const was = value(profile, key) ?? "", id = `key-${key}`;
      const area = make("textarea", { id, rows: Math.min(8, 1 + was.split("\n").length), spellcheck: "false" });
      area.value = this.#changes[key] ?? was;
      area.addEventListener("input", () => this.#set(key, area.value, was));
      return make("div", { class: "field" }, make("label", { for: id }, make("code", {}, key)), area);
    }));
  }

  #set(key, now, was) {
    if (now === was) delete this.#changes[key];
    else this.#changes[key] = now;
    this.toml.replaceChildren();
    this.#count();
    this.#later();
  }

  #count() {
    say(this.changed, "changed", { count: Object.keys(this.#changes).length });
  }

  /** Checks it when nobody has typed for a moment. */
  #later() {
    clearTimeout(this.#check);
    this.#check = setTimeout(() => this.#checked(), 400);
  }

  async #checked() {
    for (const marked of this.#place.querySelectorAll("[aria-invalid]")) marked.removeAttribute("aria-invalid");
    this.problem.hidden = true;
    try {
      return await object("profile", this.profile);
    } catch (failure) {
      this.complain(failure);
      return null;
    }
  }

  /** Tells what is wrong, and where. */
  complain({ code, message, key }) {
    this.problem.hidden = false;
    this.problem.replaceChildren(said(word(`e-${code}`) ? `e-${code}` : "failed"), " ", said("told", { message }));
    const field = document.getElementById({ name: "profile-name", threshold: "threshold" }[key] ?? `key-${key}`);
    field?.setAttribute("aria-invalid", "true");
    const group = field?.closest("details");
    if (group) group.open = true;
  }

  async #show() {
    const checked = await this.#checked();
    if (!checked) return;
    const text = make("textarea", { id: "toml", rows: 14, readonly: true, spellcheck: "false" });
    text.value = checked.toml;
    this.toml.replaceChildren(this.#field("in-toml", text));
    text.focus();
  }

  async #download() {
    const checked = await this.#checked();
    if (!checked) return;
    const url = URL.createObjectURL(new Blob([checked.toml], { type: "application/toml" }));
    make("a", { href: url, download: `${this.profile.name.replace(/[^\p{L}\p{N}_-]+/gu, "-")}.toml` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }
}
