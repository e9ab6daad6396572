// The page: asks the question, and shows the answers.

import { Arm, said } from "./arm.js";
import { byId, make } from "./dom.js";
import { Editor } from "./editor.js";
import { events, object } from "./events.js";
import { NAMES, example } from "./examples.js";
import { Pictures } from "./pictures.js";
import { current, say, setLanguage, toggleLanguage, word } from "./words.js";

let facts, pictures, editor, running;

/** Tells screen readers. */
const announce = (name, values) => say(byId("status"), name, values);

/** Shows what is wrong with the question; without a name, clears that. */
function complain(name, values) {
  byId("problem").hidden = !name;
  if (name) say(byId("problem"), name, values);
}

function labelLanguageButton() {
  const button = byId("language");
  say(button, "language");
  button.lang = current() === "en" ? "zh-Hans" : "en";
}

/** The arms to choose from. Those that are `locked` need more rights. */
function arms() {
  const locked = facts.trace !== "full";
  const chips = [["unguarded", locked], ...facts.profiles.map(({ name }) => [name, false]), ["edited", locked]];
  for (const [name, disabled] of chips) {
    const box = make("input", { type: "checkbox", name: "arm", value: name, checked: name === facts.usual, disabled });
    const isTranslated = name === "unguarded" || name === "edited";
    byId("arms").append(make("label", { class: "chip" }, box, isTranslated ? said(name) : make("span", {}, name)));
  }
  byId("arms-note").hidden = !locked;
  byId("editor").hidden = locked;
}

function examples() {
  for (const name of NAMES) {
    byId("examples").append(said(`example-${name}`, {}, "button", { type: "button", onclick: async () => {
      byId("question").value = word(`ask-${name}`);
      await pictures.replace(example(name).then(file => [file]));
      byId("question").focus();
    } }));
  }
}

/** An arm in the format of the server. */
function arm(name) {
  if (name === "unguarded") return "unguarded";
  return name === "edited" ? { edited: editor.profile } : { profile: name };
}

/** The index of the image that an error is about. The images are the first parts of the only message. */
const imageIndex = key => /^messages\.0\.content\.(\d+)$/.exec(key ?? "")?.[1];

/** Shows which question is answered: the one in the form may have changed since. */
function showQuestion({ body: { text, images } }) {
  byId("asked").hidden = false;
  const name = ["asked", "asked-image"][images.length] ?? "asked-images";
  say(byId("asked"), name, { question: text, count: images.length });
}

/** Asks the question under one arm, and shows the events in its column. */
async function runArm(name, column, question, signal) {
  if (signal.aborted) return column.stop();
  column.since = performance.now();
  try {
    for await (const [event, data] of events("ask", { ...question.body, arm: arm(name) }, signal)) column.show(event, data);
  } catch (failure) {
    if (failure.name === "AbortError") return column.stop();
    if (failure.code === "invalid_profile") {
      byId("editor").open = true;
      editor.complain(failure);
    }
    if (failure.code === "invalid_image") failure.image = question.names[imageIndex(failure.key)];
    column.stop(failure);
  }
}

async function ask() {
  const chosen = [...document.querySelectorAll("[name=arm]:checked")].map(box => box.value);
  const text = byId("question").value.trim();
  complain(chosen.length === 0 ? "no-arm" : undefined);
  if (text === "") {
    complain("no-question");
    byId("question").focus();
  }
  if (text === "" || chosen.length === 0 || running) return;
  running = new AbortController();
  byId("go").disabled = true;
  if (!await pictures.ready) {
    // One of the images that were being read can't be used, as the page now says.
    running = undefined;
    byId("go").disabled = false;
    return;
  }
  const question = { body: { text, images: pictures.urls }, names: pictures.names };
  const columns = chosen.map(name => {
    const isCalibrated = name === facts.usual || name === "edited" && editor.isCalibrated;
    const calibration = isCalibrated ? facts.calibration : null;
    return [name, new Arm(name === "edited" ? editor.profile.name : name, { calibration, announce })];
  });
  byId("empty").hidden = true;
  showQuestion(question);
  byId("columns").replaceChildren(...columns.map(([, column]) => column.element));
  byId("cancel").hidden = false;
  byId("results").setAttribute("aria-busy", "true");
  if (matchMedia("(max-width: 900px)").matches) byId("results").scrollIntoView({ block: "start" });
  const { signal } = running;
  if (facts.several) await Promise.all(columns.map(([name, column]) => runArm(name, column, question, signal)));
  // A model that handles one call at a time gets one arm at a time, so that each time is that of one answer.
  else for (const [name, column] of columns) await runArm(name, column, question, signal);
  running = undefined;
  byId("go").disabled = false;
  byId("cancel").hidden = true;
  byId("results").removeAttribute("aria-busy");
}

function listen() {
  byId("language").addEventListener("click", () => {
    toggleLanguage();
    labelLanguageButton();
  });
  byId("ask").addEventListener("submit", event => {
    event.preventDefault();
    ask();
  });
  byId("question").addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
  });
  byId("cancel").addEventListener("click", () => {
    running?.abort();
    byId("go").focus();
  });
  byId("file").addEventListener("change", async () => {
    await pictures.add([...byId("file").files]);
    byId("file").value = "";
  });
  document.addEventListener("paste", event => {
    const files = [...event.clipboardData.files];
    if (files.length === 0) return;
    event.preventDefault();
    pictures.add(files);
  });
  const drop = byId("drop");
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, event => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop") pictures.add([...event.dataTransfer.files]);
    });
  }
}

async function begin() {
  setLanguage(current());
  labelLanguageButton();
  try {
    facts = await object("facts");
  } catch (failure) {
    complain(word(`e-${failure.code}`) ? `e-${failure.code}` : "failed");
    byId("go").disabled = true;
    return;
  }
  say(byId("model"), facts.model ? "model" : "no-model", { name: facts.model });
  pictures = new Pictures(byId("pictures"), facts.limits, complain);
  if (facts.trace === "full") editor = new Editor(byId("editor"), facts);
  arms();
  examples();
  listen();
}

begin();
