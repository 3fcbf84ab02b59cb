// A request to the chat API as code that somebody can run elsewhere. Never with the key itself.

const KEY_VARIABLE = "SHOAL_API_KEY";

/** For a shell. `base`: URL of the API, ending in /v1; `needsKey`: take it from the environment. */
export function curlSample(base, body, needsKey) {
  const lines = [`curl -N ${shellQuoted(`${base}/chat/completions`)}`];
  lines.push("  -H 'Content-Type: application/json'");
  if (needsKey) lines.push(`  -H "Authorization: Bearer $${KEY_VARIABLE}"`);
  lines.push(`  -d ${shellQuoted(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n");
}

/** For OpenAI's Python package; the same parameters. */
export function pythonSample(base, body, needsKey) {
  const { timing, ...known } = body;
  const fields = Object.entries(known).map(([name, value]) => `    ${name}=${literal(value, 1)},`);
  if (timing) fields.push(`    extra_body=${literal({ timing }, 1)},`);
  const key = needsKey ? `os.environ["${KEY_VARIABLE}"]` : '"none"';
  return [
    ...(needsKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(base)}, api_key=${key})`,
    "stream = client.chat.completions.create(",
    ...fields,
    ")",
    "for chunk in stream:",
    "    if chunk.choices:",
    '        print(chunk.choices[0].delta.content or "", end="", flush=True)',
  ].join("\n");
}

const shellQuoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** JSON as Python; a list of several goes over lines, `depth` levels in. */
function literal(value, depth = 0) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) {
    if (value.length === 0) return "[]";
    const indent = "    ".repeat(depth);
    const items = value.map((item) => `${indent}    ${literal(item, depth + 1)},\n`);
    return `[\n${items.join("")}${indent}]`;
  }
  if (typeof value === "object") {
    const items = Object.entries(value).map(
      ([name, item]) => `${literal(name)}: ${literal(item, depth)}`,
    );
    return `{${items.join(", ")}}`;
  }
  return JSON.stringify(value); // strings of JSON are strings of Python
}
