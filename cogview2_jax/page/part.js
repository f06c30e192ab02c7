// Draws a box or a mask on a picture. The value is JSON: {picture, label, tool, box, strokes}.
const RADIUS = 0.03; // of the brush, as a part of the picture's width
const image = new Image();
let marks = {}, start = null, stroke = null;

const canvas = () => element.querySelector("canvas");

function read() {
  if (start) return; // what is being drawn is newer
  let said = {};
  try { said = JSON.parse(props.value || "{}"); } catch { /* no picture yet */ }
  const fresh = said.picture !== marks.picture;
  marks = said;
  if (fresh && said.picture) { image.onload = draw; image.src = said.picture; }
  draw();
}

function tell() { props.value = JSON.stringify(marks); }

function draw() {
  const area = canvas();
  if (!area) return;
  const shown = Boolean(marks.picture) && image.naturalWidth > 0;
  area.hidden = !shown;
  if (!shown) return;
  const width = area.width = image.naturalWidth, height = area.height = image.naturalHeight;
  area.setAttribute("aria-label", marks.label || "");
  const pen = area.getContext("2d");
  pen.drawImage(image, 0, 0);
  const line = Math.max(2, width / 200);
  pen.lineCap = pen.lineJoin = "round";
  for (const [radius, ...points] of marks.strokes || []) {
    pen.strokeStyle = "rgba(255, 80, 0, 0.6)";
    pen.lineWidth = 2 * radius * width;
    pen.beginPath();
    points.forEach(([x, y]) => pen.lineTo(x * width, y * height));
    if (points.length === 1) pen.lineTo(points[0][0] * width + 0.1, points[0][1] * height);
    pen.stroke();
  }
  if (marks.box) {
    const [top, left, bottom, right] = marks.box;
    const place = [left * width, top * height, (right - left) * width, (bottom - top) * height];
    pen.fillStyle = "rgba(255, 80, 0, 0.25)";
    pen.fillRect(...place);
    pen.lineWidth = line;
    pen.strokeStyle = "#fff";
    pen.setLineDash([]);
    pen.strokeRect(...place);
    pen.strokeStyle = "#d40";
    pen.setLineDash([3 * line, 3 * line]);
    pen.strokeRect(...place);
    pen.setLineDash([]);
  }
}

function place(event) {
  const area = canvas().getBoundingClientRect();
  const part = (at, from, length) =>
    Math.round(Math.min(Math.max((at - from) / length, 0), 1) * 1e4) / 1e4;
  return [part(event.clientX, area.left, area.width), part(event.clientY, area.top, area.height)];
}

element.addEventListener("pointerdown", (event) => {
  // From beside the picture too: its very edge is hard to hit.
  if (!marks.picture) return;
  canvas().setPointerCapture(event.pointerId);
  canvas().focus({ preventScroll: true });
  start = place(event);
  if (marks.tool === "brush") {
    stroke = [RADIUS, start];
    marks.box = null;
    marks.strokes = [...(marks.strokes || []), stroke];
    draw();
  }
});

element.addEventListener("pointermove", (event) => {
  if (!start) return;
  const [x, y] = place(event);
  if (stroke) {
    stroke.push([x, y]);
  } else {
    marks.strokes = [];
    marks.box = [Math.min(y, start[1]), Math.min(x, start[0]), Math.max(y, start[1]), Math.max(x, start[0])];
  }
  draw();
});

for (const end of ["pointerup", "pointercancel"]) {
  element.addEventListener(end, () => {
    if (!start) return;
    start = stroke = null;
    const box = marks.box;
    if (box && (box[2] - box[0] < 0.005 || box[3] - box[1] < 0.005)) marks.box = null;
    tell();
    draw();
  });
}

// Arrows move the box, with Shift they change its size; Delete clears.
element.addEventListener("keydown", (event) => {
  if (event.target !== canvas() || !marks.picture) return;
  const way = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (event.key === "Delete" || event.key === "Backspace") {
    marks.box = null;
    marks.strokes = [];
  } else if (way) {
    let [top, left, bottom, right] = marks.box || [0.25, 0.25, 0.75, 0.75];
    const [down, across] = way.map((one) => one * 0.05);
    marks.strokes = [];
    if (event.shiftKey) {
      bottom = Math.min(Math.max(bottom + down, top + 0.05), 1);
      right = Math.min(Math.max(right + across, left + 0.05), 1);
    } else {
      const y = Math.min(Math.max(down, -top), 1 - bottom), x = Math.min(Math.max(across, -left), 1 - right);
      [top, left, bottom, right] = [top + y, left + x, bottom + y, right + x];
    }
    marks.box = [top, left, bottom, right].map((edge) => Math.round(edge * 1e4) / 1e4);
  } else {
    return;
  }
  event.preventDefault();
  tell();
  draw();
});

watch("value", read);
read();
