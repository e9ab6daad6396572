// The images of a question: chosen, dropped, pasted, or drawn here.

import { make } from "./dom.js";
import { label } from "./words.js";

const read = file => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.addEventListener("load", () => resolve(reader.result));
  reader.addEventListener("error", () => reject(reader.error));
  reader.readAsDataURL(file);
});

/** Whether a browser can show it: then its thumbnail is the picture itself. */
const isShown = file => /^image\/(png|jpeg|webp|gif|avif)$/.test(file.type);

export class Pictures {
  #list;
  #limits;
  #complain;
  #pictures = [];

  /** `complain` is told of what can't be taken, as a word and its values; nothing takes that back. */
  constructor(list, limits, complain) {
    [this.#list, this.#limits, this.#complain] = [list, limits, complain];
  }

  /** The images as data URLs. */
  get urls() {
    return this.#pictures.map(picture => picture.url);
  }

  clear() {
    for (const picture of [...this.#pictures]) this.#remove(picture);
  }

  async add(files) {
    this.#complain();
    for (const file of files) {
      if (this.#pictures.length >= this.#limits.images) {
        this.#complain("too-many", { most: this.#limits.images });
        return;
      }
      if (file.size > this.#limits.image) {
        this.#complain("too-large", { name: file.name, most: Math.floor(this.#limits.image / 2 ** 20) });
        continue;
      }
      const url = await read(file).catch(() => null);
      if (url === null) this.#complain("unreadable", { name: file.name });
      else this.#show(file, url);
    }
  }

  #show(file, url) {
    const picture = { url };
    const shown = isShown(file) ? make("img", { src: url, alt: file.name }) : make("span", { class: "file" }, file.name);
    const remove = make("button", { type: "button", onclick: () => this.#remove(picture, true) }, "×");
    label(remove, "remove", { name: file.name });
    picture.element = make("li", {}, shown, remove);
    this.#pictures.push(picture);
    this.#list.append(picture.element);
  }

  #remove(picture, wasAsked) {
    const next = picture.element.nextElementSibling ?? picture.element.previousElementSibling;
    picture.element.remove();
    this.#pictures = this.#pictures.filter(other => other !== picture);
    if (wasAsked) (next?.querySelector("button") ?? document.querySelector("#question")).focus();
  }
}
