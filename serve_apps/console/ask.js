// The page of an application that is asked one thing at a time: a form, its events as they happen, and the outcome.
// An application brings its fields, what becomes of each event, and what its models say of themselves.

import { $, call, element, events, options } from "./page.js";

export function tell(message) {
  $("notice").textContent = message;
  $("notice").hidden = !message;
}

export function outcome(text, cost) {
  $("outcome-title").hidden = false;
  $("outcome").textContent = text;
  $("cost").textContent = cost;
}

function labelled([label, id, attributes = {}]) {
  const field = element(attributes.type ? "input" : "select", { id, name: id, required: attributes.type === "number", ...attributes });
  return element("label", {}, element("span", {}, label), " ", field);
}

// The head of a page; `other` leads to the page that asks the same models in another way.
export function header(title, ...other) {
  return element("header", { class: "top" }, element("img", { src: "mark.svg", alt: "", width: 28, height: 28 }),
    element("h1", {}, title), ...other, element("a", { class: "api", href: "api.html" }, "API"));
}

// `fields`: [label, id, attributes of an input; none: a choice]; the first is the text that is asked.
function form({ fields: [[label, id, placeholder], ...others], verb }) {
  const text = element("input", { id, name: id, type: "text", required: true, maxlength: 2000, placeholder });
  return element("form", { id: "form", class: "agent", autocomplete: "off" },
    element("label", { class: "query" }, element("span", {}, label), text),
    element("button", { id: "ask", class: "primary", type: "submit" }, verb), ...others.map(labelled));
}

function main(page) {
  return element("main", { id: "main", tabindex: "-1" }, element("p", { id: "notice", role: "alert", hidden: true }), form(page),
    ...(page.before ?? []), element("section", { "aria-label": "Outcome" },
      element("h2", { id: "outcome-title", hidden: true }, "Answer ", element("small", { id: "cost" })),
      element("p", { id: "outcome", class: "outcome", "aria-live": "polite" }), element("div", { id: "happened" }), ...(page.after ?? [])));
}

// `ask`: path of the route; `about`: path of the models' facts, given to `known`; `request()`: the body;
// `begin()`: forget what was shown, and give what shows each event by its name; `chat`: there is OpenAI's API too.
export async function run(page) {
  const chat = page.chat && element("a", { class: "api", href: "chat.html" }, "Chat");
  document.body.append(element("a", { class: "skip", href: "#main" }, "Skip to content"), header(page.title, chat), main(page));
  let running = null;
  $("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    running?.abort();
    const mine = running = new AbortController();
    tell("");
    $("outcome-title").hidden = true;
    $("outcome").textContent = "";
    $("happened").replaceChildren();
    $("happened").setAttribute("aria-busy", "true");
    const show = page.begin();
    try {
      for await (const [name, value] of events(page.ask, { ...page.request(), stream: true }, mine.signal)) {
        if (name in show) show[name](value);
        else if (name === "error") throw new Error(value.error.message);
      }
    } catch (error) {
      if (error.name !== "AbortError") tell(error.message);
    }
    if (running === mine) $("happened").removeAttribute("aria-busy");
  });
  $("example").addEventListener("change", () => { if ($("example").value) $(page.fields[0][1]).value = $("example").value; });
  try {
    page.known(await call(page.about));
  } catch (error) {
    tell(error.message);
  }
  document.body.dataset.ready = "yes";
}

export function examples(texts = []) {
  options($("example"), ["", ...texts], "");
}
