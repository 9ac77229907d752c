"use strict";
// Charts from the JSON in the page, and a table that sorts and filters. All text is set as text, never as markup.
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const cases = data.cases.map((one, index) => ({ ...one, index })).filter(one => !one.floor);
const floors = data.cases.filter(one => one.floor);
const rows = new Map([...document.querySelectorAll("#cases tr[data-case]")].map(row => [+row.dataset.case, row]));
const settings = one => Object.entries(one.settings).map(([name, value]) => `${name}=${value}`).join(", ");
const state = { words: [], pinned: new Set() };
const charts = [];
const COLOURS = 6;

function element(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "rect", "circle", "text", "title"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// What a case looks like: the colour of its model, the shape of its solver

const names = key => [...new Set(cases.map(one => one[key]))];
const models = names("model"), solvers = names("solver");
const seriesColour = model => `var(--series-${models.indexOf(model) % COLOURS})`;
const polygon = points => "M" + points.map(([x, y]) => `${x.toFixed(2)} ${y.toFixed(2)}`).join("L") + "Z";
const star = (n, outer, inner, turn = 0) => polygon([...Array(2 * n)].map((_, k) => {
  const angle = Math.PI * (k / n - 0.5) + turn, r = k % 2 ? inner : outer;
  return [r * Math.cos(angle), r * Math.sin(angle)];
}));
const PLUS = [[-1, -3], [1, -3], [1, -1], [3, -1], [3, 1], [1, 1], [1, 3], [-1, 3], [-1, 1], [-3, 1], [-3, -1], [-1, -1]];
const SHAPES = [  // of about the same area, as in the pictures
  "M-4.6 0A4.6 4.6 0 1 0 4.6 0A4.6 4.6 0 1 0 -4.6 0Z",
  polygon([[-4.1, -4.1], [4.1, -4.1], [4.1, 4.1], [-4.1, 4.1]]),
  polygon([[0, -5.6], [5.4, 4.2], [-5.4, 4.2]]),
  polygon([[0, -6], [5, 0], [0, 6], [-5, 0]]),
  polygon([[0, 5.6], [5.4, -4.2], [-5.4, -4.2]]),
  polygon(PLUS.map(([x, y]) => [1.9 * x, 1.9 * y])),
  polygon(PLUS.map(([x, y]) => [1.35 * (x - y), 1.35 * (x + y)])),
  star(5, 6.6, 2.9),
  polygon([[-5.6, 0], [4.2, -5.4], [4.2, 5.4]]),
  polygon([[5.6, 0], [-4.2, -5.4], [-4.2, 5.4]]),
];
const shape = solver => SHAPES[solvers.indexOf(solver) % SHAPES.length];
const icon = (path, fill) => element("svg", { width: 14, height: 14, viewBox: "-7 -7 14 14", "aria-hidden": "true" },
  element("path", { d: path, fill }));

// Filters

const facets = [  // what may be chosen by chips: title, icon, value of a case
  { title: "Models", of: one => one.model, icon: value => icon(SHAPES[0], seriesColour(value)) },
  { title: "Solvers", of: one => one.solver, icon: value => icon(shape(value), "currentColor") },
  ...[...new Set(cases.flatMap(one => Object.keys(one.settings)))].map(name => (
    { title: name, of: one => one.settings[name] ?? "", icon: () => "" })),
].map(facet => ({ ...facet, off: new Set() }));

function matches(one) {
  const text = `${one.name} ${one.model} ${one.solver} ${one.steps} ${settings(one)}`.toLowerCase();
  return state.words.every(word => text.includes(word))
    && facets.every(facet => !facet.off.has(facet.of(one)));
}

function filters() {
  const bar = document.getElementById("filters");
  const count = element("output", { id: "count", "aria-live": "polite" });
  const search = element("input", { type: "search", id: "search", placeholder: "words of a case, such as ddim 8",
    "aria-label": "show the cases that have these words",
    oninput: event => { state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean); update(); } });
  bar.append(element("div", { class: "group" }, element("span", {}, "Filter"), search, count));
  for (const { title, of, icon, off } of facets) {
    const chips = [...new Set(cases.map(of))].map(value => element("button", { type: "button", class: "chip",
      "aria-pressed": "true", onclick: event => {
        if (!off.delete(value)) off.add(value);
        event.currentTarget.setAttribute("aria-pressed", String(!off.has(value)));
        update();
      } }, icon(value), element("span", {}, value || "none")));
    bar.append(element("div", { class: "group", role: "group", "aria-label": title }, element("span", {}, title), ...chips));
  }
  bar.hidden = false;
}

