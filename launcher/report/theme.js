"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const themes = ["auto", "light", "dark"];
  // Pages of one board keep what was chosen; a file has nobody to keep it for.
  const kept = location.protocol.startsWith("http") ? sessionStorage : {};

  function take(theme) {
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
    button.textContent = "Theme: " + theme;
    kept.theme = theme;
    root.dispatchEvent(new Event("theme"));
  }

  button.addEventListener("click", () => {
    take(themes[(themes.indexOf(root.dataset.theme || "auto") + 1) % themes.length]);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => root.dispatchEvent(new Event("theme")));
  if (themes.includes(kept.theme)) take(kept.theme);
})();
