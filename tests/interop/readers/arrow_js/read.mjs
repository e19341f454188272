// Read card files with Apache Arrow JS alone and print, as JSON, what is in each.

import { tableFromIPC } from "apache-arrow";
import { readFileSync } from "node:fs";

const FIELDS = ["format", "name", "rank", "alpha", "targets", "dtype", "metadata", "base_model", "base_fingerprint"];

function factor(column, row) {
  const { data, shape } = column.get(row);
  const { buffer, byteOffset, byteLength } = data.toArray();
  return [[...shape], Buffer.from(buffer, byteOffset, byteLength).toString("hex")];
}

function read(path) {
  const table = tableFromIPC(readFileSync(path));
  const own = Object.fromEntries(FIELDS.map((field) => [field, table.schema.metadata.get(`lora.${field}`)]));
  const [module, scaling, A, B] = ["module", "scaling", "A", "B"].map((name) => table.getChild(name));
  const rows = [...Array(table.numRows).keys()];
  const tensors = table.schema.fields.filter(({ name }) => name === "A" || name === "B");
  return {
    name: own.name,
    rank: Number(own.rank),
    alpha: Number(own.alpha),
    target_modules: JSON.parse(own.targets),
    dtype: own.dtype,
    metadata: JSON.parse(own.metadata),
    extra: Object.fromEntries([...table.schema.metadata].filter(([key]) => !FIELDS.includes(key.replace("lora.", "")))),
    modules: Object.fromEntries(
      rows.map((row) => [module.get(row), { scaling: scaling.get(row), A: factor(A, row), B: factor(B, row) }]),
    ),
    extensions: tensors.map(({ metadata }) => metadata.get("ARROW:extension:name")),
    stored: tensors.map(({ type }) => String(type.children[0].type.children[0].type).toLowerCase()),
  };
}

console.log(JSON.stringify(process.argv.slice(2).map(read)));
