// One arm (one way to guard the answer), as a column of four steps. It shows the events of the server.

import { curve } from "./curve.js";
import { make } from "./dom.js";
import { duration, number, percent, say, word } from "./words.js";

/** The card of each step. */
const CARD = { "direct": 1, "request-check": 2, "detect": 2, "caption": 3, "safe": 4, "reply-check": 4 };

const said = (name, values, tag = "span", properties = {}) => say(make(tag, properties), name, values);

/** A text of the model, unchanged. */
const quote = text => make("p", { class: "quote", dir: "auto" }, text);

/** A hidden text. It isn't in the page at all until the user asks for it. */
function hiddenText(text, why) {
  const shown = make("div");
  const button = said("show", {}, "button", { type: "button", class: "small", "aria-expanded": "false" });
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", open);
    say(button, open ? "hide" : "show");
    shown.replaceChildren(...(open ? [quote(text)] : []));
  });
  return make("div", { class: "hidden-text" }, said(why, {}, "p"), button, shown);
}

/** A step: its number, name, state, and cost. */
class Card {
  constructor(step) {
    this.calls = { ms: 0, in: 0, out: 0, isReported: false };
    this.figures = make("p", { class: "figures" });
    this.body = make("div", { class: "body" });
    this.element = make("li", { class: "card", "data-state": "idle" },
      make("div", { class: "head" },
        make("span", { class: "number", "aria-hidden": "true" }, String(step)),
        said(`step-${step}`, {}, "h4"), this.figures),
      this.body);
  }

  set state(state) { this.element.dataset.state = state; }
  get state() { return this.element.dataset.state; }

  begin() {
    this.state = "running";
    this.since ??= performance.now();
    clearInterval(this.clock);
    this.clock = setInterval(() => {
      this.figures.textContent = duration(this.calls.ms + performance.now() - this.since);
    }, 200);
  }

  /** Stops the clock, and shows what the calls cost. */
  rest(state) {
    clearInterval(this.clock);
    this.state = state;
    const { ms, in: read, out: written, isReported } = this.calls;
    this.figures.replaceChildren();
    if (state === "idle" || ms + read + written === 0 && !isReported) return;
    this.figures.append(said("took", { time: () => duration(ms) }));
    if (isReported) this.figures.append(" · ", said("tokens", { in: () => number(read), out: () => number(written) }));
  }

  count(call) {
    this.calls.ms += call.ms;
    this.calls.in += call.prompt_tokens ?? 0;
    this.calls.out += call.completion_tokens ?? 0;
    this.calls.isReported ||= call.prompt_tokens !== null;
    this.since = undefined;
  }

  note(name, values) {
    this.body.replaceChildren(said(name, values, "p", { class: "note" }));
  }
}

/** A probability of harm as a bar, with a mark at the threshold. */
function bar(score, threshold) {
  const fill = make("span", { class: "fill" });
  fill.style.width = `${100 * score}%`;
  const track = make("span", { class: "track", "aria-hidden": "true" }, fill);
  if (typeof threshold === "number") {
    const mark = make("span", { class: "mark" });
    mark.style.left = `${100 * threshold}%`;
    track.append(mark);
  }
  return track;
}

export class Arm {
  /** `calibration` is that of the profile, if there is one; `announce` tells screen readers. */
  constructor(name, { calibration, announce }) {
    Object.assign(this, { name, calibration, announce });
    this.displayName = () => word(`arm-${name}`) ?? name;
    this.title = word(`arm-${name}`) ? said(`arm-${name}`, {}, "h3") : make("h3", {}, name);
    this.badge = make("span", { class: "badge", hidden: true });
    this.total = make("p", { class: "figures" });
    this.cards = [1, 2, 3, 4].map(step => new Card(step));
    this.answer = make("p", { class: "answer-text", dir: "auto" });
    this.origin = make("span", { class: "origin" });
    this.outcome = make("div", { class: "outcome", hidden: true },
      make("div", { class: "head" }, said("answer", {}, "h4"), this.origin), this.answer);
    this.element = make("article", { class: "arm" },
      make("header", {}, this.title, this.badge, this.total),
      make("ol", { class: "cards" }, ...this.cards.map(card => card.element)), this.outcome);
    this.groups = {};
    this.attempts = [];
    this.withheld = false;
    this.since = performance.now();
  }

