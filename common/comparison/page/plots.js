// The rate-distortion plot, and the list of curves that switches them on and off.
"use strict";

const shown = new Set();  // indexes of the curves that are on

function startPlot() {
  DATA.curves.forEach((curve, i) => curve.shown && shown.add(i));
  const groups = Object.entries(DATA.kinds).map(([kind, words]) => {
    const group = document.createElement("fieldset");
    const legend = document.createElement("legend");
    legend.append(checkbox(words, (on) => {
      for (const box of group.querySelectorAll("input[data-curve]")) {
        box.checked = on;
        switchCurve(Number(box.dataset.curve), on);
      }
      drawPlot();
    }, DATA.curves.some((curve) => curve.kind === kind && curve.shown)));
    group.append(legend);
    DATA.curves.forEach((curve, i) => {
      if (curve.kind !== kind) return;
      const label = checkbox("", (on) => { switchCurve(i, on); drawPlot(); }, curve.shown);
      label.firstChild.dataset.curve = i;
      label.title = curve.description || curve.source;
      label.insertAdjacentHTML("beforeend", swatch(curve));
      label.append(curve.name);
      group.append(label);
    });
    return group;
  });
  get("choices").replaceChildren(
    ...groups.filter((group) => group.querySelector("input[data-curve]")));
  get("quality").addEventListener("change", () => drawPlot(true));
  get("log").addEventListener("change", () => drawPlot(true));
  get("fit").addEventListener("click", () => drawPlot(true));
}

function switchCurve(i, on) {
  if (on) shown.add(i);
  else shown.delete(i);
}

function swatch(curve) {
  const dash = { solid: "", dash: "5 3", dot: "1.5 2.5" }[curve.dash];
  return `<svg width="26" height="14" aria-hidden="true"><line x1="0" x2="26" y1="6" y2="6"
    stroke="${curve.color}" stroke-width="${curve.width}" stroke-dasharray="${dash}"/><text x="13"
    y="11" text-anchor="middle" font-size="14" fill="${curve.color}">${curve.glyph}</text></svg>`;
}

function traces(quality) {
  return DATA.curves.map((curve, i) => {
    const [rates, values] = curve.qualities[quality];
    const complete = rates.length === curve.labels.length;
    return {
      x: rates, y: values, name: curve.name, mode: "lines+markers", visible: shown.has(i),
      line: { color: curve.color, dash: curve.dash, width: curve.width },
      marker: { color: curve.color, symbol: curve.symbol, size: 8, line: { width: 1.5 } },
      text: rates.map((_, j) => (complete ? curve.labels[j] : "")),
      hovertemplate: `<b>${escaped(curve.name)}</b><br>${DATA.kinds[curve.kind]}` +
        "<br>%{text}<br>%{x:.4f} bpp, %{y:.3f} dB<extra></extra>",
    };
  });
}

function ranges(quality, log) {
  const visible = DATA.curves.filter((_, i) => shown.has(i));
  const own = visible.filter((curve) => curve.kind === "ours");
  const points = (curves) => curves.flatMap((curve) => {
    const [rates, values] = curve.qualities[quality];
    return rates.map((rate, j) => [rate, values[j]]);
  });
  const base = points(own.length ? own : visible);
  if (!base.length) return {};
  const rates = base.map((p) => p[0]);
  const [low, high] = [0.85 * Math.min(...rates), 1.15 * Math.max(...rates)];
  const near = points(visible).filter((p) => p[0] >= low && p[0] <= high).map((p) => p[1]);
  const bottom = Math.min(...base.map((p) => p[1]));
  const room = 0.05 * (Math.max(...near) - bottom) + 0.2;
  return {
    x: log ? [Math.log10(low), Math.log10(high)] : [0, high],
    y: [bottom - 2 * room, Math.max(...near) + room],
  };
}

function drawPlot(fit = false) {
  const plot = get("plot");
  const quality = get("quality").value;
  const log = get("log").checked;
  const range = fit || !plot.layout ? ranges(quality, log)
    : { x: plot.layout.xaxis.range, y: plot.layout.yaxis.range };
  Plotly.react(plot, traces(quality), plotLayout(
    { type: log ? "log" : "linear", range: range.x, title: { text: "bits per pixel (whole file)" },
      ...(log && { tickvals: [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5] }) },
    { range: range.y, title: { text: DATA.qualities[quality] } }), PLOT_CONFIG);
}
