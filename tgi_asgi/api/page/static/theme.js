// Light or dark, before anything is drawn: this one script is no module, and blocks.
(() => {
  const NAME = "tgi-asgi.theme";
  const THEMES = ["auto", "light", "dark"];

  const read = () => {
    try {
      const kept = localStorage.getItem(NAME);
      return THEMES.includes(kept) ? kept : "auto";
    } catch {
      return "auto"; // a browser that keeps nothing
    }
  };

  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
  };
  show(read());

  /** Go on to the next theme and return its name. */
  window.nextTheme = () => {
    const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
    show(theme);
    try {
      localStorage.setItem(NAME, theme);
    } catch {
      /* it holds for this visit */
    }
    return theme;
  };
})();
