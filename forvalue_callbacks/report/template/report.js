"use strict";
const get = (id) => document.getElementById(id);
const data = JSON.parse(get("data").textContent);
const number = new Intl.NumberFormat("en-US");
const percent = (part, whole) => {
  const share = whole ? (100 * part) / whole : 0;
  return `${share.toFixed(share > 0 && share < 9.95 ? 1 : 0)} %`;
};
const element = (name, text, className) => {
  const out = document.createElement(name);
  if (text !== undefined) out.textContent = text;
  if (className) out.className = className;
  return out;
};

// Theme: what the system says, until somebody chooses.
const themes = ["auto", "light", "dark"];
function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  get("theme").textContent = `Theme: ${theme}`;
}
let theme = "auto";
try { theme = themes.includes(localStorage.forvalueTheme) ? localStorage.forvalueTheme : "auto"; } catch { /* none kept */ }
setTheme(theme);
get("theme").addEventListener("click", () => {
  theme = themes[(themes.indexOf(theme) + 1) % themes.length];
  setTheme(theme);
  try { localStorage.forvalueTheme = theme; } catch { /* none kept */ }
});

const written = (x) => (Math.abs(x) < 1e-9 ? "0" : x.toPrecision(3)).replace("-", "\u2212");

// A cut drops what is counted before its edge: at 0 nothing, at k the first k counts.
const edges = data.edges, bins = edges.length - 1, total = data.counts.reduce((a, b) => a + b, 0);
const dropped = (counts, cut) => counts.slice(0, cut).reduce((a, b) => a + b, 0);
const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
svg.setAttribute("viewBox", `0 0 ${bins} 100`);
svg.setAttribute("preserveAspectRatio", "none");
const bars = (className) => Array.from({ length: bins }, (_, i) => {
  const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  bar.setAttribute("x", i + 0.06);
  bar.setAttribute("width", 0.88);
  bar.dataset.level = className;
  return svg.append(bar), bar;
});
const all = bars(""), level = bars("level"), top1 = Math.max(1, ...data.counts.slice(1, -1));
function heights(some, counts) {
  some.forEach((bar, i) => {
    const height = counts && counts[i + 1] ? Math.max(0.8, (97 * counts[i + 1]) / top1) : 0;
    bar.setAttribute("y", 100 - height);
    bar.setAttribute("height", height);
  });
}
heights(all, data.counts);
heights(level, null);
get("plot").prepend(svg);

const span = edges[bins] - edges[0];
const raw = span / 8, ten = 10 ** Math.floor(Math.log10(raw));
const tick = [1, 2, 5, 10].map((k) => k * ten).find((step) => step >= raw);
const digits = Math.max(0, -Math.floor(Math.log10(tick) + 1e-9));
for (let at = Math.ceil(edges[0] / tick) * tick; at <= edges[bins]; at += tick) {
  const mark = element("span", (Math.abs(at) < tick / 1e6 ? 0 : at).toFixed(digits).replace("-", "\u2212"));
  mark.style.left = `${(100 * (at - edges[0])) / span}%`;
  get("ticks").append(mark);
}
const outside = data.counts[0] + data.counts[bins + 1];
get("unit").textContent = data.unit + (outside ? ` (${number.format(outside)} rows lie outside of this range; they are counted)` : "");

