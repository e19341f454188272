// Serve a binding to `lora conformance --command`, one JSON message a line, in plain node.
//
// A binding is an object with the members that it has. Each takes its arguments as one object with
// their names, and returns a value or a promise of it; an exception is a refusal. Values are
// numbers, strings, booleans, null, arrays, Maps, Buffers, NdArrays and Records.

import readline from "node:readline";

const PROTOCOL = 1;
const TYPED = { float32: Float32Array, float64: Float64Array };

/** Thrown for what lies outside of the implementation: neither an answer nor a refusal. */
export class Lacks extends Error {}

/** An array in row-major order: `data` is a Float32Array or a Float64Array. */
export class NdArray {
  constructor(dtype, shape, data) {
    Object.assign(this, { dtype, shape, data });
  }
}

/** A card, pair or term: `new Record("pair", { A, B, scaling })`. */
export class Record {
  constructor(kind, fields) {
    Object.assign(this, fields);
    Object.defineProperty(this, "kind", { value: kind }); // not one of the fields
  }
}

function encode(value, refer) {
  if (typeof value === "number" && (!Number.isFinite(value) || Object.is(value, -0))) {
    const names = new Map([[Infinity, "inf"], [-Infinity, "-inf"], [0, "-0.0"]]);
    return { float: names.get(value) ?? "nan" };
  }
  if (value === null || ["number", "string", "boolean"].includes(typeof value)) return value;
  if (Array.isArray(value)) return value.map((item) => encode(item, refer));
  if (Buffer.isBuffer(value)) return { bytes: value.toString("base64") };
  if (value instanceof Map) {
    return { map: [...value].map(([key, item]) => [encode(key, refer), encode(item, refer)]) };
  }
  if (value instanceof NdArray) {
    const { buffer, byteOffset, byteLength } = value.data;
    const data = Buffer.from(buffer, byteOffset, byteLength).toString("base64");
    return { array: { dtype: value.dtype, shape: value.shape, data } };
  }
  if (value instanceof Record) {
    const fields = Object.entries(value).map(([name, field]) => [name, encode(field, refer)]);
    return { [value.kind]: Object.fromEntries(fields) };
  }
  return refer(value);
}

function decode(value, callback) {
  if (Array.isArray(value)) return value.map((item) => decode(item, callback));
  if (value === null || typeof value !== "object") return value;
  const [[kind, content]] = Object.entries(value);
  if (kind === "float") return content === "nan" ? NaN : Number(content.replace("inf", "Infinity"));
  if (kind === "bytes") return Buffer.from(content, "base64");
  if (kind === "json") return content; // the text of a card's metadata, to be kept as it is
  if (kind === "callback") return callback(content);
  if (kind === "map") return new Map(content.map((pair) => decode(pair, callback)));
  if (kind === "array") {
    if (!(content.dtype in TYPED)) throw new Lacks(`no ${content.dtype}`);
    const bytes = new Uint8Array(Buffer.from(content.data, "base64")); // aligned: a copy
    return new NdArray(content.dtype, content.shape, new TYPED[content.dtype](bytes.buffer));
  }
  const fields = Object.entries(content).map(([name, field]) => [name, decode(field, callback)]);
  return new Record(kind, Object.fromEntries(fields));
}

/** Answer the calls that arrive until the suite ends the input. */
export async function serve(binding, { name, version, ...declared }) {
  console.log = console.error; // standard output is for messages
  const lines = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();
  const say = (message) => process.stdout.write(JSON.stringify(message) + "\n");
  const objects = new Map([[0, binding]]);
  let handle = 0;
  const refer = (object) => {
    objects.set(++handle, object);
    return { handle };
  };
  say({ hello: { protocol: PROTOCOL, name, version, members: Object.keys(binding), ...declared } });
  for (let line = await lines.next(); !line.done; line = await lines.next()) {
    const { id, call, on, args, free } = JSON.parse(line.value);
    free.forEach((number) => objects.delete(number));
    const callback = (number) => async (...values) => {
      say({ callback: number, args: encode(values, refer) });
      const reply = JSON.parse((await lines.next()).value);
      if ("refused" in reply) throw new Error(reply.refused);
      return decode(reply.ok, callback);
    };
    try {
      const named = Object.entries(args).map(([key, value]) => [key, decode(value, callback)]);
      const result = await objects.get(on)[call](Object.fromEntries(named));
      say({ id, ok: encode(result, refer) });
    } catch (error) {
      const place = error.stack?.match(/[^/]+:\d+:\d+/)?.[0] ?? "";
      const refused = { refused: `${error.name}: ${error.message}`, place };
      say({ id, ...(error instanceof Lacks ? { lacks: error.message } : refused) });
    }
  }
  process.exit();
}
