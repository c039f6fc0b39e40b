"use strict";
// Reads values back from the drawn curves under the pointer, and lets a filmstrip frame be enlarged. The page is complete without it.
for (const svg of document.querySelectorAll(".frame svg")) {
  const figure = svg.closest("figure"), at = figure.querySelector(".at"), cursor = svg.querySelector(".cursor");
  const [x0, x1] = svg.dataset.x.split(" ").map(Number), [y0, y1] = svg.dataset.y.split(" ").map(Number);
  const log = svg.dataset.log === "1";
  const curves = [...svg.querySelectorAll(".line")].map(path => {
    const n = path.getAttribute("d").match(/-?[\d.]+/g).map(Number), points = [];
    for (let i = 0; i + 1 < n.length; i += 2) points.push([n[i], n[i + 1]]);
    return points;
  });
  const outputs = [...figure.querySelectorAll("output")];
  const show = value => {
    if (value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e9)) return value.toExponential(2).replace("-", "−");
    return Number(value.toPrecision(4)).toLocaleString("en", {maximumSignificantDigits: 4}).replace("-", "−");
  };
  const leave = () => {
    at.hidden = true;
    cursor.setAttribute("d", "");
    for (const output of outputs) output.textContent = output.dataset.end;
  };
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = 1000 * (event.clientX - box.left) / box.width;
    let best = null;
    curves.forEach((points, i) => {
      let low = 0, high = points.length - 1;
      while (high - low > 1) { const mid = (low + high) >> 1; if (points[mid][0] < x) low = mid; else high = mid; }
      const p = Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
      const share = 1 - p[1] / 1000;
      outputs[i].textContent = show(log ? y0 * Math.pow(y1 / y0, share) : y0 + share * (y1 - y0));
      if (best === null || Math.abs(p[0] - x) < Math.abs(best - x)) best = p[0];
    });
    at.hidden = false;
    at.textContent = svg.dataset.unit + " " + Math.round(x0 + best / 1000 * (x1 - x0)).toLocaleString("en");
    cursor.setAttribute("d", "M" + best + " 0V1000");
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointercancel", leave);
}
for (const strip of document.querySelectorAll(".strip")) {
  const stage = strip.querySelector(".stage img"), frames = [...strip.querySelectorAll(".frames li")];
  const choose = frame => {
    stage.src = frame.querySelector("img").src;
    stage.alt = frame.querySelector("img").alt;
    frames.forEach(other => other.classList.toggle("on", other === frame));
  };
  for (const frame of frames) {
    frame.tabIndex = 0;
    frame.setAttribute("role", "button");
    frame.addEventListener("click", () => choose(frame));
    frame.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(frame); }
    });
  }
}
