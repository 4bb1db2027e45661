// A question for an agent that searches: its sub-queries, what they found, and the facts it records, as they happen.

import { $, call, element, events, options, shown, table } from "./page.js";

let known = { examples: {} };
let running = null;

async function start() {
  try {
    known = await call("agent");
  } catch (error) {
    tell(error.message);
    return;
  }
  options($("kind"), Object.keys(known.examples), Object.keys(known.examples)[0]);
  for (const [id, most] of Object.entries(known.limits)) {
    $(id).max = most;
    $(id).value = most;
  }
  kind();
}

function kind() {
  options($("example"), ["", ...(known.examples[$("kind").value] || [])], "");
}

function tell(message) {
  $("notice").textContent = message;
  $("notice").hidden = !message;
}

// One search: the sub-query, the passages that were shown, and the fact that was recorded.
class Search {
  constructor(query, number) {
    this.evidence = element("div", {}, "…");
    this.fact = element("p", { class: "end" }, "reading …");
    this.box = element("article", { class: "conversation" }, element("h3", {}, `Search ${number}: `, element("code", {}, query)),
      element("h4", {}, "Evidence"), this.evidence, element("h4", {}, "Recorded"), this.fact);
  }

  found(passages) {
    const rows = passages.map((p) => [p.rank, p.title, p.text, p.score]);
    this.evidence.replaceChildren(rows.length ? table([["rank", "title", "passage", "score"], ...rows]) : "nothing was found");
  }

  recorded(fact) {
    this.fact.className = fact ? "end ok" : "end failed";
    this.fact.textContent = fact || "nothing that settles it";
  }
}

async function solve(event) {
  event.preventDefault();
  running?.abort();
  const mine = running = new AbortController();
  const request = { question: $("question").value };
  for (const id of ["max_searches", "max_tokens"]) request[id] = Number($(id).value);
  const searches = [];
  tell("");
  $("outcome-title").hidden = true;
  $("outcome").textContent = "";
  $("searches").replaceChildren();
  $("searches").setAttribute("aria-busy", "true");
  try {
    for await (const [name, value] of events("solve", request, mine.signal)) {
      if (name === "search") {
        searches.push(new Search(value.query, searches.length + 1));
        $("searches").append(searches.at(-1).box);
      } else if (name === "evidence") searches.at(-1).found(value.passages);
      else if (name === "fact") searches.at(-1).recorded(value.fact);
      else if (name === "done") done(value, searches);
      else if (name === "error") throw new Error(value.error.message);
    }
  } catch (error) {
    if (error.name !== "AbortError") tell(error.message);
  }
  if (running === mine) $("searches").removeAttribute("aria-busy");
}

function done({ answer, status, searches, tokens, ms, version }, boxes) {
  boxes.forEach((box, i) => { if (searches[i].fact === null) box.recorded(""); });
  $("outcome-title").hidden = false;
  $("outcome").textContent = status === "ok" ? answer : `${answer} (${status})`;
  $("cost").textContent = `${tokens} tokens, ${shown(ms)} ms, agent ${version.slice(0, 8)}`;
}

$("form").addEventListener("submit", solve);
$("kind").addEventListener("change", kind);
$("example").addEventListener("change", () => { if ($("example").value) $("question").value = $("example").value; });
start().then(() => { document.body.dataset.ready = "yes"; });
