// Reads a release from a registry and runs its ONNX engines: in a browser with onnxruntime-web, in Node with
// onnxruntime-node. Every byte that comes is compared with its digest before it is used.

import {checkChannel, checkFiles} from "./trust.mjs";

const RELEASE = "application/vnd.exportyard.release.v1";
const TITLE = "org.opencontainers.image.title";
const REF = "org.opencontainers.image.ref.name";

/**
 * A release in a registry: `ref` is a version ("1.2.0") or a channel ("prod"); without it, the newest version.
 *
 * With `key` (of `publicKey` in trust.mjs) the release, and the channel, must be signed with it. `serials` remembers what
 * a channel has said, with `get(name)` and `set(name, number)`, so that nobody can turn it back. `progress(done, total)`
 * is told about each download, in bytes.
 */
export async function fromRegistry(registry, recipe, ref, {key, serials, progress = () => {}} = {}) {
  const base = `${String(registry).replace(/\/+$/, "")}/${recipe}`;
  const blob = (descriptor) => fetchBlob(base, descriptor, progress);
  const index = parse(await fetchBytes(`${base}/index.json`, {cache: "no-cache"}));
  const chosen = choose(index.manifests, recipe, ref);
  if (key && note(chosen, "channel")) await checkedChannel(chosen, recipe, key, serials, blob);
  const parts = parse(await blob(chosen)).manifests;
  const common = parse(await blob(parts.find((part) => note(part, "part") === "release")));
  const layers = new Map(common.layers.map((layer) => [layer.annotations[TITLE], layer]));
  const manifest = parse(await blob(layers.get("manifest.json")));
  const [found, wanted] = [`${manifest.recipe} v${manifest.version}`, `${recipe} v${note(chosen, "version")}`];
  if (found !== wanted) throw new Error(`the registry gives ${found} for ${wanted}`);
  if (key) {
    if (!layers.has("signature.json")) throw new Error(`${found} is not signed`);
    const beside = [...layers].map(([path, {digest}]) => [path, digest.replace("sha256:", "")]);
    await checkFiles(parse(await blob(layers.get("signature.json"))), key, signedDigests(manifest, beside));
  }
  return new Release(manifest, (file) => blob({digest: `sha256:${file.sha256}`, size: file.size_bytes}));
}

/** What must have been signed: a digest for each path of the manifest, and for what lies beside it. */
export function signedDigests(manifest, beside) {
  const files = Object.values(manifest.engines).flatMap((engine) => engine.files);
  const listed = [...files, manifest.golden.file].map((file) => [file.path, file.sha256]);
  return Object.fromEntries([...beside.filter(([path]) => path !== "signature.json"), ...listed]);
}

async function checkedChannel(entry, recipe, key, serials, blob) {
  const [channel, version, statement] = ["channel", "version", "statement"].map((name) => note(entry, name));
  const name = `${recipe}#${channel}`;
  if (!statement) throw new Error(`${name} is not signed`);
  const envelope = parse(await blob({digest: statement}));
  const serial = await checkChannel(envelope, key, {recipe, channel, version, digest: entry.digest});
  const before = Number(serials?.get(name) ?? 0);
  if (serial < before) throw new Error(`${name} was turned back: ${before} was seen here, the registry gives ${serial}`);
  serials?.set(name, serial);
}

function note(entry, name) {
  return entry.annotations?.[`dev.exportyard.${name}`];
}

/** What `ref` means in a registry's index. */
export function choose(entries, recipe, ref) {
  const releases = entries.filter((entry) => entry.artifactType === RELEASE);
  if (ref) {
    const found = releases.find((entry) => [ref, `v${ref}`].includes(entry.annotations?.[REF]));
    if (found) return found;
    const known = releases.map((entry) => entry.annotations?.[REF]).join(", ");
    throw new Error(`${recipe} has no version or channel "${ref}"; it has ${known || "none"}`);
  }
  const versions = releases.filter((entry) => !note(entry, "channel") && !note(entry, "withdrawn"));
  if (versions.length === 0) throw new Error(`${recipe} has no release here`);
  const numbers = (entry) => note(entry, "version").split(".").map(Number);
  const order = (a, b) => a.map((number, place) => number - b[place]).find((gap) => gap !== 0) ?? 0;
  return versions.reduce((best, entry) => (order(numbers(entry), numbers(best)) > 0 ? entry : best));
}

export class Release {
  /** `read` gets the bytes of a file of the manifest. */
  constructor(manifest, read) {
    this.manifest = manifest;
    this.read = read;
  }

