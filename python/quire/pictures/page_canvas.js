// What is drawn on canvases: the line of addresses, the pages of the selected mapping, the samples over time.

function prepared(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = "12px ui-monospace, 'DejaVu Sans Mono', monospace";
  context.textBaseline = "middle";
  return { context, width, height };
}

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const hatches = new Map();

function hatch(context, name) {
  const key = `${name} ${dark.matches}`;
  if (!hatches.has(key)) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 8;
    const pen = tile.getContext("2d");
    pen.strokeStyle = pen.fillStyle = color("hatch");
    pen.beginPath();
    if (name === "dots") pen.fillRect(3, 3, 2, 2);
    if (name !== "dots") for (const at of [-8, 0, 8]) { pen.moveTo(at, 8); pen.lineTo(at + 8, 0); }
    if (name === "crosses") { pen.moveTo(0, 0); pen.lineTo(8, 8); }
    pen.stroke();
    hatches.set(key, context.createPattern(tile, "repeat"));
  }
  return hatches.get(key);
}

function paint(context, kind, x, y, width, height) {
  context.fillStyle = fill(kind);
  context.fillRect(x, y, width, height);
  if (kind.hatch) {
    context.fillStyle = hatch(context, kind.hatch);
    context.fillRect(x, y, width, height);
  }
}

// --- The line of addresses

