"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const data = JSON.parse(document.getElementById("figures").textContent);
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const figures = () => Bokeh.documents.flatMap((one) => one.roots());

  function paint() {
    const text = color("--text"), faint = color("--faint"), edge = color("--edge"), grid = color("--grid");
    for (const plot of figures()) {
      for (const axis of [...plot.left, ...plot.below]) {
        axis.setv({ major_label_text_color: faint, axis_label_text_color: text, axis_line_color: edge,
          major_tick_line_color: edge, minor_tick_line_color: edge });
      }
      for (const one of plot.center) {
        if (one.type === "Grid") one.grid_line_color = grid;
      }
    }
  }

  const themes = ["auto", "light", "dark"];
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(root.dataset.theme || "auto") + 1) % themes.length];
    if (next === "auto") delete root.dataset.theme;
    else root.dataset.theme = next;
    button.textContent = "Theme: " + next;
    paint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

  for (const box of document.querySelectorAll("input[data-run]")) {
    box.addEventListener("change", () => {
      for (const plot of figures()) {
        for (const line of plot.renderers) {
          if (line.name === "run-" + box.dataset.run) line.visible = box.checked;
        }
      }
    });
  }

  // On a scale of magnitudes a move is a factor, elsewhere a distance.
  function move(range, logarithmic, by, zoom) {
    const go = logarithmic ? Math.log : (value) => value, back = logarithmic ? Math.exp : (value) => value;
    const low = go(range.start), high = go(range.end), middle = (low + high) / 2 + by * (high - low);
    const half = (high - low) / 2 * zoom;
    range.have_updated_interactively = true; // else it may go back to all that there is at the next drawing
    range.setv({ start: back(middle - half), end: back(middle + half) });
  }

  function keys(plot, place) {
    const moves = { ArrowLeft: [-0.2, 1], ArrowRight: [0.2, 1], "+": [0, 0.7], "=": [0, 0.7], "-": [0, 1 / 0.7] };
    place.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const by = moves[event.key];
      if (by) move(plot.x_range, plot.x_scale.type === "LogScale", ...by);
      else if (event.key === "0") plot.reset.emit();
      else return;
      event.preventDefault();
    });
  }

  if (data.items) {
    Bokeh.embed.embed_items(data.documents, data.items).then(() => {
      paint();
      for (const item of data.items) {
        for (const [model, element] of Object.entries(item.roots)) {
          keys(figures().find((one) => one.id === model), document.getElementById(element));
        }
      }
      root.dataset.drawn = String(figures().length);
    });
  }
})();
