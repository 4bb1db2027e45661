import { $, call, element } from "./page.js";

// The newest version that this page has seen. Searches ask for it, so that whoever changes the corpus finds his change
// in every replica.
export const corpus = { version: 0 };

let fail = null;

export async function startCorpus(takesDocuments, notice) {
  fail = notice;
  $("adding").hidden = !takesDocuments;
  $("new").addEventListener("submit", add);
  await refresh();
}

// An answer tells of a version: show it if it is newer.
export function noticeVersion(version) {
  if (version > corpus.version) refresh(version).catch(fail);
}

export function removeButton(hit) {
  return element("button", { class: "remove", type: "button", onclick: (event) => remove(hit, event.target.closest("li")) },
    "Remove", element("span", { class: "unseen" }, ` ${hit.doc_id}`));
}

async function refresh(version = corpus.version, what = "") {
  const { version: now, documents } = await call(`versions?limit=1&version=${version}`);
  corpus.version = now;
  $("state").textContent = `Version ${now} of the corpus, ${documents} document${documents === 1 ? "" : "s"}${what}`;
}

async function add(event) {
  event.preventDefault();
  const button = $("new").querySelector("button");
  button.disabled = true;
  fail(null);
  try {
    const id = $("new-id").value;
    const answer = await call("documents", { documents: [{ id, title: $("new-title").value, text: $("new-text").value }] });
    const code = answer.codes[id] ? ` with docid ${answer.codes[id].join("-")}` : "";
    $("new").reset();
    await refresh(answer.version, `; ${id} was added${code}${answer.collisions ? ", which it shares" : ""}`);
  } catch (error) {
    fail(error);
  } finally {
    button.disabled = false;
  }
}

async function remove(hit, row) {
  if (!confirm(`Remove ${hit.title || hit.doc_id} from the corpus?`)) return;
  fail(null);
  try {
    const answer = await call("documents/remove", { ids: [hit.doc_id] });
    row.remove();
    await refresh(answer.version, `; ${hit.doc_id} was removed`);
  } catch (error) {
    fail(error);
  }
}
