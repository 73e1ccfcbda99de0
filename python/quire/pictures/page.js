"use strict";
// The page's state, bars, and table. What draws on canvases is in page_canvas.js, which comes after this.

const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = data.page_bytes;
const ROW_PX = 24;
const rows = data.rows;
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const $ = (id) => document.getElementById(id);

const state = {
  sample: 0, against: "", onlyChanges: false, metric: "resident",
  kinds: new Set(), query: "", sort: "address", descending: false,
  selected: -1, view: [0, 1], cell: 0,
};

// --- Data

/** Numbers of the rows of a sample, in the order of addresses. */
function rowsOf(sample) {
  const each = data.samples[sample];
  if (!each.list) {
    each.list = [];
    for (let at = 0; at < each.rows.length; at += 2) {
      for (let n = 0; n < each.rows[at + 1]; n++) each.list.push(each.rows[at] + n);
    }
  }
  return each.list;
}

const nameOf = (row) => data.names[rows.name[row]];
const kindOf = (row) => data.kinds[rows.kind[row]];
const sizeOf = (row) => (rows.end[row] - rows.start[row]) * PAGE;
const fill = (kind) => (dark.matches ? kind.dark : kind.light);
const inkOn = (kind) => (dark.matches ? kind.ink_dark : kind.ink_light);
const shown = (row) => !state.kinds.size || state.kinds.has(rows.kind[row]);

function bytes(count) {
  if (count === null || count === undefined) return "";
  if (count === 0) return "0";
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
  let value = Math.abs(count);
  let unit = 0;
  for (; value >= 999.5 && unit < units.length - 1; unit++) value /= 1024;
  const digits = unit === 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  return `${count < 0 ? "−" : ""}${String(Number(value.toFixed(digits)))} ${units[unit]}`;
}

const signed = (count) => (count > 0 ? "+" : "") + bytes(count);
// A page number has at most 52 bits; three more hexadecimal digits make the address.
const hex = (page) => (page ? `0x${page.toString(16)}000` : "0x0");

/** Map row numbers to what changed there since the sample compared with; gone rows are listed apart. */
function comparison() {
  const changed = new Map();
  const gone = [];
  if (state.against && state.sample > 0) {
    const pairs = data.samples[state.sample][state.against];
    for (let at = 0; at < pairs.length; at += 2) {
      const [before, after] = [pairs[at], pairs[at + 1]];
      if (after < 0) gone.push(before);
      else changed.set(after, before);
    }
  }
  return { changed, gone };
}

function changeText(row, before, isGone) {
  if (isGone) return `− removed`;
  if (before < 0) return `+ added`;
  const grown = sizeOf(row) - sizeOf(before);
  const parts = [];
  if (grown > 0) parts.push(`▲ ${signed(grown)}`);
  if (grown < 0) parts.push(`▼ ${bytes(grown)}`);
  if (rows.protection[row] !== rows.protection[before]) parts.push(`was ${data.protections[rows.protection[before]]}`);
  const resident = (rows.resident[row] ?? 0) - (rows.resident[before] ?? 0);
  if (resident) parts.push(`resident ${signed(resident)}`);
  return parts.join(", ") || "≠ changed";
}

// --- Elements

/** Make an element; texts become text nodes, so nothing of a name is ever read as HTML. */
function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function painted(made, kind) {
  made.style.backgroundColor = fill(kind);
  made.style.color = inkOn(kind);
  if (kind.hatch) made.classList.add(kind.hatch);
  return made;
}

// --- Kinds

function totals() {
  const sums = data.kinds.map(() => ({ mappings: 0, virtual: 0, committed: 0, resident: 0 }));
  const add = (sum, mappings, virtual, committed, resident) => {
    sum.mappings += mappings;
    sum.virtual += virtual;
    sum.committed += committed;
    sum.resident += resident;
  };
  for (const row of rowsOf(state.sample)) {
    add(sums[rows.kind[row]], 1, sizeOf(row), rows.committed[row] ?? 0, rows.resident[row] ?? 0);
  }
  for (const [kind, ...figures] of data.samples[state.sample].extra) add(sums[kind], ...figures);
  return sums;
}

