"""The page of :func:`nextscale.tasks.shapes.viewing.viewer`: a small WebGL program, nothing else."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>%TITLE%</title>
<style>
:root { --back: #fbfbfa; --ink: #1c1c1a; --soft: #6b6b66; --line: #d8d8d2; }
@media (prefers-color-scheme: dark) { :root { --back: #191a1b; --ink: #ececea; --soft: #a0a09a; --line: #3a3b3d; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1rem; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; }
canvas { display: block; width: 100%; aspect-ratio: 1; touch-action: none; cursor: grab; outline-offset: -3px; }
main > :only-child canvas { aspect-ratio: auto; height: min(82vh, 60rem); }
figcaption { padding: .4rem .8rem; border-top: 1px solid var(--line); display: flex; justify-content: space-between;
  gap: 1rem; }
figcaption span, p { color: var(--soft); }
p { margin: .8rem 0 0; }
</style>
</head>
<body>
<main></main>
<p>Drag to turn, scroll or pinch to come closer; arrow keys, + and - do the same, 0 returns.</p>
<noscript><p>This page draws its shapes with JavaScript and WebGL; allow scripts to see them.</p></noscript>
<script id="shapes" type="application/json">%DATA%</script>
<script>
"use strict";
const VERTEX = `attribute vec3 place; attribute vec3 normal; attribute vec3 colour;
uniform mat3 turn; uniform vec2 scale; uniform float distance;
varying vec3 facing; varying vec3 tint;
void main() {
  vec3 seen = turn * place;
  facing = turn * normal; tint = colour;
  float depth = distance - seen.z;
  gl_Position = vec4(seen.xy * scale, (depth - distance) * 0.8, depth);
}`;
const FRAGMENT = `precision mediump float;
varying vec3 facing; varying vec3 tint;
void main() {
  vec3 n = normalize(facing);
  n *= n.z < 0.0 ? -1.0 : 1.0;
  float light = 0.25 + 0.75 * max(dot(n, normalize(vec3(0.4, 0.7, 0.6))), 0.0)
    + 0.2 * max(dot(n, normalize(vec3(-0.7, 0.2, 0.4))), 0.0);
  gl_FragColor = vec4(tint * light, 1.0);
}`;

function bytes(text) {
  return Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer;
}

function start(canvas, shape) {
  const gl = canvas.getContext("webgl", { antialias: true });
  if (!gl || !gl.getExtension("OES_element_index_uint")) return false;
  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) return false;
  gl.useProgram(program);
  // Rows of three bytes are read at their own stride; WebGL wants attributes at multiples of their size.
  for (const [name, data, type, width] of [
    ["place", shape.positions, gl.SHORT, 2], ["normal", shape.normals, gl.BYTE, 1],
    ["colour", shape.colours, gl.UNSIGNED_BYTE, 1]]) {
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, bytes(data), gl.STATIC_DRAW);
    const slot = gl.getAttribLocation(program, name);
    gl.enableVertexAttribArray(slot);
    gl.vertexAttribPointer(slot, 3, type, true, 3 * width, 0);
  }
  gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, bytes(shape.faces), gl.STATIC_DRAW);
  gl.enable(gl.DEPTH_TEST);
  const place = name => gl.getUniformLocation(program, name);
  const spots = { turn: place("turn"), scale: place("scale"), distance: place("distance") };
  const home = { azimuth: 0.6, elevation: 0.35, zoom: 1 };
  let view = { ...home }, waiting = false;

  function draw() {
    waiting = false;
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
    gl.viewport(0, 0, width, height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    const [ca, sa, ce, se] = [Math.cos(view.azimuth), Math.sin(view.azimuth), Math.cos(view.elevation),
      Math.sin(view.elevation)];
    // World z is up; column by column: what x, y and z become in the view (right, up, towards the eye).
    gl.uniformMatrix3fv(spots.turn, false, [-sa, -ca * se, ca * ce, ca, -sa * se, sa * ce, 0, ce, se]);
    const side = Math.min(width, height), reach = 2.75 * view.zoom;
    gl.uniform2f(spots.scale, reach * side / width, reach * side / height);
    gl.uniform1f(spots.distance, 3);
    gl.drawElements(gl.TRIANGLES, 3 * shape.triangles, gl.UNSIGNED_INT, 0);
  }
  function redraw() { if (!waiting) { waiting = true; requestAnimationFrame(draw); } }
  function turn(x, y) {
    view.azimuth -= x;
    view.elevation = Math.max(-1.57, Math.min(1.57, view.elevation + y));
    redraw();
  }
  function zoom(factor) { view.zoom = Math.max(0.3, Math.min(12, view.zoom * factor)); redraw(); }

  const held = new Map();
  const spread = () => { const [a, b] = [...held.values()]; return Math.hypot(a.x - b.x, a.y - b.y); };
  canvas.addEventListener("pointerdown", e => {
    canvas.setPointerCapture(e.pointerId);
    held.set(e.pointerId, { x: e.clientX, y: e.clientY });
  });
  canvas.addEventListener("pointermove", e => {
    const last = held.get(e.pointerId);
    if (!last) return;
    const before = held.size === 2 ? spread() : 0;
    held.set(e.pointerId, { x: e.clientX, y: e.clientY });
    if (held.size === 2) { if (before > 0) zoom(spread() / before); }
    else turn((e.clientX - last.x) * 0.01, (e.clientY - last.y) * 0.01);
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, e => held.delete(e.pointerId));
  canvas.addEventListener("wheel", e => { e.preventDefault(); zoom(Math.exp(-e.deltaY * 0.001)); }, { passive: false });
  canvas.addEventListener("keydown", e => {
    const keys = { ArrowLeft: () => turn(-0.15, 0), ArrowRight: () => turn(0.15, 0), ArrowUp: () => turn(0, -0.15),
      ArrowDown: () => turn(0, 0.15), "+": () => zoom(1.15), "-": () => zoom(1 / 1.15),
      "0": () => { view = { ...home }; redraw(); } };
    if (keys[e.key]) { e.preventDefault(); keys[e.key](); }
  });
  new ResizeObserver(redraw).observe(canvas);
  redraw();
  return true;
}

for (const shape of JSON.parse(document.getElementById("shapes").textContent)) {
  const figure = document.createElement("figure"), canvas = document.createElement("canvas");
  const caption = document.createElement("figcaption"), size = document.createElement("span");
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", shape.title + ", a three-dimensional shape that can be turned");
  caption.textContent = shape.title;
  size.textContent = shape.triangles.toLocaleString("en") + " triangles";
  caption.append(size);
  figure.append(canvas, caption);
  document.querySelector("main").append(figure);
  if (!start(canvas, shape)) canvas.replaceWith("This browser does not offer WebGL, which the view needs.");
}
</script>
</body>
</html>
"""
