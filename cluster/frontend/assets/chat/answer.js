// One answer of the API, as it comes in.

import { eventsOf, request } from "../common.js";

/**
 * Streams the answer to `body` into `turn`: content, renormalised (experts were away), facts
 * {tokens, promptTokens, firstMs, totalMs, perSecond, timing}, and how it ended: ending (OpenAI's
 * finish reason), stopped or error. Calls `changed` after every piece. Never throws.
 */
export async function streamAnswer(body, turn, signal, changed) {
  const clock = new Stopwatch();
  let usage = null;
  let timing = null;
  try {
    const response = await request("v1/chat/completions", { body, signal });
    for await (const chunk of eventsOf(response)) {
      const choice = chunk.choices[0];
      usage = chunk.usage ?? usage;
      timing = chunk.timing ?? timing;
      turn.ending = choice?.finish_reason ?? turn.ending;
      turn.renormalised = chunk.renormalised ?? turn.renormalised;
      if (choice?.delta?.content) {
        clock.piece();
        turn.content += choice.delta.content;
        turn.facts = clock.facts();
        changed();
      }
    }
  } catch (error) {
    if (error.name === "AbortError") turn.stopped = true;
    else turn.error = { message: error.message, code: error.code, status: error.status };
  }
  turn.facts = { ...clock.facts(usage), timing };
}

/** Speed as a client sees it. */
class Stopwatch {
  #started = performance.now();
  #first = null;
  #last = null;
  #pieces = 0;

  piece() {
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#pieces += 1;
  }

  /** Without the server's `usage` every piece counts as a token. */
  facts(usage = null) {
    const tokens = usage?.completion_tokens ?? this.#pieces;
    const decodeMs = this.#last - this.#first;
    return {
      tokens,
      promptTokens: usage?.prompt_tokens ?? null,
      firstMs: this.#first === null ? null : this.#first - this.#started,
      totalMs: performance.now() - this.#started,
      perSecond: tokens > 1 && decodeMs > 0 ? ((tokens - 1) * 1000) / decodeMs : null,
    };
  }
}