/** The number of the last element that is not above a value; -1 if all are. */
function lastAtMost(sorted, value, get = (each) => each) {
  let [low, high] = [0, sorted.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (get(sorted[middle]) <= value) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

function placeOf(page) {
  const { addresses, places } = data.axis;
  const at = lastAtMost(addresses, page);
  if (at < 0) return 0;
  if (at === addresses.length - 1) return 1;
  return places[at] + ((places[at + 1] - places[at]) * (page - addresses[at])) / (addresses[at + 1] - addresses[at]);
}

/** Where each row begins and ends on the line: asked for each row at each drawing. */
const fromOf = Float64Array.from(rows.start, placeOf);
const toOf = Float64Array.from(rows.end, placeOf);

/** The row drawn at a place of the line, or -1; with `near`, the nearest within that distance. */
function rowAt(place, near) {
  const list = rowsOf(state.sample);
  const at = lastAtMost(list, place, (row) => fromOf[row]);
  const distance = (row) => Math.max(0, fromOf[row] - place, place - toOf[row]);
  const found = [list[at], list[at + 1]].filter((row) => row !== undefined && distance(row) <= near);
  found.sort((one, other) => distance(one) - distance(other));
  return found.length ? found[0] : -1;
}

function drawRows(context, width, top, height, from, to, labels) {
  const x = (place) => ((place - from) / (to - from)) * width;
  for (const row of rowsOf(state.sample)) {
    const left = x(fromOf[row]);
    const right = x(toOf[row]);
    if (right < 0 || left > width) continue;
    context.globalAlpha = shown(row) ? 1 : 0.15;
    const room = right - left;
    paint(context, kindOf(row), left, top, Math.max(room > 3 ? room - 1 : room, 0.7), height);
    const visible = Math.min(right, width) - Math.max(left, 0);
    if (labels && visible > 40 && (!kindOf(row).hatch || visible > 90)) {
      const name = nameOf(row).split("/").pop() || kindOf(row).name;
      context.fillStyle = kindOf(row).hatch ? color("ink") : inkOn(kindOf(row));
      context.save();
      context.beginPath();
      context.rect(Math.max(left, 0), top, visible - 4, height);
      context.clip();
      const middle = top + height / 2;
      if (kindOf(row).hatch) {
        const wide = context.measureText(name).width;
        context.fillStyle = color("paper");
        context.fillRect(Math.max(left, 0) + 2, middle - 8, wide + 6, 16);
        context.fillStyle = color("ink");
      }
      context.fillText(name, Math.max(left, 0) + 5, middle);
      context.restore();
    }
  }
  context.globalAlpha = 1;
}

function drawGaps(context, width, top, height, from, to) {
  for (const [start, end] of data.axis.gaps) {
    const left = ((placeOf(start) - from) / (to - from)) * width;
    const right = ((placeOf(end) - from) / (to - from)) * width;
    if (right < 0 || left > width) continue;
    const middle = (left + right) / 2;
    context.strokeStyle = color("faint");
    context.beginPath();
    for (let y = top; y <= top + height; y += 4) context.lineTo(middle + (((y - top) / 4) % 2 ? 3 : -3), y);
    context.stroke();
    const text = bytes((end - start) * PAGE);
    if (right - left > context.measureText(text).width + 18) {
      context.fillStyle = color("paper");
      const half = context.measureText(text).width / 2;
      context.fillRect(middle - half - 3, top + height / 2 - 8, 2 * half + 6, 16);
      context.fillStyle = color("faint");
      context.fillText(text, middle - half, top + height / 2);
    }
  }
}

function drawTicks(context, width, top, from, to) {
  let free = 0;
  context.fillStyle = color("faint");
  context.strokeStyle = color("faint");
  context.lineWidth = 1;
  const tick = (page, place) => {
    const at = ((place - from) / (to - from)) * width;
    if (at < free - 14 || at > width) return;
    const text = hex(page);
    const wide = context.measureText(text).width;
    const left = Math.min(Math.max(0, at), width - wide);
    if (at < 0 || left < free) return;
    context.beginPath();
    context.moveTo(at, top);
    context.lineTo(at, top + 5);
    context.stroke();
    context.fillText(text, left, top + 13);
    free = left + wide + 14;
  };
  for (const row of rowsOf(state.sample)) {
    tick(rows.start[row], fromOf[row]);
    tick(rows.end[row], toOf[row]);
  }
}

function drawMarks(context, width, from, to) {
  const x = (page) => ((placeOf(page) - from) / (to - from)) * width;
  const pointer = (at, fillStyle, up) => {
    context.fillStyle = fillStyle;
    context.beginPath();
    context.moveTo(at - 5, up ? 10 : 1);
    context.lineTo(at + 5, up ? 10 : 1);
    context.lineTo(at, up ? 1 : 10);
    context.fill();
    context.strokeStyle = color("ink");
    context.lineWidth = 1;
    context.closePath();
    context.stroke();
  };
  for (const [start, end] of data.samples[state.sample].marks) {
    context.fillStyle = color("ink");
    context.fillRect(x(start), 6, Math.max(2, x(end) - x(start)), 3);
  }
  for (const [row, before] of compared.changed) pointer(x((rows.start[row] + rows.end[row]) / 2), before < 0 ? data.added : color("faint"), false);
  for (const row of compared.gone) pointer(x((rows.start[row] + rows.end[row]) / 2), data.removed, true);
}

function drawLine() {
  const [from, to] = state.view;
  const line = prepared($("line"), 84);
  drawMarks(line.context, line.width, from, to);
  drawRows(line.context, line.width, 12, 48, from, to, true);
  drawGaps(line.context, line.width, 12, 48, from, to);
  drawTicks(line.context, line.width, 60, from, to);
  if (state.selected >= 0) {
    const left = ((fromOf[state.selected] - from) / (to - from)) * line.width;
    const right = ((toOf[state.selected] - from) / (to - from)) * line.width;
    line.context.strokeStyle = color("ink");
    line.context.lineWidth = 2;
    line.context.strokeRect(left - 1, 11, Math.max(3, right - left + 1), 50);
  }
  if (brush && brush.canvas === $("line")) {
    line.context.fillStyle = color("hatch");
    line.context.fillRect(Math.min(brush.from, brush.to) * line.width, 12, Math.abs(brush.to - brush.from) * line.width, 48);
  }
  const overview = prepared($("overview"), 22);
  drawRows(overview.context, overview.width, 3, 16, 0, 1, false);
  overview.context.strokeStyle = color("ink");
  overview.context.lineWidth = 2;
  overview.context.strokeRect(from * overview.width + 1, 1, Math.max(4, (to - from) * overview.width - 2), 20);
}

function view(from, to) {
  const width = Math.min(1, Math.max(to - from, 1e-7));
  const start = Math.min(Math.max(0, from), 1 - width);
  state.view = [start, start + width];
  drawLine();
}

/** Zoom so that `place` stays where it is drawn; a factor below 1 shows less. */
function zoom(factor, place) {
  const [from, to] = state.view;
  view(place - (place - from) * factor, place + (to - place) * factor);
}

function middle() {
  const [from, to] = state.view;
  if (state.selected >= 0) {
    const place = (fromOf[state.selected] + toOf[state.selected]) / 2;
    if (place >= from && place <= to) return place;
  }
  return (from + to) / 2;
}

function viewRow() {
  if (state.selected < 0) return;
  const [start, end] = [fromOf[state.selected], toOf[state.selected]];
  view(start - (end - start) * 0.6, end + (end - start) * 0.6);
}

function step(by) {
  const list = rowsOf(state.sample).filter(shown);
  if (!list.length) return;
  const at = lastAtMost(list, rows.start[state.selected] ?? -1, (row) => rows.start[row]);
  select(list[Math.min(list.length - 1, Math.max(0, state.selected < 0 ? 0 : at + by))]);
  const [from, to] = state.view;
  const place = fromOf[state.selected];
  if (place < from || place > to) view(place - (to - from) / 2, place + (to - from) / 2);
}

function lineKey(event) {
  const [from, to] = state.view;
  const by = (to - from) / 4;
  const actions = {
    ArrowLeft: () => (event.shiftKey ? view(from - by, to - by) : step(-1)),
    ArrowRight: () => (event.shiftKey ? view(from + by, to + by) : step(1)),
    "+": () => zoom(0.5, middle()), "=": () => zoom(0.5, middle()), "-": () => zoom(2, middle()),
    Enter: viewRow, Home: () => view(0, 1), 0: () => view(0, 1),
  };
  if (!(event.key in actions) || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  actions[event.key]();
}

let brush = null;

/** Let a canvas be brushed: `place` makes a place of the line of a share of the canvas's width. */
function brushable(canvas, place) {
  const share = (event) => {
    const box = canvas.getBoundingClientRect();
    return Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    brush = { canvas, from: share(event), to: share(event), x: event.clientX, far: false };
  });
  canvas.addEventListener("pointermove", (event) => {
    if (brush && brush.canvas === canvas) {
      brush.to = share(event);
      brush.far ||= Math.abs(event.clientX - brush.x) > 4;
      if (brush.far) drawLine();
    } else if (canvas === $("line")) {
      const [from, to] = state.view;
      const row = rowAt(place(share(event)), (4 / canvas.clientWidth) * (to - from));
      $("status").textContent = row >= 0 ? describe(row) : state.selected >= 0 ? describe(state.selected) : "";
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    if (!brush || brush.canvas !== canvas) return;
    const [low, high] = [brush.from, brush.to].sort((one, other) => one - other).map(place);
    const { far } = brush;
    brush = null;
    const [from, to] = state.view;
    if (far) view(low, high);
    else if (canvas === $("line")) select(rowAt(place(share(event)), (4 / canvas.clientWidth) * (to - from)));
    else view(low - (to - from) / 2, low + (to - from) / 2);
  });
  canvas.addEventListener("pointercancel", () => { brush = null; drawLine(); });
  canvas.addEventListener("wheel", (event) => {
    // Without the key or the focus the wheel belongs to the page.
    if (!event.ctrlKey && document.activeElement !== canvas) return;
    event.preventDefault();
    zoom(event.deltaY < 0 ? 0.7 : 1 / 0.7, place(share(event)));
  }, { passive: false });
}

// --- The pages of the selected mapping

const LAYERS = ["resident", "shared", "swapped", "written"];

/** Undo the run lengths of a layer: pairs of a hexadecimal digit and, in parentheses, how often it stands. */
function levels(text) {
  const found = [];
  for (const [, digit, times] of text.matchAll(/([0-9a-f])(?:\((\d+)\))?/g)) {
    for (let n = Number(times || 1); n > 0; n--) found.push(parseInt(digit, 16));
  }
  return found;
}

let heat = null;

function drawHeat() {
  const pages = state.selected >= 0 ? data.pages[state.selected] : undefined;
  $("heat-box").hidden = !pages;
  heat = null;
  if (!pages) return;
  const layers = Object.fromEntries(LAYERS.map((name) => [name, levels(pages[name] || "")]));
  const count = layers.resident.length;
  const canvas = $("heat");
  const size = Math.min(18, Math.max(4, Math.floor(Math.sqrt((canvas.clientWidth * 300) / Math.max(1, count)))));
  const across = Math.max(1, Math.floor(canvas.clientWidth / size));
  heat = { layers, count, across, size, per: pages.per_cell };
  const { context } = prepared(canvas, Math.ceil(count / across) * size);
  const inner = size > 6 ? size - 2 : size - 1;
  for (let cell = 0; cell < count; cell++) {
    const [x, y] = [(cell % across) * size, Math.floor(cell / across) * size];
    context.fillStyle = color("quiet");
    context.fillRect(x, y, inner, inner);
    context.strokeStyle = color("line");
    if (size > 6) { context.lineWidth = 1; context.strokeRect(x + 0.5, y + 0.5, inner - 1, inner - 1); }
    const [resident, shared, swapped, written] = LAYERS.map((name) => layers[name][cell] || 0);
    let base = y + inner;
    for (const [level, style] of [[Math.min(shared, resident), data.shared], [resident - Math.min(shared, resident), data.exclusive], [swapped, data.swapped]]) {
      const high = (inner * level) / 15;
      context.fillStyle = style;
      context.fillRect(x, base - high, inner, high);
      base -= high;
    }
    if (swapped && size > 6) { context.fillStyle = hatch(context, "crosses"); context.fillRect(x, y, inner, inner); }
    if (written && size > 6) { context.fillStyle = "#000000"; context.fillRect(x + inner / 2 - 1.5, y + inner / 2 - 1.5, 3, 3); }
  }
  const sum = (name) => layers[name].reduce((total, level) => total + (level > 0 ? 1 : 0), 0);
  const what = heat.per === 1 ? "page" : `${heat.per} pages, filled as far as they are in memory`;
  const legend = [["exclusive", "this process's alone"], ["shared", "others have it too"], ["swapped", "swapped out"]].map(([name, text]) => {
    const mark = element("span", { class: `swatch${name === "swapped" ? " crosses" : ""}`, "aria-hidden": "true" });
    mark.style.backgroundColor = data[name];
    return element("span", {}, mark, text);
  });
  $("heat-legend").replaceChildren(`A cell is one ${what}.  `.replace("one 2", "2").replace(/one (\d+ pages)/, "$1"), ...legend,
    ...(sum("written") ? [element("span", {}, "• written")] : []));
  describeCell();
  const { width, height } = { width: size, height: size };
  context.strokeStyle = color("focus");
  context.lineWidth = 2;
  context.strokeRect((state.cell % across) * size, Math.floor(state.cell / across) * size, width - 1, height - 1);
}

function describeCell() {
  if (!heat || !heat.count) return;
  const first = rows.start[state.selected] + state.cell * heat.per;
  const last = Math.min(rows.end[state.selected], first + heat.per);
  const [resident, shared, swapped, written] = LAYERS.map((name) => heat.layers[name][state.cell] || 0);
  const share = (level) => (heat.per === 1 ? "" : ` ${Math.round((level / 15) * 100)} %`);
  const parts = [];
  if (resident) parts.push(`in memory${share(resident)}`);
  if (resident && heat.layers.shared.length) parts.push(shared ? `shared${share(shared)}` : "this process's alone");
  if (swapped) parts.push(`swapped out${share(swapped)}`);
  if (written) parts.push("written");
  const frame = (data.pages[state.selected].frames || [])[state.cell];
  if (frame !== undefined && frame !== null) parts.push(`frame ${frame}`);
  $("heat-status").textContent = `${hex(first)}-${hex(last).slice(2)}: ${parts.join(", ") || "not in memory"}`;
}

function moveCell(to) {
  if (!heat || to < 0 || to >= heat.count) return;
  state.cell = to;
  drawHeat();
}

function heatKey(event) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -(heat?.across || 1), ArrowDown: heat?.across || 1 };
  if (!(event.key in steps)) return;
  event.preventDefault();
  moveCell(state.cell + steps[event.key]);
}

function heatPoint(event) {
  if (!heat) return;
  const box = $("heat").getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left) / heat.size);
  if (column < heat.across) moveCell(Math.floor((event.clientY - box.top) / heat.size) * heat.across + column);
}

