import { $, call, element, table } from "./page.js";

function type(schema) {
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.const !== undefined) return String(schema.const);
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(type).join(" | ");
  if (schema.type === "array") return `list of ${type(schema.items ?? {})}`;
  return schema.type ?? "any";
}

function limits(schema) {
  const all = [schema, ...(schema.anyOf ?? [])];
  const words = { minimum: "at least", maximum: "at most", exclusiveMinimum: "above", exclusiveMaximum: "below",
    minLength: "characters at least", maxLength: "characters at most", minItems: "items at least", maxItems: "items at most" };
  return all.flatMap((s) => Object.entries(words).filter(([key]) => key in s).map(([key, text]) => `${text} ${s[key]}`)).join(", ");
}

function fields(api, schema) {
  const name = schema?.$ref?.split("/").pop();
  const properties = api.components.schemas[name]?.properties;
  if (!properties) return null;
  const rows = Object.entries(properties).map(([field, s]) =>
    [element("code", {}, field), type(s), s.default ?? "", limits(s), s.description ?? ""]);
  return table([["field", "type", "default", "limits", ""], ...rows]);
}

function route(api, path, method, operation) {
  const body = operation.requestBody?.content?.["application/json"]?.schema;
  const answer = operation.responses["200"]?.content?.["application/json"]?.schema;
  const given = fields(api, body);
  const returned = fields(api, answer);
  const refusals = Object.entries(operation.responses).filter(([status]) => status >= "400").map(([status, r]) => [status, r.description]);
  return element("section", { class: "route" },
    element("h2", {}, element("code", {}, `${method.toUpperCase()} ${path}`)),
    element("p", {}, operation.description ?? ""),
    given && element("h3", {}, "Request"), given,
    returned && element("h3", {}, "Answer"), returned,
    refusals.length ? element("details", {}, element("summary", {}, "Refusals"), table([["status", ""], ...refusals])) : null);
}

async function start() {
  const api = await call("openapi.json");
  const routes = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => route(api, path, method, operation)));
  $("routes").replaceChildren(...routes);
}

start().catch((error) => { $("routes").textContent = error.message; });
