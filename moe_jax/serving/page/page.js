"use strict";

// Controls of the page; follows the other scripts. Texts only become text nodes, never markup.

function startPage(document, window) {
  const get = (id) => document.getElementById(id);
  const make = (tag, className, text) => element(document, tag, className, text);
  const darkScheme = window.matchMedia("(prefers-color-scheme: dark)");
  const state = { key: "", layer: 0, coloring: "expert", asked: 0, tip: null };
  const conversations = []; // one for each model of the server
  const places = new WeakMap(); // conversation, turn and number of each token's span

  const theme = () => (darkScheme.matches ? DARK : LIGHT);
  const isAsked = (conversation) => conversation.checkbox.checked;
  const chosen = () => conversations.filter(isAsked);

  async function loadModels() {
    showErrors();
    let models;
    try {
      models = await listedModels(state.key);
    } catch (error) {
      if (error.status === 401) askForKey(error.message);
      else showError("page-error", error.message);
      return;
    }
    get("ask").hidden = false;
    if (!get("key-form").hidden) get("prompt").focus();
    get("key-form").hidden = true;
    if (conversations.length > 0) return; // the key was refused later: conversations go on
    models.forEach((model, index) => addModel(new Conversation(document, model), index < 4));
    const hasChat = models.every((model) => model.moe_jax.chat);
    get("mode").value = hasChat ? "chat" : "text";
    get("mode").options[0].disabled = !hasChat;
    showChosen();
  }

  function addModel(conversation, isChosen) {
    const choice = make("label");
    const box = make("input");
    Object.assign(box, { type: "checkbox", checked: isChosen, value: conversation.name });
    choice.append(box, ` ${conversation.name} `, make("small", "", description(conversation.model)));
    conversation.checkbox = box;
    box.addEventListener("change", showChosen);
    conversation.resetButton.addEventListener("click", () => reset([conversation]));
    conversation.legend.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      const expert = Number(button.dataset.expert);
      conversation.expert = conversation.expert === expert ? null : expert;
      paint();
    });
    get("models").append(choice);
    get("cards").append(conversation.card);
    conversations.push(conversation);
  }

  // Cards and layers of the chosen models.
  function showChosen() {
    conversations.forEach((conversation) => { conversation.card.hidden = !isAsked(conversation); });
    const routed = chosen().filter(({ experts }) => experts > 0);
    get("controls").hidden = routed.length === 0;
    get("layer").max = String(Math.max(0, ...routed.map(({ layers }) => layers - 1)));
    setLayer(state.layer);
  }

  function paintSpan(conversation, turn, token) {
    const shown = { layer: state.layer, coloring: state.coloring, expert: conversation.expert };
    paintToken(turn.spans[token], turn.routes, token, shown, theme());
  }

  function paint() {
    document.documentElement.dataset.theme = darkScheme.matches ? "dark" : "light";
    conversations.forEach((conversation) => {
      conversation.turns.forEach((turn) => {
        turn.spans.forEach((_, token) => paintSpan(conversation, turn, token));
      });
      conversation.paintLegend(state.layer);
    });
    const last = Number(get("layer").max);
    get("layer").value = String(state.layer);
    get("shown").textContent = `${state.layer} of 0 to ${last}`;
    get("before").disabled = state.layer === 0;
    get("after").disabled = state.layer === last;
    if (state.tip) showTip(state.tip);
  }

  function setLayer(layer) {
    state.layer = Math.min(Math.max(layer, 0), Number(get("layer").max));
    paint();
  }

  function showError(id, message) {
    get(id).textContent = message;
    const input = get(id.replace(/-error$/, ""));
    if (input) input.setAttribute("aria-invalid", String(message !== ""));
  }

  function showErrors(errors = {}) {
    ["page", "key", "max_tokens", "temperature", "seed"].forEach((field) => {
      showError(`${field}-error`, errors[field] || "");
    });
  }

  function askForKey(message) {
    get("key-form").hidden = false;
    showError("key-error", state.key ? message : "");
    get("key").focus();
    get("key").select();
  }

  function settings() {
    const numbers = { temperature: Number(get("temperature").value) };
    numbers.max_tokens = Number(get("max_tokens").value);
    if (get("seed").value !== "") numbers.seed = Number(get("seed").value);
    return numbers;
  }

  // An error is shown where it can be mended: at the key, at its field, or in the model's card.
  function showFailure(conversation, turn, error) {
    const field = error.field && get(`${error.field}-error`) ? error.field : null;
    if (error.status !== 401 && field === null) {
      const message = error instanceof ServerError ? error.message : `The connection broke: ${error.message}`;
      turn.fail(message);
      return;
    }
    conversation.drop(turn);
    if (error.status === 401) askForKey(error.message);
    else showError(`${field}-error`, error.message);
    if (get("prompt").value === "") get("prompt").value = turn.question;
  }

  async function answer(conversation, question) {
    const { path, body } = conversation.request(question, get("mode").value, settings());
    const turn = conversation.begin(question);
    const { signal } = conversation.stopping;
    try {
      for await (const choice of streamedChoices(path, body, state.key, signal)) {
        conversation.add(turn, choice, (_, token) => {
          places.set(turn.spans[token], { conversation, turn, token });
          paintSpan(conversation, turn, token);
        });
        conversation.paintLegend(state.layer);
      }
      turn.end(ENDINGS[turn.ending] || turn.ending || "complete");
    } catch (error) {
      if (error.name === "AbortError") turn.end("stopped");
      else showFailure(conversation, turn, error);
    }
    get("status").textContent = `${conversation.name}: ${turn.note.textContent}`;
  }

  async function ask() {
    const asked = chosen();
    const question = get("prompt").value;
    if (state.asked > 0) return;
    showErrors();
    if (asked.length === 0) {
      showError("page-error", "Choose at least one model.");
      return;
    }
    get("prompt").value = "";
    get("status").textContent = `${asked.map(({ name }) => name).join(", ")}: asked`;
    setAsked(asked.length);
    await Promise.all(asked.map(async (conversation) => {
      await answer(conversation, question);
      setAsked(state.asked - 1);
    }));
  }

  function setAsked(count) {
    state.asked = count;
    get("send").disabled = count > 0;
    get("stop").disabled = count === 0;
  }

  function reset(some) {
    hideTip();
    some.forEach((conversation) => conversation.reset());
    paint();
    get("status").textContent = `${some.map(({ name }) => name).join(", ")}: reset`;
  }

  function showTip(place) {
    const { turn, token } = place;
    hideTip();
    state.tip = place;
    fillTip(document, get("tip"), turn.tokens[token], turn.routes, token, state, theme());
    get("tip").hidden = false;
    turn.spans[token].classList.add("now");
    positionTip(window, get("tip"), turn.spans[token]);
  }

  function hideTip() {
    if (state.tip) state.tip.turn.spans[state.tip.token].classList.remove("now");
    state.tip = null;
    get("tip").hidden = true;
  }

  function placeOf(event) {
    const span = event.target.closest ? event.target.closest(".t") : null;
    return span ? places.get(span) : null;
  }

  function focusToken({ turn }, token) {
    const next = Math.min(Math.max(token, 0), turn.spans.length - 1);
    turn.spans.forEach((span, index) => { span.tabIndex = index === next ? 0 : -1; });
    turn.spans[next].focus();
  }

  function onTokenKey(event) {
    const place = placeOf(event);
    if (event.key === "Escape") hideTip();
    if (!place) return;
    const moves = { ArrowLeft: -1, ArrowRight: 1 };
    const climbs = { ArrowUp: -1, ArrowDown: 1 };
    if (event.key in moves) focusToken(place, place.token + moves[event.key]);
    else if (event.key in climbs) setLayer(state.layer + climbs[event.key]);
    else return;
    event.preventDefault();
  }

  function listenToTokens() {
    const cards = get("cards");
    const showAt = (event) => {
      const place = placeOf(event);
      if (place) showTip(place);
      else hideTip();
    };
    cards.addEventListener("pointerover", showAt);
    cards.addEventListener("focusin", showAt);
    cards.addEventListener("pointerleave", hideTip);
    cards.addEventListener("focusout", hideTip);
    cards.addEventListener("scroll", () => {
      if (state.tip) positionTip(window, get("tip"), state.tip.turn.spans[state.tip.token]);
    }, true);
    cards.addEventListener("click", (event) => {
      const place = placeOf(event);
      if (place) focusToken(place, place.token);
    });
    document.addEventListener("keydown", onTokenKey);
  }

  function listenToControls() {
    get("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      ask();
    });
    get("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      state.key = get("key").value;
      loadModels();
    });
    get("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (state.asked === 0) get("ask").requestSubmit();
    });
    get("stop").addEventListener("click", () => conversations.forEach((each) => each.stop()));
    get("reset").addEventListener("click", () => reset(conversations));
    get("layer").addEventListener("input", (event) => setLayer(Number(event.target.value)));
    get("before").addEventListener("click", () => setLayer(state.layer - 1));
    get("after").addEventListener("click", () => setLayer(state.layer + 1));
    ["expert", "mixture"].forEach((coloring) => {
      get(`by-${coloring}`).addEventListener("change", () => {
        state.coloring = coloring;
        paint();
      });
    });
    darkScheme.addEventListener("change", paint);
  }

  listenToTokens();
  listenToControls();
  paint();
  loadModels();
}

if (typeof document !== "undefined") startPage(document, window);
