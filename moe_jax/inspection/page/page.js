// The page; follows colors.js and token_view.js in the same script. Texts only become text nodes,
// never markup.

function start(document, window) {
  const data = JSON.parse(document.getElementById("data").textContent);
  const routes = routing(data);
  const get = (id) => document.getElementById(id);
  const state = { layer: 0, coloring: "expert", expert: null, token: null };
  const spans = [];
  const darkScheme = window.matchMedia ? window.matchMedia("(prefers-color-scheme: dark)") : null;

  const make = (tag, className, text) => element(document, tag, className, text);

  function isDark() {
    const chosen = get("theme").value;
    return chosen === "system" ? Boolean(darkScheme && darkScheme.matches) : chosen === "dark";
  }

  function writeText() {
    data.rows.forEach((row) => {
      const section = make("section");
      section.append(make("h2", "", row.title));
      const paragraph = make("div", "text");
      for (let token = row.start; token < row.start + row.count; token++) {
        const span = make("span", "t");
        span.dataset.token = String(token);
        span.tabIndex = token === 0 ? 0 : -1;
        appendVisible(document, span, visibleParts(data.texts[token]));
        const number = make("sub");
        const strip = make("span", "strip");
        span.append(number, strip);
        spans.push({ span, number, strip });
        paragraph.append(span);
        if (data.texts[token].endsWith("\n")) paragraph.append(make("br"));
      }
      section.append(paragraph);
      get("rows").append(section);
    });
  }

  function paint() {
    const { layer, coloring, expert } = state;
    const theme = isDark() ? DARK : LIGHT;
    document.documentElement.dataset.theme = isDark() ? "dark" : "light";
    const withNumbers = get("numbers").checked;
    spans.forEach(({ span, number }, token) => {
      paintToken(span, routes, token, { layer, coloring, expert }, theme);
      const top = routes.top(layer, token);
      number.textContent = withNumbers && top >= 0 ? String(top) : "";
    });
    get("layer").value = String(layer);
    get("shown").textContent = `${layer} of 0 to ${routes.layers - 1}`;
    get("before").disabled = layer === 0;
    get("after").disabled = layer === routes.layers - 1;
    writeLegend();
    if (state.token !== null) showTip(state.token);
  }

  function paintStrips() {
    const isOn = get("strips").checked;
    const theme = isDark() ? DARK : LIGHT;
    const height = Math.max(2, Math.min(5, Math.floor(96 / routes.layers)));
    const texts = document.querySelectorAll(".text");
    texts.forEach((text) => text.classList.toggle("strips", isOn));
    if (!isOn) return;
    spans.forEach(({ strip }, token) => {
      const stops = [];
      for (let layer = 0; layer < routes.layers; layer++) {
        const color = tokenColor(routes, layer, token, state.coloring, theme) || theme.page;
        stops.push(`${css(color)} ${layer * height}px ${(layer + 1) * height}px`);
      }
      strip.style.height = `${routes.layers * height}px`;
      strip.style.background = `linear-gradient(to bottom, ${stops.join(", ")})`;
    });
  }

  function writeLegend() {
    const legend = get("legend");
    legend.replaceChildren();
    const { layer } = state;
    if (!routes.isRouted(layer)) {
      legend.append(make("span", "hint", `Layer ${layer} has no router: its FFN is the base's.`));
      return;
    }
    if (state.coloring === "entropy") {
      const ramp = make("span", "ramp");
      const stops = RAMP.map(css).join(", ");
      ramp.style.background = `linear-gradient(to right, ${stops})`;
      legend.append("entropy: 0, decided", ramp, "1, uniform");
      legend.append(make("span", "hint", `mean over all tokens of this layer: ${data.entropies[layer]}`));
    }
    for (let expert = 0; expert < routes.experts; expert++) {
      if (!routes.isPresent(layer, expert)) continue;
      const button = make("button");
      button.type = "button";
      button.dataset.expert = String(expert);
      button.setAttribute("aria-pressed", String(state.expert === expert));
      button.title = "load relative to an equal share, over all tokens; click to highlight its tokens";
      if (state.coloring !== "entropy") button.append(swatch(document, expertColor(expert)));
      button.append(`expert ${expert} \u00d7${data.load[layer][expert].toFixed(2)}`);
      legend.append(button);
    }
  }

  function showTip(token) {
    const tip = get("tip");
    state.token = token;
    const named = { text: data.texts[token], id: data.ids[token] };
    fillTip(document, tip, named, routes, token, state, isDark() ? DARK : LIGHT);
    tip.hidden = false;
    spans.forEach(({ span }, index) => span.classList.toggle("now", index === token));
    positionTip(window, tip, spans[token].span);
  }

  function hideTip() {
    state.token = null;
    get("tip").hidden = true;
    spans.forEach(({ span }) => span.classList.remove("now"));
  }

  function setLayer(layer) {
    state.layer = Math.min(Math.max(layer, 0), routes.layers - 1);
    paint();
  }

  function tokenOf(event) {
    const span = event.target.closest ? event.target.closest(".t") : null;
    return span ? Number(span.dataset.token) : null;
  }

  function focusToken(token) {
    const next = Math.min(Math.max(token, 0), spans.length - 1);
    spans.forEach(({ span }, index) => { span.tabIndex = index === next ? 0 : -1; });
    spans[next].span.focus();
    showTip(next);
  }

  function onKey(event) {
    const token = tokenOf(event);
    if (event.key === "Escape") hideTip();
    if (token === null) return;
    const moves = { ArrowLeft: -1, ArrowRight: 1 };
    const climbs = { ArrowUp: -1, ArrowDown: 1 };
    if (event.key in moves) focusToken(token + moves[event.key]);
    else if (event.key in climbs) setLayer(state.layer + climbs[event.key]);
    else return;
    event.preventDefault();
  }

  function listen() {
    const rows = get("rows");
    rows.addEventListener("pointerover", (event) => {
      const token = tokenOf(event);
      if (token !== null) showTip(token);
    });
    rows.addEventListener("pointerleave", hideTip);
    rows.addEventListener("focusin", (event) => {
      const token = tokenOf(event);
      if (token !== null) showTip(token);
    });
    rows.addEventListener("focusout", hideTip);
    rows.addEventListener("click", (event) => {
      const token = tokenOf(event);
      if (token !== null) focusToken(token);
    });
    document.addEventListener("keydown", onKey);
    get("layer").addEventListener("input", (event) => setLayer(Number(event.target.value)));
    get("before").addEventListener("click", () => setLayer(state.layer - 1));
    get("after").addEventListener("click", () => setLayer(state.layer + 1));
    ["expert", "mixture", "entropy"].forEach((coloring) => {
      get(`by-${coloring}`).addEventListener("change", () => {
        state.coloring = coloring;
        paint();
        paintStrips();
      });
    });
    get("numbers").addEventListener("change", paint);
    get("strips").addEventListener("change", paintStrips);
    const repaint = () => { paint(); paintStrips(); };
    get("theme").addEventListener("change", repaint);
    if (darkScheme && darkScheme.addEventListener) darkScheme.addEventListener("change", repaint);
    get("legend").addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      const expert = Number(button.dataset.expert);
      state.expert = state.expert === expert ? null : expert;
      paint();
      const again = get("legend").querySelector(`[data-expert="${expert}"]`);
      if (again) again.focus(); // the legend was rebuilt
    });
  }

  writeText();
  listen();
  paint();
}

if (typeof document !== "undefined") start(document, window);
