// The list of conversations, next to the page, or over it in a narrow window.
import { byId, h, iconButton } from "./dom.js";

const NARROW = matchMedia("(max-width: 760px)");
const NAME = "tgi-asgi.sidebar";

export class Sidebar {
  /** Callbacks: `onOpen(id)`, `onDelete(id)`. */
  constructor({ onOpen, onDelete }) {
    this.onOpen = onOpen;
    this.onDelete = onDelete;
    this.list = byId("conversations");
    byId("hide-sidebar").addEventListener("click", () => this.toggle(false));
    byId("show-sidebar").addEventListener("click", () => this.toggle(true));
    byId("veil").addEventListener("click", () => this.toggle(false));
    NARROW.addEventListener("change", () => this.toggle(!NARROW.matches, false));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && NARROW.matches && this.isShown) this.toggle(false);
    });
    this.toggle(!NARROW.matches && this.wasShown(), false);
  }

  wasShown() {
    try {
      return localStorage.getItem(NAME) !== "hidden";
    } catch {
      return true;
    }
  }

  /** Show or hide the list; if the user chose it, move the focus and store the choice. */
  toggle(isShown, isChoice = true) {
    this.isShown = isShown;
    document.body.classList.toggle("with-sidebar", isShown);
    byId("sidebar").inert = !isShown;
    byId("show-sidebar").setAttribute("aria-expanded", isShown);
    if (!isChoice) return;
    byId(isShown ? "hide-sidebar" : "show-sidebar").focus();
    if (NARROW.matches) return;
    try {
      localStorage.setItem(NAME, isShown ? "shown" : "hidden");
    } catch {
      /* kept only for this visit */
    }
  }

  /** Hide the list if it covers the messages. */
  leave() {
    if (NARROW.matches) this.toggle(false, false);
  }

  /** Show the conversations, with the open one marked. */
  show(heads, openId) {
    this.list.replaceChildren(
      ...heads.map(({ id, title }) => {
        const open = h(
          "button",
          {
            class: "quiet title",
            "aria-current": id === openId ? "page" : null,
            onclick: () => this.onOpen(id),
          },
          title,
        );
        return h(
          "li",
          {},
          open,
          iconButton("trash", `Delete “${title}”`, () => this.onDelete(id)),
        );
      }),
    );
  }
}