// Fronts: the same rules as in bench/front.py

function turned(span, better) { return better === "more" ? [-span[0], -span[2], -span[1]] : span; }

function beats(a, b) {
  return a[0][0] <= b[0][0] && a[1][0] <= b[1][0] && (a[0][2] < b[0][1] || a[1][2] < b[1][1]);
}

function fronts(shown, x, y) {
  const aims = shown.map(one => [turned(one.spans[x], data.columns[x].better), turned(one.spans[y], data.columns[y].better)]);
  const members = new Set(shown.filter((_, i) => !aims.some(other => beats(other, aims[i]))));
  const line = [];
  const order = shown.map((_, i) => i).sort((i, j) => aims[i][0][0] - aims[j][0][0] || aims[i][1][0] - aims[j][1][0]);
  for (const i of order) if (!line.length || aims[i][1][0] < aims[line.at(-1)][1][0]) line.push(i);
  return { members, line: line.map(i => shown[i]) };
}

// Axes

function axis(spans, from, to) {
  const centres = spans.map(span => span[0]), positive = spans.filter(span => span[0] > 0);
  const log = positive.length > 0 && 2 * positive.length >= centres.length;
  let low, high;
  if (log) {  // an interval to 0 would have no end; a number of 0 or less is drawn on the edge
    low = Math.min(...positive.map(span => Math.max(span[1], span[0] / 10)));
    high = Math.max(...positive.map(span => span[2]));
    const decades = Math.log10(high / low), pad = 10 ** Math.max(0.06 * decades, 0.5 * (0.3 - decades), 0.02);
    low /= pad; high *= pad;
  } else {
    low = Math.min(...spans.map(span => span[1])); high = Math.max(...spans.map(span => span[2]));
    const pad = 0.06 * (high - low) || Math.abs(high) * 0.1 || 1;
    low -= pad; high += pad;
  }
  const f = log ? Math.log10 : value => value;
  const place = value => from + (to - from) * (f(Math.min(high, Math.max(low, value))) - f(low)) / (f(high) - f(low));
  return { log, low, high, place, cut: value => log && value <= 0 };
}

function ticks({ log, low, high, place }, gap) {
  let found = [];
  if (log) {
    const decades = Math.log10(high / low);
    const choices = decades < 0.8 ? [[1, 1.5, 2, 3, 4, 5, 7], [1, 2, 5], [1]] : decades < 5 ? [[1, 2, 5], [1, 3], [1]] : [[1]];
    for (const subs of choices) {
      found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
        for (const sub of subs) {
          const value = +(sub * 10 ** power).toPrecision(3);
          if (value >= low && value <= high) found.push(value);
        }
      if (found.every((value, k) => !k || Math.abs(place(value) - place(found[k - 1])) >= gap)) return found;
    }
  } else {
    const rough = (high - low) / Math.max(2, Math.abs(place(high) - place(low)) / (1.6 * gap));
    const unit = 10 ** Math.floor(Math.log10(rough)), step = unit * [1, 2, 5, 10].find(k => k * unit >= rough);
    for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(+(k * step).toPrecision(10));
  }
  return found.filter((value, k) => !k || Math.abs(place(value) - place(found[0])) >= gap * k * 0.5);
}

function written(value) {
  const size = Math.abs(value);
  return size && (size >= 1e6 || size < 1e-4) ? value.toExponential().replace("e+", "e") : String(+value.toPrecision(6));
}

// Charts

class Chart {
  constructor(section, { x, y }) {
    Object.assign(this, { section, x, y, figure: section.querySelector("figure"), focus: null });
    this.figure.querySelector("picture").remove();
    this.svg = element("svg", { class: "chart", role: "group", "aria-label": "chart: arrow keys walk through its points" });
    this.tip = element("div", { class: "tip", hidden: "" });
    this.controls = element("div", { class: "axes" }, this.choice("y", "vertical"), this.choice("x", "horizontal"));
    this.figure.prepend(this.controls, this.svg, this.tip);
    if (!charts.length) this.figure.querySelector("figcaption").append(
      " Point at a case, tap it or walk there with the arrow keys to see its numbers and its samples.");
    this.svg.addEventListener("pointermove", event => event.pointerType === "mouse" && this.show(this.nearest(event)));
    this.svg.addEventListener("pointerleave", () => this.show(null));
    this.svg.addEventListener("click", event => {
      const one = this.nearest(event);
      if (!one) return this.show(null);
      this.marks.get(one).focus({ preventScroll: true });
      pin(one);
    });
    this.svg.addEventListener("keydown", event => this.key(event));
    this.width = 0;
    new ResizeObserver(() => { if (this.figure.clientWidth !== this.width) this.draw(); }).observe(this.figure);
  }

