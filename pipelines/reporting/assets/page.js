// What needs a script: values under the pointer, and clips that run in step. Without one, curves
// are still drawn and clips still loop.
"use strict";

for (const svg of document.querySelectorAll("svg[data-curves]")) {
  const curves = JSON.parse(svg.dataset.curves);
  const [left, right, top, bottom] = svg.dataset.plane.split(" ").map(Number);
  const [low, high] = svg.dataset.range.split(" ").map(Number);
  const legend = svg.closest(".chart").querySelector(".legend");
  const values = [...legend.querySelectorAll("b")];
  const where = legend.querySelector(".where");
  const positions = [...new Set(curves.flatMap((curve) => curve.x))].sort((a, b) => a - b);
  const cursor = document.createElementNS(svg.namespaceURI, "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", top);
  cursor.setAttribute("y2", bottom);
  let place = positions.length - 1;

  const nearest = (xs, x) => {
    let from = 0, to = xs.length - 1;
    while (to - from > 1) {
      const middle = (from + to) >> 1;
      if (xs[middle] < x) from = middle; else to = middle;
    }
    return x - xs[from] < xs[to] - x ? from : to;
  };
  const show = (index) => {
    place = Math.min(Math.max(index, 0), positions.length - 1);
    const x = positions[place];
    curves.forEach((curve, number) => {
      const reaches = curve.x.length && x <= curve.x[curve.x.length - 1];
      const value = reaches ? curve.y[nearest(curve.x, x)] : null;
      values[number].textContent = value ?? "–";
    });
    where.textContent = `at ${x}`;
    const at = left + ((x - low) / (high - low)) * (right - left);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    svg.append(cursor);
  };
  const point = (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    show(nearest(positions, low + ((at - left) / (right - left)) * (high - low)));
  };
  // At rest, every curve's own last value.
  const leave = () => {
    place = positions.length - 1;
    curves.forEach((curve, number) => {
      values[number].textContent = curve.y.findLast((value) => value !== null) ?? "–";
    });
    where.textContent = "last";
    cursor.remove();
  };
  svg.tabIndex = 0;
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(place + step);
  });
  leave();
}

const rows = [...document.querySelectorAll(".cliprow")];
if (rows.length) {
  const button = document.getElementById("play");
  const seek = document.getElementById("seek");
  const clips = (row) => [...row.querySelectorAll("video")];
  const visible = new Set();
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;

  const label = () => { button.textContent = playing ? "Pause" : "Play"; };
  // Clips of a row start together; rows out of sight rest, since phones decode few videos at once.
  const start = (row) => {
    for (const video of clips(row)) {
      video.currentTime = 0;
      // A phone that saves power refuses to play unasked: then the button asks.
      video.play().catch((error) => {
        if (error.name === "NotAllowedError") { playing = false; label(); }
      });
    }
  };
  const stop = (row) => clips(row).forEach((video) => video.pause());

  for (const video of document.querySelectorAll(".cliprow video")) {
    video.autoplay = false;
    video.pause();
  }
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) visible.add(target); else visible.delete(target);
      if (isIntersecting && playing) start(target); else stop(target);
    }
  });
  rows.forEach((row) => observer.observe(row));
  button.addEventListener("click", () => {
    playing = !playing;
    label();
    visible.forEach(playing ? start : stop);
  });
  seek.addEventListener("input", () => {
    playing = false;
    label();
    for (const video of rows.flatMap(clips)) {
      video.pause();
      if (video.duration) video.currentTime = (seek.value / 1000) * video.duration * 0.999;
    }
  });
  label();
}
