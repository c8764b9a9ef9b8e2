"""The page at /v1/docs: the OpenAPI document for people, in one file that loads nothing foreign.

Its content security policy lets it run its own script (by hash) and read from its own portal, and
nothing else. All that it shows is put in as text, never as markup.
"""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from typing import Any

import msgspec
from litestar import MediaType, Request, Response, get

from portal.api.authentication import PUBLIC

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1.5rem; }
h1 { margin: 0 0 .5rem; } h2 { margin: 2rem 0 .5rem; text-transform: capitalize; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .35rem 0; }
summary { cursor: pointer; padding: .45rem .7rem; display: flex; gap: .8rem; }
summary b { width: 4.5rem; } summary code { flex: 1; } .inside { padding: .2rem 1rem 1rem; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .6rem .25rem 0;
  vertical-align: top; }
pre { background: var(--soft); border-radius: 6px; overflow: auto; padding: .7rem; }
"""

SCRIPT = """
"use strict";
const make = (name, text, ...children) => {
  const node = document.createElement(name);
  if (text) node.textContent = text;
  node.append(...children);
  return node;
};
const nameOf = (schema) => (schema.$ref || "").split("/").pop();
const resolve = (schema, all) => (schema.$ref ? all[nameOf(schema)] : schema);
const kind = (schema) => {
  if (schema.$ref) return nameOf(schema);
  if (schema.anyOf) return schema.anyOf.map(kind).join(" or ");
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" | ");
  if (schema.type === "array" && schema.items) return "list of " + kind(schema.items);
  return [schema.type, schema.format].filter(Boolean).join(", ") || "anything";
};
const LIMITS = ["minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "pattern"];
const limits = (schema) => LIMITS.filter((key) => key in schema)
  .map((key) => key + " " + schema[key]).join("; ");
const fields = (schema, all, seen = new Set()) => {
  const found = resolve(schema, all);
  const box = make("div");
  if (!found || !found.properties) return box;
  if (found.description) box.append(make("p", found.description));
  const table = make("table");
  table.append(make("tr", "", make("th", "field"), make("th", "type"), make("th", "notes")));
  const nested = [];
  for (const [name, one] of Object.entries(found.properties)) {
    const needed = (found.required || []).includes(name) ? "required" : "";
    const notes = [needed, one.description, limits(one)].filter(Boolean).join("; ");
    table.append(make("tr", "", make("td", name), make("td", kind(one)), make("td", notes)));
    for (const part of [one, one.items, ...(one.anyOf || [])]) {
      const inner = part && nameOf(part);
      if (inner && !seen.has(inner)) { seen.add(inner); nested.push(part); }
    }
  }
  box.append(table);
  for (const part of nested) box.append(make("h4", nameOf(part)), fields(part, all, seen));
  return box;
};
const body = (content, all) => {
  const schema = content && Object.values(content)[0].schema;
  return schema ? make("div", "", make("p", kind(schema)), fields(schema, all)) : make("div");
};
const operation = (path, method, one, document_) => {
  const all = document_.components.schemas;
  const inside = make("div");
  inside.className = "inside";
  inside.append(make("p", one.description));
  if (one.parameters.length) {
    const table = make("table");
    for (const each of one.parameters) {
      const notes = [kind(each.schema), limits(each.schema), each.description];
      table.append(make("tr", "", make("td", each.name), make("td", each.in),
        make("td", notes.filter(Boolean).join("; "))));
    }
    inside.append(make("h4", "Parameters"), table);
  }
  if (one.requestBody) inside.append(make("h4", "Body"), body(one.requestBody.content, all));
  for (const [status, answer] of Object.entries(one.responses)) {
    const found = answer.$ref ? document_.components.responses[nameOf(answer)] : answer;
    inside.append(make("h4", status + " " + found.description));
    if (status < 300) inside.append(body(found.content, all));
  }
  return make("details", "",
    make("summary", "", make("b", method.toUpperCase()), make("code", path),
      make("span", one.summary)), inside);
};
fetch("/v1/openapi.json").then((answer) => answer.json()).then((document_) => {
  const main = document.querySelector("main");
  main.replaceChildren(make("h1", document_.info.title + " " + document_.info.version),
    make("p", document_.info.description));
  const groups = new Map();
  for (const [path, item] of Object.entries(document_.paths))
    for (const [method, one] of Object.entries(item)) {
      const tag = one.tags[0];
      if (!groups.has(tag)) groups.set(tag, make("section", "", make("h2", tag)));
      groups.get(tag).append(operation(path, method, one, document_));
    }
  main.append(...groups.values());
}).catch((error) => document.querySelector("main").replaceChildren(make("p", String(error))));
"""

PAGE = f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>Holloway API</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style></head>
<body><main><p>The description is at <a href="/v1/openapi.json">/v1/openapi.json</a>.</p></main>
<script>{SCRIPT}</script></body>
</html>
"""


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@get("/v1/docs", opt={PUBLIC: True}, include_in_schema=False, media_type=MediaType.HTML)
async def documentation_page() -> Response[str]:
    """The page."""
    return Response(PAGE, headers={"Content-Security-Policy": POLICY})


@get("/v1/openapi.json", opt={PUBLIC: True}, include_in_schema=False)
async def openapi_document(request: Request[Any, Any, Any]) -> Response[bytes]:
    """The OpenAPI 3.1 document."""
    description: dict[str, Any] = request.app.state.description
    return Response(msgspec.json.encode(description), media_type=MediaType.JSON)