  card(step) { return this.cards[CARD[step] - 1]; }

  /** Shows an event of the server. */
  show(event, data) {
    ({ begun: this.begun, started: this.started, finished: this.finished, decided: this.decided, answer: this.answered,
      done: this.done })[event]?.call(this, data);
  }

  begun({ profile, threshold }) {
    this.threshold = threshold;
    if (this.title.dataset.word === undefined) this.title.textContent = profile;
  }

  started({ step }) {
    const card = this.card(step);
    if (!card) return;
    // Only the first of several calls of a step is announced.
    if (this.announced !== card) this.announce("say-runs", { arm: this.displayName, step: () => word(`step-${CARD[step]}`) });
    this.announced = card;
    card.begin();
  }

  finished(call) {
    const card = this.card(call.step);
    if (!card) return;
    card.count(call);
    card.rest("done");
    this.withheld ||= call.reply === undefined;
    if (call.step === "direct") this.drafted(call);
    if (call.step === "caption") this.captioned(call);
    if (call.step === "safe") this.rewrote(call);
    if (["request-check", "detect", "reply-check"].includes(call.step)) this.judged(call);
  }

  drafted({ reply }) {
    this.draft = reply;
    if (reply === undefined) this.cards[0].note("withheld");
    else this.cards[0].body.replaceChildren(hiddenText(reply, "covered-until"));
  }

  captioned({ reply }) {
    const { body } = this.cards[2];
    if (reply === undefined) this.cards[2].note("withheld");
    else if (reply.trim() === "") this.cards[2].note("nothing-seen");
    else {
      body.querySelector(".note")?.remove();
      body.append(quote(reply));
    }
  }

  rewrote({ reply }) {
    this.attempts.push(reply);
  }

  /** A question to the judge, and its result. */
  judged(call) {
    const isAttempt = call.step === "reply-check";
    const { body } = this.cards[isAttempt ? 3 : 1];
    const kind = call.step === "request-check" ? "about-request" : "about-reply";
    const place = isAttempt ? "attempt" : kind;
    if (!this.groups[place]) {
      this.groups[place] = make("div", { class: "group" }, said(kind, {}, "h5"));
      body.append(this.groups[place]);
    }
    const key = `q-${call.question ?? ""}`;
    const name = word(key) ? said(key, {}, "span", { class: "q" }) : make("span", { class: "q" }, call.question);
    const value = typeof call.score === "number"
      ? make("span", { class: "value" }, bar(call.score), say(make("span"), "score", { score: () => percent(call.score) }))
      : said(call.verdict === "unsafe" ? "yes" : "no", {}, "span", { class: "value" });
    const row = [name, value];
    if (call.prompt === undefined) {
      this.groups[place].append(make("div", { class: "row" }, ...row));
      return;
    }
    // The prompt holds the draft: it is not in the page until somebody opens it.
    const texts = make("div");
    const details = make("details", { ontoggle: () => {
      texts.replaceChildren(...(details.open ? [said("sent", {}, "h6"), quote(call.prompt), said("said", {}, "h6"), quote(call.reply)] : []));
    } }, make("summary", { class: "row" }, ...row), texts);
    this.groups[place].append(details);
  }

