// An answer assembled from its chunks: text, reasoning, tool calls, and their speed.

/** Fills a message of the conversation from a stream's chunks. */
export class Answer {
  constructor(node, now = () => performance.now()) {
    this.node = node;
    this.now = now;
    this.began = now();
    this.first = null; // arrival times of the first token and the last
    this.last = null;
    this.numPieces = 0;
    this.finish = null;
  }

  /** Add one chunk. */
  take(chunk) {
    const choice = chunk.choices?.[0];
    if (choice) this.takeDelta(choice.delta ?? {});
    if (choice?.finish_reason) this.finish = choice.finish_reason;
    if (chunk.usage) this.usage = chunk.usage;
    this.node.model = chunk.model;
  }

  takeDelta({ content, reasoning_content: reasoning, tool_calls: calls }) {
    if (!content && !reasoning && !calls) return;
    const node = this.node;
    this.last = this.now();
    this.first ??= this.last;
    this.numPieces += 1;
    if (reasoning) {
      node.reasoning = (node.reasoning ?? "") + reasoning;
      node.reasoningMs = this.last - this.began;
    }
    if (content) node.content += content;
    for (const call of calls ?? []) {
      node.calls ??= [];
      const known = (node.calls[call.index] ??= {
        id: call.id,
        name: call.function?.name ?? "",
        arguments: "",
      });
      known.arguments += call.function?.arguments ?? "";
    }
  }

  /** Record how the answer ended: normally (`error` is null), by the user, or with an error. */
  end(error = null, wasStopped = false) {
    const node = this.node;
    node.state = wasStopped ? "stopped" : error ? "failed" : this.finish === "length" ? "cut" : "done";
    if (error) node.error = error.message;
    else delete node.error;
    if (this.first === null) return;
    // Without the last chunk there is no token count; nearly every piece is one token.
    const numTokens = this.usage?.completion_tokens ?? this.numPieces;
    const seconds = (this.last - this.first) / 1000;
    node.speed = {
      firstMs: this.first - this.began,
      numTokens,
      isExact: Boolean(this.usage),
      perSecond: numTokens > 1 && seconds > 0 ? (numTokens - 1) / seconds : null,
    };
  }
}

/** Return an answer's speed in one line: `182 tokens · 41.3 tokens/s · first after 0.21 s`. */
export function describeSpeed({ firstMs, numTokens, isExact, perSecond }) {
  const parts = [`${isExact ? "" : "about "}${numTokens} ${numTokens === 1 ? "token" : "tokens"}`];
  if (perSecond !== null) parts.push(`${perSecond.toFixed(perSecond < 100 ? 1 : 0)} tokens/s`);
  parts.push(`first after ${seconds(firstMs)}`);
  return parts.join(" · ");
}

/** Format a time in seconds with the significant digits: `0.21 s`, `3.4 s`, `71 s`. */
export function seconds(ms) {
  const value = ms / 1000;
  return `${value.toFixed(value < 1 ? 2 : value < 10 ? 1 : 0)} s`;
}
