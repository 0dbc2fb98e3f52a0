/* The page holds the text as bytes, and for every byte its loss, of how many stages a chunk begins there, and the
   probability of a boundary of each stage. Blocks of about 4 kB are plain text until they come near the view. */

const BLOCK = 4096, LONGEST = 8192, FULL = 65535, SHOWN_BYTES = 48;
const INVALID = 9;

// --- data ------------------------------------------------------------------------------------------------------------

const about = JSON.parse($("about-data").textContent);
const S = about.stages;
let N = 0, text, loss, depth, prob;

function decode(base64, Type) {
  const s = atob(base64), bytes = new Uint8Array(s.length);
  for (let i = 0; i < s.length; i++) bytes[i] = s.charCodeAt(i);
  return new Type(bytes.buffer);
}

function load() {
  const pieces = [];
  for (const script of document.querySelectorAll("script.piece")) {
    const d = JSON.parse(script.textContent);
    pieces.push({ text: decode(d.text, Uint8Array), loss: decode(d.loss, Uint16Array),
      depth: decode(d.depth, Uint8Array), prob: d.prob.map((p) => decode(p, Uint16Array)) });
    script.remove();
  }
  for (const p of pieces) N += p.text.length;
  text = new Uint8Array(N); loss = new Uint16Array(N); depth = new Uint8Array(N);
  prob = Array.from({ length: S }, () => new Uint16Array(N));
  let at = 0;
  for (const p of pieces) {
    text.set(p.text, at); loss.set(p.loss, at); depth.set(p.depth, at);
    for (let s = 0; s < S; s++) { // a stage's positions are the chunks of the one outside it
      for (let i = 0, k = 0; i < p.text.length; i++) {
        if (p.depth[i] >= s) prob[s][at + i] = p.prob[s][k++];
      }
    }
    at += p.text.length;
  }
}

/* size[i]: bytes of the UTF-8 character that begins at i, 0 inside one, INVALID for a byte of none. */
function characters() {
  const size = new Uint8Array(N);
  for (let i = 0; i < N;) {
    const b = text[i];
    let n = b < 0x80 ? 1 : b >= 0xc2 && b < 0xe0 ? 2 : b >= 0xe0 && b < 0xf0 ? 3 : b >= 0xf0 && b < 0xf5 ? 4 : 0;
    for (let k = 1; k < n; k++) if ((text[i + k] & 0xc0) !== 0x80) n = 0;
    const c = text[i + 1]; // overlong forms, surrogates, past U+10FFFF
    if ((b === 0xe0 && c < 0xa0) || (b === 0xed && c > 0x9f) || (b === 0xf0 && c < 0x90) || (b === 0xf4 && c > 0x8f)) n = 0;
    size[i] = n || INVALID;
    i += n || 1;
  }
  return size;
}

load();
const size = characters();
const utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
const nats = loss.reduce((sum, x) => sum + x, 0) / 1000;
const hex = (b) => b.toString(16).toUpperCase().padStart(2, "0");
const hexes = (a, b) => Array.from(text.subarray(a, b), hex).join("·");

// --- chunks: what the slider and the boxes leave of them -----------------------------------------------------------------

let shown = about.shown, threshold = 0;

/* Of how many of the stages shown a chunk begins at byte i. */
function level(i) {
  let n = 0;
  for (const s of shown) {
    if (depth[i] <= s || (i > 0 && prob[s][i] < threshold)) break;
    n++;
  }
  return i === 0 ? shown.length : n;
}

function start(i) { while (i > 0 && level(i) === 0) i--; return i; }
function end(i) { for (i++; i < N && level(i) === 0; i++); return i; }

// --- blocks ----------------------------------------------------------------------------------------------------------

const blocks = []; // {a, b: bytes; div; rich; turns: chunks begun before it, of every stage shown}

function makeBlocks() {
  const all = document.createDocumentFragment();
  for (let a = 0; a < N;) {
    let b = Math.min(a + BLOCK, N), lines = 0;
    while (b < N && text[b - 1] !== 10 && b - a < LONGEST) b++;
    while (b < N && size[b] === 0) b++;
    for (let i = a; i < b; i++) if (text[i] === 10) lines++;
    const div = document.createElement("div");
    div.className = b < N && text[b - 1] !== 10 ? "block broken" : "block";
    div.setAttribute("role", "presentation");
    div.style.containIntrinsicSize = `auto ${2 * Math.max(lines, (b - a) / 90)}em`;
    const block = { a, b, div, rich: false, near: false, turns: [] };
    div.block = block;
    plain(block);
    blocks.push(block);
    all.append(div);
    a = b;
  }
  $("text").append(all);
}

