import { $, call, element, events, options, shown, table } from "./page.js";
import { corpus, noticeVersion, removeButton, startCorpus } from "./corpus.js";
import { Denoising } from "./denoising.js";
import { showReport } from "./report.js";

let facts = null;
let running = null;

function notice(error) {
  $("notice").hidden = !error;
  $("notice").textContent = error ? error.message : "";
}

// A retriever that does not have the chosen decoder searches with its own.
function request(retriever) {
  const steps = Number($("steps").value);
  const decoder = $("decoder").value;
  const stepwise = facts.stepwise.includes(decoder);
  return {
    query: $("query").value,
    k: Number($("k").value),
    retriever,
    version: corpus.version,
    ...(facts.decoders[retriever].includes(decoder) ? { decoder } : {}),
    order: $("order").value,
    remask: $("remask").value,
    ...(steps > 0 && stepwise ? { steps } : {}),
  };
}

// --- the budget ---------------------------------------------------------------------------------------------

// The decoders of the retriever that will be asked; Compare offers those of the default one.
function showDecoders() {
  const decoders = facts.decoders[current() === "compare" ? facts.default : $("retriever").value];
  const before = $("decoder").value;
  options($("decoder"), decoders.length ? decoders : ["none"], decoders.includes(before) ? before : decoders[0]);
  $("decoder").disabled = !decoders.length;
  showBudget();
}

function showBudget() {
  const decoder = $("decoder").value;
  const stepwise = facts.stepwise.includes(decoder);
  const steps = Number($("steps").value);
  // Only remasking lets a request take more steps than the code has positions.
  $("steps").max = $("remask").value === "none" ? facts.levels : 4 * facts.levels;
  $("steps").disabled = !stepwise;
  const half = Math.max(1, Math.floor(facts.levels / 2));
  const chosen = steps === 0 ? `${half} steps (the default, half the code length)` : `${steps} step${steps > 1 ? "s" : ""}`;
  $("budget-shown").textContent = stepwise ? chosen : decoder === "none" ? "this retriever has none" : `${decoder} takes no steps`;
  const wanted = stepwise ? (steps || half) : null;
  // Latencies are measured for the default retriever.
  const known = current() === "compare" || $("retriever").value === facts.default ? facts.calibration : [];
  const measured = known.find((row) => row.decoder === decoder && row.steps === wanted);
  $("latency").textContent = measured ? `95 % of such searches took at most ${shown(measured.p95_ms)} ms on this host` : "";
}

// --- search -------------------------------------------------------------------------------------------------

// A document's docid; tokens that the model decoded at the same level are marked.
function docid(code, decoded) {
  const tokens = code.map((token, level) => element("span", { class: decoded?.[level] === token ? "token same" : "token" }, String(token)));
  return element("span", { class: "docid", title: `docid ${code.join("-")}` }, ...tokens);
}

function card(hit, decoded, shared) {
  const score = element("span", { class: "score" }, hit.score === null ? "no score" : hit.score.toFixed(2));
  return element("li", { class: shared ? "shared" : undefined },
    element("div", { class: "head" }, element("h3", {}, hit.title || hit.doc_id), score),
    element("div", { class: "id" }, hit.title ? element("span", {}, hit.doc_id) : null, hit.code ? docid(hit.code, decoded) : null,
      facts.takes_documents ? removeButton(hit) : null),
    element("p", {}, hit.snippet));
}

function cost(result) {
  const over = result.budget.over_budget ? ", no measured budget fits the time" : "";
  const steps = result.budget.steps === null ? "" : `, ${result.steps_used} of ${result.budget.steps} steps`;
  return `${result.ms.toFixed(1)} ms, ${result.nfe} network call${result.nfe === 1 ? "" : "s"}${steps}, ordered by ${result.scored_by}${over}`;
}

