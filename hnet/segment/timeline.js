/* data: for every evaluation its numbers, and for every line and stage parts of chunks: [offset in bytes or -1 where a
   part goes on with its chunk, text, whether that is hex, whether a chunk begins there]. */

const { stages, evaluations } = JSON.parse($("data").textContent);
let at = evaluations.length - 1, stage = 0, playing = 0;

function node(tag, name, content) {
  const e = document.createElement(tag);
  if (name) e.className = name;
  if (content !== undefined) e.textContent = content;
  return e;
}

const parts = (e, line) => evaluations[e].lines[line]?.[stage] ?? [];
const begins = (e, line) => new Set(parts(e, line).filter((p) => p[3]).map((p) => p[0]));

/* A line of an evaluation: tints in turn, and a bar where a chunk begins that began nowhere near one before. */
function draw(e, line) {
  const out = node("bdi", "line"), before = e > 0 ? begins(e - 1, line) : null;
  let turn = 0, chunk = null;
  for (const [offset, text, hex, begun] of parts(e, line)) {
    if (offset >= 0) {
      chunk = node("span", `c ${"ab"[turn++ % 2]}`);
      if (begun && before && !before.has(offset)) chunk.classList.add("new");
      out.append(chunk);
    }
    chunk.append(hex ? node("i", "x", text) : text);
  }
  return out;
}

function moved(e) {
  if (e === 0) return 0;
  let n = 0;
  evaluations[e].lines.forEach((_, line) => {
    const a = begins(e - 1, line), b = begins(e, line);
    for (const x of b) if (!a.has(x)) n++;
    for (const x of a) if (!b.has(x)) n++;
  });
  return n;
}

const lines = evaluations[at].lines.map((_, line) => {
  const details = node("details"), summary = node("summary"), history = node("div", "history");
  details.append(summary, history);
  details.addEventListener("toggle", () => drawHistory(line));
  $("text").append(details);
  return { details, summary, history };
});

function drawHistory(line) {
  const { details, history } = lines[line];
  if (!details.open) return history.replaceChildren();
  history.replaceChildren(...evaluations.map((e, k) => {
    const row = node("div", k === at ? "row now" : "row");
    row.append(node("span", "step", `step ${e.step}`), draw(k, line));
    return row;
  }));
}

function show() {
  const e = evaluations[at], n = e.numbers, words = [`step ${e.step.toLocaleString("en")}`];
  if (n.bpb !== undefined) words.push(`${n.bpb.toFixed(3)} held-out bits a byte`);
  const size = n[`stage${stage}/val_bytes_per_chunk`], flips = n[`stage${stage}/flips`];
  if (size !== undefined) words.push(`${size.toFixed(1)} bytes a chunk`);
  if (flips !== undefined) words.push(`${(100 * flips).toFixed(0)} % of boundaries moved`);
  if (at > 0) words.push(`${moved(at)} in these lines`);
  $("summary").textContent = words.join(" · ");
  $("evaluation").value = at;
  $("evaluation").setAttribute("aria-valuetext", `step ${e.step}`);
  lines.forEach((l, line) => { l.summary.replaceChildren(draw(at, line)); drawHistory(line); });
  chart();
}

/* Bits a byte by step, with the evaluation shown. */
function chart() {
  const known = evaluations.map((e, k) => [k, e.step, e.numbers.bpb]).filter((p) => Number.isFinite(p[2]));
  if (known.length < 2) return;
  const W = 640, H = 92, L = 42, B = 18, NS = "http://www.w3.org/2000/svg";
  const low = Math.min(...known.map((p) => p[2])), high = Math.max(...known.map((p) => p[2]));
  const last = known[known.length - 1][1] || 1;
  const x = (step) => L + ((W - L - 10) * step) / last, y = (v) => 8 + ((H - B - 14) * (high - v)) / (high - low || 1);
  const svg = document.createElementNS(NS, "svg");
  const add = (tag, attributes, content) => {
    const e = document.createElementNS(NS, tag);
    for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
    if (content) e.textContent = content;
    svg.append(e);
    return e;
  };
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "Held-out bits a byte at every evaluation");
  add("polyline", { points: known.map((p) => `${x(p[1])},${y(p[2])}`).join(" "), class: "curve" });
  for (const p of known) {
    const dot = add("circle", { cx: x(p[1]), cy: y(p[2]), r: p[0] === at ? 5.5 : 2.5, class: p[0] === at ? "now" : "dot" });
    dot.addEventListener("click", () => { at = p[0]; show(); });
  }
  add("text", { x: L - 6, y: y(high) + 4, class: "end" }, high.toFixed(2));
  add("text", { x: L - 6, y: y(low) + 4, class: "end" }, low.toFixed(2));
  add("text", { x: L, y: H - 4 }, "bits a byte, step 0");
  add("text", { x: W - 10, y: H - 4, class: "end" }, String(last));
  $("chart").replaceChildren(svg);
}

$("evaluation").addEventListener("input", (e) => { at = Number(e.target.value); show(); });
for (let s = 0; s < stages; s++) $("stage").append(new Option(`stage ${s}`, s));
$("stage").addEventListener("change", (e) => { stage = Number(e.target.value); show(); });
$("play").addEventListener("click", () => {
  const stop = () => { clearInterval(playing); playing = 0; $("play").textContent = "Play"; };
  if (playing) return stop();
  if (at === evaluations.length - 1) at = -1;
  $("play").textContent = "Stop";
  const next = () => { at++; show(); if (at === evaluations.length - 1) stop(); };
  playing = setInterval(next, 700);
  next();
});
show();
