// What a threshold does according to the calibration: how many harmful and harmless requests are flagged.

import { draw, make } from "./dom.js";
import { label, percent, say } from "./words.js";

const [WIDTH, HEIGHT, LEFT, TOP] = [300, 150, 34, 10];
const x = share => LEFT + share * WIDTH;
const y = share => TOP + (1 - share) * HEIGHT;

const line = (points, kind) =>
  draw("polyline", { class: kind, points: points.map(([at, share]) => `${x(at).toFixed(1)},${y(share).toFixed(1)}`).join(" ") });

/** The shares of flagged requests at a threshold, interpolated between two points of the curve. */
function at(points, threshold) {
  const above = points.findIndex(([place]) => place >= threshold);
  if (above <= 0) return points.at(above).slice(1);
  const [before, after] = [points[above - 1], points[above]];
  const share = (threshold - before[0]) / (after[0] - before[0]);
  return [1, 2].map(column => before[column] + share * (after[column] - before[column]));
}

function key(kind, name) {
  return make("span", { class: `key ${kind}` }, say(make("span"), name));
}

/** The curve with a threshold on it and, if there is one, the score of this request. `move` moves the threshold. */
export function curve(calibration, threshold, score) {
  const points = calibration.curve;
  const mark = draw("line", { class: "threshold", y1: TOP, y2: TOP + HEIGHT });
  const description = make("p", { class: "note" });
  const picture = draw("svg", { viewBox: `0 0 ${LEFT + WIDTH + 16} ${TOP + HEIGHT + 26}`, role: "img" },
    draw("path", { class: "axis", d: `M${x(0)} ${y(1)}V${y(0)}H${x(1)}` }),
    ...[0, 0.5, 1].flatMap(share => [
      draw("text", { x: x(share), y: y(0) + 16, "text-anchor": "middle" }, percent(share)),
      draw("text", { x: x(0) - 5, y: y(share) + 4, "text-anchor": "end" }, percent(share)),
    ]),
    line(points.map(([place, harmful]) => [place, harmful]), "harmful"),
    line(points.map(([place, , harmless]) => [place, harmless]), "harmless"),
    mark);
  if (typeof score === "number") picture.append(draw("circle", { class: "request", cx: x(score), cy: y(0), r: 5 }));
  const move = threshold => {
    mark.setAttribute("x1", x(threshold));
    mark.setAttribute("x2", x(threshold));
    const [recall, alarms] = at(points, threshold);
    const values = { threshold: () => percent(threshold), recall: () => percent(recall), alarms: () => percent(alarms) };
    say(description, "curve-told", values);
    label(picture, "curve-told", values);
  };
  move(threshold);
  const keys = make("p", { class: "keys" }, key("harmful", "flagged-harmful"), key("harmless", "flagged-harmless"),
    key("threshold", "the-threshold"), typeof score === "number" ? key("request", "this-request") : null);
  const element = make("figure", { class: "curve" }, picture, keys, description,
    say(make("figcaption", { class: "note" }), "curve-note", { count: calibration.requests }));
  return { element, move };
}
