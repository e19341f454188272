// Write a card file for each expectation, a JSON file, with Apache Arrow JS alone: FOLDER EXPECTATION…

import * as arrow from "apache-arrow";
import { readFileSync, writeFileSync } from "node:fs";

const ELEMENTS = {
  float16: [arrow.Float16, Uint16Array],
  bfloat16: [arrow.Uint16, Uint16Array],
  float32: [arrow.Float32, Float32Array],
  float64: [arrow.Float64, Float64Array],
};

function column(name, dims, pairs, dtype) {
  const [Element, Elements] = ELEMENTS[dtype];
  const bytes = pairs.map((pair) => Buffer.from(pair[name][1], "hex"));
  const element = arrow.Field.new("item", new Element());
  const number = arrow.Field.new("item", new arrow.Int32());
  const fields = [
    arrow.Field.new("data", new arrow.List(element)),
    arrow.Field.new("shape", new arrow.FixedSizeList(2, number)),
  ];
  const flat = new Elements(Uint8Array.from(Buffer.concat(bytes)).buffer);
  const offsets = [0];
  for (const part of bytes) offsets.push(offsets.at(-1) + part.length / Elements.BYTES_PER_ELEMENT);
  const children = [
    arrow.makeData({
      type: fields[0].type,
      length: pairs.length,
      nullCount: 0,
      valueOffsets: Int32Array.from(offsets),
      child: arrow.makeData({ type: element.type, length: flat.length, nullCount: 0, data: flat }),
    }),
    arrow.makeData({
      type: fields[1].type,
      length: pairs.length,
      nullCount: 0,
      child: arrow.makeData({
        type: number.type,
        length: 2 * pairs.length,
        nullCount: 0,
        data: Int32Array.from(pairs.flatMap((pair) => pair[name][0])),
      }),
    }),
  ];
  const type = new arrow.Struct(fields);
  const metadata = new Map([
    ["ARROW:extension:name", "arrow.variable_shape_tensor"],
    ["ARROW:extension:metadata", JSON.stringify({ dim_names: dims })],
  ]);
  const data = arrow.makeData({ type, length: pairs.length, nullCount: 0, children });
  return [new arrow.Field(name, type, false, metadata), data];
}

const [folder, ...paths] = process.argv.slice(2);
for (const [index, path] of paths.entries()) {
  const card = JSON.parse(readFileSync(path, "utf8"));
  const pairs = Object.values(card.modules);
  const columns = [
    [
      new arrow.Field("module", new arrow.Utf8(), false),
      arrow.vectorFromArray(Object.keys(card.modules), new arrow.Utf8()).data[0],
    ],
    [
      new arrow.Field("scaling", new arrow.Float64(), false),
      arrow.makeData({
        type: new arrow.Float64(),
        length: pairs.length,
        nullCount: 0,
        data: Float64Array.from(pairs.map(({ scaling }) => scaling)),
      }),
    ],
    column("A", ["in", "rank"], pairs, card.dtype),
    column("B", ["rank", "out"], pairs, card.dtype),
  ];
  const own = {
    format: "1.0",
    name: card.name,
    rank: String(card.rank),
    alpha: String(card.alpha),
    targets: JSON.stringify(card.target_modules),
    dtype: card.dtype,
    metadata: JSON.stringify(card.metadata),
  };
  const texts = Object.entries(own).map(([key, text]) => [`lora.${key}`, text]);
  const schema = new arrow.Schema(
    columns.map(([field]) => field),
    new Map([...texts, ...Object.entries(card.extra)]),
  );
  const type = new arrow.Struct(schema.fields);
  const data = arrow.makeData({ type, length: pairs.length, nullCount: 0, children: columns.map(([, data]) => data) });
  const batch = new arrow.RecordBatch(schema, data);
  writeFileSync(`${folder}/${index}.lora.arrow`, arrow.tableToIPC(new arrow.Table(schema, [batch]), "file"));
}