function plain(block) {
  block.rich = false;
  block.div.textContent = pieces(block.a, block.b).map((p) => (p.sign ? `⟨${p.sign}⟩` : p.text)).join("");
}

/* Invisible characters and those that steer the direction of text, but for what joins letters, tabs and line ends. */
const STRANGE = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, JOINS = "\t\n\u200c\u200d\u00ad";

/* [{text} or {sign}] of bytes a to b: a sign stands for bytes that are no whole character, or for a strange one. */
function pieces(a, b) {
  const out = [];
  let from = a;
  const whole = (to) => {
    const s = utf8.decode(text.subarray(from, to));
    let last = 0;
    for (const m of s.matchAll(STRANGE)) {
      if (JOINS.includes(m[0]) && s.length > 1) continue;
      if (m[0] === "\n" || m[0] === "\t") continue;
      if (m.index > last) out.push({ text: s.slice(last, m.index) });
      const code = m[0].codePointAt(0);
      out.push({ sign: code < 32 ? "^" + String.fromCodePoint(code + 64) : "U+" + hex(code).padStart(4, "0") });
      last = m.index + m[0].length;
    }
    if (last < s.length) out.push({ text: s.slice(last) });
  };
  for (let i = a; i < b;) {
    const n = size[i];
    if (n >= 1 && n <= 4 && i + n <= b) { i += n; continue; }
    if (from < i) whole(i);
    let to = i + 1;
    while (to < b && (size[to] === 0 || size[to] === INVALID || (size[to] <= 4 && to + size[to] > b))) to++;
    out.push({ sign: hexes(i, to) });
    from = i = to;
  }
  if (from < b) whole(b);
  return out;
}

function node(tag, name, content) {
  const e = document.createElement(tag);
  if (name) e.className = name;
  if (content !== undefined) e.textContent = content;
  return e;
}

/* Bytes of a block where a grapheme begins, or null where the browser cannot tell. */
function graphemes(a, b) {
  if (!Intl.Segmenter) return null;
  const begins = new Set();
  let string = "";
  const at = [];
  for (let i = a; i < b;) {
    const n = size[i] >= 1 && size[i] <= 4 ? size[i] : 1;
    const s = n === size[i] ? utf8.decode(text.subarray(i, i + n)) : "\ufffd";
    for (let k = 0; k < s.length; k++) at.push(i);
    string += s;
    i += n;
  }
  for (const g of new Intl.Segmenter().segment(string)) begins.add(at[g.index]);
  return begins;
}

function rich(block) {
  const { a, b } = block, begins = graphemes(a, b), turns = [...block.turns], top = document.createDocumentFragment();
  const open = Array(shown.length).fill(null); // spans of the groups, the widest last; open[0] is the chunk
  const from = start(a);
  for (let i = a; i < b;) {
    const n = level(i), first = i === a && n === 0;
    for (let k = shown.length - 1; k >= 1; k--) {
      if (k < n || open[k] === null) {
        if (k < n) turns[k]++;
        open[k] = node("span", "g " + "ab"[turns[k] % 2]);
        open[k].setAttribute("role", "group");
        (open[k + 1] || top).append(open[k]);
      }
    }
    if (n > 0) turns[0]++;
    const to = Math.min(end(i), b), p = prob[shown[0]][i] / FULL;
    const sure = i === 0 || first ? 3 : Math.max(0, Math.min(3, Math.floor((p - 0.5) * 8)));
    const chunk = node("span", `c ${"ab"[turns[0] % 2]} s${sure}`);
    chunk.setAttribute("role", "option");
    chunk.tabIndex = -1;
    chunk.dataset.i = first ? from : i;
    fill(chunk, i, to, begins);
    (open[1] || top).append(chunk);
    i = to;
  }
  block.div.replaceChildren(top);
  block.rich = true;
  if (current >= a && current < b) { const c = span(current); if (c) c.tabIndex = 0; }
}

