// Small helpers for building pages. Data only ever becomes text nodes and attributes, never markup.

export const $ = (id) => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== undefined && child !== null));
  return made;
}

export function options(select, values, chosen) {
  select.replaceChildren(...values.map((value) => element("option", { value, selected: value === chosen }, String(value))));
}

export function table(rows) {
  const [head, ...body] = rows;
  return element("div", { class: "scroll" }, element("table", { class: "rows" },
    element("thead", {}, element("tr", {}, ...head.map((cell) => element("th", { scope: "col" }, shown(cell))))),
    element("tbody", {}, ...body.map((row) => element("tr", {}, ...row.map((cell) =>
      cell instanceof Node ? element("td", {}, cell) : element("td", {}, shown(cell))))))));
}

export function shown(value) {
  if (typeof value !== "number") return value === null || value === undefined ? "" : String(value);
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(4)));
}

// The server's JSON, or an Error with the reason that the server gives. Serve's own refusals are plain text.
export async function call(path, body, signal) {
  const response = await send(path, body, signal);
  return response.json();
}

export async function send(path, body, signal) {
  const request = body === undefined ? { signal } :
    { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  const response = await fetch(`../${path}`, request);
  if (response.ok) return response;
  const text = await response.text();
  let reason = text.slice(0, 300);
  try { reason = JSON.parse(text).error.message; } catch { /* plain text */ }
  const wait = response.headers.get("Retry-After");
  throw new Error(`${reason || response.statusText} (HTTP ${response.status}${wait ? `, try again in ${wait} s` : ""})`);
}

// The events of a server-sent stream as [name, value] pairs; those of OpenAI's API have no name and end with [DONE].
export async function* events(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    pending += value;
    const blocks = pending.split("\n\n");
    pending = blocks.pop();
    for (const block of blocks) {
      const field = (name) => block.split("\n").find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
      if (field("data") === "[DONE]") return;
      yield [field("event"), JSON.parse(field("data"))];
    }
  }
}
