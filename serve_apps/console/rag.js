// Questions: passages found, passages chosen, and the answer, as they come.

import { $, call, element, events, options, shown, table } from "./page.js";

let running = null;

async function start() {
  try {
    const { retriever, candidates, choose, examples } = await call("about");
    $("about").textContent = `${choose} of ${candidates} passages are chosen; retriever: ${retriever}.`;
    options($("example"), ["", ...examples], "");
  } catch (error) {
    tell(error.message);
  }
}

function tell(message) {
  $("notice").textContent = message;
  $("notice").hidden = !message;
}

function clear() {
  tell("");
  for (const id of ["outcome-title", "passages-title", "found"]) $(id).hidden = true;
  $("outcome").textContent = "";
  $("passages").replaceChildren();
}

function found({ candidates }) {
  $("candidates").replaceChildren(table([["rank", "passage"], ...candidates.map(({ rank, title }) => [rank, title])]));
  $("found").hidden = false;
}

function selected({ passages, flags }) {
  if (flags.retriever_failed) tell("The retriever did not answer: there are no passages.");
  if (flags.selection_failed) tell("The selector failed: these are the passages that the retriever ranks first.");
  $("passages-title").hidden = !passages.length;
  $("passages").replaceChildren(...passages.map(({ title, text, rank, probability }) => {
    const sure = probability === null ? "" : `, probability ${probability.toFixed(2)}`;
    const head = element("h3", {}, title, " ", element("small", {}, `rank ${rank} of the retriever${sure}`));
    return element("li", {}, head, element("p", {}, text));
  }));
}

function done({ ms, version }) {
  $("cost").textContent = `${shown(ms)} ms, networks ${version.slice(0, 8)}`;
}

function answer({ answer: text }) {
  $("outcome-title").hidden = false;
  $("outcome").textContent = text || "none";
}

const SHOW = { found, selected, answer, done };

async function ask(event) {
  event.preventDefault();
  running?.abort();
  const mine = running = new AbortController();
  clear();
  $("passages").setAttribute("aria-busy", "true");
  try {
    for await (const [name, value] of events("answer", { question: $("question").value, stream: true }, mine.signal)) {
      if (name === "error") throw new Error(value.error.message);
      SHOW[name](value);
    }
  } catch (error) {
    if (error.name !== "AbortError") tell(error.message);
  }
  if (running === mine) $("passages").removeAttribute("aria-busy");
}

$("form").addEventListener("submit", ask);
$("example").addEventListener("change", () => { if ($("example").value) $("question").value = $("example").value; });
start().then(() => { document.body.dataset.ready = "yes"; });
