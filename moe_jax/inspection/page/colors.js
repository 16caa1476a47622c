"use strict";

// Computations on the data, without access to the page.

const LIGHT = { page: [255, 255, 255], ink: [27, 29, 33] };
const DARK = { page: [22, 24, 29], ink: [232, 234, 237] };
// Okabe and Ito (2008), distinguishable with any color vision.
const PALETTE = [
  [230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66],
  [0, 114, 178], [213, 94, 0], [204, 121, 167], [153, 153, 153],
];
// Entropy from 0 to 1: cividis, whose lightness increases too.
const RAMP = [[0, 34, 78], [62, 73, 108], [122, 121, 120], [187, 173, 108], [254, 232, 56]];

function unpack(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

// Weights are bytes [L, T, E], where 255 is `scale`; entropies are bytes [L, T], where 255 is the
// entropy of a uniform router.
function routing(data) {
  const { layers, experts } = data;
  const tokens = data.ids.length;
  const weights = unpack(data.weights);
  const entropies = unpack(data.entropy);
  const weight = (layer, token, expert) =>
    (weights[(layer * tokens + token) * experts + expert] / 255) * data.scale;
  return {
    layers,
    experts,
    tokens,
    weight,
    entropy: (layer, token) => entropies[layer * tokens + token] / 255,
    isRouted: (layer) => data.present[layer].includes("1"),
    isPresent: (layer, expert) => data.present[layer][expert] === "1",
    // Expert with the largest weight; -1 if the token has no expert.
    top(layer, token) {
      let best = -1;
      for (let expert = 0; expert < experts; expert++) {
        const current = weight(layer, token, expert);
        if (current > 0 && (best < 0 || current > weight(layer, token, best))) best = expert;
      }
      return best;
    },
  };
}

function mix(from, to, share) {
  return from.map((value, channel) => Math.round(value + (to[channel] - value) * share));
}

function css([red, green, blue]) {
  return `rgb(${red}, ${green}, ${blue})`;
}

function luminance(color) {
  const [red, green, blue] = color.map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

// Black or white, by contrast with the background.
function ink(background) {
  return luminance(background) > 0.18 ? "#000" : "#fff";
}

// Experts beyond the palette get other hues and lightnesses.
function expertColor(expert) {
  if (expert < PALETTE.length) return PALETTE[expert];
  const hue = ((expert * 137.508) % 360) / 60;
  const [low, high] = [[70, 190], [130, 240], [40, 150]][expert % 3];
  const part = high - (high - low) * Math.abs((hue % 2) - 1);
  const wheel = [[high, part, low], [part, high, low], [low, high, part],
    [low, part, high], [part, low, high], [high, low, part]];
  return wheel[Math.floor(hue)].map(Math.round);
}

function entropyColor(share) {
  const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const index = Math.min(Math.floor(at), RAMP.length - 2);
  return mix(RAMP[index], RAMP[index + 1], at - index);
}

// Background of a token; null without a router or an expert.
function tokenColor(routes, layer, token, coloring, theme) {
  if (!routes.isRouted(layer)) return null;
  if (coloring === "entropy") return entropyColor(routes.entropy(layer, token));
  const top = routes.top(layer, token);
  if (top < 0) return null;
  const most = Math.min(routes.weight(layer, token, top), 1);
  return mix(theme.page, expertColor(top), 0.15 + 0.85 * most);
}

// Gradient stops that show all experts of a token side by side, with widths by weight.
function mixtureStops(routes, layer, token) {
  const shares = [];
  let total = 0;
  for (let expert = 0; expert < routes.experts; expert++) {
    const weight = routes.weight(layer, token, expert);
    if (weight > 0) shares.push([expert, weight]);
    total += weight;
  }
  let start = 0;
  return shares.map(([expert, weight]) => {
    const stop = start + (100 * weight) / total;
    const text = `${css(expertColor(expert))} ${start.toFixed(1)}% ${stop.toFixed(1)}%`;
    start = stop;
    return text;
  });
}

// Characters that are invisible or change the display of others, such as their direction.
const HIDDEN = [
  [0, 31], [127, 160], [0xad, 0xad], [0x200b, 0x200f], [0x2028, 0x202e], [0x2060, 0x206f],
  [0xfeff, 0xfeff],
];

// Parts of a token's text: plain text, and marks for invisible characters.
function visibleParts(piece) {
  if (piece === "") return [{ mark: "\u2026" }]; // incomplete character, completed by the next token
  const marks = { " ": "\u00b7", "\t": "\u2192", "\n": "\u21b5", "\r": "\u240d" };
  const parts = [];
  for (const letter of piece) {
    const code = letter.codePointAt(0);
    const isHidden = HIDDEN.some(([first, last]) => first <= code && code <= last);
    const mark = marks[letter] || (isHidden ? `<${code.toString(16)}>` : null);
    if (mark !== null) {
      parts.push({ mark, isBreak: letter === "\n" });
    } else if (parts.length && parts[parts.length - 1].text !== undefined) {
      parts[parts.length - 1].text += letter;
    } else {
      parts.push({ text: letter });
    }
  }
  return parts;
}

if (typeof module !== "undefined") {
  module.exports = {
    unpack, routing, mix, ink, luminance, expertColor, entropyColor, tokenColor, mixtureStops, visibleParts,
  };
}
