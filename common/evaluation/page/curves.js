// Curves of training runs: a plot for each quantity, and the list that switches runs on and off.
"use strict";

const AXES = { steps: "training steps", hours: "hours of training" };
const KINDS = ["train", "validation"];
const shown = new Set(DATA.runs.keys());  // indexes of the runs that are on
const kinds = new Set(KINDS);

function start() {
  const timed = DATA.runs.some((run) => run.series.some((s) => s.hours.some((h) => h !== null)));
  fillSelect(get("axis"), Object.entries(AXES).filter(([key]) => key === "steps" || timed));
  get("every").parentElement.hidden = DATA.first.length === Object.keys(DATA.quantities).length;
  listChoices();
  for (const id of ["axis", "log", "every"]) get(id).addEventListener("change", drawPanels);
  get("smoothing").addEventListener("input", drawPanels);
  const head = document.createElement("thead");
  const body = document.createElement("tbody");
  head.append(line("th", DATA.head));
  body.append(...DATA.runs.map((run) => line("td", run.row)));
  get("rows").replaceChildren(head, body);
  startPage(`${DATA.runs.length} ${DATA.runs.length > 1 ? "runs" : "run"}: their logs, flags and ` +
    "hardware.", drawPanels);
}

function listChoices() {
  get("choices").replaceChildren(
    group("Runs", DATA.runs.map((run, i) => [i, run.name, color(i)]), shown),
    group("Kinds", KINDS.map((kind) => [kind, kind]), kinds));
}

function group(title, entries, chosen) {  // entries: [key, text, color] of the boxes
  const field = document.createElement("fieldset");
  const legend = document.createElement("legend");
  legend.textContent = title;
  field.append(legend, ...entries.map(([key, text, mark]) => {
    const label = checkbox(text, (on) => {
      if (on) chosen.add(key);
      else chosen.delete(key);
      drawPanels();
    }, true);
    label.style.color = mark ?? "";
    return label;
  }));
  return field;
}

function color(i) {  // consecutive hues are far apart
  return `hsl(${(210 + i * 137.508) % 360}, 65%, 48%)`;
}

// Running mean with this weight of the past, without the bias towards its beginning
function smooth(values, weight) {
  let [sum, total] = [0, 0];
  return values.map((value) => {
    if (value === null) return null;
    [sum, total] = [weight * sum + (1 - weight) * value, weight * total + 1 - weight];
    return sum / total;
  });
}

function traces(quantity, axis) {
  const weight = Number(get("smoothing").value);
  return DATA.runs.flatMap((run, i) => run.series.filter((s) => s.name === quantity).map((s) => {
    const train = s.kind === "train";
    return {
      x: s[axis], y: train && quantity !== "lr" ? smooth(s.values, weight) : s.values,
      name: run.name, visible: shown.has(i) && kinds.has(s.kind), connectgaps: false,
      mode: !train || s.steps.length < 3 ? "lines+markers" : "lines", marker: { size: 5 },
      line: { color: color(i), dash: train ? "solid" : "dash", width: train ? 1.6 : 2 },
      hovertemplate: `<b>${escaped(run.name)}</b>, ${s.kind}<br>%{x:,.4~f} ${axis}, %{y:.5g}` +
        "<extra></extra>",
    };
  }));
}

// The range of the values after the first twentieth of each curve that is on
function range(curves, log) {
  const late = curves.filter((curve) => curve.visible).flatMap((curve) =>
    curve.y.slice(Math.ceil(curve.y.length / 20)).concat(curve.y.slice(-1)))
    .filter((y) => y !== null && (!log || y > 0)).map((y) => (log ? Math.log10(y) : y));
  if (!late.length) return undefined;
  const [low, high] = late.reduce(([a, b], y) => [Math.min(a, y), Math.max(b, y)],
    [Infinity, -Infinity]);
  const flat = high - low < 1e-6 * Math.abs(high);  // but for the rounding of the running mean
  const room = 0.05 * (flat ? Math.abs(high) : high - low) || 1;
  return [low - room, high + room];
}

function drawPanels() {
  const axis = get("axis").value;
  const log = get("log").checked;
  const names = get("every").checked ? Object.keys(DATA.quantities) : DATA.first;
  if (get("panels").dataset.names !== names.join()) {
    get("panels").dataset.names = names.join();
    get("panels").replaceChildren(...names.map((name) => {
      const box = document.createElement("div");
      const title = document.createElement("h3");
      const panel = document.createElement("div");
      title.textContent = DATA.quantities[name];
      panel.className = "panel";
      panel.id = `panel-${name}`;
      box.append(title, panel);
      return box;
    }));
  }
  for (const name of names) {
    const curves = traces(name, axis);
    Plotly.react(get(`panel-${name}`), curves, plotLayout(
      { title: { text: AXES[axis] } }, { type: log ? "log" : "linear", range: range(curves, log) },
      { uirevision: `${axis} ${log}` }),  // a zoom lasts while these are the same
      { ...PLOT_CONFIG, displayModeBar: false });
  }
}

start();
