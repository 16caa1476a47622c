// Drawing of a token and of the weights of its experts; shared with the page of `moe-jax serve`.
// Follows colors.js. Texts only become text nodes, never markup.

function element(document, tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function swatch(document, color) {
  const box = element(document, "span", "swatch");
  box.style.backgroundColor = css(color);
  return box;
}

function appendVisible(document, parent, parts) {
  parts.forEach((part) => {
    if (part.text !== undefined) parent.append(part.text);
    else parent.append(element(document, "i", "mark", part.mark));
  });
}

// Background and ink of a token; `shown.expert` is the only expert whose tokens are not dimmed.
function paintToken(span, routes, token, shown, theme) {
  const { layer, coloring, expert } = shown;
  const color = tokenColor(routes, layer, token, coloring, theme);
  span.classList.toggle("none", color === null && routes.isRouted(layer));
  span.classList.toggle("dim", expert !== null && !(routes.weight(layer, token, expert) > 0));
  span.style.background = "";
  span.style.color = "";
  if (color === null) return;
  if (coloring === "mixture") {
    const stops = mixtureStops(routes, layer, token);
    span.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    span.style.color = "#000";
  } else {
    span.style.background = css(color);
    span.style.color = ink(color);
  }
}

function weightRow(document, expert, weight) {
  const row = element(document, "tr", weight > 0 ? "" : "zero");
  const name = element(document, "td");
  name.append(swatch(document, expertColor(expert)), `expert ${expert}`);
  const wide = element(document, "td", "wide");
  const bar = element(document, "span", "bar");
  bar.style.width = `${Math.round(100 * Math.min(weight, 1))}%`;
  bar.style.background = css(expertColor(expert));
  wide.append(bar);
  row.append(name, wide, element(document, "td", "number", weight.toFixed(2)));
  return row;
}

// Weights of a token's experts in one layer, and its top experts in all layers.
function fillTip(document, tip, { text, id }, routes, token, shown, theme) {
  const { layer } = shown;
  tip.replaceChildren();
  const head = element(document, "div");
  const code = element(document, "code");
  visibleParts(text).forEach((part) => code.append(part.text || part.mark));
  head.append(code, ` id ${id}, layer ${layer}`);
  tip.append(head);
  if (!routes.isRouted(layer)) {
    tip.append(element(document, "div", "", "This layer has no router."));
  } else {
    if (routes.top(layer, token) < 0) {
      tip.append(element(document, "div", "", "No expert had capacity for this token."));
    }
    const table = element(document, "table");
    const order = Array.from({ length: routes.experts }, (_, expert) => expert)
      .filter((expert) => routes.isPresent(layer, expert));
    const listed = order.length <= 16
      ? order
      : order.filter((expert) => routes.weight(layer, token, expert) > 0).slice(0, 16);
    listed.forEach((expert) => {
      table.append(weightRow(document, expert, routes.weight(layer, token, expert)));
    });
    tip.append(table);
    if (routes.entropy) {
      const entropy = routes.entropy(layer, token).toFixed(2);
      tip.append(element(document, "div", "", `entropy ${entropy} (1 is uniform)`));
    }
  }
  tip.append(element(document, "div", "hint", `all layers, 0 to ${routes.layers - 1}:`));
  const cells = element(document, "div", "cells");
  for (let other = 0; other < routes.layers; other++) {
    const cell = element(document, "span", other === layer ? "now" : "");
    const color = tokenColor(routes, other, token, shown.coloring, theme);
    if (color !== null) cell.style.background = css(color);
    cells.append(cell);
  }
  tip.append(cells);
}

function positionTip(window, tip, span) {
  const box = span.getBoundingClientRect();
  const [width, height] = [tip.offsetWidth, tip.offsetHeight];
  const left = Math.min(Math.max(box.left, 8), window.innerWidth - width - 8);
  const below = box.bottom + 8;
  const top = below + height < window.innerHeight ? below : Math.max(8, box.top - height - 8);
  tip.style.left = `${Math.max(left, 8)}px`;
  tip.style.top = `${top}px`;
}
