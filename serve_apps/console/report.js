import { element, shown, table } from "./page.js";

const VERDICTS = { holds: "holds", does_not_hold: "does not hold", undecided: "undecided" };

export function showReport(place, name, report) {
  place.replaceChildren(
    element("h2", {}, `${report.method}: ${report.experiment}`, element("small", {}, `seed ${report.seed}`)),
    ...(report.notes ?? []).map((note) => element("p", {}, note)),
    ...part("Data", (report.data ?? []).map((d) => [d.name, d.source, d.records]), ["data set", "source", "records"]),
    ...part("Claims", (report.claims ?? []).map(claim), ["claim", "effect", "95 % interval", "n", "verdict"]),
    ...part("Measures", Object.entries(report.measures ?? {}).map(measure), ["measure", "value", "95 % interval", "n"]),
    ...Object.entries(report.tables ?? {}).flatMap(([title, rows]) => [element("h2", {}, title), table(rows)]),
    ...part("Cost", Object.entries(report.cost ?? {}), ["what", "amount"]),
    ...plots(name, report.plot_files ?? []));
}

function part(title, rows, head) {
  return rows.length ? [element("h2", {}, title), table([head, ...rows])] : [];
}

function interval(low, high) {
  return `${shown(low)} to ${shown(high)}`;
}

function measure([name, m]) {
  return [name, m.value, interval(m.low, m.high), m.n];
}

function claim(c) {
  return [`${c.name}: ${c.statement}`, c.effect, interval(c.low, c.high), c.n,
    element("span", { class: c.verdict }, VERDICTS[c.verdict] ?? c.verdict)];
}

function plots(name, files) {
  // A plot that was drawn in both formats is shown once.
  const chosen = files.filter((file) => !(file.endsWith(".png") && files.includes(file.replace(/\.png$/, ".svg"))));
  if (!chosen.length) return [];
  const images = chosen.map((file) => element("figure", {},
    element("img", { src: `../reports/${encodeURIComponent(name)}/plots/${encodeURIComponent(file)}`, alt: file, loading: "lazy" })));
  return [element("h2", {}, "Plots"), element("div", { class: "plots" }, ...images)];
}