function chooseKind(kind, add) {
  const only = state.kinds.size === 1 && state.kinds.has(kind);
  if (add) {
    if (!state.kinds.delete(kind)) state.kinds.add(kind);
  } else {
    state.kinds = only ? new Set() : new Set([kind]);
  }
  drawKinds();
  drawTable(true);
  drawLine();
}

function drawKinds() {
  const sums = totals();
  const used = sums.map((sum, kind) => kind).filter((kind) => sums[kind].mappings || sums[kind].virtual || sums[kind].resident);
  const focused = document.activeElement?.dataset?.key;
  $("bars").replaceChildren(...["virtual", "committed", "resident"].map((metric) => {
    const total = used.reduce((sum, kind) => sum + sums[kind][metric], 0);
    const stack = element("div", { class: "stack", role: "group", "aria-label": `${metric} by kind` });
    for (const kind of used) {
      const share = total ? sums[kind][metric] / total : 0;
      if (!share) continue;
      const text = `${data.kinds[kind].name}: ${bytes(sums[kind][metric])}, ${(share * 100).toPrecision(2)} %`;
      const part = painted(element("button", { type: "button", title: text, "aria-label": text, tabindex: "-1" }), data.kinds[kind]);
      part.style.flex = `${share} 1 0`;
      if (share > 0.09 && !data.kinds[kind].hatch) part.append(data.kinds[kind].name);
      part.classList.toggle("other", state.kinds.size > 0 && !state.kinds.has(kind));
      part.addEventListener("click", (event) => chooseKind(kind, event.shiftKey));
      stack.append(part);
    }
    return element("div", { class: "bar" }, element("span", {}, metric), element("b", {}, bytes(total)), stack);
  }));
  const line = (kind) => {
    const sum = sums[kind];
    const button = element("button", { type: "button", "aria-pressed": String(state.kinds.has(kind)) },
      painted(element("span", { class: "swatch", "aria-hidden": "true" }), data.kinds[kind]), data.kinds[kind].name);
    button.dataset.key = `kind-${kind}`;
    const made = element("tr", state.kinds.has(kind) ? { class: "chosen" } : {}, element("th", { scope: "row" }, button),
      ...[String(sum.mappings), bytes(sum.virtual), bytes(sum.committed), bytes(sum.resident)].map((text) => element("td", {}, text)));
    made.addEventListener("click", (event) => chooseKind(kind, event.shiftKey));
    return made;
  };
  const all = (metric) => used.reduce((sum, kind) => sum + sums[kind][metric], 0);
  const last = element("tr", { class: "sum" }, element("th", { scope: "row" }, "all"), element("td", {}, String(all("mappings"))),
    ...["virtual", "committed", "resident"].map((metric) => element("td", {}, bytes(all(metric)))));
  $("kinds").tBodies[0].replaceChildren(...used.map(line), last);
  if (focused) document.querySelector(`[data-key="${focused}"]`)?.focus();
  $("clear").hidden = !state.kinds.size;
}

// --- Table

const FIGURES = ["committed", "resident", "proportional", "dirty", "swapped"];
const COLUMNS = [
  { key: "address", title: "Address", width: "31ch", value: (row) => rows.start[row],
    text: (row) => `${hex(rows.start[row])}-${hex(rows.end[row]).slice(2)}` },
  { key: "size", title: "Size", width: "12ch", number: true, value: sizeOf, text: (row) => bytes(sizeOf(row)) },
  { key: "kind", title: "Kind", width: "17ch", value: (row) => rows.kind[row], text: (row) => kindOf(row).name },
  { key: "protection", title: "Prot.", width: "9ch", value: (row) => data.protections[rows.protection[row]],
    text: (row) => data.protections[rows.protection[row]] },
  { key: "change", title: "Change", width: "34ch", value: (row) => changeSize(row), text: () => "" },
  ...FIGURES.filter((key) => key !== "committed" && data.figures.includes(key)).map((key) => ({
    key, title: key[0].toUpperCase() + key.slice(1), width: key === "proportional" ? "16ch" : "13ch", number: true, value: (row) => rows[key][row] ?? -1,
    text: (row) => bytes(rows[key][row]) })),
  { key: "name", title: "Name", width: "minmax(34ch, 1fr)", value: nameOf, text: nameOf },
];
let entries = [];
let compared = { changed: new Map(), gone: [] };