// --- Samples over time

function drawTimeline() {
  if (data.samples.length < 2) return;
  const { context, width, height } = prepared($("timeline"), 110);
  const sums = data.sums[state.metric];
  const most = Math.max(1, ...sums.map((kinds) => kinds.reduce((total, value) => total + value, 0)));
  const timed = data.samples.every((sample) => sample.time !== null);
  const length = timed ? data.samples.at(-1).time - data.samples[0].time : data.samples.length - 1;
  const left = 74;
  const room = width - left - 10;
  const x = (at) => left + ((timed ? data.samples[at].time - data.samples[0].time : at) / (length || 1)) * room;
  const y = (value) => height - 20 - (value / most) * (height - 28);
  const base = data.samples.map(() => 0);
  data.kinds.forEach((kind, number) => {
    if (!sums.some((kinds) => kinds[number])) return;
    context.beginPath();
    base.forEach((value, at) => context.lineTo(x(at), y(value + sums[at][number])));
    for (let at = base.length - 1; at >= 0; at--) context.lineTo(x(at), y(base[at]));
    context.fillStyle = fill(kind);
    context.fill();
    if (kind.hatch) { context.fillStyle = hatch(context, kind.hatch); context.fill(); }
    base.forEach((value, at) => { base[at] = value + sums[at][number]; });
  });
  context.fillStyle = color("faint");
  context.textAlign = "right";
  context.fillText(bytes(most), left - 6, y(most) + 4);
  context.fillText("0", left - 6, y(0));
  context.textAlign = "left";
  context.fillText(data.samples[0].title, left, height - 8);
  context.textAlign = "right";
  context.fillText(data.samples.at(-1).title, width - 10, height - 8);
  context.textAlign = "left";
  context.strokeStyle = color("ink");
  context.lineWidth = 2;
  context.beginPath();
  context.moveTo(x(state.sample), 2);
  context.lineTo(x(state.sample), height - 18);
  context.stroke();
  $("timeline").setAttribute("aria-label", `${state.metric} by kind over ${data.samples.length} samples, at most ${bytes(most)}`);
  timelineAt = (share) => {
    const wanted = share * width;
    let best = 0;
    data.samples.forEach((_, at) => { if (Math.abs(x(at) - wanted) < Math.abs(x(best) - wanted)) best = at; });
    return best;
  };
}

