"""The style sheet of the page, kept apart from what is written into it."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --surface: #ffffff; --sunken: #efefec; --line: #e0e0db;
  --ink: #1c1e22; --soft: #5a5f69; --accent: #2450b8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131417; --surface: #1b1d21; --sunken: #24262b; --line: #30333a;
    --ink: #eceded; --soft: #a3a8b3; --accent: #8fb0ff;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; scroll-padding-top: 1rem; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
header, main, footer { max-width: 66rem; margin: 0 auto; padding: 0 clamp(1rem, 4vw, 2.5rem); }
header { padding-top: clamp(2rem, 6vw, 4.5rem); }
h1 { margin: 0; font-size: clamp(1.9rem, 1.3rem + 2.6vw, 3rem); line-height: 1.12; letter-spacing: -0.025em;
  text-wrap: balance; overflow-wrap: anywhere; }
.lead { max-width: 42rem; margin: 1rem 0 0; color: var(--soft);
  font-size: clamp(1.05rem, 1rem + 0.4vw, 1.25rem);
  line-height: 1.5; text-wrap: pretty; }
h2 { margin: 0 0 0.75rem; font-size: 1.4rem; line-height: 1.25; letter-spacing: -0.015em;
  overflow-wrap: anywhere; }
section { margin-top: clamp(2.5rem, 6vw, 4rem); }
section > * { margin-block: 0 1.1rem; }
section > *:last-child { margin-bottom: 0; }
p { max-width: 42rem; margin: 0 0 1.1rem; text-wrap: pretty; overflow-wrap: break-word; }
a { color: var(--accent); text-underline-offset: 0.2em; }
a:focus-visible, [tabindex]:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.skip { position: absolute; left: -999rem; }
.skip:focus { left: 1rem; top: 1rem; padding: 0.5rem 0.75rem; background: var(--surface); z-index: 1; }
nav { margin-top: 2rem; border-block: 1px solid var(--line); }
nav ul { display: flex; flex-wrap: wrap; gap: 0 1.75rem; margin: 0; padding: 0.5rem 0; list-style: none; }
nav a { display: inline-block; padding: 0.3rem 0; font-size: 0.95rem; text-decoration: none; }
nav a:hover { text-decoration: underline; }
.facts { display: flex; flex-wrap: wrap; gap: 1px; margin: 2rem 0 0; overflow: hidden;
  border: 1px solid var(--line); border-radius: 12px; background: var(--line); }
section .facts { margin-top: 0; }
.facts div { flex: 1 1 10.5rem; padding: 1rem 1.15rem; background: var(--surface); }
.facts dt { color: var(--soft); font-size: 0.85rem; line-height: 1.35; }
.facts dd { margin: 0.2rem 0 0; }
.facts b { display: block; font-size: 1.6rem; font-weight: 650; line-height: 1.25; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.facts span { display: block; color: var(--soft); font-size: 0.85rem; line-height: 1.4; }
figure { margin: 0 0 1.1rem; }
.picture { width: max(var(--width), 16rem); max-width: 100%; overflow: hidden; border: 1px solid var(--line);
  border-radius: 12px; background: var(--surface); }
.picture img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.picture img.pixels { image-rendering: pixelated; }
figcaption { color: var(--soft); font-size: 0.9rem; line-height: 1.45; }
.picture figcaption { padding: 0.65rem 0.9rem 0.75rem; }
.gallery { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--tile)), 1fr)); }
.gallery .picture { width: auto; margin: 0; }
.gallery .picture img { width: 100%; }
.gallery.small { gap: 0.6rem; }
.gallery.small .picture { border-radius: 8px; }
.gallery.small figcaption { padding: 0.2rem 0.15rem 0.3rem; font-size: 0.8rem; text-align: center; }
.table { overflow-x: auto; border: 1px solid var(--line); border-radius: 12px; background: var(--surface); }
table { width: 100%; border-collapse: collapse; font-size: 0.95rem; font-variant-numeric: tabular-nums; }
caption { padding: 0.8rem 1rem; color: var(--soft); font-size: 0.9rem; text-align: left; }
th, td { padding: 0.5rem 1rem; border-top: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { background: var(--sunken); color: var(--soft); font-size: 0.85rem; font-weight: 600;
  white-space: nowrap; }
table > thead:first-child th { border-top: 0; }
tbody th { font-weight: 500; }
.number { text-align: right; white-space: nowrap; }
.code { overflow: hidden; border: 1px solid var(--line); border-radius: 12px; background: var(--sunken); }
.code figcaption { padding: 0.55rem 1rem; border-bottom: 1px solid var(--line); }
pre { margin: 0; padding: 0.9rem 1rem; overflow-x: auto; line-height: 1.55; }
code { font: 0.9em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
p code, td code, th code, figcaption code { padding: 0.1em 0.35em; border-radius: 5px;
  background: var(--sunken); }
footer { margin-top: clamp(3rem, 8vw, 5rem); padding-bottom: 3rem; color: var(--soft); font-size: 0.9rem; }
footer p { max-width: none; padding-top: 1.25rem; border-top: 1px solid var(--line); }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
@media print { body { background: #fff; } nav, .skip { display: none; } section { break-inside: avoid; } }
"""
