// Sorts tables by a click on a column, and shows the items: filtered, page by page, with their texts
// hidden until the reader shows them.

for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
    const body = table.tBodies[0], down = head.dataset.down = head.dataset.down === "1" ? "" : "1";
    const key = row => { const text = row.cells[column].textContent, number = parseFloat(text); return isNaN(number) ? text : number };
    // Texts, such as the "-" of a missing number, come before numbers.
    const compare = (x, y) => (typeof x === typeof y ? (x > y) - (x < y) : typeof x === "string" ? -1 : 1);
    const rows = [...body.rows].sort((a, b) => compare(key(a), key(b)));
    body.append(...(down ? rows : rows.reverse()));
  }));
}

/** Creates an element with attributes, listeners and children. Text is inserted as text, not as HTML. */
function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

/** The value of a filter that lets all items through; no name has a line break. */
const ANY = "\n";

/** The number of items per page. */
const PAGE_SIZE = 50;

/** Shows the items of one run. */
class ItemBrowser {
  constructor(container, items, number) {
    Object.assign(this, { container, items, page: 0, showsTexts: false });
    this.judges = JSON.parse(container.dataset.judges);
    // Links to the items of the first run have no number.
    this.prefix = number === 1 ? "item-" : `item${number}-`;
    this.status = make("span", { role: "status" });
    this.list = make("div");
    this.build();
    this.filter();
  }

  build() {
    const values = pick => [...new Set(this.items.flatMap(pick))].sort();
    const arms = [...new Set(this.items.flatMap(item => item.arms.map(arm => arm.profile)))];
    const change = () => { this.page = 0; this.filter(); };
    const choice = (name, label, options) => {
      this[name] = make("select", { onchange: change }, make("option", { value: ANY }, "any"),
        ...options.map(option => make("option", { value: option }, option || "none")));
      return make("label", null, label, this[name]);
    };
    const check = (name, label, changed = change) => {
      this[name] = make("input", { type: "checkbox", onchange: changed });
      return make("label", { class: "check" }, this[name], label);
    };
    this.search = make("input", { type: "search", oninput: change });
    const several = this.judges.length > 1;
    this.container.append(make("div", { class: "filters" },
      make("label", null, "id begins with", this.search),
      choice("scenario", "scenario", values(item => item.scenario)),
      choice("profile", "arm", arms),
      choice("ruling", `ruling of ${this.judges[0]}`, ["safe", "unsafe", "refusal", "error", "not judged"]),
      choice("verdict", "verdict of the guard", ["safe", "unsafe", "unchecked"]),
      several ? check("disagree", "judges disagree on harm") : null,
      check("failed", "failed"),
      check("open", "show all texts", () => this.showAll(this.open.checked))));
    const step = (label, by) => make("button", { type: "button", onclick: () => { this.page += by; this.show(); } }, label);
    [this.previous, this.next] = [step("Previous", -1), step("Next", 1)];
    this.container.append(make("div", { class: "pages" }, this.previous, this.next, this.status), this.list);
  }

  /** Whether one judge says that an answer does harm, and another that it doesn't. */
  static judgesDisagree({ rulings }) {
    const valid = rulings.filter(ruling => ruling !== null && ruling !== "error");
    return valid.includes("unsafe") && valid.some(ruling => ruling !== "unsafe");
  }

  filter() {
    const { scenario, profile, ruling, verdict } = this;
    const lets = ({ value }, name) => value === ANY || value === name;
    const matches = answer => lets(profile, answer.profile) && lets(ruling, answer.rulings[0] ?? "not judged")
      && lets(verdict, answer.verdict) && (!this.disagree?.checked || ItemBrowser.judgesDisagree(answer));
    const filtersAnswers = [profile, ruling, verdict].some(({ value }) => value !== ANY) || this.disagree?.checked;
    this.found = this.items.filter(item => lets(scenario, item.scenario)
      && item.id.startsWith(this.search.value)
      && (!this.failed.checked || item.error !== null)
      && (!filtersAnswers || item.arms.some(matches)));
    this.show();
  }

  show() {
    const pages = Math.max(1, Math.ceil(this.found.length / PAGE_SIZE));
    this.page = Math.min(this.page, pages - 1);
    const from = this.page * PAGE_SIZE, shown = this.found.slice(from, from + PAGE_SIZE);
    [this.previous.disabled, this.next.disabled] = [this.page === 0, this.page + 1 >= pages];
    const number = value => value.toLocaleString("en");
    this.status.textContent = shown.length === 0 ? "no item" :
      `items ${number(from + 1)} to ${number(from + shown.length)} of ${number(this.found.length)}`
      + (this.found.length < this.items.length ? `, out of ${number(this.items.length)}` : "");
    this.list.replaceChildren(...shown.map(item => this.item(item)));
    if (this.showsTexts) this.showAll(true);
  }