let timelineAt = () => 0;

function showSample(number) {
  const start = state.selected >= 0 ? rows.start[state.selected] : -1;
  state.sample = Math.min(data.samples.length - 1, Math.max(0, number));
  const sample = data.samples[state.sample];
  $("sample").value = String(state.sample);
  $("sample").setAttribute("aria-valuetext", sample.title);
  $("sample-title").textContent = `${state.sample + 1} of ${data.samples.length}: ${sample.title}`;
  $("note").textContent = sample.note;
  $("note").hidden = !sample.note;
  drawTimeline();
  drawKinds();
  drawTable(true);
  const list = rowsOf(state.sample);
  const at = lastAtMost(list, start, (row) => rows.start[row]);
  select(start >= 0 && at >= 0 && rows.end[list[at]] > start ? list[at] : -1);
}

// --- Begin

function begin() {
  $("time").hidden = data.samples.length < 2;
  $("sample").max = String(data.samples.length - 1);
  $("sample").addEventListener("input", () => showSample(Number($("sample").value)));
  $("metric").addEventListener("change", () => { state.metric = $("metric").value; drawTimeline(); });
  $("against").addEventListener("change", () => {
    state.against = $("against").value;
    $("only-changes").disabled = !state.against;
    if (!state.against && state.sort === "change") state.sort = "address";
    drawTable(true);
    drawLine();
  });
  $("only-changes").addEventListener("change", () => { state.onlyChanges = $("only-changes").checked; drawTable(true); });
  $("timeline").addEventListener("click", (event) => {
    const box = $("timeline").getBoundingClientRect();
    showSample(timelineAt((event.clientX - box.left) / box.width));
  });
  $("query").addEventListener("input", () => { state.query = $("query").value; $("grid").scrollTop = 0; drawTable(true); });
  $("clear").addEventListener("click", () => { state.kinds.clear(); drawKinds(); drawTable(true); drawLine(); });
  $("grid").addEventListener("scroll", () => drawTable(false), { passive: true });
  $("grid").addEventListener("keydown", tableKey);
  $("line").addEventListener("keydown", lineKey);
  $("line").addEventListener("dblclick", (event) => {
    const box = $("line").getBoundingClientRect();
    const [from, to] = state.view;
    zoom(0.25, from + ((event.clientX - box.left) / box.width) * (to - from));
  });
  $("zoom-in").addEventListener("click", () => zoom(0.5, middle()));
  $("zoom-out").addEventListener("click", () => zoom(2, middle()));
  $("zoom-row").addEventListener("click", viewRow);
  $("zoom-all").addEventListener("click", () => view(0, 1));
  $("heat").addEventListener("keydown", heatKey);
  $("heat").addEventListener("click", heatPoint);
  brushable($("line"), (share) => state.view[0] + share * (state.view[1] - state.view[0]));
  brushable($("overview"), (share) => share);
  const again = () => { drawTimeline(); drawKinds(); drawTable(true); drawLine(); drawHeat(); };
  dark.addEventListener("change", again);
  new ResizeObserver(() => { drawTimeline(); drawLine(); drawTable(false); drawHeat(); }).observe(document.body);
  showSample(data.samples.length > 1 && data.samples.every((sample) => sample.time !== null) ? data.samples.length - 1 : 0);
  document.body.dataset.ready = "yes";
}

begin();
