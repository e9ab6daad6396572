// The images of a question: chosen, dropped, pasted, or drawn as an example.

import { make } from "./dom.js";
import { label } from "./words.js";

const read = file => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.addEventListener("load", () => resolve(reader.result));
  reader.addEventListener("error", () => reject(reader.error));
  reader.readAsDataURL(file);
});

/** Whether browsers can display the file; its thumbnail is then the image itself. */
const isDisplayable = file => /^image\/(png|jpeg|webp|gif|avif)$/.test(file.type);

export class Pictures {
  #list;
  #limits;
  #complain;
  #pictures = [];
  #reading = Promise.resolve(true);

  /** `complain` shows why a file is refused, by the name of a text and its values. Without a name, it clears that. */
  constructor(list, limits, complain) {
    [this.#list, this.#limits, this.#complain] = [list, limits, complain];
  }

  /** The images as data URLs. */
  get urls() {
    return this.#pictures.map(picture => picture.url);
  }

  /** The file names, in the order of `urls`. */
  get names() {
    return this.#pictures.map(picture => picture.name);
  }

  /** Resolves once no image is being read. The result says whether all of them could be used. */
  get ready() {
    return this.#reading;
  }

  /** Adds files: a list, or a promise of one. */
  add(files) {
    return this.#queue(() => this.#add(files));
  }

  /** Drops what is there, and adds files. */
  replace(files) {
    return this.#queue(() => {
      for (const picture of [...this.#pictures]) this.#remove(picture);
      return this.#add(files);
    });
  }

  /** Runs one step after the other, so that images keep their order, and `ready` waits for all. */
  #queue(step) {
    const last = this.#reading.then(async isFine => await step() && isFine);
    this.#reading = last;
    last.then(() => {
      if (this.#reading === last) this.#reading = Promise.resolve(true);
    });
    return last;
  }

  async #add(files) {
    this.#complain();
    let isFine = true;
    const refuse = (name, values) => {
      this.#complain(name, values);
      isFine = false;
    };
    const chosen = await Promise.resolve(files).catch(() => null);
    if (chosen === null) refuse("failed");
    for (const file of chosen ?? []) {
      if (this.#pictures.length >= this.#limits.images) {
        refuse("too-many", { most: this.#limits.images });
        break;
      }
      if (file.size > this.#limits.image) {
        refuse("too-large", { name: file.name, most: Math.floor(this.#limits.image / 2 ** 20) });
        continue;
      }
      const url = await read(file).catch(() => null);
      if (url === null) refuse("unreadable", { name: file.name });
      else this.#show(file, url);
    }
    return isFine;
  }

  #show(file, url) {
    const picture = { url, name: file.name };
    const thumbnail = isDisplayable(file) ? make("img", { src: url, alt: file.name }) : make("span", { class: "file" }, file.name);
    const remove = make("button", { type: "button", onclick: () => this.#remove(picture, true) }, "×");
    label(remove, "remove", { name: file.name });
    picture.element = make("li", {}, thumbnail, remove);
    this.#pictures.push(picture);
    this.#list.append(picture.element);
  }

  #remove(picture, isByUser) {
    const next = picture.element.nextElementSibling ?? picture.element.previousElementSibling;
    picture.element.remove();
    this.#pictures = this.#pictures.filter(other => other !== picture);
    if (isByUser) (next?.querySelector("button") ?? document.querySelector("#question")).focus();
  }
}
