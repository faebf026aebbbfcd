// The dialog that asks for the server's key.
import { byId } from "./dom.js";

const FIRST = "It is kept in this browser and sent to this server alone.";
const WRONG = "The server does not know the key that this browser has. Its administrator may have changed it.";

/** Ask for a key; resolves to the key, or to null if the user has none. */
export function askKey(wasWrong) {
  const dialog = byId("key-dialog");
  const field = byId("key");
  byId("key-text").textContent = wasWrong ? WRONG : FIRST;
  field.value = "";
  dialog.showModal();
  field.focus();
  return new Promise((resolve) => {
    let key = null;
    const form = dialog.querySelector("form");
    const submit = (event) => {
      event.preventDefault();
      key = field.value.trim();
      if (key) dialog.close();
    };
    form.addEventListener("submit", submit);
    dialog.addEventListener(
      "close",
      () => {
        form.removeEventListener("submit", submit);
        field.value = "";
        resolve(key);
      },
      { once: true },
    );
  });
}