  choice(which, title) {
    const options = data.columns.map((column, k) => [column, k])
      .filter(([column, k]) => cases.some(one => one.spans[k]))
      .map(([column, k]) => element("option", { value: k, ...(k === this[which] ? { selected: "" } : {}) }, column.title));
    return element("label", {}, title, element("select", { "data-axis": which,
      onchange: event => { this[which] = +event.target.value; update(); } }, ...options));
  }

  draw() {
    const { x, y, svg } = this, width = this.width = this.figure.clientWidth;
    const height = Math.round(Math.min(460, Math.max(290, width * 0.56)));
    this.shown = cases.filter(one => one.spans[x] && one.spans[y] && matches(one));
    this.shown.sort((a, b) => a.spans[x][0] - b.spans[x][0] || a.spans[y][0] - b.spans[y][0]);
    const heights = floors.filter(one => one.spans[y]);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    this.marks = new Map();
    this.taken = [];
    this.front = fronts(this.shown, x, y);
    if (!this.shown.length) {
      svg.append(element("text", { class: "empty", x: width / 2, y: height / 2, "text-anchor": "middle" },
        "No case that the filter shows has both numbers."));
      this.show(null);
      return;
    }
    const ys = axis([...this.shown, ...heights].map(one => one.spans[y]), height - 46, 30);
    const marksY = ticks(ys, 22), left = 14 + Math.max(...marksY.map(value => measured(written(value))), 10);
    const xs = axis(this.shown.map(one => one.spans[x]), left, width - 14);
    this.frame = { left, right: width - 14, top: 24, bottom: height - 46 };
    this.at = new Map(this.shown.map(one => [one, [xs.place(one.spans[x][0]), ys.place(one.spans[y][0])]]));
    this.axes(xs, ys, marksY, width, height);
    for (const one of heights) this.floor(one, ys);
    this.lines();
    const order = [...this.shown].sort((a, b) => this.front.members.has(a) - this.front.members.has(b));
    for (const one of order) svg.append(this.point(one, xs, ys));
    this.labels();
    const first = this.shown.includes(this.focus) ? this.focus : this.shown[0];
    this.marks.get(first).setAttribute("tabindex", "0");
    this.show(null);
  }

