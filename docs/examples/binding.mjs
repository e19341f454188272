// An implementation of layers, targets and routing in plain JavaScript, held to the specification by
//
//     lora conformance --command "node binding.mjs"

import { NdArray, serve } from "./serve.mjs";

/** y = x Wᵀ + b + Σ weight · scaling · (x A) B, summed in float64 and rounded once. */
function forward({ x, weight, bias, terms }) {
  const [columns, rows] = weight.shape;
  const count = x.shape.slice(0, -1).reduce((product, size) => product * size, 1);
  const out = new Float64Array(count * columns);
  for (let n = 0; n < count; n++) {
    const row = x.data.subarray(n * rows, (n + 1) * rows);
    const y = out.subarray(n * columns, (n + 1) * columns);
    for (let j = 0; j < columns; j++) {
      for (let i = 0; i < rows; i++) y[j] += row[i] * weight.data[j * rows + i];
      if (bias !== null) y[j] += bias.data[j];
    }
    for (const [, term] of [...terms].sort(([a], [b]) => compare(a, b))) addTerm(y, row, term);
  }
  return new NdArray(x.dtype, [...x.shape.slice(0, -1), columns], x.data.constructor.from(out));
}

function addTerm(y, row, { A, B, scaling, weight }) {
  const [rank, columns] = B.shape;
  const low = new Float64Array(columns);
  for (let k = 0; k < rank; k++) {
    let hidden = 0;
    for (let i = 0; i < row.length; i++) hidden += row[i] * A.data[i * rank + k];
    for (let j = 0; j < columns; j++) low[j] += hidden * B.data[k * columns + j];
  }
  for (let j = 0; j < columns; j++) y[j] += low[j] * (scaling * weight);
}

const HEADS = new Set(
  "lm_head embed_out output_projection cls classifier score qa_outputs logits head".split(" "),
);

/** The names that equal a target or end with it after a dot; "all-linear" leaves out heads. */
function match_targets({ names, targets }) {
  return names.filter((name) => {
    const isHead = name.split(".").some((part) => HEADS.has(part));
    const fits = (target) => name === target || name.endsWith("." + target);
    return targets.some((target) => fits(target) || (target === "all-linear" && !isHead));
  });
}

/** Order of code points, which is not that of JavaScript's own UTF-16. */
function compare(a, b) {
  const [left, right] = [a, b].map((text) => Array.from(text, (letter) => letter.codePointAt(0)));
  const place = left.findIndex((point, index) => point !== right[index]);
  return place < 0 ? left.length - right.length : left[place] - (right[place] ?? -1);
}

/** Candidates by name, each with the unit vectors of its texts. */
class Router {
  constructor(embed) {
    this.embed = embed;
    this.candidates = new Map();
  }

  async units(texts) {
    const { data, shape } = await this.embed(texts);
    return texts.map((_, n) => {
      const row = Array.from(data.subarray(n * shape[1], (n + 1) * shape[1]));
      const largest = row.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
      const even = row.map((value) => value / (largest || 1)); // no square of these overflows
      const length = Math.sqrt(even.reduce((sum, value) => sum + value * value, 0));
      return even.map((value) => value / (length || 1));
    });
  }

  async register({ name, texts }) {
    this.candidates.set(name, await this.units(texts));
    return null;
  }

  unregister({ name }) {
    this.candidates.delete(name);
    return null;
  }

  async select({ query, top_k, threshold }) {
    const [asked] = await this.units([query]);
    const cosine = (unit) => unit.reduce((sum, value, index) => sum + value * asked[index], 0);
    return [...this.candidates]
      .map(([name, units]) => [name, Math.round(Math.max(...units.map(cosine)) * 1e6) / 1e6 + 0])
      .filter(([, score]) => threshold === null || score >= threshold)
      .sort(([name, score], [other, least]) => least - score || compare(name, other))
      .slice(0, top_k);
  }

  async select_many({ queries, top_k, threshold }) {
    const routes = [];
    for (const query of queries) routes.push(await this.select({ query, top_k, threshold }));
    return routes;
  }
}

const noCards = "it has no cards";
await serve(
  { forward, match_targets, make_router: ({ embed }) => new Router(embed) },
  {
    name: "plain JavaScript",
    version: "1",
    domains: { forward: { dtypes: ["float32", "float64"] } },
    missing: {
      write_card: noCards,
      read_card: noCards,
      bind: noCards,
      extract: noCards,
      merge: noCards,
    },
  },
);
