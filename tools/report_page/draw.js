"use strict";
// Draws the charts of the page when they come near the screen: a run may have hundreds.
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const boxes = Array.from(document.querySelectorAll("[data-chart]"));
  const hidden = new Set(); // runs that are switched off
  // A finger on a chart must still scroll the page, so there zooming is left to the buttons.
  const touch = window.matchMedia("(pointer: coarse)").matches;
  // Buttons that do not wait for a mouse need room of their own.
  const hover = window.matchMedia("(hover: hover)").matches;
  const buttons = touch
    ? ["zoomIn2d", "zoomOut2d", "resetScale2d"]
    : ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"];

  function traces(chart) {
    return chart.lines.map((line) => ({
      type: "scatter",
      mode: line.mode,
      name: line.name,
      x: line.x,
      y: line.y,
      connectgaps: false,
      visible: !hidden.has(line.run),
      line: { color: line.colour, dash: line.dash, width: 1.8 },
      marker: { color: line.colour, size: 4 },
      hovertemplate: line.name ? "%{y:.5~g}" : "%{y:.5~g}<extra></extra>",
    }));
  }

  function layout(chart) {
    const margin = page.last * 0.02;
    return {
      autosize: true,
      margin: { l: 10, r: 12, t: hover ? 8 : 34, b: 10 },
      font: { family: "system-ui, sans-serif", size: 12, color: "#333" },
      paper_bgcolor: "#fff",
      plot_bgcolor: "#fff",
      showlegend: false,
      dragmode: touch ? false : "zoom",
      hovermode: chart.lines.length > 8 ? "closest" : "x unified",
      hoverlabel: { namelength: -1, bgcolor: "rgba(255,255,255,0.95)", font: { size: 12 } },
      modebar: { bgcolor: "rgba(255,255,255,0.8)", color: "#888", activecolor: "#0072B2" },
      xaxis: {
        title: { text: "optimizer step", standoff: 6 },
        range: [-margin, page.last + margin],
        automargin: true,
        gridcolor: "#eee",
        zeroline: false,
        hoverformat: ",d",
        unifiedhovertitle: { text: "step %{x:,d}" },
        exponentformat: "SI",
        ...(page.last <= 7 ? { dtick: 1 } : { nticks: 7 }),
      },
      yaxis: {
        title: { text: chart.unit, standoff: 6 },
        automargin: true,
        gridcolor: "#eee",
        zerolinecolor: "#ccc",
        exponentformat: chart.exponent,
        nticks: 6,
        ...(chart.range ? { range: chart.range } : {}),
      },
      shapes: page.phases.map((step) => ({
        type: "line",
        xref: "x",
        yref: "paper",
        x0: step,
        x1: step,
        y0: 0,
        y1: 1,
        line: { color: "#999", width: 1, dash: "dot" },
      })),
    };
  }

  function draw(box) {
    if (box.dataset.drawn) {
      return;
    }
    box.dataset.drawn = "begun";
    const chart = page.charts[Number(box.dataset.chart)];
    const settings = {
      responsive: true,
      displaylogo: false,
      displayModeBar: hover ? "hover" : true,
      modeBarButtons: [buttons],
    };
    Plotly.newPlot(box, traces(chart), layout(chart), settings).then(() => {
      box.dataset.drawn = "yes";
    });
  }

  const near = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting) {
          near.unobserve(entry.target);
          draw(entry.target);
        }
      }
    },
    { rootMargin: "600px 0px" },
  );
  boxes.forEach((box) => near.observe(box));
  window.addEventListener("beforeprint", () => boxes.forEach(draw));

  for (const button of document.querySelectorAll("button.log")) {
    button.addEventListener("click", () => {
      const log = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(log));
      const box = boxes[Number(button.dataset.for)];
      draw(box);
      Plotly.relayout(box, { "yaxis.type": log ? "log" : "linear", "yaxis.autorange": true });
    });
  }

  for (const input of document.querySelectorAll("input[data-run]")) {
    input.addEventListener("change", () => {
      const run = Number(input.dataset.run);
      if (input.checked) {
        hidden.delete(run);
      } else {
        hidden.add(run);
      }
      for (const box of boxes.filter((each) => each.dataset.drawn)) {
        const lines = page.charts[Number(box.dataset.chart)].lines;
        Plotly.restyle(box, { visible: lines.map((line) => !hidden.has(line.run)) });
      }
    });
  }

  for (const button of document.querySelectorAll("button.large")) {
    button.addEventListener("click", () => button.closest("figure").classList.toggle("whole"));
  }
})();
