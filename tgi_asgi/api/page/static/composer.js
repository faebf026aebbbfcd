// The box for writing messages and attaching images.
import { byId, h, iconButton } from "./dom.js";
import { readImage } from "./images.js";

const MAX_HEIGHT_PX = 260;

export class Composer {
  /** `onSend(text, images)` returns whether the message was accepted; `onStop()`; `notice(text)` shows a problem. */
  constructor({ onSend, onStop, onEditLast, notice }) {
    this.field = byId("prompt");
    this.images = [];
    this.takesImages = false;
    this.onSend = onSend;
    this.notice = notice;
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", () => {
      onStop();
      this.field.focus();
    });
    this.field.addEventListener("input", () => this.fit());
    this.field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
      if (event.key === "ArrowUp" && !this.field.value && onEditLast()) event.preventDefault();
    });
    this.setUpImages();
  }

  setUpImages() {
    const file = byId("attach-file");
    byId("attach").addEventListener("click", () => file.click());
    file.addEventListener("change", () => {
      this.attach([...file.files]);
      file.value = "";
    });
    this.field.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      if (files.length) event.preventDefault();
      this.attach(files);
    });
    const isOfFiles = (event) => event.dataTransfer?.types.includes("Files");
    document.addEventListener("dragover", (event) => isOfFiles(event) && event.preventDefault());
    document.addEventListener("drop", (event) => {
      if (!isOfFiles(event)) return;
      event.preventDefault();
      this.attach([...event.dataTransfer.files]);
    });
  }

  async attach(files) {
    const pictures = files.filter((file) => file.type.startsWith("image/"));
    if (pictures.length && !this.takesImages) {
      this.notice("This model takes no images.");
      return;
    }
    for (const file of pictures) {
      try {
        this.images.push(await readImage(file));
      } catch {
        this.notice(`${file.name} cannot be read as an image.`);
      }
    }
    this.showImages();
  }

  showImages() {
    const rows = this.images.map((url, i) => {
      const remove = iconButton("close", `Remove image ${i + 1}`, () => {
        this.images.splice(i, 1);
        this.showImages();
        this.field.focus();
      });
      return h("li", {}, h("img", { src: url, alt: `Image ${i + 1}` }), remove);
    });
    byId("attached").replaceChildren(...rows);
  }

  send() {
    const text = this.field.value.trim();
    if (!text && !this.images.length) return;
    if (!this.onSend(text, this.images)) return;
    this.field.value = "";
    this.images = [];
    this.showImages();
    this.fit();
  }

  /** Fit the box's height to its text. */
  fit() {
    this.field.style.height = "auto";
    this.field.style.height = `${Math.min(this.field.scrollHeight, MAX_HEIGHT_PX)}px`;
  }

  /** Show that an answer is in progress, or that none is possible. */
  setState({ isRunning, isReady }) {
    const hadFocus = document.activeElement === byId("send") || document.activeElement === byId("stop");
    byId("send").hidden = isRunning;
    byId("stop").hidden = !isRunning;
    byId("send").disabled = !isReady;
    if (hadFocus) this.field.focus();
  }

  allowImages(isAllowed) {
    this.takesImages = isAllowed;
    byId("attach").hidden = !isAllowed;
  }
}
