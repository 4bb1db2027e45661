// Questions: passages found, passages chosen, and the answer, as they come.

import { examples, outcome, run, tell } from "./ask.js";
import { $, element, shown, table } from "./page.js";

function known({ retriever, candidates, choose, examples: texts }) {
  $("about").textContent = `${choose} of ${candidates} passages are chosen; retriever: ${retriever}.`;
  examples(texts);
}

function candidates({ candidates: ranked }) {
  $("candidates").replaceChildren(table([["rank", "passage"], ...ranked.map(({ rank, title }) => [rank, title])]));
  $("ranking").hidden = false;
}

function selected({ passages, flags }) {
  if (flags.retriever_failed) tell("The retriever did not answer: there are no passages.");
  if (flags.selection_failed) tell("The selector failed: these are the passages that the retriever ranks first.");
  const items = passages.map(({ title, text, rank, probability }) => {
    const sure = probability === null ? "" : `, probability ${probability.toFixed(2)}`;
    const head = element("h3", {}, title, " ", element("small", {}, `rank ${rank} of the retriever${sure}`));
    return element("li", {}, head, element("p", {}, text));
  });
  if (items.length) $("happened").append(element("h2", {}, "Chosen passages"), element("ol", { id: "passages" }, ...items));
}

function begin() {
  $("ranking").hidden = true;
  let text = "";
  return {
    candidates,
    selected,
    answer: ({ answer }) => outcome(text = answer || "none", ""),
    done: ({ ms, version }) => outcome(text, `${shown(ms)} ms, networks ${version.slice(0, 8)}`),
  };
}

run({
  title: "Mobula question answering", verb: "Answer", ask: "answer", about: "about", chat: true, known, begin,
  request: () => ({ question: $("question").value }),
  fields: [["Question", "question", "What do you want to know?"], ["Example", "example"]],
  before: [element("p", { id: "about" })],
  after: [element("details", { id: "ranking", hidden: true }, element("summary", {}, "Passages that were found, as the retriever ranks them"),
    element("div", { id: "candidates", class: "scroll" }))],
});