function fill(chunk, a, b, begins) {
  const parts = pieces(a, b);
  if (begins && !begins.has(a) && size[a] >= 1 && size[a] <= 4 && parts[0].text) {
    chunk.classList.add(/^\p{M}/u.test(parts[0].text) ? "mark" : "join");
  }
  for (const p of parts) {
    if (p.sign) { chunk.append(node("i", "x", p.sign)); continue; }
    const lines = p.text.split("\n");
    lines.forEach((line, k) => {
      if (k) chunk.append(node("i", "nl"), "\n");
      if (line) chunk.append(line);
    });
  }
}

const span = (i) => blockOf(i).div.querySelector(`.c[data-i="${i}"]`);

function blockOf(i) {
  let lo = 0, hi = blocks.length - 1;
  while (lo < hi) { const m = (lo + hi + 1) >> 1; if (blocks[m].a <= i) lo = m; else hi = m - 1; }
  return blocks[lo];
}

// --- counting and drawing again --------------------------------------------------------------------------------------

function recount() {
  const chunks = Array(shown.length).fill(0);
  let at = 0;
  for (let i = 0; i < N; i++) {
    if (at < blocks.length && blocks[at].a === i) blocks[at++].turns = [...chunks];
    const n = level(i);
    for (let k = 0; k < n; k++) chunks[k]++;
  }
  const number = (x) => x.toLocaleString("en");
  const parts = [`${number(N)} bytes`];
  shown.forEach((s, k) => parts.push(`stage ${s}: ${number(chunks[k])} chunks of ${(N / Math.max(chunks[k], 1)).toFixed(1)} bytes`));
  if (N) parts.push(`${(nats / N / Math.LN2).toFixed(2)} bits a byte`);
  $("summary").textContent = (about.model ? about.model + " · " : "") + parts.join(" · ");
}

function redraw() {
  recount();
  current = N ? start(current) : 0;
  for (const block of blocks) {
    if (block.near || block === blockOf(current)) rich(block);
    else if (block.rich) plain(block);
  }
  describe(current);
}

// --- what is known of a chunk ----------------------------------------------------------------------------------------

let current = 0; // first byte of the chunk that Tab leads to

function describe(i) {
  if (!N) return;
  const a = start(i), b = end(a), stage = shown[0];
  const here = loss.subarray(a, b).reduce((sum, x) => sum + x, 0) / 1000;
  const what = pieces(a, b).map((p) => (p.sign ? `⟨${p.sign}⟩` : p.text.replaceAll("\n", "⏎").replaceAll("\t", "⇥"))).join("");
  const begins = a === 0 ? "first of the file" : shown.filter((s) => depth[a] > s && prob[s][a] >= threshold)
    .map((s) => `stage ${s} with p ${(prob[s][a] / FULL).toFixed(3)}`).join(", ");
  const p = node("p", "", "");
  p.append(node("span", "what", what.length > 80 ? what.slice(0, 79) + "…" : what),
    ` — bytes ${a.toLocaleString("en")} to ${(b - 1).toLocaleString("en")}: ${b - a} ${b - a === 1 ? "byte" : "bytes"}, ` +
    `${here.toFixed(2)} nats. Begins: ${begins}.`);
  $("about").replaceChildren(p);
  const rows = [["character"], ["byte"], ["p, stage " + stage], ["nats"]].map(([name]) => {
    const tr = node("tr"), th = node("th", "", name);
    th.scope = "row";
    tr.append(th);
    return tr;
  });
  const to = Math.min(b, a + SHOWN_BYTES);
  for (let k = a; k < to; k++) {
    const n = size[k], first = n > 0 || k === a ? "first" : "";
    if (first) {
      let span = 1;
      while (k + span < to && size[k + span] === 0) span++;
      const whole = n <= 4 && n === span;
      const [part] = whole ? pieces(k, k + n) : [{ sign: n === INVALID ? "none" : "a part" }];
      const td = node("td", "first", part.sign || part.text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
        .replace(/^\p{M}/u, "◌$&"));
      td.colSpan = span;
      rows[0].append(td);
    }
    rows[1].append(node("td", first, hex(text[k])));
    rows[2].append(node("td", first, stage === 0 || depth[k] >= stage ? (prob[stage][k] / FULL).toFixed(2) : ""));
    rows[3].append(node("td", first, (loss[k] / 1000).toFixed(2)));
  }
  if (to < b) rows[0].append(node("td", "", `and ${b - to} bytes more`));
  $("bytes").replaceChildren(...rows);
}

// --- keyboard, pointer, controls -------------------------------------------------------------------------------------

