"use strict";
// The program of the page. Texts of a run become text nodes only, never markup.
(() => {
  const holder = document.getElementById("data");
  const live = holder.dataset.live === "true";
  let data = JSON.parse(holder.textContent);
  holder.textContent = ""; // its pictures would be held twice
  const COLOURS = 8, MARGIN = { left: 58, right: 10, top: 8, bottom: 20 }, SECONDS = 5;
  const state = { x: "step", log: false, smooth: 0, filter: "", range: null, hidden: new Set(), lit: null, sorted: true, all: false };
  const at = (id) => document.getElementById(id);

  function make(tag, given, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(given || {})) {
      if (name === "class") element.className = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
    return element;
  }

  function words(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    return String(Number(value.toPrecision(4)));
  }

  const counted = (value) => (Number.isInteger(value) ? value.toLocaleString("en") : words(value));
  const chip = (run) => make("span", { class: `chip run${run % COLOURS}${run >= COLOURS ? " dashed" : ""}`, "aria-hidden": "true" });

  // ------------------------------------------------------------------------------------- the axis

  const AXES = { step: "steps", images: "images", hours: "hours of training" };

  /** Return x for each of these steps of a run; null where the run does not say it. */
  function placed(run, steps) {
    if (state.x === "step") return steps;
    const map = data.runs[run][state.x];
    if (!map) return null;
    const [from, to] = map;
    let part = 0;
    return steps.map((step) => {
      while (part + 2 < from.length && from[part + 1] <= step) part += 1;
      if (from.length < 2) return to[0];
      const share = (step - from[part]) / (from[part + 1] - from[part] || 1);
      return to[part] + share * (to[part + 1] - to[part]);
    });
  }

  function ticks(low, high, count) {
    const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw));
    const size = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= raw * 0.999) || raw;
    const found = [];
    for (let number = Math.ceil(low / size - 1e-9); number * size <= high + size * 1e-9 && found.length < 50; number += 1) found.push(number * size);
    return found;
  }

  function decades(low, high, count) {
    const first = Math.ceil(low - 1e-9), last = Math.floor(high + 1e-9);
    if (last - first < 1) return ticks(10 ** low, 10 ** high, count).filter((one) => one > 0);
    const every = Math.max(1, Math.ceil((last - first) / count));
    const found = [];
    for (let power = first; power <= last; power += every) found.push(10 ** power);
    return found;
  }

  // ------------------------------------------------------------------------------------- a curve

  class Card {
    constructor(curve) {
      this.name = curve.name;
      this.tip = make("div", { class: "tip", hidden: true });
      this.canvas = make("canvas", { tabindex: "0", role: "img" });
      this.note = make("p", { class: "note" });
      this.widen = make("button", { type: "button", "aria-label": `Enlarge ${curve.name}`, "aria-pressed": "false" }, "\u2922");
      this.element = make("div", { class: "card", "data-name": curve.name }, make("div", { class: "card-head" }, make("h3", {}, curve.name), this.widen), this.canvas, this.note, this.tip);
      this.widen.addEventListener("click", () => {
        const wide = this.element.classList.toggle("wide");
        this.widen.setAttribute("aria-pressed", String(wide));
        draw();
      });
      this.listen();
      this.take(curve);
    }

    take(curve) {
      this.curve = curve;
      this.lines = null;
    }

    /** Points of each run that is shown, at their places on the axis. */
    visible() {
      const key = `${state.x} ${state.log} ${state.smooth}`;
      if (!this.lines || this.key !== key) {
        this.key = key;
        this.lines = this.curve.runs.map((points, run) => (points ? this.line(points, run) : null));
      }
      return this.lines.map((line, run) => ({ line, run })).filter((one) => one.line && !state.hidden.has(one.run));
    }

    line(points, run) {
      const places = placed(run, points.steps);
      if (!places) return null;
      const kept = points.values.map((value, number) => number).filter((number) => !state.log || points.values[number] > 0);
      const x = kept.map((number) => places[number]), y = kept.map((number) => points.values[number]);
      let smooth = null;
      if (state.smooth > 0) {
        let mean = 0, weight = 0;
        smooth = y.map((value) => {
          mean = state.smooth * mean + (1 - state.smooth) * value;
          weight = state.smooth * weight + 1 - state.smooth;
          return mean / weight;
        });
      }
      const dropped = points.values.length - kept.length;
      return { x, y, smooth, steps: kept.map((number) => points.steps[number]), bad: points.bad ? placed(run, points.bad) : [], bads: points.bads || 0, dropped };
    }

    describe(shown) {
      const notes = [];
      const bads = shown.reduce((sum, one) => sum + one.line.bads, 0), dropped = shown.reduce((sum, one) => sum + one.line.dropped, 0);
      if (bads) notes.push(`${counted(bads)} ${bads === 1 ? "value is" : "values are"} not finite (marked below)`);
      if (dropped) notes.push(`${counted(dropped)} not above 0, which a log scale cannot show`);
      const unplaced = this.curve.runs.filter((points, run) => points && !this.lines[run]).length;
      if (unplaced) notes.push(`${unplaced} ${unplaced === 1 ? "run does" : "runs do"} not say its ${AXES[state.x]}`);
      const compared = new Set(shown.map((one) => one.run));
      notes.push(...data.differing.filter((one) => one.names.includes(this.name) && one.runs.every((run) => compared.has(run))).map((one) => one.note));
      this.note.textContent = notes.join("; ");
      const said = shown.filter((one) => one.line.y.length).map((one) => `${data.runs[one.run].name}: last ${words(one.line.y[one.line.y.length - 1])}`);
      this.canvas.setAttribute("aria-label", `${this.name} over ${AXES[state.x]}. ${said.join(", ")}`);
    }

    draw() {
      const ratio = window.devicePixelRatio || 1, width = this.canvas.clientWidth, height = this.canvas.clientHeight;
      if (!width) return;
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
      const pen = this.canvas.getContext("2d");
      pen.scale(ratio, ratio);
      const shown = this.visible();
      this.describe(shown);
      const [first, last] = state.range || whole();
      let low = Infinity, high = -Infinity;
      for (const { line } of shown) {
        const ys = line.y;
        for (let number = 0; number < ys.length; number += 1) {
          if (line.x[number] >= first && line.x[number] <= last) {
            low = Math.min(low, ys[number]);
            high = Math.max(high, ys[number]);
          }
        }
      }
      if (low > high) [low, high] = state.log ? [0.1, 1] : [0, 1];
      if (state.log) [low, high] = [Math.log10(low), Math.log10(high)];
      const pad = (high - low) * 0.04 || Math.abs(high) * 0.05 || 0.5;
      [low, high] = [low - pad, high + pad];
      const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
      const px = (x) => MARGIN.left + ((x - first) / (last - first || 1)) * inner.width;
      const py = (y) => MARGIN.top + (1 - ((state.log ? Math.log10(y) : y) - low) / (high - low)) * inner.height;
      this.px = px;
      this.back = (place) => first + ((place - MARGIN.left) / inner.width) * (last - first);
      this.element.dataset.y = `${words(state.log ? 10 ** low : low)} ${words(state.log ? 10 ** high : high)}`;
      const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
      pen.font = "11px system-ui, sans-serif";
      pen.lineWidth = 1;
      pen.strokeStyle = colour("--grid");
      pen.fillStyle = colour("--quiet");
      pen.textAlign = "right";
      pen.textBaseline = "middle";
      for (const y of state.log ? decades(low, high, 6) : ticks(low, high, 5)) {
        const place = py(y);
        if (place < MARGIN.top - 1 || place > height - MARGIN.bottom + 1) continue;
        pen.beginPath();
        pen.moveTo(MARGIN.left, place);
        pen.lineTo(width - MARGIN.right, place);
        pen.stroke();
        pen.fillText(words(y), MARGIN.left - 6, place);
      }
      pen.textBaseline = "top";
      const across = ticks(first, last, Math.max(2, Math.floor(inner.width / 60)));
      for (const x of across) {
        const text = short(x);
        pen.textAlign = px(x) > width - 30 ? "right" : "center";
        pen.fillText(text, Math.min(px(x), width - 2), height - MARGIN.bottom + 5);
      }
      pen.save();
      pen.beginPath();
      pen.rect(MARGIN.left, 0, inner.width + MARGIN.right, height);
      pen.clip();
      for (const { line, run } of shown) {
        pen.strokeStyle = colour(`--run${run % COLOURS}`);
        pen.setLineDash(run >= COLOURS ? [5, 3] : []);
        const faded = state.lit !== null && state.lit !== run ? 0.15 : 1;
        if (line.smooth) {
          pen.globalAlpha = 0.25 * faded;
          stroke(pen, line.x, line.y, px, py, first, last);
        }
        pen.globalAlpha = faded;
        pen.lineWidth = 1.6;
        stroke(pen, line.x, line.smooth || line.y, px, py, first, last);
        pen.lineWidth = 1;
        pen.setLineDash([]);
        pen.strokeStyle = colour("--bad");
        for (const x of line.bad || []) {
          pen.beginPath();
          pen.moveTo(px(x), height - MARGIN.bottom);
          pen.lineTo(px(x), height - MARGIN.bottom - 9);
          pen.stroke();
        }
      }
      pen.globalAlpha = 1;
      if (this.cross !== null && this.cross !== undefined) {
        pen.strokeStyle = colour("--quiet");
        pen.beginPath();
        pen.moveTo(this.cross, MARGIN.top);
        pen.lineTo(this.cross, height - MARGIN.bottom);
        pen.stroke();
      }
      if (this.from !== null && this.from !== undefined && this.cross !== null) {
        pen.fillStyle = colour("--accent");
        pen.globalAlpha = 0.2;
        pen.fillRect(Math.min(this.from, this.cross), MARGIN.top, Math.abs(this.cross - this.from), inner.height);
      }
      pen.restore();
    }

    point(place) {
      const x = this.back(place), rows = [];
      for (const { line, run } of this.visible()) {
        if (!line.x.length) continue;
        let low = 0, high = line.x.length - 1;
        while (high - low > 1) {
          const middle = (low + high) >> 1;
          if (line.x[middle] <= x) low = middle;
          else high = middle;
        }
        const near = Math.abs(line.x[low] - x) <= Math.abs(line.x[high] - x) ? low : high;
        const value = words((line.smooth || line.y)[near]);
        rows.push(make("div", {}, chip(run), `${data.runs[run].name}  ${value}  at step ${counted(line.steps[near])}`));
      }
      this.tip.replaceChildren(...rows);
      this.tip.hidden = !rows.length;
      const width = this.canvas.clientWidth, left = this.canvas.offsetLeft + place + 12;
      this.tip.style.left = `${Math.max(4, Math.min(left, width - this.tip.offsetWidth))}px`;
      this.tip.style.top = `${this.canvas.offsetTop + 6}px`;
    }

    listen() {
      const canvas = this.canvas;
      this.cross = this.from = null;
      const inside = (event) => Math.max(MARGIN.left, Math.min(event.clientX - canvas.getBoundingClientRect().left, canvas.clientWidth - MARGIN.right));
      canvas.addEventListener("pointerdown", (event) => {
        if (event.button !== 0 || !this.back) return;
        this.from = this.cross = inside(event);
        canvas.setPointerCapture(event.pointerId);
      });
      canvas.addEventListener("pointermove", (event) => {
        if (!this.back) return;
        this.cross = inside(event);
        this.point(this.cross);
        this.draw();
      });
      canvas.addEventListener("pointerup", (event) => {
        const from = this.from, to = inside(event);
        this.from = null;
        if (from !== null && Math.abs(to - from) > 8) zoom([this.back(Math.min(from, to)), this.back(Math.max(from, to))]);
        else this.draw();
      });
      const leave = () => {
        this.cross = this.from = null;
        this.tip.hidden = true;
        this.draw();
      };
      canvas.addEventListener("pointerleave", leave);
      canvas.addEventListener("pointercancel", leave);
      canvas.addEventListener("dblclick", () => zoom(null));
      canvas.addEventListener("keydown", (event) => {
        const action = { "+": () => scale(0.5), "=": () => scale(0.5), "-": () => scale(2), ArrowLeft: () => move(-0.2), ArrowRight: () => move(0.2), Escape: () => zoom(null) }[event.key];
        if (action) {
          event.preventDefault();
          action();
        }
      });
    }
  }

  function stroke(pen, xs, ys, px, py, first, last) {
    pen.beginPath();
    let begun = false;
    for (let number = 0; number < xs.length; number += 1) {
      if (number + 1 < xs.length && xs[number + 1] < first) continue;
      const x = px(xs[number]), y = py(ys[number]);
      if (begun) pen.lineTo(x, y);
      else pen.moveTo(x, y);
      begun = true;
      if (xs[number] > last) break;
    }
    pen.stroke();
    if (xs.length === 1) {
      pen.beginPath();
      pen.arc(px(xs[0]), py(ys[0]), 2, 0, 7);
      pen.stroke();
    }
  }

  function short(value) {
    const size = Math.abs(value);
    if (state.x === "hours") return words(value);
    if (size >= 1e9) return `${words(value / 1e9)}G`;
    if (size >= 1e6) return `${words(value / 1e6)}M`;
    return size >= 1e4 ? `${words(value / 1e3)}k` : words(value);
  }

  // ------------------------------------------------------------------------------------- zoom

  let cards = new Map(), seen = new Set(), waiting = false, span = null;
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const card = cards.get(entry.target.dataset.name);
      if (!card) continue;
      if (entry.isIntersecting) seen.add(card);
      else seen.delete(card);
    }
    draw();
  }, { rootMargin: "300px" });

  /** First and last place on the axis of all runs that are shown. */
  function whole() {
    if (span) return span;
    let first = Infinity, last = -Infinity;
    for (const card of cards.values()) {
      for (const { line } of card.visible()) {
        if (!line.x.length) continue;
        first = Math.min(first, line.x[0]);
        last = Math.max(last, line.x[line.x.length - 1]);
      }
    }
    span = first > last ? [0, 1] : first === last ? [first - 0.5, last + 0.5] : [first, last];
    return span;
  }

  function zoom(range) {
    const [first, last] = whole();
    if (range) {
      const low = Math.max(first, range[0]), high = Math.min(last, range[1]);
      range = high - low < (last - first) * 1e-6 || high - low >= (last - first) * 0.9999 ? (high > low && high - low < last - first ? state.range : null) : [low, high];
    }
    state.range = range;
    at("whole").disabled = !range;
    at("charts").dataset.range = range ? range.map((one) => Number(one.toPrecision(6))).join(" ") : "whole";
    draw();
  }

  function scale(factor) {
    const [first, last] = state.range || whole(), middle = (first + last) / 2, half = ((last - first) / 2) * factor;
    zoom([middle - half, middle + half]);
  }

  function move(share) {
    if (!state.range) return;
    const [low, high] = whole(), [first, last] = state.range;
    const by = Math.max(low - first, Math.min(high - last, (last - first) * share));
    zoom([first + by, last + by]);
  }

  function draw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      for (const card of seen) card.draw();
      for (const chart of bars) chart();
    });
  }

  function restart() {
    span = null;
    zoom(null);
  }

  // ------------------------------------------------------------------------------------- sections

  const GROUPS = [["validation", (name) => name.startsWith("valid/")], ["losses", (name) => /loss|nll|cross_entropy|accuracy/.test(name)], ["codes", (name) => name.startsWith("codebook_")], ["machine", (name) => ["images_per_second", "data_wait", "memory_gb"].includes(name)], ["others", () => true]];

  function showCurves() {
    const box = at("charts"), kept = new Map(), groups = new Map(GROUPS.map(([name]) => [name, []]));
    for (const curve of data.curves) {
      const card = cards.get(curve.name) || new Card(curve);
      card.take(curve);
      kept.set(curve.name, card);
      groups.get(GROUPS.find(([, holds]) => holds(curve.name))[0]).push(card);
    }
    const same = cards.size === kept.size && [...kept.keys()].every((name) => cards.has(name));
    cards = kept;
    span = null;
    if (same && box.children.length) return;
    seen = new Set();
    observer.disconnect();
    box.replaceChildren();
    for (const [name, members] of groups) {
      if (!members.length) continue;
      box.append(make("div", { class: "block" }, make("p", { class: "group" }, name), make("div", { class: "charts" }, ...members.map((card) => card.element))));
    }
    for (const card of cards.values()) observer.observe(card.element);
    filter();
  }

  function filter() {
    const wanted = state.filter.toLowerCase();
    for (const card of cards.values()) card.element.hidden = !card.name.toLowerCase().includes(wanted);
    for (const block of at("charts").children) block.hidden = ![...block.querySelectorAll(".card")].some((card) => !card.hidden);
    draw();
  }

  function showRuns() {
    const boxes = data.runs.map((run, number) => {
      const box = make("input", { type: "checkbox" });
      box.checked = !state.hidden.has(number);
      box.addEventListener("change", () => {
        if (box.checked) state.hidden.delete(number);
        else state.hidden.add(number);
        span = null;
        showPictures();
        showCodes();
        draw();
      });
      const light = (lit) => () => {
        state.lit = data.runs.length > 1 ? lit : null;
        draw();
      };
      const label = make("label", { title: run.path, onpointerenter: light(number), onpointerleave: light(null) }, box, chip(number), run.name, make("span", { class: "quiet" }, `${run.model} step ${counted(run.step)}`));
      box.addEventListener("focus", light(number));
      box.addEventListener("blur", light(null));
      return label;
    });
    at("runs").replaceChildren(...boxes);
    const problems = data.runs.flatMap((run) => run.problems.map((text) => make("li", {}, `${run.name}: ${text}`)));
    at("problems").replaceChildren(...problems);
    at("problems").hidden = !problems.length;
    at("made").textContent = `version ${data.version}, ${data.made.replace("T", " ").replace("+00:00", " UTC")}`;
  }

  function showAxes() {
    const known = Object.keys(AXES).filter((name) => name === "step" || data.runs.some((run) => run[name]));
    if (!known.includes(state.x)) state.x = "step";
    at("x").replaceChildren(...known.map((name) => make("option", { value: name, selected: name === state.x }, AXES[name])));
  }

  /** Fill a section with a slider over steps and a figure of each run. */
  function overSteps(section, runs, figure) {
    const box = at(section), steps = [...new Set(runs.flatMap((items) => items.map((item) => item.step)))].sort((a, b) => a - b);
    box.hidden = !steps.length;
    if (!steps.length) return;
    let slider = box.querySelector("input[type=range]"), sheets = box.querySelector(".sheets");
    const atEnd = !slider || slider.value === slider.max;
    if (!slider) {
      slider = make("input", { type: "range", min: "0", step: "1", "aria-label": `Step of the ${section}` });
      sheets = make("div", { class: "sheets" });
      box.append(make("div", { class: "slider" }, slider, make("output", {})), sheets);
    }
    slider.max = String(steps.length - 1);
    if (atEnd) slider.value = slider.max;
    const show = () => {
      const step = steps[Math.min(Number(slider.value), steps.length - 1)];
      slider.setAttribute("aria-valuetext", `step ${step}`);
      box.querySelector("output").textContent = `step ${counted(step)}`;
      box.dataset.step = step;
      const figures = [];
      runs.forEach((items, run) => {
        if (state.hidden.has(run) || !items.length) return;
        const before = items.filter((item) => item.step <= step);
        figures.push(figure(before.length ? before[before.length - 1] : items[0], run));
      });
      sheets.replaceChildren(...figures);
      draw();
    };
    slider.oninput = show;
    show();
  }

  const caption = (run, text) => make("figcaption", {}, chip(run), `${data.runs[run].name}, ${text}`);

  function showPictures() {
    overSteps("pictures", data.pictures, (item, run) => {
      const image = make("img", { alt: `Pictures of ${data.runs[run].name} at step ${item.step}`, src: item.src });
      image.addEventListener("load", () => {
        if (image.naturalWidth < 300) image.style.width = `${image.naturalWidth * 2}px`;
      });
      return make("figure", {}, caption(run, `step ${counted(item.step)}`), image);
    });
  }

  let bars = [];

  function showCodes() {
    bars = [];
    const box = at("codes");
    if (!box.querySelector("label") && data.charts.some((items) => items.length)) {
      const order = make("input", { type: "checkbox", id: "sorted", checked: true });
      order.addEventListener("change", () => {
        state.sorted = order.checked;
        draw();
      });
      box.append(make("p", { class: "quiet" }, "Codes of the training images between two charts. ", make("label", {}, order, " most frequent first")));
    }
    overSteps("codes", data.charts, (item, run) => {
      if (item.src) return make("figure", {}, caption(run, `step ${counted(item.step)}`), make("img", { alt: `Codes of ${data.runs[run].name}`, src: item.src }));
      const text = `step ${counted(item.step)}: ${counted(item.used)} of ${counted(item.codes)} codes in use`;
      const canvas = make("canvas", { role: "img", "aria-label": `${data.runs[run].name}, ${text}` });
      bars = bars.filter((one) => one.run !== run);
      const paint = () => drawBars(canvas, state.sorted ? item.ranked : item.bars, run);
      paint.run = run;
      bars.push(paint);
      return make("figure", {}, caption(run, text), canvas);
    });
  }

  function drawBars(canvas, counts, run) {
    const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d"), most = Math.max(1, ...counts), each = canvas.width / counts.length;
    pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(`--run${run % COLOURS}`).trim();
    counts.forEach((count, number) => {
      const tall = count ? Math.max(1, (count / most) * (canvas.height - 6)) : 0;
      pen.fillRect(number * each, canvas.height - tall, Math.max(1, each - (each > 3 ? 1 : 0)), tall);
    });
  }

  const isNumber = (text) => text !== null && /^-?[\d.]+(e[-+]?\d+)?$/.test(text);

  function table(rows, heads) {
    const numbers = rows.length && rows.every((row) => row.cells.every((cell) => cell === null || isNumber(cell) || cell.length < 12));
    const kind = numbers ? "number" : "";
    const cell = (text) => make("td", { class: text === null ? "none" : kind }, text === null ? "-" : text);
    return make("div", { class: "scroll", tabindex: "0" }, make("table", {}, make("thead", {}, make("tr", {}, make("td", {}), ...heads.map((head) => make("th", { scope: "col", class: kind }, head)))), make("tbody", {}, ...rows.map((row) => make("tr", {}, make("th", { scope: "row" }, row.name), ...row.cells.map(cell))))));
  }

  function fill(section, ...content) {
    const box = at(section);
    box.replaceChildren(box.querySelector("h2"), ...content);
    box.hidden = !content.length;
  }

  function showTables() {
    const names = data.runs.map((run) => run.name);
    const differs = new Set(data.differing.flatMap((one) => one.names));
    const marked = data.numbers.map((row) => (differs.has(row.name) ? { ...row, name: `${row.name} *` } : row));
    fill("numbers", table(marked, names), ...data.differing.map((one) => make("p", { class: "hint" }, `* ${one.line}`)));
    const tables = data.evaluations.flatMap((one, number) => [
      make("h3", {}, data.evaluations.length > 1 ? `Protocol ${number + 1}` : "One protocol"),
      make("p", { class: "quiet" }, one.protocol.map(([name, value]) => `${name}: ${value}`).join(", ")),
      table(one.rows, names),
    ]);
    if (data.evaluations.length > 1) tables.unshift(make("p", {}, "These numbers were measured in different ways. Only those of one table can be compared."));
    fill("evaluations", ...tables);
    const differing = data.configuration.filter((row) => new Set(row.cells).size > 1 && row.name !== "trainer.results_folder");
    const all = make("details", {}, make("summary", {}, `All ${data.configuration.length} options`), table(data.configuration, names));
    all.open = state.all;
    all.addEventListener("toggle", () => { state.all = all.open; });
    const first = data.runs.length < 2 ? [] : [differing.length ? table(differing, names) : make("p", {}, "The runs have the same configuration.")];
    fill("configuration", ...first, all);
    fill("environment", ...(data.environment.length ? [table(data.environment, names)] : []));
    showEvents();
  }

  function showEvents() {
    const rows = data.events.flatMap((one, run) => one.rows.map((event) => ({ ...event, run })));
    rows.sort((a, b) => ((a.time || "") < (b.time || "") ? -1 : 1));
    const left = data.events.reduce((sum, one) => sum + one.left_out, 0);
    const head = make("thead", {}, make("tr", {}, ...["time (UTC)", "run", "step", "event", ""].map((text) => make("th", { scope: "col" }, text))));
    const body = rows.map((event) => make("tr", {}, make("td", {}, (event.time || "").replace("T", " ").replace("+00:00", "")), make("td", {}, data.runs[event.run].name), make("td", { class: "number" }, counted(event.step)), make("td", {}, event.event), make("td", {}, event.message || "")));
    const content = rows.length ? [make("div", { class: "scroll", tabindex: "0" }, make("table", {}, head, make("tbody", {}, ...body)))] : [];
    if (left) content.unshift(make("p", { class: "quiet" }, `${counted(left)} earlier events are left out.`));
    fill("events", ...content);
  }

  function showNavigation() {
    const links = [...document.querySelectorAll("main > section")].filter((section) => !section.hidden).map((section) => make("a", { href: `#${section.id}` }, section.querySelector("h2").textContent));
    at("nav").replaceChildren(...links);
  }

  function show() {
    showRuns();
    showAxes();
    showCurves();
    showPictures();
    showCodes();
    showTables();
    showNavigation();
    draw();
  }

  // ------------------------------------------------------------------------------------- controls

  at("x").addEventListener("change", (event) => {
    state.x = event.target.value;
    at("charts").dataset.x = state.x;
    restart();
  });
  at("log").addEventListener("change", (event) => {
    state.log = event.target.checked;
    at("charts").dataset.log = String(state.log);
    draw();
  });
  at("smooth").addEventListener("input", (event) => {
    state.smooth = Number(event.target.value);
    draw();
  });
  at("filter").addEventListener("input", (event) => {
    state.filter = event.target.value;
    filter();
  });
  at("nearer").addEventListener("click", () => scale(0.5));
  at("farther").addEventListener("click", () => scale(2));
  at("whole").addEventListener("click", () => zoom(null));
  window.addEventListener("resize", draw);

  const wish = window.matchMedia("(prefers-color-scheme: dark)"), root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : wish.matches);
  function nameTheme() {
    at("theme").textContent = isDark() ? "light" : "dark";
    at("theme").setAttribute("aria-label", `Change to ${isDark() ? "light" : "dark"} colours`);
    draw();
  }
  at("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  wish.addEventListener("change", nameTheme);

  show();
  restart();
  nameTheme();

  if (live) {
    let mark = "";
    const ask = async () => {
      try {
        const answer = await fetch("/data.json", { headers: mark ? { "If-None-Match": mark } : {}, cache: "no-store" });
        if (answer.status === 200) {
          mark = answer.headers.get("ETag") || "";
          data = await answer.json();
          show();
        }
      } catch (error) {
        at("made").textContent = "the server has ended; these are its last numbers";
      }
      setTimeout(ask, SECONDS * 1000);
    };
    setTimeout(ask, SECONDS * 1000);
  }
  root.dataset.ready = "true";
})();
