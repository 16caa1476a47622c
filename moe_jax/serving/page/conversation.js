"use strict";

// The conversation with one model: questions, and answers as tokens with their experts.
// Follows colors.js and token_view.js. Texts only become text nodes, never markup.

const ENDINGS = { stop: "complete", length: "ended by the limit of tokens" };

// Routing of streamed tokens, in the form that colors.js reads.
function streamedRouting(tokens, layers, experts) {
  const chosen = (layer, token) => (tokens[token].experts || [])[layer] || null;
  const weight = (layer, token, expert) => {
    const place = chosen(layer, token) ? chosen(layer, token).indexOf(expert) : -1;
    return place < 0 ? 0 : tokens[token].weights[layer][place];
  };
  return {
    layers,
    experts,
    weight,
    isRouted: (layer) => tokens.length > 0 && chosen(layer, 0) !== null,
    isPresent: () => true,
    // Expert with the largest weight; -1 if the token has no expert.
    top(layer, token) {
      const served = chosen(layer, token) || [];
      return served.reduce((best, expert) =>
        (best < 0 || weight(layer, token, expert) > weight(layer, token, best) ? expert : best), -1);
    },
  };
}

// Visible text of a token for reading: spaces and line breaks are as they are.
function readableParts(piece) {
  return visibleParts(piece).flatMap((part) => {
    if (part.mark === "\u00b7") return [{ text: " " }];
    return part.isBreak ? [part, { text: "\n" }] : [part];
  });
}

// Description of a model, for its label and the head of its card.
function description(model) {
  const { kind, method, num_experts: experts, top_k: chosen } = model.moe_jax;
  if (kind === "base") return "base, no adapter";
  const parts = [method];
  if (experts) parts.push(`${experts} experts`);
  if (experts && chosen) parts.push(`top ${chosen}`);
  return parts.join(", ");
}

// One question and the answer to it.
class Turn {
  constructor(document, question, { layers, experts }) {
    this.document = document;
    this.question = question;
    this.answer = "";
    this.tokens = [];
    this.spans = [];
    this.ending = null;
    this.isKept = false; // whether later questions follow this one
    this.routes = streamedRouting(this.tokens, layers, experts);
    this.box = element(document, "div", "turn");
    this.text = element(document, "div", "text");
    this.text.setAttribute("aria-busy", "true");
    this.note = element(document, "p", "hint", "waiting\u2026");
    this.box.append(element(document, "p", "question", question), this.text, this.note);
  }

  // Adds the tokens of a streamed choice and returns their numbers in this turn.
  add(choice) {
    this.answer += choice.delta ? choice.delta.content || "" : choice.text || "";
    if (choice.finish_reason) this.ending = choice.finish_reason;
    const added = (choice.moe_jax && choice.moe_jax.tokens) || [];
    return added.map((token, place) => {
      const ends = choice.finish_reason === "stop" && place === added.length - 1;
      if (ends && token.text === "") token.text = "<end>"; // the text does not contain this token
      const span = element(this.document, "span", "t");
      span.tabIndex = this.spans.length ? -1 : 0;
      appendVisible(this.document, span, readableParts(token.text));
      this.tokens.push(token);
      this.spans.push(span);
      this.text.append(span);
      this.note.textContent = `${this.count()}\u2026`;
      return this.tokens.length - 1;
    });
  }

  count() {
    return this.tokens.length === 1 ? "1 token" : `${this.tokens.length} tokens`;
  }

  end(ending) {
    this.text.setAttribute("aria-busy", "false");
    this.note.textContent = `${this.count()}, ${ending}`;
    this.isKept = this.answer !== "";
  }

  fail(message) {
    this.end("not complete");
    this.isKept = false;
    this.note.after(element(this.document, "p", "error", message));
  }
}

class Conversation {
  constructor(document, model) {
    const { num_layers: layers, num_experts: experts } = model.moe_jax;
    Object.assign(this, { document, model, name: model.id, turns: [], stopping: null });
    Object.assign(this, { layers, experts: experts || 0, expert: null });
    this.loads = Array.from({ length: layers }, () => new Array(this.experts).fill(0));
    this.card = element(document, "section", "card");
    this.card.setAttribute("aria-label", model.id);
    this.resetButton = element(document, "button", "", "Reset");
    this.resetButton.type = "button";
    this.resetButton.setAttribute("aria-label", `reset the conversation with ${model.id}`);
    const head = element(document, "div", "head");
    const title = element(document, "h2", "", model.id);
    title.append(" ", element(document, "small", "", description(model)));
    head.append(title, this.resetButton);
    this.legend = element(document, "div", "legend");
    this.legend.setAttribute("role", "group");
    this.legend.setAttribute("aria-label", `experts of ${model.id}`);
    if (this.experts) this.legend.append(element(document, "span", "hint", "Experts"));
    this.labels = Array.from({ length: this.experts }, (_, expert) => this.legendButton(expert));
    this.box = element(document, "div", "turns");
    this.card.append(head, this.legend, this.box);
  }

  legendButton(expert) {
    const button = element(this.document, "button");
    const label = element(this.document, "span");
    button.type = "button";
    button.dataset.expert = String(expert);
    button.title = "load relative to an equal share, over the answers; click to highlight its tokens";
    button.append(swatch(this.document, expertColor(expert)), label);
    this.legend.append(button);
    return { button, label };
  }

  // Request for the answer to `question` after all turns before it.
  request(question, mode, settings) {
    const kept = this.turns.filter((turn) => turn.isKept);
    const common = { model: this.name, ...settings, moe_jax: { routing: true } };
    if (mode === "text") {
      const before = kept.map((turn) => turn.question + turn.answer).join("");
      return { path: "v1/completions", body: { ...common, prompt: before + question } };
    }
    const messages = kept.flatMap((turn) => [
      { role: "user", content: turn.question }, { role: "assistant", content: turn.answer },
    ]);
    messages.push({ role: "user", content: question });
    return { path: "v1/chat/completions", body: { ...common, messages } };
  }

  begin(question) {
    const turn = new Turn(this.document, question, this);
    this.turns.push(turn);
    this.keepingEndInView(() => this.box.append(turn.box));
    this.stopping = new AbortController();
    return turn;
  }

  add(turn, choice, paint) {
    this.keepingEndInView(() => turn.add(choice).forEach((token) => {
      (turn.tokens[token].experts || []).forEach((experts, layer) => {
        (experts || []).forEach((expert) => { this.loads[layer][expert] += 1; });
      });
      paint(turn, token);
    }));
  }

  drop(turn) {
    this.turns = this.turns.filter((other) => other !== turn);
    turn.box.remove();
  }

  stop() {
    if (this.stopping) this.stopping.abort();
  }

  reset() {
    this.stop();
    this.turns = [];
    this.box.replaceChildren();
    this.loads.forEach((counts) => counts.fill(0));
  }

  keepingEndInView(change) {
    const { box } = this;
    const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 48;
    change();
    if (isAtEnd) box.scrollTop = box.scrollHeight;
  }

  paintLegend(layer) {
    const counts = this.loads[layer] || [];
    const total = counts.reduce((sum, count) => sum + count, 0);
    this.labels.forEach(({ button, label }, expert) => {
      const load = total ? ` \u00d7${((counts[expert] * this.experts) / total).toFixed(2)}` : "";
      label.textContent = `${expert}${load}`;
      button.setAttribute("aria-label", `expert ${expert}${load}`);
      button.setAttribute("aria-pressed", String(this.expert === expert));
    });
  }
}
