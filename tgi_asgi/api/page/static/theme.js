// Sets the theme before anything is drawn: this script is not a module, so it blocks rendering.
(() => {
  const NAME = "tgi-asgi.theme";
  const THEMES = ["auto", "light", "dark"];

  const read = () => {
    try {
      const kept = localStorage.getItem(NAME);
      return THEMES.includes(kept) ? kept : "auto";
    } catch {
      return "auto"; // the browser has no storage
    }
  };

  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
  };
  show(read());

  /** Switch to the next theme and return its name. */
  window.nextTheme = () => {
    const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
    show(theme);
    try {
      localStorage.setItem(NAME, theme);
    } catch {
      /* kept only for this visit */
    }
    return theme;
  };
})();
