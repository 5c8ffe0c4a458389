// Sorting, filtering and drilling down. The page is whole without it.
"use strict";

function cellValue(row, column) {
  const cell = row.cells[column];
  return cell === undefined ? "" : cell.dataset.sort !== undefined ? cell.dataset.sort : cell.textContent.trim();
}

function compare(a, b, up) {
  const sign = up ? 1 : -1;
  const x = parseFloat(a.replace(/[,<]/g, "")), y = parseFloat(b.replace(/[,<]/g, ""));
  if (!Number.isNaN(x) && !Number.isNaN(y)) return sign * (x - y);
  if (!Number.isNaN(x)) return -1;                       // what is missing stands last, either way
  if (!Number.isNaN(y)) return 1;
  return sign * a.localeCompare(b, undefined, {numeric: true});
}

function sortable(table) {
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0];
      body.append(...Array.from(body.rows).sort((a, b) => compare(cellValue(a, column), cellValue(b, column), up)));
    });
  });
}

function filterable(table) {
  const box = document.createElement("p");
  box.className = "filter";
  const label = document.createElement("label");
  const input = document.createElement("input");
  const count = document.createElement("output");
  input.type = "search";
  input.title = 'Words in any column; in quotes: what a cell begins with';
  input.placeholder = 'wanda "not matching"';
  label.append("Show rows with ", input);
  box.append(label, " ", count);
  table.parentElement.before(box);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().match(/"[^"]*"?|\S+/g) || [];
    const rows = Array.from(table.tBodies[0].rows);
    rows.forEach(row => {
      const cells = Array.from(row.cells).filter(cell => cell.dataset.filter !== "no").map(cell => cell.textContent.trim().toLowerCase());
      row.hidden = !words.every(word => cells.some(cell =>  // in quotes: what a cell begins with
        word.startsWith('"') ? cell.startsWith(word.replaceAll('"', "")) : cell.includes(word)));
    });
    count.textContent = words.length ? `${rows.filter(row => !row.hidden).length} of ${rows.length}` : "";
  });
}

function openTarget() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let place = target; place; place = place.parentElement) {
    if (place.tagName === "DETAILS") place.open = true;
  }
  if (target) target.scrollIntoView();
}

document.querySelectorAll("table.sortable").forEach(table => { sortable(table); if (table.tBodies[0].rows.length > 5) filterable(table); });
window.addEventListener("hashchange", openTarget);
openTarget();
