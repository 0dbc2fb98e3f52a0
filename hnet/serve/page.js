"use strict";
// The prompt and its text as spans, one a chunk. Text comes first; that a chunk began within it is told a byte later.
const $ = (id) => document.getElementById(id);
let running = null;

class Chunks {
  constructor(into) {
    this.into = into;
    this.begun = []; // chunks that began, by stage
    this.length = 0; // characters (code points)
    this.spans = [];
    into.replaceChildren();
  }

  open(start, className, letters) {
    const element = document.createElement("span");
    element.className = className;
    element.textContent = letters.join("");
    this.into.append(element);
    this.spans.push({ start, letters, element });
  }

  write(text) {
    const letters = Array.from(text);
    if (!letters.length) return;
    if (!this.spans.length) this.open(0, "", []);
    const last = this.spans[this.spans.length - 1];
    last.letters.push(...letters);
    last.element.append(letters.join(""));
    this.length += letters.length;
  }

  // Chunks of so many stages begin at a character of the last span. One that begins within a character begins with it.
  begin(offset, stages) {
    for (let s = 0; s < stages; s++) this.begun[s] = (this.begun[s] || 0) + 1;
    const last = this.spans[this.spans.length - 1], name = `c${(this.begun[1] || 0) % 2}${this.begun[0] % 2}`;
    if (!last || offset <= last.start) {
      if (last) last.element.className = name;
      return;
    }
    const rest = last.letters.splice(offset - last.start);
    last.element.textContent = last.letters.join("");
    this.open(offset, name, rest);
  }

  sizes() {
    return this.begun.map((n, s) => `stage ${s}: ${n} chunks of ${(this.length / n).toFixed(1)} characters`).join(" · ");
  }
}

function say(text, wrong = false) {
  $("state").textContent = text;
  $("state").className = wrong ? "error" : "";
}

function asked() {
  const number = (id) => ($(id).value === "" ? null : Number($(id).value));
  const seed = $("seed").value.trim();
  const body = { prompt: $("prompt").value, stream: true, echo: true, chunks: true };
  for (const id of ["max_tokens", "temperature", "top_p"]) body[id] = number(id);
  // a seed has up to 63 bits, a number of JavaScript 53
  const json = JSON.stringify(body);
  return /^[0-9]+$/.test(seed) ? `${json.slice(0, -1)},"seed":${BigInt(seed)}}` : json;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    for (const event of whole) if (event.startsWith("data: ")) yield event.slice(6);
  }
}

async function write() {
  running = new AbortController();
  $("write").disabled = true;
  $("stop").disabled = false;
  const chunks = new Chunks($("text"));
  $("sizes").textContent = "";
  say("writing");
  try {
    const headers = { "Content-Type": "application/json" };
    if ($("token").value) headers.Authorization = `Bearer ${$("token").value}`;
    const response = await fetch("v1/completions", { method: "POST", headers, body: asked(), signal: running.signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    let ended = "the connection broke";
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) {
        chunks.write(choice.text);
        for (const [offset, stages] of choice.chunks) chunks.begin(offset, stages);
        if (choice.stop_reason) ended = `ended: ${choice.stop_reason}`;
      }
      $("sizes").textContent = chunks.sizes();
    }
    say(ended);
  } catch (e) {
    say(e.name === "AbortError" ? "stopped" : e.message, e.name !== "AbortError");
  }
  running = null;
  $("write").disabled = false;
  $("stop").disabled = true;
}

$("form").addEventListener("submit", (e) => {
  e.preventDefault();
  if (!running) write();
});
$("stop").addEventListener("click", () => running && running.abort());
