// Tasks for planner and grounder: the plan, every call and what it returned, as they happen.

import { $, call, element, events, options, shown, table } from "./page.js";

let known = { families: {} };
let running = null;

async function start() {
  try {
    known = await call("agents");
  } catch (error) {
    tell(error.message);
    return;
  }
  options($("family"), Object.keys(known.families), Object.keys(known.families)[0]);
  $("max_steps").max = known.limits.max_steps;
  family();
}

function family() {
  const { tools, examples } = known.families[$("family").value];
  $("tools").replaceChildren(table([["tool", "what it does"], ...tools.map((tool) => [tool.signature, tool.purpose])]));
  options($("example"), ["", ...examples], "");
}

function tell(message) {
  $("notice").textContent = message;
  $("notice").hidden = !message;
}

// One conversation: subgoals beside the calls that came of them.
class Conversation {
  constructor(number, many) {
    this.plan = element("ol", { class: "plan" });
    this.calls = element("tbody");
    this.end = element("p", { class: "end" }, "planning …");
    const title = many ? element("h3", {}, `Conversation ${number + 1}`) : null;
    const head = element("thead", {}, element("tr", {}, ...["call", "returned"].map((name) => element("th", { scope: "col" }, name))));
    this.box = element("article", { class: "conversation" }, title, element("h4", {}, "Plan"), this.plan,
      element("h4", {}, "Tools"), element("div", { class: "scroll" }, element("table", { class: "rows" }, head, this.calls)), this.end);
  }

  show(name, value) {
    if (name === "plan") {
      this.plan.replaceChildren(...value.subgoals.map((subgoal) => element("li", {}, subgoal)));
      this.end.textContent = "acting …";
    } else if (name === "call") {
      this.returned = element("td", { class: "waiting" }, "…");
      this.calls.append(element("tr", {}, element("td", {}, element("code", {}, value.call)), this.returned));
    } else if (name === "result") {
      this.returned.className = value.status === "ok" ? "" : "failed";
      this.returned.textContent = shown(value.returned);
    } else if (name === "answer") {
      this.finish("ok", `answer: ${shown(value.answer)}`);
    } else if (name === "error") {
      this.finish("failed", `${value.error.code}: ${value.error.message}`);
    }
  }

  finish(kind, text) {
    this.end.className = `end ${kind}`;
    this.end.textContent = text;
  }
}

async function solve(event) {
  event.preventDefault();
  running?.abort();
  const mine = running = new AbortController();
  const number = (id) => Number($(id).value);
  const request = { task: $("task").value, family: $("family").value };
  for (const id of ["max_steps", "n", "temperature", "seed"]) request[id] = number(id);
  const talks = new Map();
  tell("");
  $("outcome-title").hidden = true;
  $("outcome").textContent = "";
  $("conversations").replaceChildren();
  $("conversations").setAttribute("aria-busy", "true");
  try {
    for await (const [name, value] of events("solve", request, mine.signal)) {
      if (name === "done") done(value);
      else if (value.conversation === undefined) throw new Error(value.error.message);
      else {
        if (!talks.has(value.conversation)) {
          talks.set(value.conversation, new Conversation(value.conversation, request.n > 1));
          $("conversations").append(talks.get(value.conversation).box);
        }
        talks.get(value.conversation).show(name, value);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") tell(error.message);
  }
  if (running === mine) $("conversations").removeAttribute("aria-busy");
}

function done({ answer, status, tokens, ms, version }) {
  $("outcome-title").hidden = false;
  $("outcome").textContent = answer === null ? `none (${status})` : answer;
  $("cost").textContent = `${tokens} tokens, ${shown(ms)} ms, agents ${version.slice(0, 8)}`;
}

$("form").addEventListener("submit", solve);
$("family").addEventListener("change", family);
$("example").addEventListener("change", () => { if ($("example").value) $("task").value = $("example").value; });
start().then(() => { document.body.dataset.ready = "yes"; });