  /** Targets with an engine for ONNX Runtime that `suits(row, engine)` takes; fp32 first. */
  targets(suits) {
    const found = Object.entries(this.manifest.engines).filter(
      ([, engine]) => engine.target.backend === "onnxruntime" && suits(engine.target, engine),
    );
    const rank = ([, engine]) => (engine.scheme === "fp32" ? 0 : 1);
    return found.sort((a, b) => rank(a) - rank(b)).map(([name]) => name);
  }

  /** The engine of a target, loaded. `ort` is the module onnxruntime-web or onnxruntime-node. */
  async engine(ort, target, options = {}) {
    const entry = this.manifest.engines[target];
    if (entry?.target.backend !== "onnxruntime") {
      throw new Error(`the release has no engine of ONNX Runtime for "${target}"`);
    }
    const all = {sizes: {}, files: entry.files.map((file) => file.path)};
    const parts = [];
    for (const {sizes, files} of entry.selector?.buckets ?? [all]) {
      const wanted = entry.files.filter((file) => files.includes(file.path) && !file.path.endsWith(".json"));
      const models = wanted.filter((file) => /\.(onnx|ort)$/.test(file.path));
      const externalData = [];
      for (const file of wanted.filter((one) => one.path.endsWith(".data"))) {
        externalData.push({path: file.path.split("/").pop(), data: await this.read(file)});
      }
      const settings = {...options};
      // such a graph is laid out for its CPU already; another one gets its layout as it is loaded
      if (entry.target.options.optimization === "all") settings.graphOptimizationLevel = "disabled";
      if (externalData.length) settings.externalData = externalData;
      parts.push({sizes, session: await ort.InferenceSession.create(await this.read(models[0]), settings)});
    }
    return new Engine(this, ort, target, entry, parts);
  }

  /** The golden cases: name, axis sizes, inputs and the outputs that eager PyTorch gave. */
  async golden() {
    const tensors = readSafetensors(await this.read(this.manifest.golden.file));
    const {inputs, outputs} = this.manifest.signature;
    return Object.entries(this.manifest.golden.cases).map(([name, sizes]) => ({
      name,
      sizes,
      inputs: Object.fromEntries(inputs.map((spec) => [spec.name, tensors[`${name}/in/${spec.name}`]])),
      outputs: Object.fromEntries(outputs.map((spec) => [spec.name, tensors[`${name}/out/${spec.name}`]])),
    }));
  }
}

export class Engine {
  constructor(release, ort, target, entry, parts) {
    Object.assign(this, {release, ort, target, entry, parts});
  }

  /** Run it on `{name: {type, dims, data}}`; the answer has the same form. */
  async run(feeds) {
    const {inputs, outputs} = this.release.manifest.signature;
    const sizes = {};
    for (const spec of inputs) spec.shape.forEach((dim, place) => (sizes[dim] = feeds[spec.name].dims[place]));
    const part = this.parts.find((one) => Object.entries(one.sizes).every(([axis, size]) => sizes[axis] <= size));
    if (!part) throw new Error(`the engine has no bucket for ${JSON.stringify(sizes)}`);
    const tensors = {};
    for (const spec of inputs) {
      const shape = spec.shape.map((dim) => part.sizes[dim] ?? sizes[dim]);
      const whole = resized(feeds[spec.name], shape);
      tensors[spec.name] = new this.ort.Tensor(whole.type, whole.data, whole.dims);
    }
    const made = await part.session.run(tensors);
    const answer = {};
    for (const spec of outputs) {
      const {type, dims, data} = made[spec.name];
      const cut = spec.shape.map((dim, place) => sizes[dim] ?? dims[place]);
      answer[spec.name] = resized({type, dims, data}, cut);
    }
    return answer;
  }

  /** Whether the engine serves these axis sizes. */
  serves(sizes) {
    const {axes} = this.entry.selector ?? this.release.manifest.signature;
    return Object.entries(sizes).every(([name, size]) => axes[name].min <= size && size <= axes[name].max);
  }

  /** Run the golden cases; a row for each output of each: `{name, output, words, good}`. */
  async check() {
    const rows = [];
    for (const one of (await this.release.golden()).filter(({sizes}) => this.serves(sizes))) {
      const made = await this.run(one.inputs);
      for (const [output, want] of Object.entries(one.outputs)) {
        rows.push({name: one.name, output, ...compared(made[output], want, this.entry.golden[output])});
      }
    }
    return rows;
  }
}

