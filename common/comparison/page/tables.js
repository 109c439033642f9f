// The sortable table of curves, and the matrix of BD-rates.
"use strict";

let sorted = { column: -1, down: false };

function startTable() {
  const head = document.createElement("tr");
  DATA.head.forEach((name, column) => {
    const cell = document.createElement("th");
    const button = document.createElement("button");
    cell.scope = "col";
    button.type = "button";
    button.textContent = name;
    button.addEventListener("click", () => {
      sorted = { column, down: sorted.column === column && !sorted.down };
      drawTable();
    });
    cell.append(button);
    head.append(cell);
  });
  document.querySelector("#rows thead").replaceChildren(head);
  for (const id of ["search", "every"]) {
    get(id).addEventListener("input", drawTable);
  }
  drawTable();
}

// "33,000 of 0.2 M" -> 33000; "0.24-0.37" -> 0.24; text without a number -> null
function numberIn(text) {
  const match = text.replace(/,/g, "").match(/^([-+]?\d+(?:\.\d+)?)( M\b)?/);
  return match ? Number(match[1]) * (match[2] ? 1e6 : 1) : null;
}

function compareCells(a, b) {
  const [x, y] = [numberIn(a), numberIn(b)];
  if (x !== null && y !== null) return x - y;
  return a.localeCompare(b);
}

function drawTable() {
  const words = get("search").value.toLowerCase();
  const every = get("every").checked;
  const rows = DATA.curves.filter((curve) => (every || curve.listed) &&
    curve.row.join(" ").toLowerCase().includes(words));
  const { column, down } = sorted;
  if (column >= 0) {
    // cells without a value stay at the end in both directions
    const empty = (curve) => curve.row[column] === "-" || curve.row[column] === "anchor";
    rows.sort((a, b) => empty(a) - empty(b) ||
      (down ? -1 : 1) * compareCells(a.row[column], b.row[column]));
  }
  document.querySelectorAll("#rows thead th").forEach((cell, i) => {
    cell.ariaSort = i !== column ? "none" : down ? "descending" : "ascending";
    cell.firstChild.textContent = DATA.head[i] + (i !== column ? "" : down ? " ▼" : " ▲");
  });
  document.querySelector("#rows tbody").replaceChildren(...rows.map((curve) => {
    const line = document.createElement("tr");
    line.className = curve.kind;
    line.title = curve.description || curve.source;
    line.append(...curve.row.map((text) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      return cell;
    }));
    return line;
  }));
}

function startMatrix() {
  get("matrix-quality").addEventListener("change", drawMatrix);
}

function drawMatrix() {
  const { names, values } = DATA.matrices;
  const quality = get("matrix-quality").value;
  const head = document.createElement("thead");
  const body = document.createElement("tbody");
  head.append(line("th", ["anchor", ...names]));
  values[quality].forEach((row, i) => {
    const cells = line("td", row.map((v) => (v === null ? "" : v.toFixed(1))));
    const name = document.createElement("th");
    name.scope = "row";
    name.textContent = names[i];
    cells.prepend(name);
    row.forEach((v, j) => {
      if (v === null || i === j) return;
      const strength = Math.min(60, 12 * Math.log2(1 + Math.abs(v) / 5));
      const color = v < 0 ? "#2a9d55" : "#d1493f";
      cells.children[j + 1].style.background =
        `color-mix(in srgb, ${color} ${strength}%, transparent)`;
    });
    body.append(cells);
  });
  get("deltas").replaceChildren(head, body);
}
