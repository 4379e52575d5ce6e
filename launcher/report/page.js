"use strict";
(() => {
  const root = document.documentElement;
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
  root.addEventListener("theme", paint);

  function choose() {
    for (const box of document.querySelectorAll("input[data-run]")) {
      for (const plot of figures()) {
        for (const line of plot.renderers) {
          if (line.name === "run-" + box.dataset.run) line.visible = box.checked;
        }
      }
    }
  }
  document.addEventListener("change", (event) => {
    if (event.target.matches("input[data-run]")) choose();
  });

  // On a scale of magnitudes a move is a factor, elsewhere a distance.
  function move(range, logarithmic, by, zoom) {
    const go = logarithmic ? Math.log : (value) => value, back = logarithmic ? Math.exp : (value) => value;
    const low = go(range.start), high = go(range.end), middle = (low + high) / 2 + by * (high - low);
    const half = (high - low) / 2 * zoom;
    range.have_updated_interactively = true; // else it may go back to all that there is at the next drawing
    range.setv({ start: back(middle - half), end: back(middle + half) });
  }

  const moves = { ArrowLeft: [-0.2, 1], ArrowRight: [0.2, 1], "+": [0, 0.7], "=": [0, 0.7], "-": [0, 1 / 0.7] };
  let drawn = {}; // the figure in each element, by the element's id
  document.addEventListener("keydown", (event) => {
    const plot = event.target.classList?.contains("plot") && drawn[event.target.id];
    if (!plot || event.ctrlKey || event.metaKey || event.altKey) return;
    const by = moves[event.key];
    if (by) move(plot.x_range, plot.x_scale.type === "LogScale", ...by);
    else if (event.key === "0") plot.reset.emit();
    else return;
    event.preventDefault();
  });

  async function draw(content) {
    if (!content.items) return;
    await Bokeh.embed.embed_items(content.documents, content.items);
    drawn = {};
    for (const item of content.items) {
      for (const [model, element] of Object.entries(item.roots)) {
        drawn[element] = figures().find((one) => one.id === model);
      }
    }
    choose();
    paint();
    root.dataset.drawn = String(figures().length);
  }

  const sources = (plots) => plots.flatMap((plot) => plot.renderers.map((one) => one.data_source));
  const shape = (plots) => plots.map((plot) => plot.renderers.map((one) => one.name + one.glyph.type).join()).join(";");

  // What is zoomed stays so: the same lines take the new points. Where there are others, all is drawn anew.
  async function renew(content) {
    const { Document } = Bokeh.require("document/document");
    const known = figures(), number = Bokeh.documents.length;
    const fresh = Object.values(content.documents || {}).flatMap((one) => Document.from_json(one).roots());
    Bokeh.documents.splice(number); // reading them has put them among those that are shown
    if (shape(fresh) === shape(known)) {
      const points = sources(fresh);
      sources(known).forEach((source, place) => { source.data = points[place].data; });
      return;
    }
    for (const one of [...Bokeh.documents]) one.clear();
    Bokeh.documents.splice(0);
    for (const place of document.querySelectorAll(".plot")) place.replaceChildren();
    await draw(content);
  }

  root.addEventListener("renewed", (event) => renew(JSON.parse(event.detail.getElementById("figures").textContent)));
  draw(data);
})();