// Groups.
const slider = get("slider");
slider.max = bins + 1;
slider.value = data.start === null ? 0 : data.start + 1;
let table = data.tables[0], selected = null;
function showTable() {
  const cut = Number(slider.value);
  const levels = table.levels.map((one) => ({ one, gone: dropped(one.counts, cut) }));
  if (!table.ordered) levels.sort((a, b) => b.gone / b.one.rows - a.gone / a.one.rows || b.one.rows - a.one.rows);
  const body = get("groups").tBodies[0];
  body.replaceChildren(...levels.map(({ one }) => {
    const row = element("tr"), bar = element("td", undefined, "bar"), box = element("div");
    const name = element("td", one.name || "(empty)");
    name.title = one.name;
    box.append(element("b"));
    bar.append(box);
    row.append(name, element("td", number.format(one.rows), "n"), element("td", "", "n"), element("td", "", "n"), bar);
    row.tabIndex = 0;
    row.setAttribute("aria-selected", one === selected);
    row.one = one;
    return row;
  }));
  count();
}
function count() {
  const cut = Number(slider.value), gone = dropped(data.counts, cut);
  get("says").textContent = `A cut here drops ${number.format(gone)} of ${number.format(total)} rows (${percent(gone, total)})`;
  get("where").textContent = cut === 0 ? "Nothing is dropped." :
    `Rows that score less than ${written(edges[cut - 1])} go, ${number.format(total - gone)} stay.`;
  get("line").hidden = cut === 0;
  get("line").style.left = `${(100 * (cut - 1)) / bins}%`;
  for (const some of [all, level]) some.forEach((bar, i) => bar.setAttribute("class", `${bar.dataset.level}${i + 1 < cut ? " gone" : ""}`));
  if (!table) return;
  for (const row of get("groups").tBodies[0].rows) {
    const lost = dropped(row.one.counts, cut);
    row.cells[2].textContent = number.format(lost);
    row.cells[3].textContent = percent(lost, row.one.rows);
    row.cells[4].firstChild.firstChild.style.width = `${(100 * lost) / row.one.rows}%`;
  }
  const most = table.levels.filter((one) => one.rows >= 5 && 2 * dropped(one.counts, cut) > one.rows).map((one) => one.name);
  get("most").textContent = most.length && gone < total ? `${table.name}: more than half of the rows go of ${most.slice(0, 8).join(", ")}${most.length > 8 ? ` and ${most.length - 8} more` : ""}. Look at them before you drop them.` : "";
}
function select(one) {
  selected = one === selected ? null : one;
  heights(level, selected && selected.counts);
  get("plot").classList.toggle("part", selected !== null);
  for (const row of get("groups").tBodies[0].rows) row.setAttribute("aria-selected", row.one === selected);
}
slider.addEventListener("input", count);
if (table) {
  slider.addEventListener("change", showTable);
  for (const button of document.querySelectorAll(".pick button")) {
    button.addEventListener("click", () => {
      for (const other of document.querySelectorAll(".pick button")) other.setAttribute("aria-pressed", other === button);
      table = data.tables[Number(button.value)];
      if (selected) select(selected);
      showTable();
    });
  }
  const chosen = (event) => event.target.closest("tr")?.one;
  get("groups").tBodies[0].addEventListener("click", (event) => chosen(event) && select(chosen(event)));
  get("groups").tBodies[0].addEventListener("keydown", (event) => event.key === "Enter" && chosen(event) && select(chosen(event)));
  showTable();
} else count();

// Rows: lists, kinds, groups and words.
const rows = [...document.querySelectorAll(".row")].map((node) => ({ node, ...node.dataset }));
const filters = { list: get("list"), kind: get("kind"), group: get("group") };
function filter() {
  const wanted = get("search").value.toLowerCase().trim();
  let n = 0;
  for (const row of rows) {
    let fits = Object.entries(filters).every(([name, node]) => !node || node.value === "" || row[name] === node.value.slice(1));
    if (fits && wanted) {
      row.text ??= row.node.textContent.toLowerCase();
      fits = row.text.includes(wanted);
    }
    row.node.hidden = !fits;
    n += fits;
  }
  get("shown").textContent = `${number.format(n)} of ${number.format(rows.length)} rows shown`;
}
if (rows.length) {
  for (const name of ["kind", "group"]) {
    if (!filters[name]) continue;
    for (const value of [...new Set(rows.map((row) => row[name]).filter((value) => value !== undefined))].sort()) {
      const option = element("option", value || "(empty)");
      option.value = `=${value}`;
      filters[name].append(option);
    }
    filters[name].hidden = filters[name].options.length < 2;
  }
  get("search").addEventListener("input", filter);
  for (const node of Object.values(filters)) node?.addEventListener("change", filter);
  filter();
}
