// What every page has: its data, title and notes, links to its sections, light and dark, and the
// pieces that their own scripts build tables, lists and plots from.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const PLOT_CONFIG = { responsive: true, displaylogo: false, showSendToCloud: false };

function get(id) {
  return document.getElementById(id);
}

// redraw: draws everything whose colours depend on the theme; called once here, then at changes
function startPage(subtitle, redraw) {
  get("title").textContent = DATA.title;
  get("subtitle").textContent = subtitle;
  const remarks = DATA.notes.length ? DATA.notes : ["Nothing was left out."];
  get("remarks").replaceChildren(...remarks.map((text) => {
    const item = document.createElement("li");
    item.textContent = text;
    return item;
  }));
  get("sections").replaceChildren(
    ...[...document.querySelectorAll("section:not([hidden])")].map((section) => {
      const link = document.createElement("a");
      link.href = `#${section.id}`;
      link.textContent = section.dataset.name;
      return link;
    }));
  const setTheme = (dark) => {
    document.documentElement.classList.toggle("dark", dark);
    get("theme").textContent = dark ? "Light" : "Dark";
    redraw();
  };
  const wish = window.matchMedia("(prefers-color-scheme: dark)");
  setTheme(wish.matches);
  wish.addEventListener("change", () => setTheme(wish.matches));
  get("theme").addEventListener("click", () => {
    setTheme(!document.documentElement.classList.contains("dark"));
  });
}

function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function fillSelect(select, entries) {  // entries: [value, text] pairs
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
}

function checkbox(text, change, checked) {
  const label = document.createElement("label");
  const box = document.createElement("input");
  box.type = "checkbox";
  box.checked = checked;
  box.addEventListener("change", () => change(box.checked));
  label.append(box, ` ${text}`);
  return label;
}

function line(kind, texts) {  // a row of a table; kind: "th" or "td"
  const row = document.createElement("tr");
  row.append(...texts.map((text) => {
    const cell = document.createElement(kind);
    cell.textContent = text;
    return cell;
  }));
  return row;
}

// A layout of Plotly in the colours of the theme; x, y: settings of the axes, others: of the rest
function plotLayout(x, y, others) {
  const axis = { gridcolor: cssColor("--line"), zeroline: false, automargin: true };
  return {
    showlegend: false, hovermode: "closest", margin: { l: 50, r: 10, t: 10, b: 45 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: cssColor("--text") }, xaxis: { ...axis, ...x }, yaxis: { ...axis, ...y },
    ...others,
  };
}

function escaped(text) {  // Plotly takes names for HTML
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;");
}