function go(i) {
  const left = blockOf(current), before = span(current);
  if (before) before.tabIndex = -1;
  current = start(Math.max(0, Math.min(i, N - 1)));
  const block = blockOf(current);
  if (!block.rich) rich(block);
  const c = span(current);
  c.tabIndex = 0;
  c.focus({ preventScroll: true });
  if (left !== block && !left.near) plain(left);
  keepInView(c, 4);
}

/* Blocks get their true heights only as they come into view, and what is below them moves. */
function keepInView(c, frames) {
  if (document.activeElement !== c) return;
  c.scrollIntoView({ block: "nearest" });
  if (frames) requestAnimationFrame(() => keepInView(c, frames - 1));
}

const lineStart = (i) => { while (i > 0 && text[i - 1] !== 10) i--; return i; };
const lineEnd = (i) => { while (i < N - 1 && text[i] !== 10) i++; return i; };

function vertical(lines) {
  let at = lineStart(current);
  const column = current - at;
  for (let k = 0; k < Math.abs(lines); k++) at = lines > 0 ? Math.min(lineEnd(at) + 1, N - 1) : lineStart(Math.max(at - 1, 0));
  const target = start(Math.min(lineStart(at) + column, lineEnd(at)));
  return target !== current ? target : lines > 0 ? end(current) : current - 1;
}

$("text").addEventListener("keydown", (e) => {
  if (e.altKey || e.metaKey || !N) return;
  const far = e.ctrlKey, keys = {
    ArrowRight: () => end(current), ArrowLeft: () => current - 1,
    ArrowDown: () => vertical(1), ArrowUp: () => vertical(-1), PageDown: () => vertical(20), PageUp: () => vertical(-20),
    Home: () => (far ? 0 : lineStart(current)), End: () => (far ? N - 1 : lineEnd(current)),
  };
  if (!keys[e.key] || (far && e.key !== "Home" && e.key !== "End")) return;
  e.preventDefault();
  go(keys[e.key]());
});

$("text").addEventListener("focusin", (e) => {
  const c = e.target.closest(".c");
  if (!c) return;
  for (const old of document.querySelectorAll('.c[aria-selected="true"]')) { old.removeAttribute("aria-selected"); old.tabIndex = -1; }
  current = Number(c.dataset.i);
  c.setAttribute("aria-selected", "true");
  c.tabIndex = 0;
  describe(current);
});
$("text").addEventListener("pointerover", (e) => { const c = e.target.closest(".c"); if (c) describe(Number(c.dataset.i)); });
$("text").addEventListener("pointerleave", () => describe(current));
$("text").addEventListener("click", (e) => {
  const c = e.target.closest(".c");
  if (c && getSelection().isCollapsed) go(Number(c.dataset.i));
});

let waiting = false;
function soon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; redraw(); });
}

$("threshold").addEventListener("input", (e) => {
  const p = Number(e.target.value);
  $("threshold-value").textContent = p.toFixed(2);
  threshold = p > Number(e.target.min) ? Math.round(p * FULL) : 0;
  soon();
});

for (let s = 0; s < S; s++) {
  const label = node("label"), box = node("input");
  box.type = "checkbox";
  box.checked = shown.includes(s);
  box.value = s;
  label.append(box, node("span", "key", `stage ${s}`));
  $("stages").append(label);
}
function keys() {
  $("text").style.lineHeight = 1.45 + 0.25 * shown.length;
  for (const label of $("stages").querySelectorAll("label")) {
    const k = shown.indexOf(Number(label.firstChild.value));
    label.lastChild.className = k < 0 ? "" : `key key${Math.min(k, 1)}`;
  }
}
$("stages").addEventListener("change", (e) => {
  const now = [...$("stages").querySelectorAll("input:checked")].map((x) => Number(x.value));
  if (!now.length) { e.target.checked = true; return; } // one is always shown
  shown = now;
  keys();
  soon();
});

makeBlocks();
recount();
const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const block = target.block;
    block.near = isIntersecting;
    if (isIntersecting && !block.rich) rich(block);
    else if (!isIntersecting && block.rich && block !== blockOf(current)) plain(block); // Tab must lead somewhere
  }
}, { rootMargin: "800px 0px" });
for (const block of blocks) near.observe(block.div);
if (N) { rich(blocks[0]); span(0).tabIndex = 0; }
keys();
describe(0);