  decided({ verdict, rewritten }) {
    Object.assign(this, { verdict, rewritten });
    const [first, judge] = this.cards;
    this.badge.hidden = false;
    this.badge.dataset.verdict = verdict;
    say(this.badge, `verdict-${verdict}`);
    if (first.state === "running") {
      first.rest("skipped");
      first.note("given-up");
    } else if (first.state === "idle") first.note("given-up");
    else if (!rewritten) first.note(verdict === "unchecked" ? "not-guarded" : "let-out");
    else if (this.draft !== undefined) first.body.replaceChildren(hiddenText(this.draft, verdict === "unsafe" ? "covered" : "covered-unjudged"));
    if (judge.state === "idle" && verdict === "unchecked") {
      judge.state = "skipped";
      judge.note(rewritten ? "anew-anyhow" : this.name === "unguarded" ? "not-asked" : "out-of-scope");
    }
    judge.element.dataset.verdict = verdict;
    const unused = rewritten ? [] : this.cards.slice(2).filter(card => card.state === "idle");
    for (const card of unused) {
      card.state = "skipped";
      card.note(verdict === "unchecked" ? "not-asked" : "not-needed");
    }
  }

  answered({ text }) {
    this.outcome.hidden = false;
    this.answer.append(text);
    if (this.rewritten && this.cards[3].state !== "idle") this.cards[3].body.querySelector(".note")
      ?? this.cards[3].body.prepend(said("see-below", {}, "p", { class: "note" }));
  }

  done({ verdict, score, rewritten, refused }) {
    this.end("done");
    const [, judge, third, last] = this.cards;
    if (typeof score === "number") judge.body.prepend(this.summary(score, verdict));
    else if (judge.state === "done") {
      judge.body.prepend(said(verdict === "unchecked" ? "anew-anyhow" : "no-score", {}, "p", { class: "note" }));
    }
    if (rewritten && third.state === "idle") third.note("not-asked");
    if (refused) {
      last.state = "done";
      last.body.prepend(said("fixed", {}, "p", { class: "note" }));
    }
    const failed = this.attempts.filter(reply => reply !== undefined).slice(0, refused ? undefined : -1);
    last.body.append(...failed.map(reply => hiddenText(reply, "covered-attempt")));
    if (this.withheld && rewritten && !refused && last.body.childElementCount === 0) last.note("see-below");
    say(this.origin, refused ? "refusal" : rewritten ? "closed" : verdict === "unchecked" ? "unjudged" : "own");
    this.announce("say-done", { arm: this.displayName, verdict: () => word(`verdict-${verdict}`) });
  }

  /** The score against the threshold, and the threshold on the curve of the calibration. */
  summary(score, verdict) {
    const against = this.threshold !== null && this.threshold !== undefined;
    const text = said(against ? "harm-against" : "harm",
      { score: () => percent(score), threshold: () => percent(this.threshold) }, "p");
    const sum = make("div", { class: "sum", "data-verdict": verdict }, bar(score, this.threshold), text);
    if (this.calibration && against) {
      sum.append(make("details", {}, said("curve", {}, "summary"),
        curve(this.calibration, this.threshold, score).element));
    }
    return sum;
  }

  /** Ends the column: no more events. */
  end(state) {
    for (const card of this.cards) if (card.state === "running") card.rest(state);
    const sum = key => this.cards.reduce((sum, card) => sum + card.calls[key], 0);
    const [took, read, written] = [performance.now() - this.since, sum("in"), sum("out")];
    this.total.replaceChildren(said("total", { time: () => duration(took) }));
    if (read + written > 0) {
      this.total.append(" · ", said("tokens", { in: () => number(read), out: () => number(written) }));
    }
  }

  /** Shows that the answer was stopped, or that it failed. */
  stop(failure) {
    this.end("stopped");
    if (!failure) {
      this.element.append(said("stopped", {}, "p", { class: "note stopped" }));
      return;
    }
    const name = failure.image ? "image-error" : `e-${failure.code}`;
    this.element.append(make("div", { class: "failure", role: "alert" },
      said("failed", {}, "h4"),
      word(name) ? said(name, { name: failure.image }, "p") : null,
      said("told", { message: failure.message }, "p", { class: "note" })));
    this.announce("say-failed", { arm: this.displayName });
  }
}

export { said };