  axes(xs, ys, marksY, width, height) {
    const { left, right, top, bottom } = this.frame, parts = [];
    for (const value of marksY) {
      const at = ys.place(value);
      parts.push(element("line", { class: "grid", x1: left, x2: right, y1: at, y2: at }),
        element("text", { class: "tick", x: left - 7, y: at + 4, "text-anchor": "end" }, written(value)));
    }
    for (const value of ticks(xs, 34)) {
      const at = xs.place(value);
      parts.push(element("line", { class: "grid", x1: at, x2: at, y1: top, y2: bottom }),
        element("text", { class: "tick", x: at, y: bottom + 17, "text-anchor": "middle" }, written(value)));
    }
    parts.push(element("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
    const title = k => data.columns[k].title + (data.columns[k].better ? ` (${data.columns[k].better} is better)` : "");
    const cut = this.shown.some(one => ys.cut(one.spans[this.y][0])) ? "; hollow: 0 or less" : "";
    parts.push(element("text", { class: "name", x: 0, y: 12 }, title(this.y) + cut),
      element("text", { class: "name", x: right, y: height - 8, "text-anchor": "end" }, title(this.x)));
    this.svg.append(...parts);
  }

  floor(one, ys) {
    const [centre, low, high] = one.spans[this.y].map(ys.place), { left, right } = this.frame;
    this.svg.append(
      element("rect", { class: "floorband", x: left, width: right - left, y: Math.min(low, high), height: Math.abs(low - high) }),
      element("line", { class: "floorline", x1: left, x2: right, y1: centre, y2: centre }));
    this.taken.push([right - 4 - measured("floor: real images"), centre - 16, right, centre]);
  }

  lines() {
    const path = list => "M" + list.map(one => this.at.get(one).map(v => v.toFixed(1)).join(" ")).join("L");
    const series = grouped(this.shown, one => JSON.stringify([one.model, one.solver, settings(one)]));
    for (const list of series.values())
      this.svg.append(element("path", { class: "series", stroke: seriesColour(list[0].model),
        d: path([...list].sort((a, b) => a.steps - b.steps)) }));
    this.svg.append(element("path", { class: "frontline", d: path(this.front.line) }));
  }

  point(one, xs, ys) {
    const [px, py] = this.at.get(one), [, xlow, xhigh] = one.spans[this.x], [, ylow, yhigh] = one.spans[this.y];
    const first = this.front.members.has(one), stroke = seriesColour(one.model), bar = { class: "bar", stroke };
    const texts = [this.x, this.y].map(k => `${data.columns[k].title} ${one.texts[k]}`).join(", ");
    const cut = xs.cut(one.spans[this.x][0]) || ys.cut(one.spans[this.y][0]);
    const mark = element("g", { class: `point${first ? " front" : ""}${cut ? " cut" : ""}`, role: "img", tabindex: "-1",
      "data-case": one.index, "aria-label": `${one.name}: ${texts}${first ? ", on the Pareto front" : ""}` },
      element("line", { ...bar, x1: xs.place(xlow), x2: xs.place(xhigh), y1: py, y2: py }),
      element("line", { ...bar, x1: px, x2: px, y1: ys.place(ylow), y2: ys.place(yhigh) }),
      element("g", { transform: `translate(${px.toFixed(1)} ${py.toFixed(1)})` },
        element("circle", { class: "ring", r: 10 }),
        element("path", { class: "mark", d: shape(one.solver), fill: stroke, stroke, transform: `scale(${first ? 1.1 : 0.9})` })));
    mark.classList.toggle("pinned", state.pinned.has(one));
    mark.addEventListener("focus", () => { this.focus = one; this.show(one); });
    mark.addEventListener("blur", () => this.show(null));
    this.marks.set(one, mark);
    return mark;
  }

  labels() {
    // Beside its point, where nothing else stands; else it is left to the tip and the table.
    const { left, right, top, bottom } = this.frame, taken = this.taken;
    for (const [, , , y] of taken)
      this.svg.append(element("text", { class: "label", x: right - 4, y: y - 5, "text-anchor": "end" }, "floor: real images"));
    const covered = [...this.at.values()].map(([x, y]) => [x - 6, y - 6, x + 6, y + 6]);
    const line = this.front.line, ends = line.map((_, k) => k).sort((a, b) => Math.min(a, line.length - 1 - a) - Math.min(b, line.length - 1 - b));
    for (const k of ends) {
      const one = line[k], [x, y] = this.at.get(one), w = measured(one.label) * 0.96;
      const places = [[-9 - w, 17], [9, -9], [-10 - w, 4], [10, 4], [9, 17], [-w / 2, 22], [-w / 2, -13], [-9 - w, -9]];
      const free = places.map(([dx, dy]) => [x + dx, y + dy - 10, x + dx + w, y + dy + 3]).find(box =>
        box[0] >= left && box[2] <= right + 10 && box[1] >= top - 6 && box[3] <= bottom
        && ![...taken, ...covered].some(other => overlap(box, other)));
      if (!free) continue;
      taken.push(free);
      this.svg.append(element("text", { class: "label", x: free[0], y: free[1] + 10, "pointer-events": "none" }, one.label));
    }
  }

  nearest(event) {
    if (!this.at || !this.shown.length) return null;
    const box = this.svg.getBoundingClientRect(), mx = event.clientX - box.left, my = event.clientY - box.top;
    const far = one => Math.hypot(this.at.get(one)[0] - mx, this.at.get(one)[1] - my);
    const best = this.shown.reduce((a, b) => far(b) < far(a) ? b : a);
    return far(best) < 26 ? best : null;
  }

  key(event) {
    const way = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key], one = this.focus;
    if (event.key === "Escape") this.show(null);
    if ((event.key === "Enter" || event.key === " ") && one) { event.preventDefault(); pin(one); }
    if (!way || !this.shown.length) return;
    event.preventDefault();
    const next = this.shown[(this.shown.indexOf(one) + way + this.shown.length) % this.shown.length];
    for (const mark of this.marks.values()) mark.setAttribute("tabindex", "-1");
    this.marks.get(next).setAttribute("tabindex", "0");
    this.marks.get(next).focus();
  }

  show(one) {
    if (!one && this.marks && document.activeElement && this.svg.contains(document.activeElement) && this.focus
      && document.activeElement.matches(":focus-visible") && this.shown.includes(this.focus)) one = this.focus;
    if (one === this.told) return;
    this.told = one;
    light(one);
    this.tip.hidden = !one;
    if (!one) return;
    this.tip.replaceChildren(...told(one, [this.y, this.x]));
    const [x, y] = this.at.get(one), width = this.tip.offsetWidth, high = this.tip.offsetHeight, top = this.svg.getBoundingClientRect().top;
    const offset = top - this.figure.getBoundingClientRect().top;
    const beside = x + 18 + width <= this.width ? x + 18 : x - 18 - width >= 0 ? x - 18 - width : null;
    this.tip.style.left = `${beside ?? Math.max(0, Math.min(this.width - width, x - width / 2))}px`;
    const above = top + y - 18 - high > 0;
    const level = Math.min(Math.max(y - high / 2, -top + 4), window.innerHeight - top - high - 4);
    this.tip.style.top = `${offset + (beside !== null ? level : above ? y - 18 - high : y + 18)}px`;
  }
}

function grouped(list, key) {
  const found = new Map();
  for (const one of list) found.set(key(one), [...(found.get(key(one)) || []), one]);
  return found;
}

const overlap = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
const pen = document.createElement("canvas").getContext("2d");
function measured(text) { pen.font = `12px ${getComputedStyle(document.body).fontFamily}`; return pen.measureText(text).width; }

// What is told of a case, and its samples

function told(one, first) {
  const order = [...new Set([...first, ...data.columns.keys()])].filter(k => one.texts[k] && (first.includes(k) || data.columns[k].title !== "steps"));
  const facts = order.slice(0, 16).flatMap(k => [element("dt", {}, data.columns[k].title), element("dd", {}, one.texts[k])]);
  const parts = [element("b", {}, one.name), element("dl", {}, ...facts)];
  if (settings(one)) parts.splice(1, 0, element("div", { class: "soft" }, settings(one)));
  const strip = data.strips[one.strip], half = () => element("div", { class: "half" }, element("img", { src: strip, alt: "" }));
  if (strip && data.count % 2 === 0) parts.push(half(), half());
  else if (strip) parts.push(element("img", { src: strip, alt: "" }));
  return parts;
}

function pin(one) {
  if (!state.pinned.delete(one)) state.pinned.add(one);
  for (const chart of charts) chart.marks?.get(one)?.classList.toggle("pinned", state.pinned.has(one));
  strips();
}

function strips() {
  const place = document.querySelector('[data-chart="samples.png"]');
  if (!place || !charts.length || !Object.keys(data.strips).length) return;
  const shown = [...new Set([...charts[0].front.line, ...state.pinned])].filter(one => data.strips[one.strip]);
  const lines = shown.flatMap(one => [
    element("span", {}, icon(shape(one.solver), seriesColour(one.model)), one.name),
    element("img", { src: data.strips[one.strip], alt: `${data.count} samples of ${one.name}` }),
  ]);
  const note = "Each column starts from the same noise. The Pareto front of the first chart"
    + (state.pinned.size ? ", and what was clicked there." : "; a click on a point adds or removes its case.")
    + (data.reduced ? ` Reduced to ${data.size} pixels a side.` : "");
  place.querySelector("figure").replaceChildren(element("div", { class: "strips" }, ...lines),
    element("figcaption", { class: "soft" }, note));
}

// The table

function table() {
  const heads = [...document.querySelectorAll("#cases th")], body = document.getElementById("rows");
  heads.forEach((head, column) => {
    const button = element("button", { type: "button", onclick: () => {
      const was = head.getAttribute("aria-sort"), best = head.dataset.better === "more" ? "descending" : "ascending";
      const now = was === null ? best : was === "ascending" ? "descending" : "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", now);
      const key = row => row.cells[column]?.dataset.sort ?? "";
      const compare = (a, b) => {  // what was not measured comes last either way
        const x = key(a), y = key(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
        return now === "descending" ? -order : order;
      };
      body.append(...[...body.rows].sort(compare));
    } }, head.textContent);
    head.replaceChildren(button);
  });
  for (const one of cases) {
    const row = rows.get(one.index);
    row?.addEventListener("pointerenter", () => light(one));
    row?.addEventListener("pointerleave", () => light(null));
  }
}

function light(one) {
  document.querySelectorAll(".lit").forEach(other => other.classList.remove("lit"));
  if (!one) return;
  rows.get(one.index)?.classList.add("lit");
  for (const chart of charts) chart.marks?.get(one)?.classList.add("lit");
}

function update() {
  for (const chart of charts) chart.draw();
  let count = 0;
  for (const one of cases) {
    const shown = matches(one), row = rows.get(one.index);
    count += shown;
    row.hidden = !shown;
    if (charts.length) row.classList.toggle("front", charts[0].front.members.has(one));
  }
  document.getElementById("count").textContent = `${count} of ${cases.length} cases`;
  strips();
}

filters();
table();
for (const section of document.querySelectorAll("[data-chart]"))
  if (data.charts[section.dataset.chart]) charts.push(new Chart(section, data.charts[section.dataset.chart]));
update();
})();