async function search(signal) {
  const retriever = $("retriever").value;
  const traced = retriever === facts.default;
  $("denoising").hidden = !traced;
  let result = null;
  if (traced) {
    const picture = new Denoising($("code").tBodies[0], $("progress"), facts.levels);
    for await (const [name, value] of events("trace", request(retriever), signal)) {
      if (name === "step") picture.step(value);
      if (name === "result") result = value;
      if (name === "error") throw new Error(value.error.message);
    }
    picture.done(result.raw_code);
  } else {
    result = await call("search", request(retriever), signal);
  }
  noticeVersion(result.version);
  $("results-title").hidden = false;
  $("cost").textContent = cost(result);
  $("results").replaceChildren(...result.hits.map((hit) => card(hit, result.raw_code)));
}

// --- comparison ---------------------------------------------------------------------------------------------

async function compare(signal) {
  const names = [...$("arms").querySelectorAll("input:checked")].map((box) => box.value);
  const outcomes = await Promise.allSettled(names.map((retriever) => call("search", request(retriever), signal)));
  noticeVersion(Math.max(0, ...outcomes.map(({ value }) => value?.version ?? 0)));
  const times = new Map();
  for (const { value } of outcomes) for (const hit of value?.hits ?? []) times.set(hit.doc_id, (times.get(hit.doc_id) ?? 0) + 1);
  $("columns").replaceChildren(...outcomes.map(({ value, reason }, i) => element("section", {},
    element("h2", {}, names[i], element("small", {}, value ? cost(value) : "")),
    value ? element("ol", { class: "hits" }, ...value.hits.map((hit) => card(hit, value.raw_code, times.get(hit.doc_id) > 1)))
      : element("p", { class: "does_not_hold" }, reason.message))));
}

// --- reports ------------------------------------------------------------------------------------------------

async function listReports() {
  const runs = await call("reports");
  options($("run"), runs.map((run) => run.name));
  if (runs.length) await openReport();
  else $("report").replaceChildren(element("p", { class: "hint" }, "No finished run here yet."));
}

async function openReport() {
  const name = $("run").value;
  showReport($("report"), name, await call(`reports/${encodeURIComponent(name)}`));
}

// --- the page -----------------------------------------------------------------------------------------------

const TABS = ["search", "compare", "reports"];

function open(tab) {
  for (const name of TABS) {
    $(name).hidden = name !== tab;
    $(`tab-${name}`).setAttribute("aria-selected", String(name === tab));
    $(`tab-${name}`).tabIndex = name === tab ? 0 : -1;
  }
  $("form").hidden = $("corpus").hidden = tab === "reports";
  document.querySelector(".only-search").hidden = tab !== "search";
  notice(null);
  if (tab !== "reports") showDecoders();
  if (tab === "reports") listReports().catch(notice);
}

function current() {
  return TABS.find((name) => !$(name).hidden);
}

async function submit(event) {
  event.preventDefault();
  running?.abort();
  const mine = running = new AbortController();
  const button = $("form").querySelector(".primary");
  button.disabled = true;
  notice(null);
  try {
    await (current() === "compare" ? compare : search)(mine.signal);
  } catch (error) {
    if (error.name !== "AbortError") notice(error);
  } finally {
    if (running === mine) button.disabled = false;
  }
}

async function start() {
  facts = await call("retrievers");
  options($("order"), facts.orders, "confidence");
  options($("remask"), facts.remask, "none");
  options($("retriever"), facts.retrievers, facts.default);
  const first = [...facts.retrievers.slice(0, 2), "bm25", "dense"];
  $("arms").append(...facts.retrievers.map((name) =>
    element("label", {}, element("input", { type: "checkbox", value: name, checked: first.includes(name) }), name)));
  for (const id of ["steps", "decoder", "remask"]) $(id).addEventListener("input", showBudget);
  $("retriever").addEventListener("input", showDecoders);
  $("form").addEventListener("submit", submit);
  $("run").addEventListener("change", () => openReport().catch(notice));
  for (const name of TABS) {
    $(`tab-${name}`).addEventListener("click", () => open(name));
    $(`tab-${name}`).addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      const next = TABS[(TABS.indexOf(name) + move + TABS.length) % TABS.length];
      open(next);
      $(`tab-${next}`).focus();
    });
  }
  showDecoders();
  await startCorpus(facts.takes_documents, notice);
  document.body.dataset.ready = "yes";
}

start().catch(notice);
