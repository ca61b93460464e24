// The page works without this script, which sorts tables, unfolds the target of a link, and unfolds all for printing.
"use strict";

const UNITS = { kB: 1e3, MB: 1e6, GB: 1e9 };
// Numbers in names count as numbers: layer 2 comes before layer 10.
const NAMES = new Intl.Collator("en", { numeric: true });

function sortKey(cell) {
  const text = cell.textContent.trim().replaceAll("−", "-").replaceAll(",", "");
  const number = /^([<>]?) *(-?\d+(?:\.\d+)?(?:e[+-]\d+)?)(?:\s(kB|MB|GB))?/.exec(text);
  // The grade A+ comes before A: a sign sorts before letters.
  if (!number) return text === "-" || text === "" ? null : text.replace(/^A\+(?=\??$)/, "+A");
  const nudge = number[1] === "<" ? -1e-9 : number[1] === ">" ? 1e-9 : 0;
  return Number(number[2]) * (UNITS[number[3]] || 1) + nudge;
}

function compare(a, b) {
  if (typeof a === "string" && typeof b === "string") return NAMES.compare(a, b);
  return typeof a === typeof b ? a - b : typeof a === "number" ? -1 : 1;
}

function sortBy(table, header) {
  const column = header.cellIndex;
  const body = table.tBodies[table.tBodies.length - 1];
  const rows = [...body.rows].map((row) => ({ row, key: sortKey(row.cells[column]) }));
  const numeric = rows.some(({ key }) => typeof key === "number");
  const before = header.getAttribute("aria-sort");
  const descending = before === null ? numeric && column > 0 : before === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  rows.sort((a, b) => {
    // Missing values come last in either order.
    if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
    return descending ? compare(b.key, a.key) : compare(a.key, b.key);
  });
  body.append(...rows.map(({ row }) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const header of table.tHead.rows[0].querySelectorAll("th")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => sortBy(table, header));
  }
}

function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let node = target; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
  if (target) target.scrollIntoView();
}

window.addEventListener("hashchange", openTarget);
if (location.hash) openTarget();

let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const details of opened) details.open = true;
});
window.addEventListener("afterprint", () => {
  for (const details of opened) details.open = false;
});
