// A chat with an application's models over OpenAI's API: plans, tool calls with their results, and answers as they come.

import { header, tell } from "./ask.js";
import { $, call, element, events, options, shown, table } from "./page.js";

const conversation = [];
let running = null;

const LONG = 200; // characters of a result beyond which it is folded

// Lists of things become tables, all else stays text.
function result(content) {
  let value = null;
  try { value = JSON.parse(content); } catch { /* text */ }
  if (!Array.isArray(value) || !value.length || typeof value[0] !== "object") {
    if (content.length <= LONG) return element("span", {}, content);
    return element("details", {}, element("summary", {}, `${content.slice(0, LONG / 2)} …`), content);
  }
  const names = Object.keys(value[0]);
  return element("details", {}, element("summary", {}, `${value.length} result${value.length === 1 ? "" : "s"}`),
    table([names, ...value.map((row) => names.map((name) => row[name]))]));
}

// What a model does and says, as its chunks come.
class Reply {
  constructor() {
    this.plan = element("ul", { class: "plan" });
    this.calls = element("ol", { class: "calls" });
    this.thought = element("div", { hidden: true }, element("h4", {}, "Reasoning"), this.plan);
    this.tools = element("div", { hidden: true }, element("h4", {}, "Tools"), this.calls);
    this.content = element("p", { class: "outcome waiting" }, "…");
    this.end = element("p", { class: "hint" });
    this.box = element("article", { class: "conversation reply" }, this.thought, this.tools, this.content, this.end);
    this.text = "";
  }

  add({ reasoning, tool_calls: calls = [], tool_results: results = [], content, refusal }) {
    if (reasoning) {
      this.thought.hidden = false;
      this.plan.append(...reasoning.trim().split("\n").map((line) => element("li", {}, line)));
    }
    for (const { function: { name, arguments: given } } of calls) {
      this.tools.hidden = false;
      this.returned = element("div", { class: "waiting" }, "…");
      const values = Object.values(JSON.parse(given)).map((value) => Array.isArray(value) ? value.join(", ") : shown(value));
      this.calls.append(element("li", {}, element("code", {}, `${name}(${values.join(", ")})`), this.returned));
    }
    for (const { content: text } of results) {
      this.returned.className = "";
      this.returned.replaceChildren(result(text));
    }
    if (content) this.say(this.text += content, "outcome");
    if (refusal) this.say(`no answer: ${refusal}`, "end failed");
  }

  say(text, kind) {
    this.content.className = kind;
    this.content.textContent = text;
  }

  note(text) {
    this.end.textContent += this.end.textContent ? `, ${text}` : text;
  }
}

async function ask(question, signal) {
  conversation.push({ role: "user", content: question });
  const reply = new Reply();
  $("log").append(element("article", { class: "conversation asked" }, element("p", {}, question)), reply.box);
  reply.box.scrollIntoView({ block: "nearest" });
  const body = { model: $("model").value, messages: conversation, stream: true, stream_options: { include_usage: true } };
  for await (const [, chunk] of events("v1/chat/completions", body, signal)) {
    if (chunk.error) throw new Error(chunk.error.message);
    const [choice] = chunk.choices;
    if (choice) reply.add(choice.delta);
    if (choice?.status && choice.status !== "ok") reply.note(choice.status);
    if (chunk.usage) reply.note(`${chunk.usage.prompt_tokens} tokens read, ${chunk.usage.completion_tokens} written`);
    reply.box.scrollIntoView({ block: "nearest" });
  }
  conversation.push({ role: "assistant", content: reply.text });
}

async function submit(event) {
  event.preventDefault();
  running?.abort();
  const mine = running = new AbortController();
  const question = $("question").value;
  const before = conversation.length;
  tell("");
  $("question").value = "";
  $("log").setAttribute("aria-busy", "true");
  try {
    await ask(question, mine.signal);
  } catch (error) {
    // What was not answered is asked again, or not: it is no part of the conversation.
    conversation.length = Math.min(conversation.length, before);
    $("log").lastChild?.querySelector(".waiting")?.replaceChildren("no answer");
    if (error.name !== "AbortError") tell(error.message);
    if (!$("question").value) $("question").value = question;
  }
  if (running === mine) $("log").removeAttribute("aria-busy");
}

function restart() {
  running?.abort();
  conversation.length = 0;
  $("log").replaceChildren();
  tell("");
  $("question").focus();
}

function form() {
  const question = element("input", { id: "question", type: "text", required: true, maxlength: 2000, placeholder: "Ask something" });
  return element("form", { id: "form", class: "agent", autocomplete: "off" },
    element("label", { class: "query" }, element("span", {}, "Message"), question),
    element("button", { id: "ask", class: "primary", type: "submit" }, "Send"),
    element("label", {}, element("span", {}, "Model"), " ", element("select", { id: "model" })),
    element("button", { id: "restart", class: "second", type: "button", onclick: restart }, "New chat"));
}

async function start() {
  document.body.append(element("a", { class: "skip", href: "#main" }, "Skip to content"), header("Mobula chat", element("a", { class: "api", href: "../" }, "Steps")),
    element("main", { id: "main", tabindex: "-1" }, element("p", { id: "notice", role: "alert", hidden: true }),
      element("div", { id: "log", "aria-live": "polite" }), form()));
  $("form").addEventListener("submit", submit);
  try {
    const { data } = await call("v1/models");
    options($("model"), data.map(({ id }) => id), data[0].id);
  } catch (error) {
    tell(error.message);
  }
  document.body.dataset.ready = "yes";
}

start();