/** How far `got` is from `want`, in words, and whether the bound holds. A NaN is too far from anything. */
export function compared(got, want, bound) {
  if (got.type !== want.type || String(got.dims) !== String(want.dims)) {
    return {words: `is ${got.type}[${got.dims}], expected ${want.type}[${want.dims}]`, good: false};
  }
  const pairs = Array.from(want.data, (value, place) => [value, got.data[place]]);
  if (bound.argmax_agreement !== undefined) {
    const share = pairs.filter(([a, b]) => a === b).length / pairs.length;
    const words = `${share.toFixed(4)} equal, at least ${bound.argmax_agreement.toFixed(4)} expected`;
    return {words, good: share >= bound.argmax_agreement};
  }
  const gaps = pairs.map(([a, b]) => (a === b ? 0 : Math.abs(Number(a) - Number(b))));
  const worst = gaps.reduce((most, gap) => (gap > most || Number.isNaN(gap) ? gap : most), 0);
  const words = `differs by ${worst.toExponential(1)}, ${bound.max_abs.toExponential(1)} allowed`;
  return {words, good: worst <= bound.max_abs};
}

/** A tensor with zeros behind its numbers, or with only the first of them, in each dimension. */
function resized(tensor, dims) {
  if (String(tensor.dims) === String(dims)) return tensor;
  const count = dims.reduce((product, size) => product * size, 1);
  const data = new tensor.data.constructor(count);
  const row = Math.min(tensor.dims.at(-1), dims.at(-1));
  const rows = tensor.dims.slice(0, -1).map((size, place) => Math.min(size, dims[place]));
  const at = rows.map(() => 0);
  for (let left = rows.reduce((product, size) => product * size, 1); left > 0; left--) {
    const place = (shape) => at.reduce((sum, index, axis) => sum * shape[axis] + index, 0) * shape.at(-1);
    data.set(tensor.data.subarray(place(tensor.dims), place(tensor.dims) + row), place(dims));
    for (let axis = at.length - 1; axis >= 0 && ++at[axis] === rows[axis]; axis--) at[axis] = 0;
  }
  return {type: tensor.type, dims, data};
}

const TYPES = {
  F64: ["float64", Float64Array],
  F32: ["float32", Float32Array],
  I64: ["int64", BigInt64Array],
  I32: ["int32", Int32Array],
  I16: ["int16", Int16Array],
  I8: ["int8", Int8Array],
  U8: ["uint8", Uint8Array],
  BOOL: ["bool", Uint8Array],
};

/** Tensors by name: 8 bytes with the header's length, the header in JSON, the numbers. */
export function readSafetensors(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const start = 8 + Number(view.getBigUint64(0, true));
  const header = parse(bytes.subarray(8, start));
  const tensors = {};
  for (const [name, {dtype, shape, data_offsets: [from, to]}] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    if (!TYPES[dtype]) throw new Error(`${name} is ${dtype}, for which there is no array here`);
    const [type, Kind] = TYPES[dtype];
    const data = new Kind(new Uint8Array(bytes.subarray(start + from, start + to)).buffer); // a copy is aligned
    tensors[name] = {type, dims: shape, data};
  }
  return tensors;
}

async function fetchBlob(base, descriptor, progress) {
  const wanted = descriptor.digest.replace("sha256:", "");
  const bytes = await fetchBytes(`${base}/blobs/sha256/${wanted}`, {}, descriptor.size, progress);
  await verify(bytes, wanted, descriptor.size ?? bytes.length, `blob ${wanted.slice(0, 12)}`);
  return bytes;
}

/** Throw unless `bytes` are those that were published. */
export async function verify(bytes, sha256, size, what) {
  if (bytes.length !== size) throw new Error(`${what} has ${bytes.length} bytes, expected ${size}`);
  if ((await digestOf(bytes)) !== sha256) {
    throw new Error(`${what} has other bytes than were published (sha256 differs)`);
  }
}

/** sha256 in hex. */
export async function digestOf(bytes) {
  const found = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(found, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function fetchBytes(url, options, size = 0, progress = () => {}) {
  const answer = await fetch(url, options).catch((error) => {
    throw new Error(`${url}: ${error.cause?.message ?? error.message}`);
  });
  if (!answer.ok) throw new Error(`${url}: ${answer.status} ${answer.statusText}`);
  const reader = answer.body.getReader();
  const chunks = [];
  let length = 0;
  for (let {done, value} = await reader.read(); !done; {done, value} = await reader.read()) {
    chunks.push(value);
    length += value.length;
    progress(length, size);
  }
  const bytes = new Uint8Array(length);
  let at = 0;
  for (const chunk of chunks) {
    bytes.set(chunk, at);
    at += chunk.length;
  }
  return bytes;
}

function parse(bytes) {
  return JSON.parse(new TextDecoder().decode(bytes));
}
