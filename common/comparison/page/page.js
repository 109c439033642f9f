// Start: read the data, fill the fixed parts, and keep light and dark in step.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);

function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function setTheme(dark) {
  document.documentElement.classList.toggle("dark", dark);
  document.getElementById("theme").textContent = dark ? "Light" : "Dark";
  drawPlot();
  drawMatrix();
  if (DATA.viewer) drawRates();
}

function fillSelect(select, entries) {  // entries: [value, text] pairs
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
}

function start() {
  document.title = `${DATA.title}: comparison of image codecs`;
  document.getElementById("subtitle").textContent =
    `${DATA.title}. Rates are those of whole files; BD-rates refer to ${DATA.anchor}.`;
  document.getElementById("method").textContent = `${DATA.method} ${DATA.macs}`;
  for (const id of ["quality", "matrix-quality"]) {
    fillSelect(document.getElementById(id), Object.entries(DATA.qualities));
  }
  const remarks = DATA.notes.length ? DATA.notes : ["Nothing was left out."];
  document.getElementById("remarks").replaceChildren(...remarks.map((text) => {
    const item = document.createElement("li");
    item.textContent = text;
    return item;
  }));
  startPlot();
  startTable();
  startMatrix();
  if (DATA.viewer) startViewer();
  else document.getElementById("viewer").hidden = true;
  const wish = window.matchMedia("(prefers-color-scheme: dark)");
  setTheme(wish.matches);
  wish.addEventListener("change", () => setTheme(wish.matches));
  document.getElementById("theme").addEventListener("click", () => {
    setTheme(!document.documentElement.classList.contains("dark"));
  });
}

start();
