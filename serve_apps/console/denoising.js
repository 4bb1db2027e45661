import { element, shown } from "./page.js";

// The docid while it is denoised: one row per step, one cell per level.
export class Denoising {
  constructor(body, progress, levels) {
    this.body = body;
    this.progress = progress;
    this.code = Array(levels).fill(null);
    const head = this.code.map((_, level) => element("th", { scope: "col" }, String(level + 1), element("span", { class: "unseen" }, " level")));
    const masked = this.code.map(() => element("td", { class: "masked", title: "masked" }, "?"));
    body.replaceChildren(
      element("tr", {}, element("th", { scope: "row" }, "level"), ...head),
      element("tr", {}, element("th", { scope: "row" }, "start"), ...masked));
    progress.textContent = "all tokens masked";
  }

  step({ step, commits, remasked, valid_left }) {
    for (const level of remasked) this.code[level] = null;
    const fresh = new Set();
    for (const [level, code, confidence] of commits) {
      this.code[level] = { code, confidence };
      fresh.add(level);
    }
    const again = new Set(remasked.filter((level) => !fresh.has(level)));
    const cells = this.code.map((token, level) => cell(token, fresh.has(level), again.has(level)));
    const left = valid_left === null ? "" : `${valid_left} document${valid_left === 1 ? "" : "s"} left`;
    this.body.append(element("tr", {}, element("th", { scope: "row" }, `step ${step}`), ...cells,
      element("td", { class: "left" }, left)));
    const known = this.code.filter((token) => token !== null).length;
    this.progress.textContent = `step ${step}: ${known} of ${this.code.length} tokens unmasked`;
  }

  done(code) {
    if (code) this.progress.textContent += `, docid ${code.join("-")}`;
  }
}

function cell(token, fresh, again) {
  if (token === null) {
    const title = again ? "masked again" : "masked";
    return element("td", { class: again ? "masked again" : "masked", title }, "?");
  }
  const shade = `c${Math.min(3, Math.floor(token.confidence * 4))}`;
  const title = `token ${token.code}, confidence ${shown(token.confidence)}`;
  return element("td", { class: `${fresh ? "new" : "kept"} ${shade}`, title }, String(token.code));
}