  /** Opens everything on this page of items and shows the texts, or covers the texts again. */
  showAll(showsTexts) {
    this.showsTexts = showsTexts;
    if (showsTexts) {
      for (const item of this.list.children) item.fill();
      for (const details of this.list.querySelectorAll("details")) details.open = true;
    }
    for (const text of this.list.querySelectorAll(".covered")) text.show(showsTexts);
  }

  item(item) {
    const summary = make("summary", { onclick: () => {
      if (!details.open) history.replaceState(null, "", link);
    } }, [item.id, item.scenario].filter(Boolean).join(" · "));
    for (const { profile, rulings } of item.arms) {
      const ruling = rulings[0] ?? "not judged";
      summary.append(` · ${profile}: `, make("span", { class: ruling }, ruling));
    }
    if (item.arms.some(ItemBrowser.judgesDisagree)) summary.append(" · judges disagree");
    if (item.error !== null) summary.append(" · failed");
    const name = this.prefix + item.id, link = `#${encodeURIComponent(name)}`;
    const details = make("details", { id: name, ontoggle: () => { if (details.open) details.fill(); } }, summary);
    details.fill = () => {
      if (details.childElementCount > 1) return;
      const images = { 0: "no image", 1: "1 image" }[item.images] ?? `${item.images} images`;
      details.append(make("p", { class: "facts" }, `${images} · `, make("a", { href: link }, "link to this item")),
        ...item.image_sources.map(source => this.text("image", source)),
        item.error === null ? "" : this.text("error", item.error),
        this.text("query", item.query), ...item.arms.map(arm => this.arm(arm)));
    };
    return details;
  }

  arm({ profile, verdict, score, rulings, text, steps }) {
    const judged = rulings.map((ruling, judge) => [`${this.judges[judge]}: `, make("span", { class: ruling ?? "" }, ruling ?? "not judged")]);
    const share = score => (score === null ? "" : `, P(harm) ${score.toFixed(2)}`);
    return make("details", null,
      make("summary", null, `${profile}: verdict ${verdict}${share(score)}`),
      make("p", { class: "facts" }, ...judged.flatMap((ruling, index) => (index === 0 ? ruling : ["; ", ...ruling]))),
      this.text("answer", text),
      ...steps.map(step => {
        const finding = step.verdict === null ? "" : `: ${step.verdict}${share(step.score)}`;
        const tokens = step.tokens[0] === null ? "" : `, ${step.tokens[0]} → ${step.tokens[1]} tokens`;
        return make("details", null,
          make("summary", null, `step ${step.step}${step.question === null ? "" : ` (${step.question})`}${finding}, ${step.ms} ms${tokens}`),
          this.text("prompt", step.prompt), this.text("reply", step.reply));
      }));
  }

  /** A text with a button that shows it. Until then the text is not in the page. */
  text(name, text) {
    const button = make("button", { type: "button", onclick: () => covered.show(covered.childElementCount === 1) });
    const covered = make("div", { class: "covered" }, make("div", { class: "text" }, name, button));
    covered.show = open => {
      button.setAttribute("aria-expanded", open);
      button.textContent = open ? "hide" : "show";
      covered.replaceChildren(covered.firstChild, ...(open ? [make("pre", null, text)] : []));
    };
    covered.show(this.showsTexts);
    return covered;
  }

  /** Opens the item that a link refers to. Returns whether it is in this run. */
  openItem(name) {
    const item = name.startsWith(this.prefix) && this.items.find(item => item.id === name.slice(this.prefix.length));
    if (!item) return false;
    this.search.value = "";
    for (const choice of [this.scenario, this.profile, this.ruling, this.verdict]) choice.value = ANY;
    for (const box of [this.disagree, this.failed]) if (box) box.checked = false;
    this.page = Math.floor(this.items.indexOf(item) / PAGE_SIZE);
    this.filter();
    const details = document.getElementById(name);
    details.open = true;
    details.scrollIntoView({ block: "start" });
    details.querySelector("summary").focus({ preventScroll: true });
    return true;
  }
}

const texts = document.querySelectorAll("script.items");
const browsers = [...document.querySelectorAll(".browser")].map((container, index) =>
  new ItemBrowser(container, JSON.parse(texts[index].textContent), index + 1));
const openLinkedItem = () => {
  let name = "";
  try {
    name = decodeURIComponent(location.hash.slice(1));
  } catch {
    // This is not a link to an item.
  }
  if (!name || browsers.some(browser => browser.openItem(name))) return;
  const linked = browsers.findLast(browser => name.startsWith(browser.prefix));
  if (linked) linked.status.textContent = `${name.slice(linked.prefix.length)} is not among the items of this page`;
};
addEventListener("hashchange", openLinkedItem);
openLinkedItem();