function changeSize(row) {
  if (compared.gone.includes(row)) return -sizeOf(row);
  const before = compared.changed.get(row);
  if (before === undefined) return -Infinity;
  return before < 0 ? sizeOf(row) : sizeOf(row) - sizeOf(before) || (rows.resident[row] ?? 0) - (rows.resident[before] ?? 0);
}

const columns = () => COLUMNS.filter((column) => column.key !== "change" || state.against);

/** Tell whether a row matches what was typed: a part of its name, or an address inside it. */
function matcher() {
  const query = state.query.trim().toLowerCase();
  if (!query) return () => true;
  const address = /^(0x)?[0-9a-f]{4,16}$/.test(query) ? query.replace(/^0x/, "").padStart(4, "0") : "";
  const page = address ? parseInt(address.slice(0, -3), 16) : -1;
  return (row) => nameOf(row).toLowerCase().includes(query) || (rows.start[row] <= page && page < rows.end[row]);
}

function findEntries() {
  compared = comparison();
  const matches = matcher();
  let found = state.onlyChanges && state.against ? [...compared.changed.keys()] : rowsOf(state.sample).slice();
  found = found.filter((row) => shown(row) && matches(row)).map((row) => ({ row, gone: false }));
  for (const row of compared.gone) if (shown(row) && matches(row)) found.push({ row, gone: true });
  const column = COLUMNS.find((each) => each.key === state.sort);
  const sign = state.descending ? -1 : 1;
  found.sort((one, other) => {
    const [left, right] = [column.value(one.row), column.value(other.row)];
    return left < right ? -sign : left > right ? sign : rows.start[one.row] - rows.start[other.row];
  });
  entries = found;
}

function drawTable(again) {
  if (again) {
    findEntries();
    $("grid").style.setProperty("--columns", columns().map((column) => column.width).join(" "));
    const least = columns().reduce((sum, column) => sum + parseInt(column.width.replace("minmax(", ""), 10), 0);
    $("grid").style.setProperty("--least", `${least}ch`);
    $("head").replaceChildren(...columns().map((column, number) => {
      const sorted = state.sort === column.key;
      const button = element("button", { type: "button", tabindex: "-1" }, column.title + (sorted ? (state.descending ? " ▼" : " ▲") : ""));
      button.addEventListener("click", () => sortBy(column));
      return element("div", { role: "columnheader", "aria-colindex": String(number + 1), class: column.number ? "number" : "",
        "aria-sort": sorted ? (state.descending ? "descending" : "ascending") : "none" }, button);
    }));
    $("grid").setAttribute("aria-rowcount", String(entries.length + 1));
    const all = rowsOf(state.sample).length;
    $("count").textContent = entries.length === all ? `${all} mappings` : `${entries.length} of ${all} mappings`;
    $("body").style.height = `${entries.length * ROW_PX}px`;
  }
  const grid = $("grid");
  const first = Math.max(0, Math.floor(grid.scrollTop / ROW_PX) - 6);
  const last = Math.min(entries.length, Math.ceil((grid.scrollTop + grid.clientHeight) / ROW_PX) + 6);
  const made = [];
  for (let at = first; at < last; at++) made.push(drawRow(at));
  $("body").replaceChildren(...made);
  const active = entries.findIndex((entry) => entry.row === state.selected);
  if (active >= first && active < last) grid.setAttribute("aria-activedescendant", `row-${active}`);
  else grid.removeAttribute("aria-activedescendant");
}

