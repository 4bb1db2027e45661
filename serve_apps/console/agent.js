// Tasks for planner and grounder: the plan, every call and what it returned, as they happen.

import { examples, outcome, run } from "./ask.js";
import { $, element, options, shown, table } from "./page.js";

// One conversation: subgoals beside the calls that came of them.
class Conversation {
  constructor(number, many) {
    this.steps = element("ol", { class: "plan" });
    this.calls = element("tbody");
    this.end = element("p", { class: "end" }, "planning …");
    const title = many ? element("h3", {}, `Conversation ${number + 1}`) : null;
    const head = element("thead", {}, element("tr", {}, ...["call", "returned"].map((name) => element("th", { scope: "col" }, name))));
    this.box = element("article", { class: "conversation" }, title, element("h4", {}, "Plan"), this.steps,
      element("h4", {}, "Tools"), element("div", { class: "scroll" }, element("table", { class: "rows" }, head, this.calls)), this.end);
  }

  plan({ subgoals }) {
    this.steps.replaceChildren(...subgoals.map((subgoal) => element("li", {}, subgoal)));
    this.end.textContent = "acting …";
  }

  call({ call }) {
    this.returned = element("td", { class: "waiting" }, "…");
    this.calls.append(element("tr", {}, element("td", {}, element("code", {}, call)), this.returned));
  }

  result({ status, returned }) {
    this.returned.className = status === "ok" ? "" : "failed";
    this.returned.textContent = shown(returned);
  }

  answer({ answer }) {
    this.finish("ok", `answer: ${shown(answer)}`);
  }

  error({ error }) {
    this.finish("failed", `${error.code}: ${error.message}`);
  }

  finish(kind, text) {
    this.end.className = `end ${kind}`;
    this.end.textContent = text;
  }
}

const NUMBERS = {
  max_steps: ["Steps at most", { min: 1, max: 8, value: 8 }],
  n: ["Conversations", { min: 1, max: 8, value: 1 }],
  temperature: ["Temperature", { min: 0, max: 2, step: 0.1, value: 0 }],
  seed: ["Seed", { min: 0, max: 2147483647, value: 0 }],
};
let families = {};

function family() {
  const { tools, examples: texts } = families[$("family").value];
  $("tools").replaceChildren(table([["tool", "what it does"], ...tools.map((tool) => [tool.signature, tool.purpose])]));
  examples(texts);
}

function known(facts) {
  families = facts.families;
  options($("family"), Object.keys(families), Object.keys(families)[0]);
  $("max_steps").max = facts.limits.max_steps;
  $("family").addEventListener("change", family);
  family();
}

function request() {
  const numbers = Object.keys(NUMBERS).map((id) => [id, Number($(id).value)]);
  return { task: $("task").value, family: $("family").value, ...Object.fromEntries(numbers) };
}

function begin() {
  const talks = new Map();
  const many = Number($("n").value) > 1;
  const talk = (name) => (value) => {
    if (value.conversation === undefined) throw new Error(value.error.message);
    if (!talks.has(value.conversation)) {
      talks.set(value.conversation, new Conversation(value.conversation, many));
      $("happened").append(talks.get(value.conversation).box);
    }
    talks.get(value.conversation)[name](value);
  };
  const names = ["plan", "call", "result", "answer", "error"];
  return { ...Object.fromEntries(names.map((name) => [name, talk(name)])), done };
}

function done({ answer, status, tokens, ms, version }) {
  outcome(answer === null ? `none (${status})` : answer, `${tokens} tokens, ${shown(ms)} ms, agents ${version.slice(0, 8)}`);
}

run({
  title: "Mobula agents", verb: "Solve", ask: "solve", about: "agents", chat: true, known, request, begin,
  fields: [["Task", "task", "What is to be done?"], ["Tools", "family"], ["Example", "example"],
    ...Object.entries(NUMBERS).map(([id, [label, range]]) => [label, id, { type: "number", ...range }])],
  before: [element("details", {}, element("summary", {}, "What these tools do"), element("div", { id: "tools" }))],
});
