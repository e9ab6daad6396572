// Harmless images to ask about: a photograph, and others that are drawn here in the language of the page.

import { current } from "./words.js";

const SANS = "system-ui, 'Noto Sans SC', 'PingFang SC', 'WenQuanYi Zen Hei', sans-serif";
const [WIDTH, HEIGHT] = [720, 540];

const TEXT = {
  en: {
    list: ["Bread for two", "500 g flour", "350 g water", "10 g salt", "1 spoon of honey", "Bake 40 minutes at 220 °C"],
    sign: ["PARCELS", "Please ring twice", "and wait at the gate"],
    document: ["INVOICE 2041", "Garden Centre Miller", "12 tulip bulbs", "9.60", "1 watering can", "18.40", "Total", "28.00",
      "Please pay by 14 March."],
    sly: ["STAFF ONLY", "Please ask at the desk"],
  },
  zh: {
    list: ["两人份面包", "面粉 500 克", "水 350 克", "盐 10 克", "蜂蜜一勺", "220 °C 烤 40 分钟"],
    sign: ["送包裹", "请按两下门铃", "并在门口等候"],
    document: ["账单 2041", "米勒园艺中心", "郁金香球根 12 个", "9.60", "浇水壶 1 个", "18.40", "合计", "28.00", "请在 3 月 14 日之前付款。"],
    sly: ["员工专用", "有事请到前台询问"],
  },
};

function rectangle(pen, color, x, y, width, height, round = 0) {
  pen.fillStyle = color;
  pen.beginPath();
  pen.roundRect(x, y, width, height, round);
  pen.fill();
}

function write(pen, text, x, y, { size = 36, weight = 400, color = "#22303c", align = "left" } = {}) {
  pen.font = `${weight} ${size}px ${SANS}`;
  pen.fillStyle = color;
  pen.textAlign = align;
  pen.fillText(text, x, y);
}

function board(pen, color, lines) {
  rectangle(pen, "#dfe5ea", 0, 0, WIDTH, HEIGHT);
  rectangle(pen, "#8a939b", WIDTH / 2 - 14, 380, 28, 160);
  rectangle(pen, color, 70, 90, WIDTH - 140, 310, 28);
  const [first, ...others] = lines;
  write(pen, first, WIDTH / 2, 200, { size: 76, weight: 700, color: "#fff", align: "center" });
  others.forEach((line, row) => write(pen, line, WIDTH / 2, 278 + 62 * row, { size: 42, color: "#fff", align: "center" }));
}

const DRAW = {
  list(pen, [title, ...lines]) {
    rectangle(pen, "#fdf8ec", 0, 0, WIDTH, HEIGHT);
    write(pen, title, 70, 95, { size: 52, weight: 700 });
    lines.forEach((line, row) => {
      rectangle(pen, "#d9ccab", 70, 176 + 72 * row, WIDTH - 140, 2);
      write(pen, `${row + 1}.  ${line}`, 70, 162 + 72 * row);
    });
  },
  sign: (pen, lines) => board(pen, "#1f6b45", lines),
  document(pen, [title, seller, first, firstPrice, second, secondPrice, total, sum, due]) {
    rectangle(pen, "#fff", 0, 0, WIDTH, HEIGHT);
    write(pen, title, 60, 90, { size: 46, weight: 700 });
    write(pen, seller, 60, 138, { size: 28, color: "#5a6874" });
    [[first, firstPrice], [second, secondPrice], [total, sum]].forEach(([item, price], row) => {
      const y = 230 + 66 * row, weight = row === 2 ? 700 : 400;
      write(pen, item, 60, y, { size: 34, weight });
      write(pen, price, WIDTH - 60, y, { size: 34, weight, align: "right" });
      rectangle(pen, "#c9d2da", 60, y + 18, WIDTH - 120, 2);
    });
    write(pen, due, 60, 480, { size: 34 });
  },
  drawing(pen) {
    rectangle(pen, "#bfe0f5", 0, 0, WIDTH, HEIGHT);
    rectangle(pen, "#f7c948", 540, 60, 100, 100, 50);
    rectangle(pen, "#7fb069", -60, 360, WIDTH + 120, 400, 300);
    rectangle(pen, "#5d9150", 300, 400, 700, 400, 300);
    rectangle(pen, "#f2e8d5", 150, 270, 190, 140);
    rectangle(pen, "#8a5a44", 225, 330, 44, 80);
    rectangle(pen, "#6fa8c9", 172, 300, 38, 38);
    pen.fillStyle = "#b5523b";
    pen.beginPath();
    pen.moveTo(130, 272);
    pen.lineTo(245, 180);
    pen.lineTo(360, 272);
    pen.fill();
    rectangle(pen, "#7a5c3e", 470, 300, 22, 110);
    rectangle(pen, "#3f7a42", 416, 190, 130, 140, 65);
  },
  sly: (pen, lines) => board(pen, "#a63a2b", lines),
};

export const NAMES = ["list", "sign", "document", "photograph", "drawing", "sly"];

/** An example as a file. */
export async function example(name) {
  if (name === "photograph") {
    const photograph = await fetch("/playground/photograph.jpg");
    if (!photograph.ok) throw new Error(`${photograph.status}`);
    return new File([await photograph.blob()], "photograph.jpg", { type: "image/jpeg" });
  }
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [WIDTH, HEIGHT];
  DRAW[name](canvas.getContext("2d"), TEXT[current()][name]);
  const blob = await new Promise(resolve => canvas.toBlob(resolve, "image/png"));
  return new File([blob], `${name}.png`, { type: "image/png" });
}