function drawRow(at) {
  const { row, gone } = entries[at];
  const before = compared.changed.get(row);
  const made = element("div", { role: "row", id: `row-${at}`, "aria-rowindex": String(at + 2),
    "aria-selected": String(row === state.selected), class: (at % 2 ? "odd" : "") + (gone ? " gone" : "") });
  made.style.top = `${at * ROW_PX}px`;
  made.append(...columns().map((column, number) => {
    const cell = element("div", { role: "gridcell", "aria-colindex": String(number + 1), class: column.number ? "number" : "" });
    if (column.key === "kind") cell.append(painted(element("span", { class: "swatch", "aria-hidden": "true" }), kindOf(row)));
    const text = column.key === "change" ? (gone || before !== undefined ? changeText(row, before, gone) : "") : column.text(row);
    if (column.key === "name") {
      // Of a path too long for the column the file's own name stays in sight.
      const base = text.lastIndexOf("/") + 1;
      cell.append(element("span", {}, text.slice(0, base)), element("span", {}, text.slice(base)));
      cell.classList.add("path");
    } else {
      cell.append(text);
    }
    if (column.key === "name" || column.key === "change") cell.title = text;
    return cell;
  }));
  made.addEventListener("click", () => select(row));
  return made;
}

function sortBy(column) {
  state.descending = state.sort === column.key ? !state.descending : FIGURES.includes(column.key) || ["size", "change"].includes(column.key);
  state.sort = column.key;
  drawTable(true);
}

function scrollToSelected() {
  const at = entries.findIndex((entry) => entry.row === state.selected);
  if (at < 0) return;
  const grid = $("grid");
  const room = grid.clientHeight - $("head").offsetHeight - ROW_PX;
  if (at * ROW_PX < grid.scrollTop) grid.scrollTop = at * ROW_PX;
  else if (at * ROW_PX > grid.scrollTop + room) grid.scrollTop = at * ROW_PX - room;
}

function tableKey(event) {
  const at = entries.findIndex((entry) => entry.row === state.selected);
  const page = Math.max(1, Math.floor($("grid").clientHeight / ROW_PX) - 2);
  const steps = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: entries.length - 1 };
  if (event.target !== $("grid") || !(event.key in steps) || !entries.length) return;
  event.preventDefault();
  select(entries[Math.min(entries.length - 1, Math.max(0, steps[event.key]))].row);
}

// --- Selection

function describe(row) {
  const parts = [COLUMNS[0].text(row), bytes(sizeOf(row)), data.protections[rows.protection[row]], kindOf(row).name];
  if (rows.resident[row] !== null) parts.push(`${bytes(rows.resident[row])} resident`);
  if (nameOf(row)) parts.push(nameOf(row));
  return parts.filter(Boolean).join("  ");
}

function select(row) {
  state.selected = row;
  state.cell = 0;
  $("selection").hidden = row < 0;
  if (row >= 0) {
    const facts = [["Address", COLUMNS[0].text(row)], ["Size", `${bytes(sizeOf(row))} (${sizeOf(row) / PAGE} pages)`],
      ["Kind", kindOf(row).name], ["Protection", data.protections[rows.protection[row]]], ["Name", nameOf(row)],
      ...FIGURES.map((key) => [key[0].toUpperCase() + key.slice(1), bytes(rows[key][row])]), ...data.details[rows.details[row]]];
    $("facts").replaceChildren(...facts.filter(([, text]) => text).map(([label, text]) =>
      element("div", {}, element("dt", {}, label), element("dd", {}, text))));
    $("status").textContent = describe(row);
  } else {
    $("status").textContent = "";
  }
  drawHeat();
  drawLine();
  scrollToSelected();
  drawTable(false);
}
