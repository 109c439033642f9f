// Start: fill the fixed parts, then the plot, the tables and the viewer.
"use strict";

function start() {
  get("method").textContent = `${DATA.method} ${DATA.macs}`;
  for (const id of ["quality", "matrix-quality"]) {
    fillSelect(get(id), Object.entries(DATA.qualities));
  }
  startPlot();
  startTable();
  startMatrix();
  if (DATA.viewer) startViewer();
  else get("viewer").hidden = true;
  startPage(`Rates are those of whole files; BD-rates refer to ${DATA.anchor}.`, () => {
    drawPlot();
    drawMatrix();
    if (DATA.viewer) drawRates();
  });
}

start();
