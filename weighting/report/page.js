// Values under the pointer, and one cursor over all charts: their x axes are all steps.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const LEFT = 54, RIGHT = 374, TOP = 12, BOTTOM = 216; // as in charts.py
  const numbers = (text) => text.split(" ").map(Number);
  const box = document.createElement("div");
  box.id = "values";
  box.hidden = true;
  box.setAttribute("role", "status");
  document.body.append(box);

  const charts = [...document.querySelectorAll("svg.chart")].map((svg) => {
    for (const strip of svg.querySelectorAll(".h")) strip.remove(); // the box takes their place
    const cursor = document.createElementNS(SVG, "path");
    cursor.setAttribute("class", "cursor");
    svg.append(cursor);
    svg.tabIndex = 0;
    const [first, last] = numbers(svg.dataset.steps);
    const lines = [...svg.querySelectorAll("[data-label]")].map((line) => ({
      label: line.dataset.label, x: numbers(line.dataset.x), y: numbers(line.dataset.y),
    }));
    const steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    return { svg, cursor, first, last, lines, steps };
  });

  // The place in `values`, which ascend, that is nearest to `x`.
  function nearest(values, x) {
    let low = 0, high = values.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (values[middle] <= x) low = middle; else high = middle;
    }
    return x - values[low] <= values[high] - x ? low : high;
  }

  function words(chart, step) {
    const rows = chart.lines.map((line) => {
      const i = nearest(line.x, step);
      const at = line.x[i] === step ? "" : ` (step ${line.x[i].toLocaleString("en")})`;
      return `${line.label}: ${line.y[i]}${at}`;
    });
    return [`step ${step.toLocaleString("en")}`, ...rows].join("\n");
  }

  function show(chart, step, x, y) {
    for (const each of charts) {
      const inside = each.first <= step && step <= each.last;
      const at = LEFT + (step - each.first) / (each.last - each.first) * (RIGHT - LEFT);
      each.cursor.setAttribute("d", inside ? `M${at.toFixed(1)} ${TOP}V${BOTTOM}` : "");
    }
    chart.step = step;
    box.textContent = words(chart, step);
    box.hidden = false;
    const width = document.documentElement.clientWidth;
    const left = x + 16 + box.offsetWidth < width ? x + 16 : x - 16 - box.offsetWidth;
    const top = Math.min(y + 12, innerHeight - box.offsetHeight - 4);
    box.style.left = `${Math.max(0, Math.min(left, width - box.offsetWidth))}px`;
    box.style.top = `${Math.max(0, top)}px`;
  }

  function hide() {
    box.hidden = true;
    for (const each of charts) each.cursor.setAttribute("d", "");
  }

  for (const chart of charts) {
    const { svg, first, last, steps } = chart;
    svg.addEventListener("pointermove", (event) => {
      const place = new DOMPoint(event.clientX, event.clientY);
      const x = place.matrixTransform(svg.getScreenCTM().inverse()).x;
      const step = first + (x - LEFT) / (RIGHT - LEFT) * (last - first);
      show(chart, steps[nearest(steps, step)], event.clientX, event.clientY);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return hide();
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!way) return;
      event.preventDefault();
      const now = chart.step === undefined ? -1 : nearest(steps, chart.step);
      const next = Math.max(0, Math.min(steps.length - 1, now + way));
      const corner = svg.getBoundingClientRect();
      show(chart, steps[next], corner.left + corner.width / 2, corner.top);
    });
  }
})();
