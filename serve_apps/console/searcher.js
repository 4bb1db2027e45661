// A question for an agent that searches: its sub-queries, what they found, and the facts it records, as they happen.

import { examples, outcome, run } from "./ask.js";
import { $, element, options, shown, table } from "./page.js";

// One search: the sub-query, the passages that were shown, and the fact that was recorded.
class Search {
  constructor(query, number) {
    this.evidence = element("div", {}, "…");
    this.fact = element("p", { class: "end" }, "reading …");
    this.box = element("article", { class: "conversation" }, element("h3", {}, `Search ${number}: `, element("code", {}, query)),
      element("h4", {}, "Evidence"), this.evidence, element("h4", {}, "Recorded"), this.fact);
  }

  show(passages) {
    const rows = passages.map((p) => [p.rank, p.title, p.text, p.score]);
    this.evidence.replaceChildren(rows.length ? table([["rank", "title", "passage", "score"], ...rows]) : "nothing was found");
  }

  recorded(fact) {
    this.fact.className = fact ? "end ok" : "end failed";
    this.fact.textContent = fact || "nothing that settles it";
  }
}

const LIMITS = ["max_searches", "max_tokens"];
let byKind = {};

function known(facts) {
  byKind = facts.examples;
  options($("kind"), Object.keys(byKind), Object.keys(byKind)[0]);
  for (const id of LIMITS) $(id).max = $(id).value = facts.limits[id];
  $("kind").addEventListener("change", () => examples(byKind[$("kind").value]));
  examples(byKind[$("kind").value]);
}

function request() {
  return { question: $("question").value, ...Object.fromEntries(LIMITS.map((id) => [id, Number($(id).value)])) };
}

function begin() {
  const searches = [];
  return {
    search: ({ query }) => {
      searches.push(new Search(query, searches.length + 1));
      $("happened").append(searches.at(-1).box);
    },
    evidence: ({ passages }) => searches.at(-1).show(passages),
    fact: ({ fact }) => searches.at(-1).recorded(fact),
    done: (whole) => done(whole, searches),
  };
}

function done({ answer, status, searches, tokens, ms, version }, boxes) {
  boxes.forEach((box, i) => { if (searches[i].fact === null) box.recorded(""); });
  outcome(status === "ok" ? answer : `${answer} (${status})`, `${tokens} tokens, ${shown(ms)} ms, agent ${version.slice(0, 8)}`);
}

run({
  title: "Mobula searcher", verb: "Ask", ask: "solve", about: "agent", chat: true, known, request, begin,
  fields: [["Question", "question", "What do you want to know?"], ["Kind", "kind"], ["Example", "example"],
    ["Searches at most", "max_searches", { type: "number", min: 1, value: 1 }],
    ["Tokens of a turn", "max_tokens", { type: "number", min: 1, value: 1 }]],
});
